"""Local reparameterisation: exact moments, the same gradients on average, and what it refuses."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import nn

from pyro_flipout import FlipoutError, FlipoutMessenger, FlipoutWarning, MissingRuleError, flipout
from pyro_flipout.infer import AutoMeanField
from pyro_flipout.poutine import (
    LocalReparameterizationMessenger,
    local_reparameterization,
    local_reparameterization_messenger,
)
from tests.helpers import bayesian, randomize
from tests.poutine.test_estimator import bonferroni, discrepancy, setup

STRICT = {"on_missing_rule": "error"}


class FixedNoise:
    """Keeps the standard noise of every layer, in place of torch.randn_like."""

    def __init__(self, monkeypatch):
        self.drawn = []
        monkeypatch.setattr(local_reparameterization_messenger.torch, "randn_like", self)
        self.right = torch.randn

    def __call__(self, like):
        self.drawn.append(self.right(like.shape, dtype=like.dtype))
        return self.drawn[-1]


def posteriors(guide, *args):
    """Centre and scale of every site of an AutoNormal or AutoMeanField."""
    if isinstance(guide, AutoMeanField):
        return {n: guide.loc_and_scale(n) for n in guide.prototype_trace.stochastic_nodes}
    return {
        name: tuple(t.detach() for t in guide._get_loc_and_scale(name))
        for name in guide.prototype_trace.stochastic_nodes
    }


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoMeanField])
def test_two_layers_are_the_formula(float64, monkeypatch, guide_class):
    model, guide, x, y = setup(guide_class)
    noise = FixedNoise(monkeypatch)
    trace = poutine.trace(guide).get_trace(x, y)
    noise.drawn.clear()
    program = local_reparameterization(model.net, **STRICT)
    with poutine.replay(trace=trace):
        out = program(x)
    q = {n.removeprefix("net."): v for n, v in posteriors(guide).items()}
    hidden, zeta = x, iter(noise.drawn)
    for layer in ("0", "2"):
        (w, s), (b, t) = q[f"{layer}.weight"], q[f"{layer}.bias"]
        mean = hidden @ w.T + b
        pre = mean + (hidden**2 @ (s**2).T + t**2).sqrt() * next(zeta)
        hidden = torch.tanh(pre)
    torch.testing.assert_close(out.detach(), pre)
    assert len(noise.drawn) == 2


def functional(x, how):
    w = pyro.sample("w", dist.Normal(torch.ones(4, 3), torch.rand(4, 3) + 0.1).to_event(2))
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 0.5).to_event(1))
    if how == "matmul":
        return x @ w + b
    if how == "linear":
        return F.linear(x, w.T, b)
    if how == "bias":
        return F.linear(x, torch.ones(3, 4).to(x), b)
    return torch.mm(x, w.t().t()).add(b)


@pytest.mark.parametrize("how", ["matmul", "linear", "bias", "transposed"])
def test_functions(float64, monkeypatch, how):
    noise = FixedNoise(monkeypatch)
    x = torch.randn(5, 4)
    trace = poutine.trace(functional).get_trace(x, how)
    out = local_reparameterization(poutine.replay(functional, trace=trace), **STRICT)(x, how)
    s = trace.nodes["w"]["fn"].base_dist.scale
    variance = x**2 @ s**2
    if how == "bias":
        expected = x.sum(1, keepdim=True) + 0.5 * noise.drawn[0]
    elif how == "linear":
        expected = x.sum(1, keepdim=True) + (variance + 0.25).sqrt() * noise.drawn[0]
    else:
        expected = x.sum(1, keepdim=True) + variance.sqrt() * noise.drawn[0] + 0.5 * noise.drawn[1]
    torch.testing.assert_close(out, expected.expand(5, 3))


def test_inputs_of_zero_have_finite_gradients(float64):
    scale = torch.ones(2, 3, requires_grad=True)
    x = torch.zeros(4, 3, requires_grad=True)

    def model(x):
        return F.linear(x, pyro.sample("w", dist.Normal(torch.zeros(2, 3), scale).to_event(2)))

    local_reparameterization(model, **STRICT)(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (scale.grad == 0).all()


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoDiagonalNormal, AutoMeanField])
def test_unbiased(guide_class):
    model, guide, x, y = setup(guide_class)
    program = local_reparameterization(model, **STRICT)
    z, shared, own = discrepancy(model, program, guide, (x, y), Trace_ELBO(), 400)
    assert z < bonferroni(shared.numel())
    assert own.sum() < shared.sum()


def test_a_bug_is_noticed(monkeypatch):
    """Planted: the standard deviations are added up in place of the variances."""
    wrong = LocalReparameterizationMessenger.tensor.scale.fget
    model, guide, x, y = setup()
    randomize(guide, 0.3)
    monkeypatch.setattr(
        LocalReparameterizationMessenger.tensor,
        "scale",
        property(lambda self: wrong(self).sqrt()),
    )
    program = local_reparameterization(model)
    z, shared, _ = discrepancy(model, program, guide, (x, y), Trace_ELBO(), 400)
    assert z > bonferroni(shared.numel())


def test_training():
    model, guide, x, y = setup()
    svi = SVI(
        local_reparameterization(model, **STRICT),
        guide,
        pyro.optim.Adam({"lr": 0.02}),
        Trace_ELBO(),
    )
    losses = [svi.step(x, y) for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10])


# ---------------------------------------------------------------------------- refusals


def net_of(layer, shape, fn=dist.Normal):
    net = bayesian(layer)

    def guide(x):
        for name in ("weight", "bias"):
            value = getattr(layer, "_pyro_samples", {})[name]
            loc = pyro.param(f"{name}_loc", torch.zeros(value.shape()))
            pyro.sample(name, fn(loc, 0.5).to_event(value.event_dim))

    return net, guide, torch.randn(shape)


REFUSED = {
    "conv": (lambda: nn.Conv2d(2, 3, 3), (4, 2, 5, 5), dist.Normal, "conv2d.*every pixel"),
    "sequence": (lambda: nn.Linear(3, 2), (4, 6, 3), dist.Normal, r"\(4, 6, 3\), not \(N, in\)"),
    "vector": (lambda: nn.Linear(3, 2), (3,), dist.Normal, r"shape \(3,\), not \(N, in\)"),
    "laplace": (lambda: nn.Linear(3, 2), (4, 3), dist.Laplace, "needs a Normal.*is a Laplace"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_sites_keep_their_shared_draw(case):
    make, shape, fn, message = REFUSED[case]
    net, guide, x = net_of(make(), shape, fn)
    trace = poutine.trace(guide).get_trace(x)
    handler = LocalReparameterizationMessenger()
    program = poutine.replay(handler(net), trace=trace)
    with pytest.warns(FlipoutWarning, match=message):
        out = program(x)
    expected = poutine.replay(net, trace=trace)(x)
    assert torch.equal(out, expected)
    assert torch.equal(program(x), expected)  # and no second warning
    assert all(d.startswith("shared") for d in handler.decisions.values())
    if case != "laplace":
        with pytest.raises(MissingRuleError, match=message):
            poutine.replay(local_reparameterization(net, **STRICT), trace=trace)(x)


def test_other_functions_are_refused():
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        return F.layer_norm(x, (3,), w)

    with pytest.warns(FlipoutWarning, match="local_reparameterization cannot be used in"):
        local_reparameterization(model)(torch.randn(4, 3))


@pytest.mark.parametrize("second", ["same", "transposed", "conv"])
def test_a_second_use_raises(second):
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 3), 1.0).to_event(2))
        h = F.linear(x, w)
        if second == "conv":
            return F.conv1d(h[..., None], w[..., None])
        return F.linear(h, w if second == "same" else w.t())

    with pytest.raises(FlipoutError, match=r"'w' is used a second time .*hide=\['w'\]"):
        local_reparameterization(model)(torch.randn(4, 3))
    local_reparameterization(model, hide=["w"])(torch.randn(4, 3))


def test_flattened_time_steps_are_not_examples():
    def model(x):
        first = pyro.sample("first", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        second = pyro.sample("second", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        return F.linear(x[:, 0], first).sum() + F.linear(x.flatten(0, 1), second).sum()

    with pytest.warns(FlipoutWarning, match="'second' .* 24 rows .* 4 examples"):
        local_reparameterization(model)(torch.randn(4, 6, 3))


def test_traces_and_queries_are_plain():
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        assert w.shape == (2, 3)
        assert w.norm() > 0
        return F.linear(x, w)

    handler = LocalReparameterizationMessenger(**STRICT)
    trace = poutine.trace(handler(model)).get_trace(torch.randn(4, 3))
    assert type(trace.nodes["w"]["value"]) is torch.Tensor
    assert handler.decisions == {"w": "local_reparameterization"}


def test_untouched_sites():
    def model(x):
        return F.linear(x, pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2)))

    x, w = torch.randn(4, 3), torch.randn(2, 3)
    program = poutine.condition(local_reparameterization(model, **STRICT), {"w": w})
    assert torch.equal(program(x), F.linear(x, w))
    assert local_reparameterization(model)(x[:0]).shape == (0, 2)


def test_each_site_has_one_estimator():
    """Beside flipout: the inner handler has the site, and a mixed layer has both."""
    model, guide, x, y = setup()
    inner = LocalReparameterizationMessenger(expose=["net.0.weight", "net.0.bias"])
    outer = FlipoutMessenger(**STRICT)
    Trace_ELBO().loss(outer(inner(model)), guide, x, y)
    assert inner.decisions["net.0.weight"] == "local_reparameterization"
    assert outer.decisions["net.2.weight"].startswith("flipped")
    mixed = flipout(local_reparameterization(model, expose=["net.0.bias"]))
    with pytest.warns(FlipoutWarning, match="'net.0.bias' .* has another estimator"):
        Trace_ELBO().loss(mixed, guide, x, y)


def test_options():
    with pytest.raises(TypeError, match="local_reparameterization: got unknown options"):
        local_reparameterization(lambda: None, batch_dim=0)
    model, *_ = setup()
    assert isinstance(local_reparameterization(model), nn.Module)
    assert isinstance(local_reparameterization(), LocalReparameterizationMessenger)
