"""The KL term: closed form, subsampling, constrained sites, tempering."""

import copy
import functools
import io

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from torch.distributions import kl_divergence

from pyro_flipout import FlipoutError, FlipoutWarning, flipout
from pyro_flipout.infer import AutoMeanField, TemperMessenger, tempered, tempering
from tests.helpers import Recording, Regression, Z, mlp, randomize

T5 = functools.partial(dist.StudentT, 5.0)
LOC = torch.tensor([[0.5, -1.0, 0.0], [2.0, 0.1, -0.3]], dtype=torch.float64)
SCALE = torch.tensor([[0.4, 1.0, 0.2], [0.7, 1.5, 0.25]], dtype=torch.float64)


def iid(prior):
    return prior.expand([2, 3]).to_event(2)


# name: (family of the guide, prior, whether the KL has a closed form)
PAIRS = {
    "Normal, Normal": (dist.Normal, iid(dist.Normal(0.0, 1.0)), True),
    "Normal, scaled Normal": (dist.Normal, iid(dist.Normal(0.0, 3.0**-0.5)), True),
    "Normal, Normal at weights": (dist.Normal, dist.Normal(LOC.flip(0), SCALE).to_event(2), True),
    "Normal, broadcast Normal": (
        dist.Normal,
        dist.Normal(LOC[0], 0.5).expand([2, 3]).to_event(2),
        True,
    ),
    "Normal, Laplace": (dist.Normal, iid(dist.Laplace(0.3, 0.5)), True),
    "Normal, StudentT": (dist.Normal, iid(dist.StudentT(3.0, 0.0, 1.0)), False),
    "Normal, Cauchy": (dist.Normal, iid(dist.Cauchy(0.0, 1.0)), False),
    "Laplace, Laplace": (dist.Laplace, iid(dist.Laplace(0.3, 0.5)), True),
    "Laplace, Normal": (dist.Laplace, iid(dist.Normal(0.3, 2.0)), True),
    "Laplace, StudentT": (dist.Laplace, iid(dist.StudentT(3.0, 0.0, 1.0)), False),
    "StudentT, Normal": (T5, iid(dist.Normal(0.3, 2.0)), False),
    "StudentT, StudentT": (T5, iid(dist.StudentT(3.0, 0.0, 1.0)), False),
    "Cauchy, Cauchy": (dist.Cauchy, iid(dist.Cauchy(0.0, 1.0)), True),
}


def prior_only(family, prior):
    """A model of one site without data, and a guide for it at (LOC, SCALE)."""

    def model():
        pyro.sample("w", prior)

    init = {"init_loc_fn": lambda site: LOC, "init_scale": lambda site: SCALE}
    guide = AutoMeanField(model, family=family, **init)
    guide()
    return model, guide


def quadrature(family, prior):
    """KL of family(LOC, SCALE) from an elementwise prior, by the trapezoidal rule."""
    t = torch.linspace(-30, 30, 400_001, dtype=torch.float64)
    total = 0.0
    base = prior.base_dist.expand([2, 3])
    for index in range(6):
        i, j = divmod(index, 3)
        q = family(LOC[i, j], SCALE[i, j])
        # Substitution x = loc + scale * sinh(t) for the tails.
        x = LOC[i, j] + SCALE[i, j] * t.sinh()
        log_p = base.log_prob(x[:, None, None].expand(-1, 2, 3))[:, i, j]
        log_q = q.log_prob(x)
        total += torch.trapezoid(log_q.exp() * (log_q - log_p) * SCALE[i, j] * t.cosh(), t)
    return total.item()


def log_ratios(model, guide, num_draws):
    """Draws of log q - log p, shape (num_draws,)."""
    with torch.no_grad(), pyro.plate("num_particles_vectorized", num_draws, dim=-1):
        trace = poutine.trace(guide).get_trace()
        replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
    trace.compute_log_prob()
    replayed.compute_log_prob()
    log_q = sum(s["log_prob"] for s in trace.nodes.values() if "log_prob" in s)
    return log_q - sum(s["log_prob"] for s in replayed.nodes.values() if "log_prob" in s)


