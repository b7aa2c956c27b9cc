"""AutoMeanField: direct draws, exact perturbations, and the autoguide interface."""

import copy
import functools
import io
import pickle

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, JitTrace_ELBO, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch.distributions import biject_to

from pyro_flipout import FlipoutWarning, flipout, symmetric_center
from pyro_flipout.infer import AutoMeanField, _common_draw
from pyro_flipout.symmetric import symmetric_delta
from tests.helpers import Recording, Regression, Z, check_network, mlp, randomize
from tests.poutine.test_estimator import bonferroni, discrepancy

FAMILIES = {
    "Normal": dist.Normal,
    "Laplace": dist.Laplace,
    "StudentT": functools.partial(dist.StudentT, 5.0),
    "Logistic": dist.Logistic,
}
SHAPES = {"0.weight": (4, 3), "0.bias": (4,), "2.weight": (2, 4), "2.bias": (2,)}


def setup(sizes=(3, 4, 2), batch=24, **options):
    model = Regression(mlp(sizes), scale=1.0)
    x = torch.randn(batch, sizes[0])
    y = 3 * x[:, : sizes[-1]]
    guide = AutoMeanField(model, **{"init_scale": 0.3, **options})
    guide(x, y)
    return model, randomize(guide, 0.2), x, y


def weights(guide):
    """A model with the given guide's sites, as (name, loc, scale)."""
    return [(name, *guide.loc_and_scale(name)) for name in guide.median()]


# ------------------------------------------------------------------------- draws


@pytest.mark.parametrize("family", FAMILIES)
def test_one_draw_for_all_sites(family):
    _, guide, x, y = setup(family=FAMILIES[family])
    standard = FAMILIES[family](torch.zeros(()), torch.ones(()))
    pyro.set_rng_seed(7)
    trace = poutine.trace(guide).get_trace(x, y)
    pyro.set_rng_seed(7)
    size = guide.loc.numel()
    noise = torch.randn(size) if family == "Normal" else standard.rsample((1, size))[0]
    start = 0
    for name, loc, scale in weights(guide):
        node = trace.nodes[name]
        part = noise[start : start + loc.numel()].view(loc.shape)
        assert torch.equal(node["value"], loc + scale * part)
        assert torch.equal(symmetric_delta(node["fn"], node["value"]), scale * part)
        assert torch.equal(symmetric_center(node["fn"]), loc)
        assert node["fn"].event_shape == loc.shape
        start += loc.numel()
    assert start == size == sum(torch.Size(s).numel() for s in SHAPES.values())


def test_parameters_are_one_loc_and_one_scale():
    _, guide, x, y = setup()
    assert [n for n, _ in guide.named_parameters()] == ["loc_unconstrained", "scale_unconstrained"]
    assert set(poutine.trace(guide).get_trace(x, y).param_nodes) == {
        "AutoMeanField.loc",
        "AutoMeanField.scale",
    }
    assert (guide.scale > 0).all()


def test_two_draws_differ():
    _, guide, x, y = setup()
    a, b = guide(x, y), guide(x, y)
    assert not any((a[n] == b[n]).any() for n in a)


def test_the_draw_is_given_away_once():
    _, guide, x, y = setup()
    node = poutine.trace(guide).get_trace(x, y).nodes["net.0.weight"]
    value, fn = node["value"], node["fn"]
    again, many = fn.rsample(), fn.rsample((10,))
    assert not torch.equal(again, value)
    assert many.shape == (10, 4, 3)
    assert not torch.equal(many[0], many[1])
    assert not any(torch.equal(draw, value) or torch.equal(draw, again) for draw in many)


def test_delta_is_that_of_exactly_this_value():
    fn = dist.Normal(torch.zeros(3), torch.ones(3))
    assert symmetric_delta(fn, fn.rsample()) is None
    _, guide, x, y = setup()
    node = poutine.trace(guide).get_trace(x, y).nodes["net.0.weight"]
    value, fn = node["value"], node["fn"]
    assert symmetric_delta(fn, value) is not None
    assert symmetric_delta(fn.mask(torch.tensor(True)), value) is not None
    assert symmetric_delta(fn, value.clone()) is None
    fn.rsample()
    assert symmetric_delta(fn, value) is None


