"""One warning for one cause, with the remedy that fits it; and none where nothing is wrong."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn

from pyro_flipout import FlipoutWarning, flipout

X, Y = torch.randn(8, 3), torch.randn(8)


def step(model, guide, count=3, x=X, y=Y):
    """The warnings of some steps."""
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            svi.step(x, y)
    return [str(w.message) for w in caught if issubclass(w.category, FlipoutWarning)]


def regression(x, y=None, scale=None, size=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    mean = F.linear(x, w).squeeze(-1)
    with pyro.plate("data", len(x), subsample_size=size) as i:
        y = None if y is None else y[i]
        pyro.sample("y", dist.Normal(mean[i], 1.0 if scale is None else scale), obs=y)


def noisy(x, y):
    regression(x, y, pyro.sample("sigma", dist.HalfCauchy(1.0)))


def ordered(x, y):
    cuts = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    fn = dist.TransformedDistribution(cuts, [dist.transforms.OrderedTransform()])
    regression(x, y, 1 + pyro.sample("sigma", fn).square().sum())


@pytest.mark.parametrize("model", [noisy, ordered])
def test_a_constrained_site_is_right_as_it_is(model):
    handler = flipout()
    assert step(handler(model), AutoNormal(model)) == []
    assert "support is constrained" in handler.decisions["sigma"]
    assert "AutoNormal" not in handler.decisions["sigma"]
    assert handler.decisions["w"].startswith("flipped")


def test_a_plate_that_picks_from_what_all_examples_gave():
    def model(x, y):
        regression(x, y, size=4)

    assert step(flipout(model), AutoNormal(model)) == []


def test_a_plate_that_subsamples_other_data():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        mean = F.linear(x, w).mean()
        with pyro.plate("data", 20, subsample_size=5):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.zeros(5))

    (told,) = step(flipout(model, audit=False), AutoNormal(model))
    assert "give the model the rows that the plate picks" in told
    (told,) = step(flipout(model), AutoNormal(model))
    assert "rows in its dimension 0, but this execution has 5 examples" in told


def twelve(x, y, use=lambda w: w):
    total = 0.0
    for i in range(12):
        w = pyro.sample(f"w{i}", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        total = total + F.linear(x, use(w)).squeeze(-1)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(total, 1.0), obs=y)


def test_one_cause_of_many_sites():
    (told,) = step(flipout(twelve), AutoMultivariateNormal(twelve))
    assert all(f"'w{i}'" in told for i in range(12))

    def model(x, y):
        twelve(x, y, torch.exp)

    (told,) = step(flipout(model), AutoNormal(model))
    assert told.startswith("flipout: sites ['w0', ")
    assert "'w11'] keep their shared draws: in torch.exp, there is no" in told


def test_one_cause_is_told_in_the_step_that_it_is_found_in():
    svi = SVI(twelve, AutoMultivariateNormal(twelve), pyro.optim.Adam({}), Trace_ELBO())
    with flipout():
        svi.step(X, Y)
        with pytest.warns(FlipoutWarning, match=r"sites \['w0', .*'w11'\] keep"):
            svi.step(X, Y)


def test_what_waits_is_not_lost_by_an_error():
    def model(x, y):
        twelve(x, y, torch.exp)
        if len(x) == 1:
            raise ValueError("stop")

    handler = flipout()
    flipped = handler(model)
    with pytest.raises(ValueError, match="stop"):
        flipped(X[:1].expand(1, 3), Y[:1])
    assert handler not in pyro.poutine.runtime._PYRO_STACK


def test_a_guide_that_is_wrapped_in_place_of_the_model():
    (told,) = step(regression, flipout(AutoNormal(regression)))
    assert "wrap the model, as in SVI(flipout(model), guide" in told

    def guide(x, y):
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.zeros(1, 3)), 1.0).to_event(2))

    (told,) = step(regression, flipout(guide))
    assert "a guide is wrapped and the model beside it is not" in told
    assert step(flipout(regression), flipout(guide)) == []


@pytest.mark.parametrize("what", ["SVI", "ELBO"])
def test_what_is_no_model(what):
    elbo = Trace_ELBO()
    svi = SVI(regression, AutoNormal(regression), pyro.optim.Adam({}), elbo)
    with pytest.raises(
        TypeError, match=r"got a (SVI|Trace_ELBO), expected a model; .*SVI\(flipout"
    ):
        flipout(svi if what == "SVI" else elbo)


def test_a_module_without_sample_sites():
    layer = flipout(nn.Linear(3, 2))
    with pytest.warns(FlipoutWarning, match="has no sample site.*PyroSample"):
        layer(X)
    layer(X)  # is told once


def test_a_model_with_nothing_to_flip():
    def model(x, y):
        sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, sigma), obs=y)

    (told,) = step(flipout(model), AutoNormal(model))
    assert "no site of the model can be flipped" in told
    assert "site 'sigma': its support is constrained" in told
    assert "site 'z': it is local to the plate 'data'" in told


def test_a_branch_with_nothing_to_flip():
    def model(x, y):
        if len(x) == 8:
            noise = pyro.sample("sigma", dist.HalfCauchy(1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(0.0, noise), obs=y)
        else:
            regression(x, y)

    def guide(x, y):
        if len(x) == 8:
            pyro.sample("sigma", dist.LogNormal(pyro.param("l", torch.tensor(0.0)), 1.0))
        else:
            pyro.sample("w", dist.Normal(pyro.param("loc", torch.zeros(1, 3)), 1.0).to_event(2))

    flipped = flipout(model)
    for size in (8, 5, 8, 8, 8):
        assert step(flipped, guide, 1, X[:size], Y[:size]) == []


def test_what_inference_has_set_is_no_model_with_nothing_to_flip():
    guide, flipped = AutoNormal(regression), flipout(regression)
    guide(X, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            Predictive(flipped, guide=guide, num_samples=2)(X, Y)
            AutoNormal(flipped)(X, Y)
            pyro.poutine.condition(flipped, data={"w": torch.ones(1, 3)})(X, Y)
            flipout(regression, hide=["w"])(X, Y)