def mean_error(draws, expected):
    """Distance of the mean from its expectation, in standard errors."""
    return ((draws.mean() - expected).abs() / (draws.std() / len(draws) ** 0.5)).item()


@pytest.mark.parametrize("pair", PAIRS)
def test_closed_form_and_monte_carlo(pair, float64):
    family, prior, closed = PAIRS[pair]
    model, guide = prior_only(family, prior)
    truth = quadrature(family, prior)
    draws = log_ratios(model, guide, 20_000)
    assert draws.shape == (20_000,)
    assert mean_error(draws, truth) < Z
    elbo = TraceMeanField_ELBO()
    losses = torch.tensor([elbo.loss(model, guide) for _ in range(2 if closed else 400)])
    if closed:
        assert losses[0] == losses[1]
        torch.testing.assert_close(losses[0].item(), truth, rtol=1e-6, atol=1e-6)
        assert mean_error(draws, losses[0]) < Z
    else:
        assert losses[0] != losses[1]
        assert mean_error(losses, truth) < Z


@pytest.mark.parametrize("pair", [name for name, (*_, closed) in PAIRS.items() if closed])
def test_gradient_of_the_closed_form(pair, float64):
    """It is the mean of the Monte Carlo gradient, at no variance."""
    family, prior, _ = PAIRS[pair]
    model, guide = prior_only(family, prior)
    TraceMeanField_ELBO().differentiable_loss(model, guide).backward()
    exact = torch.cat([p.grad for p in guide.parameters()])
    rows = []
    for _ in range(400):
        guide.zero_grad()
        Trace_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=0).loss_and_grads(
            model, guide
        )
        rows.append(torch.cat([p.grad for p in guide.parameters()]))
    rows = torch.stack(rows)
    error = (rows.mean(0) - exact).abs() / (rows.std(0) / len(rows) ** 0.5)
    assert error.max() < Z + 1  # of 12


def test_multivariate_normal_prior(float64):
    cov = torch.tensor([[1.0, 0.6], [0.6, 2.0]])

    def model():
        pyro.sample("w", dist.MultivariateNormal(torch.zeros(2), cov))

    guide = AutoMeanField(model, init_scale=0.5)
    guide()
    randomize(guide)
    (loc, scale) = guide.loc_and_scale("w")
    q = dist.MultivariateNormal(loc, scale.square().diag())
    expected = kl_divergence(q, dist.MultivariateNormal(torch.zeros(2), cov)).item()
    assert TraceMeanField_ELBO().loss(model, guide) == pytest.approx(expected)


def test_stock_auto_normal_is_monte_carlo(float64):
    """What this guide is for: AutoNormal's sites are Deltas, so that its KL is an estimate."""
    model, guide = prior_only(dist.Normal, iid(dist.Normal(0.0, 1.0)))
    stock = AutoNormal(model)
    elbo = TraceMeanField_ELBO()
    assert elbo.loss(model, stock) != elbo.loss(model, stock)
    assert elbo.loss(model, guide) == elbo.loss(model, guide)


def constrained_model():
    tau = pyro.sample("tau", dist.LogNormal(1.0, 0.5))
    pyro.sample("w", dist.Normal(torch.zeros(3), tau.unsqueeze(-1)).to_event(1))
    pyro.sample("p", dist.Dirichlet(torch.ones(3)))


def test_constrained_sites_have_their_jacobian(float64):
    guide = AutoMeanField(constrained_model, init_scale=0.3)
    guide()
    with torch.no_grad():
        guide.loc.add_(torch.tensor([1.5, 0.3, -0.2, 0.5, 0.4, -1.0]))
    draws = log_ratios(constrained_model, guide, 20_000)
    elbo = TraceMeanField_ELBO()
    losses = torch.tensor([elbo.loss(constrained_model, guide) for _ in range(400)])
    gap = (losses.mean() - draws.mean()).abs()
    assert gap / (losses.var() / 400 + draws.var() / 20_000).sqrt() < Z
    assert losses.var() < draws.var()  # the KL of "w" is closed, given "tau"