@pytest.mark.parametrize("family", ["Normal", "Laplace", "StudentT"])
def test_log_prob_and_its_gradient_are_the_family_s(family):
    _, guide, x, y = setup(family=FAMILIES[family])
    for kept in (True, False):
        pyro.set_rng_seed(7)
        fn = poutine.trace(guide).get_trace(x, y).nodes["net.0.weight"]["fn"]
        value = fn.base_dist.loc + fn.base_dist.scale * torch.randn(4, 3)
        if not kept:
            fn = FAMILIES[family](fn.base_dist.loc, fn.base_dist.scale).to_event(2)
        guide.zero_grad()
        log_prob = fn.log_prob(value)
        log_prob.backward()
        result = log_prob, *[p.grad.clone() for p in guide.parameters()]
        if kept:
            expected = result
    assert all(map(torch.equal, result, expected))
    # The path through the value cancels that through loc; scale has -1/scale left.
    assert expected[1].abs().max() < 1e-5
    assert expected[2].abs().max() > 0.1


# --------------------------------------------------------------- with the handler


@pytest.mark.parametrize("family", ["Normal", "Laplace", "StudentT"])
def test_network(family, float64):
    guide_class = functools.partial(AutoMeanField, family=FAMILIES[family])
    check_network(mlp((3, 4, 2)), guide_class, torch.randn(6, 3))


@pytest.mark.parametrize(
    ("family", "elbo"), [("Normal", TraceMeanField_ELBO()), ("StudentT", Trace_ELBO())]
)
def test_gradients_are_unbiased_and_vary_less(family, elbo):
    model, guide, x, y = setup(family=FAMILIES[family])
    z, shared, flipped = discrepancy(model, flipout(model), guide, (x, y), elbo, 200)
    assert z < bonferroni(shared.numel())
    assert flipped.sum() < shared.sum()


@pytest.mark.parametrize("form", ["both", "context", "guide of it"])
def test_forms_of_the_handler_agree(form):
    model, guide, x, y = setup()
    pyro.set_rng_seed(1)
    expected = Trace_ELBO().loss(flipout(model), guide, x, y)
    pyro.set_rng_seed(1)
    if form == "guide of it":
        pyro.clear_param_store()
        other = AutoMeanField(flipout(model))
        other(x, y)
        other.load_state_dict(guide.state_dict())
        pyro.set_rng_seed(1)
        assert Trace_ELBO().loss(flipout(model), other, x, y) == expected
    elif form == "both":
        assert Trace_ELBO().loss(flipout(model), flipout(guide), x, y) == expected
    else:
        with flipout():
            assert Trace_ELBO().loss(model, guide, x, y) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_cancellation(dtype):
    """With abs(loc) so large that value == loc, delta is what it was and so are gradients."""
    shape, big, small = (2, 3), 2.0**20, 2.0**-10

    def model(x):
        prior = dist.Normal(torch.zeros(shape, dtype=dtype), 1.0).to_event(2)
        w = pyro.sample("w", prior)
        return torch.nn.functional.linear(x, w)

    guide = AutoMeanField(
        model, init_loc_fn=lambda site: torch.full(shape, big, dtype=dtype), init_scale=small
    )
    x = torch.eye(3, dtype=dtype)
    trace = poutine.trace(guide).get_trace(x)
    handler = Recording()
    poutine.replay(handler(model), trace=trace)(x)
    w = handler.seen["w"]
    value = trace.nodes["w"]["value"]
    assert torch.equal(value, torch.full_like(value, big))
    (delta,) = [term.delta for term in w.terms] if hasattr(w, "terms") else [w.delta]
    assert (delta != 0).all()
    assert (delta.abs() < 8 * small).all()
    # One path to loc, one to scale.
    (loc_grad,) = torch.autograd.grad(delta.sum(), guide.loc, retain_graph=True, allow_unused=True)
    assert loc_grad is None
    (grad,) = torch.autograd.grad(delta.sum(), guide.scale_unconstrained)
    assert (grad != 0).all()


