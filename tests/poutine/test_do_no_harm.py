"""Contract 4: what is no weight draw is bit for bit what it is without the handler."""

import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceTMC_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.infer.inspect import get_dependencies, get_model_relations
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import LocScaleReparam
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.trace_struct import Trace

from pyro_flipout import FlipoutTensor, FlipoutWarning, flipout
from tests.helpers import Recording, kinds

X, Y = torch.randn(6, 3), torch.randn(6)


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    mean = pyro.deterministic("mean", torch.tanh(F.linear(x, w)) @ v)
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(mean, 0.1), obs=y)


VALUES = {"w": torch.randn(2, 3), "v": torch.randn(2)}


def assert_same_trace(a, b):
    """The two traces agree bit for bit, in values and log-densities."""
    assert list(a.nodes) == list(b.nodes)
    a.compute_log_prob()
    b.compute_log_prob()
    for name, node in a.nodes.items():
        other = b.nodes[name]
        if node["type"] != "sample":
            continue
        for key in ("value", "log_prob", "unscaled_log_prob"):
            assert type(other[key]) is type(node[key]), (name, key)
            assert torch.equal(node[key], other[key]), (name, key)
        for key in ("is_observed", "scale", "cond_indep_stack", "infer", "mask"):
            assert node[key] == other[key], (name, key)
        assert type(node["fn"]) is type(other["fn"])


def both(wrap, run):
    """Runs the bare model and the flipped one under ``wrap``, with the same seed."""
    results = []
    for fn in (model, Recording()(model)):
        pyro.set_rng_seed(7)
        results.append(run(wrap(fn)))
    return results


def trace_of(fn):
    return poutine.trace(fn).get_trace(X, Y)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda fn: poutine.condition(fn, data=VALUES),
        lambda fn: poutine.do(fn, data=VALUES),
        lambda fn: InitMessenger(init_to_median)(fn),
        lambda fn: poutine.mask(poutine.condition(fn, data=VALUES), mask=False),
        lambda fn: poutine.scale(poutine.condition(fn, data=VALUES), scale=3.0),
        lambda fn: poutine.infer_config(
            poutine.condition(fn, data=VALUES), config_fn=lambda site: {"note": 1}
        ),
        lambda fn: (
            poutine.block(poutine.trace(poutine.condition(fn, data=VALUES)))
            and poutine.condition(fn, data=VALUES)
        ),
    ],
    ids=["condition", "do", "init", "mask", "scale", "infer_config", "block"],
)
def test_values_that_are_set(wrap):
    assert_same_trace(*both(wrap, trace_of))


@pytest.mark.parametrize("outside", [True, False])
def test_handler_outside_and_inside(outside):
    conditioned = poutine.condition(model, data=VALUES)
    flipped = flipout(conditioned) if outside else poutine.condition(flipout(model), data=VALUES)
    assert_same_trace(trace_of(conditioned), trace_of(flipped))


def test_partially_conditioned_model_flips_the_rest():
    data = {"v": VALUES["v"]}
    handler = Recording()
    trace_of(poutine.condition(handler(model), data=data))
    assert set(handler.seen) == {"w"}


def test_replayed_traces_are_those_of_the_bare_model():
    guide = AutoNormal(model)
    trace = poutine.trace(guide).get_trace(X, Y)
    bare, flipped = both(lambda fn: poutine.replay(fn, trace=trace), trace_of)
    for t in (bare, flipped):
        t.compute_log_prob()
        assert not any(isinstance(n.get("value"), FlipoutTensor) for n in t.nodes.values())
    for name in ("w", "v"):
        assert torch.equal(bare.nodes[name]["value"], flipped.nodes[name]["value"])
        assert torch.equal(bare.nodes[name]["log_prob"], flipped.nodes[name]["log_prob"])
        assert flipped.nodes[name]["value"] is trace.nodes[name]["value"]
    assert not torch.equal(bare.nodes["y"]["log_prob"], flipped.nodes["y"]["log_prob"])