# ---------------------------------------------------------------------- subsampling


class Spy:
    """Keeps the traces of an ELBO."""

    def __new__(cls, elbo_class, **options):
        def get_trace(self, *args):
            self.traces = elbo_class._get_trace(self, *args)
            return self.traces

        return type("Spy", (elbo_class,), {"_get_trace": get_trace})(**options)


def closed_kl(guide, prior=None):
    prior = prior or dist.Normal(0.0, 1.0)
    return sum(
        kl_divergence(dist.Normal(*guide.loc_and_scale(n)), prior).sum().item()
        for n in guide.median()
    )


def subsampled(x, y, rows):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    with pyro.plate("data", len(x), subsample=rows) as index:
        mean = torch.nn.functional.linear(x[index], w).squeeze(-1)
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y[index])


@pytest.mark.parametrize("batch", [50, 10, 1])
@pytest.mark.parametrize("elbo_class", [Trace_ELBO, TraceMeanField_ELBO])
def test_subsampling_scales_the_likelihood_alone(batch, elbo_class, float64):
    x, y = torch.randn(50, 3), torch.randn(50)
    rows = torch.randperm(50)[:batch]
    guide = AutoMeanField(subsampled)
    guide(x, y, rows)
    randomize(guide)
    elbo = Spy(elbo_class)
    loss = elbo.loss(subsampled, guide, x, y, rows)
    w = elbo.traces[1].nodes["w"]["value"]
    mean = (x[rows] @ w.T).squeeze(-1)
    likelihood = 50 / batch * dist.Normal(mean, 1.0).log_prob(y[rows]).sum().item()
    if elbo_class is TraceMeanField_ELBO:
        kl = closed_kl(guide)
    else:
        log_q = dist.Normal(*guide.loc_and_scale("w")).log_prob(w).sum()
        kl = (log_q - dist.Normal(0.0, 1.0).log_prob(w).sum()).item()
    assert loss == pytest.approx(kl - likelihood, rel=1e-10)


def test_the_kl_of_local_variables_is_scaled_with_their_plate(float64):
    rows = torch.tensor([3, 19, 4, 0, 11])

    def model():
        with pyro.plate("data", 20, subsample=rows):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AutoMeanField(model, create_plates=lambda: pyro.plate("data", 20, subsample=rows))
    guide()
    randomize(guide)
    loss = TraceMeanField_ELBO().loss(model, guide)
    loc, scale = (t[rows] for t in guide.loc_and_scale("z"))
    kl = kl_divergence(dist.Normal(loc, scale), dist.Normal(0.0, 1.0)).sum()
    assert loss == pytest.approx(4 * kl.item())


# ------------------------------------------------------------------------ tempering

GUIDES = {
    "AutoMeanField": AutoMeanField,
    "Laplace": functools.partial(AutoMeanField, family=dist.Laplace),
    "AutoNormal": AutoNormal,
    "AutoDiagonalNormal": AutoDiagonalNormal,
    "AutoDelta": AutoDelta,
}
ELBOS = {
    "Trace": Trace_ELBO(),
    "MeanField": TraceMeanField_ELBO(),
    "Graph": TraceGraph_ELBO(),
    "Enum": TraceEnum_ELBO(strict_enumeration_warning=False, max_plate_nesting=1),
    "particles": Trace_ELBO(num_particles=3),
}


class Subsampled(Regression):
    """With a likelihood that is scaled up, and a constrained site."""

    def forward(self, x, y=None):
        mean = self.net(x)
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 100, subsample=torch.arange(len(x))):
            return pyro.sample("y", dist.Normal(mean, noise).to_event(1), obs=y)