def test_marks_on_the_model_s_sites_count():
    def model(x):
        for name, mark in {"a": False, "b": True, "c": None}.items():
            prior = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
            infer = {} if mark is None else {"flipout": mark}
            x = x * pyro.sample(name, prior, infer=infer)
        return x

    x = torch.randn(5, 3)
    handler = Recording()
    trace = poutine.trace(AutoMeanField(model)).get_trace(x)
    poutine.replay(handler(model), trace=trace)(x)
    assert set(handler.seen) == {"b", "c"}


def together(loc, scale, eps):
    """Locations, scales, perturbations and values of the sites, by the common node."""
    return _common_draw._together(
        loc, scale, eps, [torch.Size((2, 2)), torch.Size(()), torch.Size((3,))]
    )


def one_by_one(loc, scale, eps):
    parts = [torch.split(t, [4, 1, 3]) for t in (loc, scale, eps)]
    out = []
    for center, spread, noise in zip(*parts, strict=True):
        shape = {4: (2, 2), 1: (), 3: (3,)}[len(center)]
        delta = spread * noise
        out += [t.view(shape) for t in (center, spread, delta, center + delta, center)]
    return out


FLAT = [torch.linspace(a, b, 8, dtype=torch.float64) for a, b in ((-1, 2), (0.1, 0.8), (1.5, -1))]


@pytest.mark.parametrize("learned", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    "used", ["all", "loc", "scale", "delta", "value", "delta and value", "center"]
)
def test_gradients_of_the_common_draw(used, learned):
    names = ["loc", "scale", "delta", "value", "center"]
    wanted = range(15) if used == "all" else [i for i in range(15) if names[i % 5] in used][1:]
    found = []
    for fn in (together, one_by_one):
        leaves = [t.clone().requires_grad_(wish) for t, wish in zip(FLAT, learned, strict=False)]
        out = fn(*leaves, FLAT[2])
        total = sum((k + 1) * out[i].sin().sum() for k, i in enumerate(wanted))
        leaves = [t for t in leaves if t.requires_grad]
        if not total.requires_grad:  # of one_by_one: locations alone do not depend on scales
            assert found == [(None, None)]
            return
        grads = [
            torch.autograd.grad(total, leaves, create_graph=again, allow_unused=True)
            for again in (True, False)
        ]
        found.append(grads[0] + grads[1])
    for ours, expected in zip(*found, strict=True):
        assert (ours is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(ours, expected)


def test_second_derivatives_of_the_common_draw():
    leaves = [t.clone().requires_grad_() for t in FLAT[:2]]

    def fn(loc, scale):
        return tuple(t.sin() for t in together(loc, scale, FLAT[2]))

    assert torch.autograd.gradcheck(fn, leaves)
    assert torch.autograd.gradgradcheck(fn, leaves)


def test_the_common_draw_is_one_node_and_the_sites_are_apart():
    """What autograd joins is not what one site's distribution depends on."""
    model, guide, x, y = setup()
    trace = poutine.trace(guide).get_trace(x, y)
    names = [f"net.{name}" for name in SHAPES]
    assert len({trace.nodes[name]["value"].grad_fn for name in names}) == 1
    handler = Recording(on_missing_rule="error")
    poutine.replay(handler(model), trace=trace)(x)
    assert set(handler.seen) == set(names)


@pytest.mark.parametrize("more", ["site", "guide"])
def test_what_a_larger_guide_makes_of_the_common_draw_is_seen(more):
    """Sites drawn at once are independent, but others may depend on them."""
    model, inner, x, _ = setup()

    def larger(x):
        v = pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        return model(x) + v[0]

    def guide(x, y=None):
        first = inner(x)["net.0.weight"][0]
        if more == "site":
            pyro.sample("v", dist.Normal(first, 0.1).to_event(1))
        else:
            other.loc = first
            other(x)

    class Other(AutoMeanField):
        """Of another name in the parameter store."""

    other = Other(lambda x: pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1)))
    other(x)
    del other.loc
    handler = Recording()
    trace = poutine.trace(guide).get_trace(x)
    with pytest.warns(FlipoutWarning, match="site 'v' depends on it"):
        poutine.replay(handler(larger), trace=trace)(x)
    assert "depends" in handler.decisions["net.0.weight"]
    assert all(handler.decisions[site].startswith("flipped") for site in ("net.0.bias", "v"))