def test_context_manager_around_a_replay_keeps_traces_plain():
    guide = AutoNormal(model)
    with flipout():
        guide_trace = poutine.trace(guide).get_trace(X, Y)
        trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(X, Y)
    for t in (guide_trace, trace):
        assert not any(isinstance(n.get("value"), FlipoutTensor) for n in t.nodes.values())


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("source", ["guide", "samples", "prior"])
def test_predictive(parallel, source):
    def plated(x, y=None):
        # Broadcasts over parallel samples, as Predictive(parallel=True) asks for.
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        mean = (x * (w.unsqueeze(-2) if w.dim() == 2 else w)).sum(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, 0.1), obs=y)

    guide = AutoNormal(plated)
    guide(X, Y)
    options = {
        "guide": {"guide": guide, "num_samples": 5},
        "samples": {"posterior_samples": {"w": torch.randn(5, 3)}},
        "prior": {"num_samples": 5},
    }[source]
    draws = []
    for fn in (plated, flipout(plated)):
        pyro.set_rng_seed(1)
        draws.append(Predictive(fn, parallel=parallel, **options)(X))
    bare, flipped = draws
    assert set(bare) == set(flipped)
    for name in bare:
        assert type(flipped[name]) is torch.Tensor
        assert torch.equal(bare[name], flipped[name]), name


def test_nuts_potential():
    potentials = []
    for fn in (model, flipout(model)):
        pyro.set_rng_seed(2)
        _, potential, _transforms, _ = initialize_model(fn, model_args=(X, Y))
        potentials.append(potential(VALUES))
    assert torch.equal(*potentials)


def test_nuts_samples():
    samples = []
    for fn in (model, flipout(model, on_missing_rule="error")):
        pyro.set_rng_seed(0)
        mcmc = MCMC(NUTS(fn), num_samples=3, warmup_steps=2, disable_progbar=True)
        mcmc.run(X, Y)
        samples.append(mcmc.get_samples()["w"])
    assert torch.equal(*samples)


def test_auto_delta_svi():
    def train(fn):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(fn, AutoDelta(model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        return [svi.step(X, Y) for _ in range(3)]

    with pytest.warns(FlipoutWarning, match=r"no site .*\['w', 'v'\]: the guide has a point there"):
        losses = train(flipout(model))
    assert losses == train(model)


def test_enumerated_discrete_site():
    """A mixture with an enumerated assignment: only the real weight is flipped."""

    @config_enumerate
    def mixture(x):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(pyro.ops.indexing.Vindex(locs)[z], 1.0), obs=x)

    guide = AutoNormal(poutine.block(mixture, hide=["z"]))
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    guide(torch.zeros(4))
    losses = []
    for fn in (mixture, flipout(mixture, hide=["locs"])):
        pyro.set_rng_seed(0)
        losses.append(elbo.loss(fn, guide, torch.tensor([-1.0, 0.0, 2.0, 3.0])))
    assert losses[0] == losses[1]


def test_vae_with_subsampled_plate():
    decoder, encoder = torch.nn.Linear(2, 3), torch.nn.Linear(3, 4)
    data = torch.randn(20, 3)

    def vae():
        pyro.module("decoder", decoder)
        with pyro.plate("data", 20, subsample_size=5) as idx:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.1).to_event(1), obs=data[idx])

    def guide():
        pyro.module("encoder", encoder)
        with pyro.plate("data", 20, subsample_size=5) as idx:
            loc, scale = encoder(data[idx]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    results = []
    for fn in (vae, flipout(vae)):
        pyro.set_rng_seed(4)
        decoder.zero_grad()
        encoder.zero_grad()
        loss = Trace_ELBO().loss_and_grads(fn, guide)
        grads = [p.grad.clone() for m in (decoder, encoder) for p in m.parameters()]
        results.append((loss, grads))
    assert results[0][0] == results[1][0]
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(a, b)


def test_lifted_parameters_are_left_alone():
    def lifted(x):
        w = pyro.param("w", torch.zeros(2, 3))
        return F.linear(x, w) + F.linear(x, pyro.param("w"))

    prior = {"w": dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2)}
    handler = Recording()
    outs = []
    for fn in (
        poutine.lift(lifted, prior=prior),
        handler(poutine.lift(lifted, prior=prior)),
        poutine.lift(handler(lifted), prior=prior),
    ):
        pyro.set_rng_seed(0)
        outs.append(fn(X))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("outside", [True, False])