def setup(guide="AutoMeanField", model_class=Subsampled):
    model = model_class(mlp((3, 4, 2)))
    x, y = torch.randn(10, 3), torch.randn(10, 2)
    guide = GUIDES[guide](model)
    guide(x, y)
    return model, randomize(guide, 0.2), x, y


def loss_and_grad(elbo, model, guide, x, y, factor=None, form="elbo"):
    """The loss and its gradient for all guide parameters, under one seed."""
    pyro.set_rng_seed(3)
    guide.zero_grad()
    if factor is None:
        loss = elbo.loss_and_grads(model, guide, x, y)
    elif form == "elbo":
        loss = tempered(elbo, factor).loss_and_grads(model, guide, x, y)
    elif form == "both":
        loss = elbo.loss_and_grads(tempered(model, factor), tempered(guide, factor), x, y)
    else:
        with tempered(factor=factor):
            loss = elbo.loss_and_grads(model, guide, x, y)
    return loss, torch.cat([p.grad.flatten() for p in guide.parameters()])


@pytest.mark.parametrize("form", ["elbo", "both", "context"])
@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("guide", GUIDES)
def test_elbo_is_likelihood_minus_factor_times_kl(form, elbo, guide, float64):
    elbo = ELBOS[elbo]
    model, guide, x, y = setup(guide)
    full, full_grad = loss_and_grad(elbo, model, guide, x, y)
    bare, bare_grad = loss_and_grad(elbo, model, guide, x, y, 0.0, form)
    for factor in (0.1, 1.0, 2.5):
        loss, grad = loss_and_grad(elbo, model, guide, x, y, factor, form)
        assert loss == pytest.approx(bare + factor * (full - bare), rel=1e-10)
        torch.testing.assert_close(grad, bare_grad + factor * (full_grad - bare_grad))
    # At 0 the log-likelihood is left, scaled up from 10 to 100 examples.
    spy = Spy(type(elbo), strict_enumeration_warning=False, max_plate_nesting=1)
    pyro.set_rng_seed(3)
    loss = spy.loss(model, guide, x, y)
    likelihood = spy.traces[0].nodes["y"]["log_prob_sum"].item()
    if elbo.num_particles == 1:
        assert full == pytest.approx(loss)
        assert bare == pytest.approx(-likelihood, rel=1e-10)
    raw = spy.traces[0].nodes["y"]
    assert likelihood == pytest.approx(10 * raw["fn"].log_prob(raw["value"]).sum().item())


def test_closed_form_exactly(float64):
    model, guide, x, y = setup(model_class=Regression)
    spy = Spy(TraceMeanField_ELBO)
    loss = tempered(spy, 0.1).loss(model, guide, x, y)
    pyro.set_rng_seed(3)
    loss = (elbo := tempered(spy, 0.1)).loss(model, guide, x, y)
    likelihood = elbo.traces[0].nodes["y"]["log_prob_sum"].item()
    assert loss == pytest.approx(0.1 * closed_kl(guide) - likelihood, rel=1e-10)


@pytest.mark.parametrize("guide", ["AutoMeanField", "AutoNormal"])
@pytest.mark.parametrize(
    "options", [{"expose": ["net.0.weight"]}, {"hide": ["noise", "net.2.bias"]}]
)
def test_chosen_sites(guide, options, float64):
    model, guide, x, y = setup(guide)
    pyro.set_rng_seed(3)
    spy = Spy(Trace_ELBO)
    full = spy.loss(model, guide, x, y)
    terms = {}
    for name in guide.median():
        log_q = sum(
            spy.traces[1].nodes[n]["log_prob_sum"].item()
            for n in (name, f"{name}_unconstrained")
            if n in spy.traces[1].nodes
        )
        terms[name] = log_q - spy.traces[0].nodes[name]["log_prob_sum"].item()
    names = options.get("expose") or set(terms) - set(options["hide"])
    pyro.set_rng_seed(3)
    loss = tempered(Trace_ELBO(), 0.1, **options).loss(model, guide, x, y)
    assert loss == pytest.approx(full - 0.9 * sum(terms[n] for n in names), rel=1e-10)


