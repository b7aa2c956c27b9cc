"""Which symmetric draw a value is, for every stock source of values."""

import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)

from pyro_flipout import FlipoutTensor, FlipoutWarning, flipout
from tests.helpers import Recording, randomize

X, Y = torch.randn(6, 3), torch.randn(6)


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    v = pyro.sample("v", dist.Laplace(0.0, 1.0).expand([2]).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    mean = torch.tanh(F.linear(x, w)) @ v + b
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(mean, sigma), obs=y)


WEIGHTS = {"w", "v", "b"}


def replayed(guide, handler=None):
    guide(X, Y)
    randomize(guide)
    trace = poutine.trace(guide).get_trace(X, Y)
    handler = handler or Recording()
    poutine.replay(handler(model), trace=trace)(X, Y)
    return handler, trace


def loc_of(guide, name):
    if isinstance(guide, AutoNormal):
        return getattr(guide.locs, name)
    position = {"w": (0, 6), "v": (6, 8), "b": (8, 9)}[name]
    return guide.loc[slice(*position)].reshape({"w": (2, 3), "v": (2,), "b": ()}[name])


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoDiagonalNormal])
def test_autoguides(guide_class):
    guide = guide_class(model)
    handler, trace = replayed(guide)
    assert set(handler.seen) == WEIGHTS
    for name, w in handler.seen.items():
        torch.testing.assert_close(w.center, loc_of(guide, name))
        torch.testing.assert_close(w.center + w.delta, trace.nodes[name]["value"])
        torch.testing.assert_close(w.plain, trace.nodes[name]["value"], rtol=0, atol=0)
        assert w.site == name
        assert w.delta.abs().min() > 0
    assert "not known to be symmetric" not in handler.decisions["sigma"]
    assert handler.decisions["sigma"].startswith("shared")


def test_guide_list():
    guide = AutoGuideList(model)
    first = AutoNormal(poutine.block(model, expose=["w"]))
    second = AutoDiagonalNormal(poutine.block(model, hide=["w"]))
    guide.append(first)
    guide.append(second)
    handler, _ = replayed(guide)
    assert set(handler.seen) == WEIGHTS
    torch.testing.assert_close(handler.seen["w"].center, first.locs.w)
    torch.testing.assert_close(handler.seen["v"].center, second.loc[:2])
    torch.testing.assert_close(handler.seen["b"].center, second.loc[2])


def test_custom_guide_gives_the_centre_not_the_prior():
    loc = torch.randn(2, 3)

    def guide(x, y=None):
        pyro.sample("w", dist.Normal(loc, 0.1).to_event(2))
        pyro.sample("v", dist.StudentT(4.0, 2.0, 0.1).expand([2]).to_event(1))
        pyro.sample("b", dist.Uniform(1.0, 2.0))
        pyro.sample("sigma", dist.LogNormal(0.0, 0.1))

    trace = poutine.trace(guide).get_trace(X, Y)
    handler = Recording()
    poutine.replay(handler(model), trace=trace)(X, Y)
    assert set(handler.seen) == WEIGHTS
    assert torch.equal(handler.seen["w"].center, loc)
    assert torch.equal(handler.seen["v"].center, torch.full((2,), 2.0))
    assert handler.seen["b"].center == 1.5


def test_auto_delta_has_nothing_to_flip():
    handler, _ = replayed(AutoDelta(model))
    assert set(handler.decisions) == WEIGHTS | {"sigma"}
    assert all("Delta" in why for why in handler.decisions.values())


@pytest.mark.parametrize("wrap", ["model", "guide", "context"])
def test_guide_messenger(wrap):
    handler = Recording()
    if wrap == "model":
        guide = AutoNormalMessenger(handler(model))
        guide(X, Y)
    elif wrap == "guide":
        guide = AutoNormalMessenger(model)
        handler(guide)(X, Y)
    else:
        guide = AutoNormalMessenger(model)
        with handler:
            guide(X, Y)
    assert set(handler.seen) == WEIGHTS
    torch.testing.assert_close(handler.seen["w"].center, guide.locs.w)
    model_trace, guide_trace = guide.get_traces()
    for trace in (model_trace, guide_trace):
        for node in trace.nodes.values():
            assert not isinstance(node.get("value"), FlipoutTensor)


def test_noise_drawn_in_the_model():
    handler = Recording()
    loc = torch.randn(2, 3)

    def noisy(x):
        w = pyro.sample("w", dist.Normal(loc, 0.1).to_event(2))
        return F.linear(x, w)

    handler(noisy)(X)
    assert torch.equal(handler.seen["w"].center, loc)