def test_the_common_draw_serves_once():
    """Another call of the distribution is another draw."""
    _, guide, x, y = setup()
    fn = poutine.trace(guide).get_trace(x, y).nodes["net.0.weight"]["fn"]
    draws = [fn.rsample() for _ in range(3)]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])
    assert symmetric_delta(fn, draws[1]) is None
    assert symmetric_delta(fn, draws[2]) is not None


# ------------------------------------------------------------------------ particles


def test_vectorized_particles_are_independent_draws():
    _, guide, x, y = setup()
    pyro.set_rng_seed(3)
    with pyro.plate("num_particles_vectorized", 5, dim=-2):
        trace = poutine.trace(guide).get_trace(x, y)
    pyro.set_rng_seed(3)
    noise = torch.randn(5, guide.loc.numel())
    start = 0
    for name, loc, scale in weights(guide):
        node = trace.nodes[name]
        assert node["value"].shape == (5, 1, *loc.shape)
        part = noise[:, start : start + loc.numel()].view(5, 1, *loc.shape)
        assert torch.equal(symmetric_delta(node["fn"], node["value"]), scale * part)
        start += loc.numel()


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_vectorized_particles_average(elbo):
    def model(x, y):
        prior = dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2)
        w = pyro.sample("w", prior)  # (particles, 1, 2, 3) or (2, 3)
        mean = torch.nn.functional.linear(x, w) if w.dim() == 2 else x @ w.squeeze(1).mT
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    x, y = torch.randn(8, 3), torch.randn(8, 2)
    guide = AutoMeanField(model)
    guide(x, y)
    randomize(guide, 0.3)
    many = elbo(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    one = elbo()
    draws = [torch.tensor([e.loss(model, guide, x, y) for _ in range(100)]) for e in (many, one)]
    error = sum(d.var() / len(d) for d in draws).sqrt()
    assert (draws[0].mean() - draws[1].mean()).abs() / error < Z
    assert draws[0].var() < draws[1].var() / 10  # 50 times lower if particles are independent
    many.differentiable_loss(model, guide, x, y).backward()
    assert all((p.grad != 0).all() for p in guide.parameters())


# -------------------------------------------------------- constrained sites and plates


def mixed_model(x=None):
    pyro.sample("real", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("positive", dist.LogNormal(torch.tensor([0.0, 1.0]), 0.5).to_event(1))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    pyro.sample("interval", dist.Uniform(1.0, 3.0))
    pyro.sample("mvn", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    with pyro.plate("rows", 3):
        pyro.sample("row", dist.Gamma(2.0, 1.0))


def stock_twin(guide, model, *args):
    """An AutoNormal at the same locations and scales."""
    twin = AutoNormal(model, create_plates=guide.create_plates)
    twin(*args)
    with torch.no_grad():
        for name, loc, scale in weights(guide):
            dict(twin.locs.named_parameters())[f"{name}_unconstrained"].copy_(loc)
            raw = biject_to(guide.scale_constraint).inv(scale)
            dict(twin.scales.named_parameters())[f"{name}_unconstrained"].copy_(raw)
    return twin


def test_sites_with_and_without_constraints():
    guide = AutoMeanField(mixed_model)
    guide()
    randomize(guide)
    trace = poutine.trace(guide).get_trace()
    sampled = {n for n, s in trace.nodes.items() if s["type"] == "sample" and n != "rows"}
    constrained = {"positive", "simplex", "interval", "row"}
    assert sampled == {"real", "mvn"} | constrained | {f"{n}_unconstrained" for n in constrained}
    twin = stock_twin(guide, mixed_model)
    unconstrained = {}
    for name in ("real", "mvn"):
        assert isinstance(trace.nodes[name]["fn"].base_dist, dist.Normal)
        unconstrained[f"{name}_unconstrained"] = trace.nodes[name]["value"]
    for name in constrained:
        unconstrained[f"{name}_unconstrained"] = trace.nodes[f"{name}_unconstrained"]["value"]
    other = poutine.trace(poutine.condition(twin, data=unconstrained)).get_trace()
    for name in sampled - set(unconstrained):
        torch.testing.assert_close(other.nodes[name]["value"], trace.nodes[name]["value"])
    torch.testing.assert_close(other.log_prob_sum(), trace.log_prob_sum())


def test_summaries_are_those_of_auto_normal():
    guide = AutoMeanField(mixed_model)
    guide()
    randomize(guide)
    twin = stock_twin(guide, mixed_model)
    for ours, theirs in (
        (guide.median(), twin.median()),
        (guide.quantiles([0.1, 0.5, 0.8]), twin.quantiles([0.1, 0.5, 0.8])),
    ):
        assert set(ours) == set(theirs)
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name])
            assert not value.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_quantiles(family, float64):
    guide = AutoMeanField(
        lambda: pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2)),
        family=FAMILIES[family],
    )
    levels = [0.05, 0.5, 0.9]
    quantiles = guide.quantiles(levels)["w"]
    assert quantiles.shape == (3, 2, 3)
    randomize(guide)
    quantiles, (loc, scale) = guide.quantiles(levels)["w"], guide.loc_and_scale("w")
    base = FAMILIES[family](torch.tensor(0.0), torch.tensor(1.0))
    z = (quantiles - loc) / scale
    grid = torch.linspace(-400, 400, 800_001)
    step = grid[1] - grid[0]
    mass = base.log_prob(grid).exp().cumsum(0) * step
    for level, got in zip(levels, z, strict=True):
        torch.testing.assert_close(got, got.flatten()[0].expand_as(got))
        index = ((got.flatten()[0] - grid[0]) / step).round().long()
        assert abs(mass[index].item() - level) < 1e-3