@pytest.mark.parametrize("option", ["hide", "expose"])
def test_names_that_no_site_has(option):
    def model():
        pyro.sample("w", dist.Normal(0.0, 1.0))

    elbo = tempered(Trace_ELBO(), 0.1, **{option: ["W"]})
    with pytest.warns(FlipoutWarning, match=rf"{option} names \['W'\], .*sites are .*'w'") as told:
        for _ in range(2):
            elbo.loss(model, AutoNormal(model))
    assert len(told) == 1


def test_an_elbo_is_tempered_once():
    with pytest.raises(ValueError, match="tempered already, with the factor 0.5"):
        tempered(tempered(Trace_ELBO(), 0.5), 0.2)


def test_a_joint_draw_cannot_be_tempered_in_part():
    model, guide, x, y = setup("AutoDiagonalNormal")
    with pytest.raises(FlipoutError, match="may stand for several sites.*AutoMeanField"):
        tempered(Trace_ELBO(), 0.1, expose=["noise"]).loss(model, guide, x, y)
    names = poutine.trace(guide).get_trace(x, y).stochastic_nodes
    pyro.set_rng_seed(3)
    loss = tempered(Trace_ELBO(), 0.1, expose=names).loss(model, guide, x, y)
    assert loss == pytest.approx(loss_and_grad(Trace_ELBO(), model, guide, x, y, 0.1)[0])


@pytest.mark.parametrize("guides", [1.0, 0.2])
def test_the_model_alone_is_refused(guides):
    model, guide, x, y = setup()
    with pytest.raises(FlipoutError, match=rf"0\.1 in the model and {guides} in the guide"):
        Trace_ELBO().loss(tempered(model, 0.1), tempered(guide, guides), x, y)
    if guides == 1.0:
        with pytest.raises(FlipoutError, match="wrap both, or the ELBO alone"):
            Trace_ELBO().loss(tempered(model, 0.1), guide, x, y)


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("as_trace", [True, False])
def test_what_is_conditioned_is_likelihood(outside, as_trace, float64):
    model, guide, x, y = setup()
    data = {"y": y}
    if as_trace:
        data = poutine.trace(poutine.condition(model, data=data)).get_trace(x)
        for name in list(data.nodes):
            if name != "y":
                data.remove_node(name)
    wrap = functools.partial(poutine.condition, data=data)
    fn = wrap(tempered(model, 0.1)) if outside else tempered(wrap(model), 0.1)
    pyro.set_rng_seed(3)
    loss = Trace_ELBO().loss(fn, tempered(guide, 0.1), x)
    assert loss == pytest.approx(loss_and_grad(Trace_ELBO(), model, guide, x, y, 0.1)[0])


def test_nested_factors_multiply(float64):
    model, guide, x, y = setup()
    expected, _ = loss_and_grad(Trace_ELBO(), model, guide, x, y, 0.06)
    pyro.set_rng_seed(3)
    with tempered(factor=0.2):
        nested = Trace_ELBO().loss(tempered(model, 0.3), tempered(guide, 0.3), x, y)
    assert nested == pytest.approx(expected)
    words = r"0\.06 in the model and 0\.2 in the guide"
    with pytest.raises(FlipoutError, match=words), tempered(factor=0.2):
        Trace_ELBO().loss(tempered(model, 0.3), guide, x, y)


def test_one_handler_for_both_counts_once(float64):
    model, guide, x, y = setup()
    expected, _ = loss_and_grad(Trace_ELBO(), model, guide, x, y, 0.1)
    temper = tempered(factor=0.1)
    pyro.set_rng_seed(3)
    with temper:
        loss = temper(Trace_ELBO()).loss(temper(model), temper(guide), x, y)
    assert loss == pytest.approx(expected)
    assert not poutine.runtime._PYRO_STACK


