"""Priors: shapes, scales, dtype, and sites of their own."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import nn

from pyro_flipout import FlipoutTensor, flipout
from pyro_flipout.infer import AutoMeanField
from pyro_flipout.nn import (
    FlipoutLinear,
    HorseshoePrior,
    IIDPrior,
    KaimingPrior,
    LaplacePrior,
    PretrainedPrior,
    StudentTPrior,
    XavierPrior,
    bayesianize,
)
from tests.helpers import Recording
from tests.nn.oracle import Execution, assert_explicit, ready

WEIGHT = torch.full((4, 6, 3), 2.0)
BIAS = torch.full((4,), 0.5)
PRIORS = [
    (IIDPrior(dist.Cauchy(0.0, 2.0)), WEIGHT, dist.Cauchy(0.0, 2.0)),
    (IIDPrior(dist.Normal(torch.zeros(3), 2.0)), WEIGHT, dist.Normal(0.0, 2.0)),
    (IIDPrior(dist.Normal(torch.zeros(3), 2.0).to_event(1)), WEIGHT, dist.Normal(0.0, 2.0)),
    (LaplacePrior(0.5), WEIGHT, dist.Laplace(0.0, 0.5)),
    (StudentTPrior(4.0, 0.5), WEIGHT, dist.StudentT(4.0, 0.0, 0.5)),
    (KaimingPrior(), WEIGHT, dist.Normal(0.0, math.sqrt(2 / 18))),
    (KaimingPrior(gain=1.0, bias_scale=0.1), BIAS, dist.Normal(0.0, 0.1)),
    (XavierPrior(), WEIGHT, dist.Normal(0.0, math.sqrt(2 / (18 + 12)))),
    (XavierPrior(bias_scale=0.2), BIAS, dist.Normal(0.0, 0.2)),
    (PretrainedPrior(0.3), WEIGHT, dist.Normal(2.0, 0.3)),
    (PretrainedPrior(0.3, relative=True), WEIGHT, dist.Normal(2.0, 0.6)),
]


@pytest.mark.parametrize(("prior", "parameter", "expected"), PRIORS)
def test_families(prior, parameter, expected, float64):
    parameter = parameter.double()
    made = prior("weight", parameter)
    assert made.event_shape == parameter.shape
    x = torch.randn_like(parameter)
    torch.testing.assert_close(made.log_prob(x), expected.log_prob(x).sum())
    assert made.sample().dtype == torch.float64
    assert pickle.loads(pickle.dumps(prior)) == prior or "dist" in vars(prior)


def test_fan_in_keeps_the_variance():
    # Var(w x) = fan_in * gain^2 / fan_in * E x^2: an identity, no draw needed.
    for layer in (nn.Linear(50, 3), nn.Conv2d(5, 3, 4), nn.Bilinear(3, 4, 2)):
        scale = KaimingPrior(gain=1.0)("weight", layer.weight).base_dist.scale
        inputs = layer.weight[0].numel()
        torch.testing.assert_close(scale.pow(2).mean() * inputs, torch.tensor(1.0))


def test_pretrained_of_zero_names_the_parameter():
    with pytest.raises(ValueError, match="'0.bias' is zero.*relative=True"):
        PretrainedPrior(0.1, relative=True)("0.bias", torch.zeros(3))


# --------------------------------------------------------------------- scales as sites


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("guide_class", [AutoNormal, AutoDiagonalNormal, AutoMeanField])
def test_horseshoe_flips(local, guide_class, float64):
    prior = HorseshoePrior(0.5, local=local)
    model = FlipoutLinear(4, 3, prior=prior, bias_prior=dist.Normal(0.0, 1.0))
    x = torch.randn(5, 4)
    guide = ready(model, guide_class, x)
    run = Execution(model, guide, x)
    flipped = {name for name, w in run.draws.items() if isinstance(w, FlipoutTensor)}
    assert flipped == {"weight", "bias"}
    assert ("weight_local" in run.draws) is local
    assert run.draws["weight_scale"].shape == ()
    run.draws = {name: run.draws[name] for name in flipped}
    assert_explicit(run, nn.Linear(4, 3), (x,), guide)


def test_horseshoe_density(float64):
    model = FlipoutLinear(4, 3, prior=HorseshoePrior(0.5, local=True), bias_prior=BIAS_NONE)
    trace = poutine.trace(model).get_trace(torch.randn(5, 4))
    trace.compute_log_prob()
    w, tau, lam = (trace.nodes[n]["value"] for n in ("weight", "weight_scale", "weight_local"))
    expected = dist.HalfCauchy(0.5).log_prob(tau) + dist.HalfCauchy(1.0).log_prob(lam).sum()
    expected = expected + dist.Normal(0.0, tau * lam).log_prob(w).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)


def BIAS_NONE(name, parameter):
    return None


def test_horseshoe_in_svi_with_particles():
    net = bayesianize(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), HorseshoePrior())

    def model(x, y):
        mean = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean.squeeze(-1), 1.0), obs=y)

    guide = AutoNormal(model)
    x, y = torch.randn(10, 4), torch.randn(10)
    for options in ({}, {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}):
        handler = Recording(on_missing_rule="error")
        svi = SVI(handler(model), guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(**options))
        assert math.isfinite(svi.step(x, y))
        assert {"0.weight", "2.bias"} <= set(handler.seen)
        assert "0.weight_scale" not in handler.seen


def test_hierarchy_copies_and_moves():
    model = bayesianize(nn.Linear(4, 3), HorseshoePrior(local=True)).double()
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        trace = poutine.trace(flipout(each)).get_trace(torch.randn(2, 4, dtype=torch.float64))
        assert {trace.nodes[n]["value"].dtype for n in trace.stochastic_nodes} == {torch.float64}
        assert len(trace.stochastic_nodes) == 6


def test_hierarchy_needs_a_free_name():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
            self.weight_scale = nn.Parameter(torch.zeros(2))

    with pytest.raises(ValueError, match="would be called 'weight_scale'.*has already"):
        bayesianize(Net(), HorseshoePrior())