def test_reparam_is_a_linear_map_of_a_flipped_weight(outside):
    config = {"w": LocScaleReparam(centered=0.0, shape_params=())}
    handler = Recording()

    def scaled(x, y=None):
        w = pyro.sample("w", dist.Normal(0.5, 2.0).expand([2, 3]).to_event(2))
        return F.linear(x, w)

    if outside:
        fn = handler(poutine.reparam(scaled, config=config))
    else:
        fn = poutine.reparam(handler(scaled), config=config)
    trace = poutine.trace(fn).get_trace(X)
    assert set(handler.seen) == {"w_decentered"}
    assert all(
        not isinstance(n["value"], FlipoutTensor)
        for n in trace.nodes.values()
        if n["type"] == "sample"
    )
    w = 0.5 + 2.0 * handler.seen["w_decentered"].materialize()
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], torch.einsum("ni,noi->no", X, w))
    assert torch.isfinite(trace.log_prob_sum())


def test_hierarchical_prior_sees_the_shared_draw():
    def hierarchical(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(mu, 1.0).expand([1, 3]).to_event(2))
        mean = F.linear(x, w).squeeze(-1) + mu
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    guide = AutoNormal(hierarchical)
    trace = poutine.trace(guide).get_trace(X, Y)
    handler = Recording(on_missing_rule="error")
    t = poutine.trace(poutine.replay(handler(hierarchical), trace=trace)).get_trace(X, Y)
    bare = poutine.trace(poutine.replay(hierarchical, trace=trace)).get_trace(X, Y)
    assert set(handler.seen) == {"mu", "w"}
    t.compute_log_prob()
    bare.compute_log_prob()
    assert torch.equal(t.nodes["w"]["log_prob"], bare.nodes["w"]["log_prob"])
    w, mu = handler.seen["w"].materialize(), handler.seen["mu"].materialize()
    mean = torch.einsum("ni,noi->n", X, w) + mu
    torch.testing.assert_close(t.nodes["y"]["log_prob"], dist.Normal(mean, 1.0).log_prob(Y))


class StandardGuide(GuideMessenger):
    """Draws every site from a normal distribution of its own, beside the model."""

    def get_posterior(self, name, prior):
        return dist.Normal(torch.zeros(prior.shape()), 0.1).to_event(prior.event_dim)


def test_a_prior_beside_an_effect_based_guide_sees_the_shared_draw():
    def hierarchical(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(mu, 1.0).expand([1, 3]).to_event(2))
        return F.linear(x, w) + mu

    guide, handler = StandardGuide(hierarchical), Recording()
    told = "'mu' keeps its shared draw from now on: site 'w' depends on it"
    with pytest.warns(FlipoutWarning, match=told), handler:
        guide(X)
    assert handler.decisions["w"].startswith("flipped")
    model_trace, _ = guide.get_traces()
    mu, w = (model_trace.nodes[name]["value"] for name in ("mu", "w"))
    assert type(model_trace.nodes["w"]["fn"].log_prob(w)) is torch.Tensor
    expected = dist.Normal(mu, 1.0).log_prob(w).sum()
    torch.testing.assert_close(model_trace.nodes["w"]["fn"].log_prob(w), expected)


def test_traces_inside_a_trace_are_executions_of_their_own():
    def program(name):
        def run(x):
            return F.linear(x, pyro.sample(name, dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2)))

        return run

    def both():
        for name, x in (("a", X), ("b", X[:2])):
            poutine.trace(program(name)).get_trace(x)

    handler = Recording(on_missing_rule="error")
    with poutine.trace(), handler:
        both()
    assert kinds(handler.decisions) == {"a": "flipped", "b": "flipped"}