def test_annealing():
    model, guide, x, y = setup()
    temper = tempered(factor=0.0)
    svi = SVI(
        flipout(temper(model)), temper(guide), pyro.optim.Adam({"lr": 0.0}), TraceMeanField_ELBO()
    )
    losses = []
    for factor in (0.0, 0.5, 1.0):
        temper.factor = factor
        pyro.set_rng_seed(3)
        losses.append(svi.step(x, y))
    assert losses[1] == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-4)
    assert losses[0] < losses[1]


@pytest.mark.parametrize(
    "wrap", [lambda m: flipout(tempered(m, 0.1)), lambda m: tempered(flipout(m), 0.1)]
)
def test_flipout_goes_on(wrap):
    model, guide, x, y = setup()
    handler = Recording()
    Trace_ELBO().loss(handler(tempered(model, 0.1)), tempered(guide, 0.1), x, y)
    assert set(handler.seen) == set(guide.median()) - {"noise"}
    pyro.set_rng_seed(3)
    expected = tempered(Trace_ELBO(), 0.1).loss(flipout(model), guide, x, y)
    pyro.set_rng_seed(3)
    assert Trace_ELBO().loss(wrap(model), tempered(guide, 0.1), x, y) == expected


def test_noise_drawn_in_the_model_is_flipped_too():
    """Tempering is known not to set values: no warning, no shared draw."""

    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        return torch.nn.functional.linear(x, w)

    handler = Recording()
    with tempered(factor=0.1):
        handler(model)(torch.randn(4, 3))
    assert set(handler.seen) == {"w"}


def test_modules_stay_modules():
    model, guide, x, y = setup()
    for module in (model, guide):
        wrapped = tempered(module, 0.1)
        assert isinstance(wrapped, type(module))
        assert wrapped.state_dict().keys() == module.state_dict().keys()
        assert list(wrapped.parameters()) == list(module.parameters())
    elbo = Trace_ELBO()(tempered(model, 0.1), tempered(guide, 0.1))
    names = {n for n, _ in elbo.named_parameters()}
    assert names == {"guide.loc_unconstrained", "guide.scale_unconstrained"}
    elbo(x, y).backward()
    elbo = tempered(Trace_ELBO(), 0.1)(model, guide)
    elbo(x, y).backward()
    assert tempered(guide, 0.1).median().keys() == guide.median().keys()
    draws = Predictive(tempered(model, 0.1), guide=tempered(guide, 0.1), num_samples=3)(x)
    assert draws["y"].shape == (3, 10, 2)


def test_functions_stay_functions():
    def my_model():
        """Mine."""
        return pyro.sample("w", dist.Normal(0.0, 1.0))

    wrapped = tempered(my_model, 0.1)
    assert wrapped.__name__ == "my_model"
    assert wrapped.__doc__ == "Mine."
    trace = poutine.trace(wrapped).get_trace()
    value = trace.nodes["w"]["value"]
    assert trace.log_prob_sum() == 0.1 * dist.Normal(0.0, 1.0).log_prob(value)


def test_elbo_stays_an_elbo():
    elbo = TraceMeanField_ELBO(num_particles=3)
    wrapped = tempered(elbo, 0.1)
    assert isinstance(wrapped, TraceMeanField_ELBO)
    assert wrapped.num_particles == 3
    assert type(elbo) is TraceMeanField_ELBO
    model, guide, x, y = setup()
    assert elbo.loss(model, guide, x, y) > wrapped.loss(model, guide, x, y)