def test_quantiles_of_a_decreasing_transform():
    def model():
        pyro.sample("w", dist.ImproperUniform(constraints.less_than(0.0), (), ()))

    guide = AutoMeanField(model, init_loc_fn=lambda site: torch.tensor(-1.0))
    low, high = guide.quantiles([0.1, 0.9])["w"]
    assert low < -1.0 < high < 0


def test_quantiles_of_intervals():
    low, high = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([1.0, 3.0, 5.0])

    def model():
        pyro.sample("w", dist.Uniform(low, high).to_event(1))

    guide = AutoMeanField(model)
    guide()
    found = guide.quantiles([0.1, 0.5, 0.9])["w"]
    assert found.shape == (3, 3)
    assert (low < found[0]).all()
    assert (found[0] < found[1]).all()
    assert (found[1] < found[2]).all()
    assert (found[2] < high).all()


def test_loc_and_scale_before_the_first_call():
    with pytest.raises(RuntimeError, match="call it once with the model's arguments"):
        AutoMeanField(local_model).loc_and_scale("scale")


def local_model(x, batch=None):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=batch) as index:
        with pyro.plate("features", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("v", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        pyro.sample("y", dist.Normal(z.sum(-2), 1.0), obs=x[index])


@pytest.mark.parametrize("create", [False, True])
def test_subsampled_plates(create):
    x = torch.randn(7)
    options = {}
    if create:
        index = torch.tensor([4, 1, 6])
        options["create_plates"] = lambda *_: pyro.plate("data", 7, subsample=index)
    guide = AutoMeanField(local_model, **options)
    guide(x, 3)
    assert {n: tuple(loc.shape) for n, loc, _ in weights(guide)} == {
        "scale": (),
        "z": (2, 7),
        "v": (7, 3),
        "p": (7, 2),
    }
    assert guide._noise_size == 1  # of "scale": no noise is drawn for rows that are not needed
    randomize(guide)
    trace = poutine.trace(guide).get_trace(x, 3)
    rows = trace.nodes["data"]["value"]
    assert not create or torch.equal(rows, index)
    for name, dim in {"z": 1, "v": 0}.items():
        node, (loc, scale) = trace.nodes[name], guide.loc_and_scale(name)
        center, base = symmetric_center(node["fn"]), node["fn"]
        base = getattr(base, "base_dist", base)
        assert torch.equal(center, loc.index_select(dim, rows))
        assert torch.equal(base.scale, scale.index_select(dim, rows))
        assert node["scale"] == pytest.approx(7 / 3)
        assert len(node["value"].unique()) == node["value"].numel()
    model_trace = poutine.trace(poutine.replay(local_model, trace=trace)).get_trace(x, 3)
    assert model_trace.log_prob_sum().isfinite()
    # log q is AutoNormal's on the same rows.
    twin = stock_twin(guide, local_model, x, 3)
    data = {f"{n}_unconstrained": trace.nodes[n]["value"] for n in ("z", "v")}
    data |= {
        f"{n}_unconstrained": trace.nodes[f"{n}_unconstrained"]["value"] for n in ("scale", "p")
    }
    data["data"] = rows
    other = poutine.trace(poutine.condition(twin, data=data)).get_trace(x, 3)
    torch.testing.assert_close(trace.log_prob_sum(), other.log_prob_sum())


def test_gradients_of_a_subsample_are_those_of_its_rows():
    x = torch.randn(7)
    guide = AutoMeanField(local_model)
    guide(x, 3)
    trace = poutine.trace(guide).get_trace(x, 3)
    trace.nodes["v"]["value"].sum().backward()
    start = 1 + 2 * 7  # after "scale" and "z"
    touched = guide.loc.grad[start : start + 21].view(7, 3).any(1).nonzero().squeeze(1)
    assert torch.equal(touched, trace.nodes["data"]["value"].sort().values)
    SVI(local_model, guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO()).step(x, 3)


def test_sequential_plates_are_refused():
    def model():
        for i in pyro.plate("data", 2):
            pyro.sample(f"w{i}", dist.Normal(0.0, 1.0))

    with pytest.raises(NotImplementedError, match="sequential pyro.plate"):
        AutoMeanField(model)()


# ------------------------------------------------------------------------- interface


def test_guide_list():
    model, _, x, y = setup()
    guide = AutoGuideList(model)
    first = poutine.block(model, expose=["net.0.weight", "net.0.bias"])
    rest = poutine.block(model, hide=["net.0.weight", "net.0.bias"])
    guide.append(AutoMeanField(first))
    guide.append(AutoMeanField(rest, family=dist.Laplace))
    svi = SVI(flipout(model), guide, pyro.optim.Adam({"lr": 0.05}), TraceMeanField_ELBO())
    losses = [svi.step(x, y) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    sites = {f"net.{n}": s for n, s in SHAPES.items()}
    assert {n: tuple(v.shape) for n, v in guide.median().items()} == sites
    assert all(v.shape == (2, *sites[n]) for n, v in guide.quantiles([0.1, 0.9]).items())
    handler = Recording()
    Trace_ELBO().loss(handler(model), guide, x, y)
    assert set(handler.seen) == set(sites)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel):
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        mean = (x * (w.unsqueeze(-2) if w.dim() > 1 else w)).sum(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, scale))

    x = torch.randn(4, 3)
    guide = AutoMeanField(model)
    guide(x)
    randomize(guide)
    predictive = Predictive(flipout(model), guide=guide, num_samples=6, parallel=parallel)
    draws = predictive(x)
    assert draws["y"].squeeze().shape == (6, 4)
    assert draws["w"].squeeze().shape == (6, 3)
    assert len(draws["w"].unique()) == 18
    assert len(draws["scale"].unique()) == 6
    # The same under the bare model: the handler is not in the way.
    pyro.set_rng_seed(2)
    flipped = predictive(x)
    pyro.set_rng_seed(2)
    bare = Predictive(model, guide=guide, num_samples=6, parallel=parallel)(x)
    assert all(torch.equal(flipped[n], bare[n]) for n in bare)


@pytest.mark.parametrize("learn_scale", [True, False])
@pytest.mark.parametrize("local", [True, False])
def test_elbo_module(learn_scale, local):
    with pyro.settings.context(module_local_params=local):
        model, guide, x, y = setup(learn_scale=learn_scale)
        elbo = TraceMeanField_ELBO()(flipout(model), guide)
        elbo(x, y)
        names = {n for n, _ in elbo.named_parameters()}
        expected = {"guide.loc_unconstrained", "guide.scale_unconstrained"}
        assert names == (expected if learn_scale else {"guide.loc_unconstrained"})
        optim = torch.optim.Adam(elbo.parameters(), 0.05)
        losses = []
        for _ in range(40):
            optim.zero_grad()
            loss = elbo(x, y)
            loss.backward()
            optim.step()
            losses.append(loss.item())
    assert sum(losses[-10:]) < sum(losses[:10])


def test_fixed_scale():
    model, guide, x, y = setup(learn_scale=False, init_scale=0.25)
    assert set(guide.state_dict()) == {"loc_unconstrained", "scale"}
    svi = SVI(flipout(model), guide, pyro.optim.Adam({"lr": 0.05}), TraceMeanField_ELBO())
    before = guide.loc.clone()
    svi.step(x, y)
    assert (guide.scale == 0.25).all()
    assert (guide.loc != before).all()


def test_initialisation_by_site():
    model, _, x, y = setup()
    pyro.clear_param_store()  # a guide of the same name takes what it finds there
    start = {f"net.{n}": torch.randn(s) for n, s in SHAPES.items()}
    guide = AutoMeanField(
        model,
        init_loc_fn=lambda site: start[site["name"]],
        init_scale=lambda site: 0.1 + site["value"].abs() if "weight" in site["name"] else 0.5,
    )
    guide(x, y)
    for name, loc, scale in weights(guide):
        assert torch.equal(loc, start[name])
        wanted = 0.1 + loc.abs() if "weight" in name else torch.full_like(loc, 0.5)
        torch.testing.assert_close(scale, wanted)


def test_copies():
    _, guide, x, y = setup()
    state = guide.state_dict()
    buffer = io.BytesIO()
    torch.save(guide, buffer)
    buffer.seek(0)
    pyro.clear_param_store()  # which would override what is loaded
    loaded = torch.load(buffer, weights_only=False)
    copied = copy.deepcopy(guide)
    fresh = AutoMeanField(Regression(mlp((3, 4, 2)), scale=1.0))
    fresh(x, y)
    fresh.load_state_dict(state)
    for other in (loaded, copied, fresh):
        pyro.clear_param_store()
        assert all(
            torch.equal(a, b) for a, b in zip(other.parameters(), guide.parameters(), strict=True)
        )
        pyro.set_rng_seed(4)
        expected = guide(x, y)
        pyro.clear_param_store()
        pyro.set_rng_seed(4)
        assert all(torch.equal(expected[n], v) for n, v in other(x, y).items())
    with torch.no_grad():
        copied.loc.add_(1.0)
    assert not torch.equal(copied.loc, guide.loc)


def test_traces_can_be_pickled():
    _, guide, x, y = setup()
    with torch.no_grad():
        node = poutine.trace(guide).get_trace(x, y).nodes["net.0.weight"]
    fn = pickle.loads(pickle.dumps(node["fn"]))
    assert type(fn.base_dist) is dist.Normal
    assert vars(fn.base_dist).keys() == vars(dist.Normal(0.0, 1.0)).keys()  # without the draw
    assert torch.equal(fn.log_prob(node["value"]), node["fn"].log_prob(node["value"]))


def test_dtypes(float64):
    _, guide, x, y = setup()
    assert all(p.dtype == torch.float64 for p in guide.parameters())
    assert all(v.dtype == torch.float64 for v in guide(x, y).values())


def test_to():
    _, guide, x, y = setup(learn_scale=False)
    pyro.clear_param_store()
    guide.to(torch.float64)
    draw = guide(x.double(), y.double())
    assert all(v.dtype == torch.float64 for v in draw.values())
    quantiles = guide.quantiles([0.5])
    assert all(v.dtype == torch.float64 for v in quantiles.values())


def test_subclass_of_a_bare_function_without_arguments():
    guide = AutoMeanField(lambda: pyro.sample("w", dist.Normal(0.0, 1.0)))
    assert guide.median()["w"].shape == ()  # sets itself up
    assert guide().keys() == {"w"}


def test_scalar_and_empty_sites():
    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0).expand([0, 3]).to_event(2))
        pyro.sample("c", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = AutoMeanField(model)
    assert {n: tuple(v.shape) for n, v in guide().items()} == {"a": (), "b": (0, 3), "c": (2,)}
    assert torch.isfinite(torch.tensor(TraceMeanField_ELBO().loss(model, guide)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_compiled_elbo():
    model, guide, x, y = setup()
    elbo = JitTrace_ELBO(ignore_jit_warnings=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    losses = [svi.step(x, y) for _ in range(40)]
    assert len(set(losses)) == 40
    assert sum(losses[-10:]) < sum(losses[:10])


# ---------------------------------------------------------------------------- errors


def affine_image(loc, scale):
    transform = torch.distributions.AffineTransform(loc, scale)
    return dist.TransformedDistribution(dist.Normal(torch.zeros_like(loc), 1.0), [transform])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"family": dist.LogNormal}, "LogNormal is not a distribution over all real numbers"),
        ({"family": lambda loc, scale: dist.Normal(scale, loc.abs() + 1)}, "not symmetric"),
        ({"family": dist.Gumbel}, "Gumbel is not symmetric"),
        ({"family": lambda loc, scale: 0.0}, "over one element"),
        (
            {"family": lambda loc, scale: dist.MultivariateNormal(loc, torch.eye(2))},
            "give a family",
        ),
        ({"family": lambda loc, scale: dist.Normal(loc, 1.0)}, "second argument as scale"),
        ({"family": lambda loc, scale: dist.Normal(loc, 2 * scale)}, "factor of the scale into"),
        ({"family": lambda loc, scale: dist.Laplace(loc, scale / 2**0.5)}, "another loc or scale"),
        ({"family": affine_image}, "another loc or scale"),
        ({"init_scale": 0.0}, "init_scale=0.0, expected a number > 0"),
        ({"init_scale": "small"}, "init_scale='small'"),
        ({"init_scale": True}, "init_scale=True"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        AutoMeanField(lambda: None, **options)


@pytest.mark.parametrize(
    ("init_scale", "words"),
    [
        (lambda site: -1.0, "'w', expected > 0"),
        (lambda site: torch.ones(5), r"gave shape \(5,\) for site 'w'.*broadcasts to \(2,\)"),
    ],
)
def test_bad_scale_of_a_site(init_scale, words):
    def model():
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    guide = AutoMeanField(model, init_scale=init_scale)
    for _ in range(2):  # and again: a failed set-up leaves nothing behind
        with pytest.raises(ValueError, match=words):
            guide()


def test_no_latent_sites():
    guide = AutoMeanField(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0)))
    with pytest.raises(RuntimeError, match="no latent variables; use an empty guide"):
        guide()


def test_mixed_dtypes():
    def model():
        pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("b", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))

    with pytest.raises(
        ValueError, match="'a' is torch.float32.*'b' is torch.float64.*AutoGuideList"
    ):
        AutoMeanField(model)()


def test_leftovers_in_the_param_store():
    _, guide, x, y = setup()
    guide(x, y)
    with pytest.raises(RuntimeError, match=r"2 latent values.*clear_param_store"):
        AutoMeanField(lambda: pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1)))()


def test_discrete_sites_are_refused():
    with pytest.raises(ValueError, match="discrete sample site 'k'"):
        AutoMeanField(lambda: pyro.sample("k", dist.Categorical(torch.ones(3))))()


def test_unknown_site():
    _, guide, _, _ = setup()
    with pytest.raises(KeyError, match="got site 'w', expected one of"):
        guide.loc_and_scale("w")


def test_svi_under_module_local_parameters():
    def model():
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    with pyro.settings.context(module_local_params=True):
        guide = AutoMeanField(model)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        svi.step()
        before = guide.loc.detach().clone()
        svi.step()
        assert not torch.equal(guide.loc, before)