def test_intercept_straight_into_the_likelihood():
    def intercept(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    guide = AutoNormal(intercept)
    trace = poutine.trace(guide).get_trace(Y)
    handler = Recording(on_missing_rule="error")
    t = poutine.trace(poutine.replay(handler(intercept), trace=trace)).get_trace(Y)
    t.compute_log_prob()
    mu = handler.seen["mu"].materialize(len(Y))
    torch.testing.assert_close(t.nodes["y"]["log_prob"], dist.Normal(mu, 1.0).log_prob(Y))


# ------------------------------------------------------- what other inference has of its own


class Score(dist.Normal):
    has_rsample = False


def scored(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    s = pyro.sample("s", Score(0.0, 1.0))
    sw = pyro.deterministic("sw", s * w)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + x @ sw, 1.0), obs=y)


def score_guide(x, y):
    s = pyro.sample("s", Score(pyro.param("sl", torch.tensor(0.0)), 1.0))
    loc = pyro.param("wl", torch.zeros(3))
    pyro.sample("w", dist.Normal(loc, 0.3).to_event(1))
    return s


def test_provenance_of_inspection():
    flipped = flipout(scored)
    assert get_dependencies(flipped, (X, Y)) == get_dependencies(scored, (X, Y))
    assert get_model_relations(flipped, (X, Y)) == get_model_relations(scored, (X, Y))


def test_provenance_of_score_functions():
    handler = Recording()
    elbo = TraceGraph_ELBO()
    with pytest.warns(FlipoutWarning, match="'s' keeps its shared draw: .*not reparametrised"):
        elbo.loss_and_grads(handler(scored), score_guide, X, Y)
    assert handler.decisions["w"].startswith("flipped")
    w = handler.seen["w"].materialize()
    assert len(w.unique(dim=0)) > 1
    trace = poutine.trace(score_guide).get_trace(X, Y)
    track = track_provenance(trace.nodes["s"]["value"], frozenset("s"))
    trace.nodes["s"]["value"] = track
    t = poutine.trace(poutine.replay(handler(scored), trace=trace)).get_trace(X, Y)
    w, s = handler.seen["w"].materialize(), detach_provenance(track)
    expected = torch.einsum("ni,ni->n", X, w) * (1 + s)
    torch.testing.assert_close(detach_provenance(t.nodes["y"]["fn"].loc), expected)
    assert get_provenance(t.nodes["y"]["fn"].loc) == {"s"}


def test_a_draw_that_depends_on_a_score_function():
    def dependent(x, y):
        s = pyro.sample("s", Score(pyro.param("sl", torch.tensor(0.0)), 1.0))
        pyro.sample("w", dist.Normal(s.expand(3), 0.3).to_event(1))

    elbo = TraceGraph_ELBO()
    with pytest.warns(FlipoutWarning, match=r"'w' .*draws \['s'\], .*TraceGraph_ELBO tracks it"):
        elbo.loss_and_grads(flipout(scored, hide=["s"]), dependent, X, Y)


@pytest.mark.parametrize("expand", [False, True])
def test_sites_of_tensor_monte_carlo(expand):
    options = {"enumerate": "parallel", "num_samples": 4, "expand": expand}

    def plated(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0), infer=options)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x[:, 0] * w, 1.0), obs=y)

    def guide(x, y):
        loc = pyro.param("loc", torch.tensor(0.5))
        pyro.sample("w", dist.Normal(loc, 1.0), infer=options)

    losses = []
    for fn in (plated, flipout(plated)):
        pyro.set_rng_seed(0)
        elbo = TraceTMC_ELBO(max_plate_nesting=1)
        guides = guide, lambda *_: 0
        losses.append([elbo.differentiable_loss(fn, g, X, Y).item() for g in guides])
    assert losses[0] == losses[1]


def test_a_replayed_trace_without_distributions():
    trace = Trace()
    for name, value in VALUES.items():
        node = {"type": "sample", "is_observed": False, "infer": {}}
        trace.add_node(name, name=name, value=value, **node)
    bare, flipped = both(lambda fn: poutine.replay(fn, trace=trace), trace_of)
    assert_same_trace(bare, flipped)


@pytest.mark.parametrize("make", [AutoDelta, AutoNormal])
def test_jit_has_the_warnings_of_the_bare_model(make):
    warned = []
    for fn in (model, flipout(model, hide=["w", "v"])):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = JitTrace_ELBO().loss_and_grads(fn, make(model), X, Y)
        warned.append((loss, [str(w.message) for w in caught]))
    assert warned[0] == warned[1]