def test_noise_drawn_in_the_model_under_an_empty_guide():
    handler = Recording()
    trace = poutine.trace(lambda *a: None).get_trace(X)

    def noisy(x):
        return F.linear(x, pyro.sample("w", dist.Normal(0.0, 0.1).expand([2, 3]).to_event(2)))

    poutine.trace(poutine.replay(handler(noisy), trace=trace)).get_trace(X)
    assert set(handler.seen) == {"w"}


@pytest.mark.parametrize(
    ("guide_class", "words"),
    [
        (AutoLowRankMultivariateNormal, "correlated"),
        (AutoMultivariateNormal, "correlated"),
        (AutoIAFNormal, "not affine"),
    ],
)
def test_joint_guides_give_one_warning(guide_class, words):
    guide = guide_class(model)
    svi = SVI(flipout(model), guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            svi.step(X, Y)
    ours = [w for w in caught if issubclass(w.category, FlipoutWarning)]
    assert len(ours) == 1
    assert words in str(ours[0].message)
    assert "'w'" in str(ours[0].message)


def structured(x, y=None):
    loc = pyro.param("loc", torch.zeros(2, 3))
    w = pyro.sample("w", dist.Normal(loc, 0.1).to_event(2))
    pyro.sample("v", dist.Normal(w[:, 0], 0.1).to_event(1))
    pyro.sample("b", dist.Normal(pyro.param("b_loc", torch.tensor(0.0)), 1.0))
    pyro.sample("sigma", dist.LogNormal(0.0, 0.1))


@pytest.mark.parametrize("wrap", ["model", "both", "context"])
def test_a_site_that_another_depends_on_stays_shared(wrap):
    handler = Recording()
    run = handler(model)
    guide = Recording()(structured) if wrap == "both" else structured
    with pytest.warns(FlipoutWarning, match="'w' keeps .* site 'v' depends on it"):
        if wrap == "context":
            with handler:
                trace = poutine.trace(structured).get_trace(X)
                poutine.trace(poutine.replay(model, trace=trace)).get_trace(X, Y)
        else:
            trace = poutine.trace(guide).get_trace(X)
            poutine.trace(poutine.replay(run, trace=trace)).get_trace(X, Y)
    assert "depends" in handler.decisions["w"]
    assert all(handler.decisions[site].startswith("flipped") for site in ("v", "b"))


def test_score_function_gradients_need_a_shared_draw():
    from pyro.distributions.testing.fakes import NonreparameterizedNormal

    def guide(x, y=None):
        loc = pyro.param("loc", torch.zeros(2, 3))
        pyro.sample("w", NonreparameterizedNormal(loc, 0.1).to_event(2))
        pyro.sample("v", dist.Normal(0.0, 0.1).expand([2]).to_event(1))
        pyro.sample("b", dist.Normal(0.0, 0.1))
        pyro.sample("sigma", dist.LogNormal(0.0, 0.1))

    handler = Recording()
    trace = poutine.trace(guide).get_trace(X)
    with pytest.warns(FlipoutWarning, match="'w' .*not reparametrised"):
        poutine.replay(handler(model), trace=trace)(X, Y)
    assert set(handler.seen) == {"v", "b"}


def test_a_delta_computed_from_draws_is_reported():
    def guide(x, y=None):
        loc = pyro.param("loc", torch.zeros(6))
        z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1), infer={"is_auxiliary": True})
        pyro.sample("w", dist.Delta((z * 2).reshape(2, 3), event_dim=2))
        pyro.sample("v", dist.Normal(0.0, 0.1).expand([2]).to_event(1))
        pyro.sample("b", dist.Normal(0.0, 0.1))
        pyro.sample("sigma", dist.LogNormal(0.0, 0.1))

    trace = poutine.trace(guide).get_trace(X)
    handler = Recording()
    with pytest.warns(FlipoutWarning, match="'w' .*computes it from .*'z'"):
        poutine.replay(handler(model), trace=trace)(X, Y)
    assert set(handler.seen) == {"v", "b"}


def test_fair_two_point_mask_by_request():
    center = torch.randn(2, 3)

    def dropconnect(x, mark):
        infer = {"flipout": True} if mark else {}
        mask = pyro.sample("m", dist.Bernoulli(0.5).expand([2, 3]).to_event(2), infer=infer)
        return F.linear(x, 2 * center * mask)

    handler = Recording()
    handler(dropconnect)(X, False)
    assert handler.decisions["m"] == "shared: it is discrete"
    out = handler(dropconnect)(X, True)
    masks = handler.seen["m"].materialize()
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(out, torch.einsum("ni,noi->no", X, 2 * center * masks))