def test_copies(float64):
    model, guide, x, y = setup()
    expected, _ = loss_and_grad(Trace_ELBO(), model, guide, x, y, 0.1)
    elbo = tempered(Trace_ELBO(), 0.1)
    buffer = io.BytesIO()
    torch.save((elbo, tempered(model, 0.1)), buffer)
    buffer.seek(0)
    loaded, loaded_model = torch.load(buffer, weights_only=False)
    for other in (loaded, copy.deepcopy(elbo), copy.copy(elbo)):
        pyro.set_rng_seed(3)
        assert other.loss(model, guide, x, y) == pytest.approx(expected)
    for other in (loaded_model, copy.deepcopy(tempered(model, 0.1))):
        pyro.set_rng_seed(3)
        loss = Trace_ELBO().loss(other, tempered(guide, 0.1), x, y)
        assert loss == pytest.approx(expected)


def test_enumerated_sites_are_part_of_the_likelihood(float64):
    probs = torch.tensor([0.3, 0.7])

    @config_enumerate
    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(probs))
            pyro.sample("y", dist.Normal(w[k], 1.0), obs=y)

    y = torch.randn(6)
    guide = AutoMeanField(poutine.block(model, hide=["k"]))
    guide(y)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    spy = Spy(TraceEnum_ELBO, max_plate_nesting=1)
    pyro.set_rng_seed(3)
    spy.loss(model, guide, y)
    w = spy.traces[1].nodes["w"]["value"]
    joint = dist.Normal(w, 1.0).log_prob(y[:, None]) + probs.log()
    pyro.set_rng_seed(3)
    loss = tempered(elbo, 0.0).loss(model, guide, y)
    assert loss == pytest.approx(-joint.logsumexp(1).sum().item())


def test_local_variables_and_map():
    """They have the factor too; deterministic sites, subsamples and observations do not."""

    def model():
        with pyro.plate("data", 4, subsample_size=2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("d", z + 1)
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(2))

    trace = poutine.trace(tempered(model, 0.1)).get_trace()
    scales = {n: trace.nodes[n]["scale"] for n in ("z", "d", "y", "data")}
    assert scales == {"z": pytest.approx(0.2), "d": 2.0, "y": 2.0, "data": 1.0}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_compiled_factor_cannot_be_annealed():
    model, guide, x, y = setup()
    temper = tempered(factor=0.5)
    temper.factor = 0.1
    elbo = temper(JitTrace_ELBO(ignore_jit_warnings=True))
    elbo.loss_and_grads(model, guide, x, y)
    temper(Trace_ELBO()).loss(model, guide, x, y)
    with pytest.raises(FlipoutError, match="compiled the factor in"):
        temper.factor = 0.2
    assert temper.factor == 0.1


def test_a_factor_in_a_cuda_graph_cannot_be_annealed(monkeypatch):
    model, guide, x, y = setup()
    temper = tempered(factor=0.5)
    monkeypatch.setattr(tempering, "graphed", lambda: True)
    temper(Trace_ELBO()).loss(model, guide, x, y)
    with pytest.raises(FlipoutError, match="a CUDA graph has compiled the factor in"):
        temper.factor = 0.2


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf"), "0.1", None, True])
def test_bad_factor(factor):
    with pytest.raises(ValueError, match="expected a finite number >= 0"):
        tempered(factor=factor)
    with pytest.raises(ValueError, match="expected a finite number >= 0"):
        TemperMessenger().factor = factor


def test_bad_options():
    with pytest.raises(ValueError, match="'w'.*both hide and expose"):
        tempered(factor=0.1, hide=["w"], expose=["w"])
    with pytest.raises(TypeError, match="hide='w', expected a list"):
        tempered(factor=0.1, hide="w")
    for names in (3, ["w", 1], [None]):
        with pytest.raises(TypeError, match="expose=.*, expected a list of site names"):
            tempered(expose=names)
    assert tempered(hide=[]).hide == tempered(hide=iter(())).hide == frozenset()
    for fn in (0.1, AutoNormal):
        with pytest.raises(TypeError, match="expected a model, a guide or an ELBO"):
            tempered(fn, 0.1)
