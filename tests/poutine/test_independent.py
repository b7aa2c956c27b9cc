"""The explicit reference: example by example equal to a plain net on its own weights."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import nn

from pyro_flipout import FlipoutWarning, MissingRuleError
from pyro_flipout.infer import AutoMeanField
from pyro_flipout.poutine import IndependentMessenger, independent
from tests.helpers import Recording, check_network, mlp
from tests.poutine.test_estimator import bonferroni, discrepancy, setup


class RecordingIndependent(Recording, IndependentMessenger):
    pass


NETS = {
    "dense": (lambda: mlp((4, 8, 3)), (5, 4)),
    "time": (lambda: mlp((4, 8, 3)), (5, 6, 4)),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
        ),
        (5, 2, 4, 4),
    ),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (5, 4, 7)),
}


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoDiagonalNormal, AutoMeanField])
@pytest.mark.parametrize("net", NETS)
def test_network(float64, net, guide_class):
    make, shape = NETS[net]
    handler = RecordingIndependent(on_missing_rule="error")
    check_network(make(), guide_class, torch.randn(shape), handler=handler)
    for weight in handler.seen.values():
        explicit = weight.materialize()
        assert not (explicit[0] == explicit[1]).any()


def functional(kind):
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(4, 3), 1.0).to_event(2))
        b = pyro.sample("b", dist.Normal(torch.ones(3), 1.0).to_event(1))
        if kind == "matmul":
            return b + x @ w * 2 * b
        return torch.mm(x, w.t().T).add(b)

    return model


@pytest.mark.parametrize("kind", ["matmul", "transposed"])
def test_functions(float64, kind):
    handler = RecordingIndependent(on_missing_rule="error")
    x = torch.randn(5, 4)
    out = handler(functional(kind))(x)
    w, b = (handler.seen[name].materialize() for name in "wb")
    for n in range(5):
        expected = x[n] @ w[n]
        expected = b[n] + expected * 2 * b[n] if kind == "matmul" else expected + b[n]
        torch.testing.assert_close(out[n], expected)
    with pytest.raises(ValueError, match="5 is known"):
        handler.seen["w"].materialize(4)


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoMeanField])
def test_unbiased(guide_class):
    model, guide, x, y = setup(guide_class)
    z, shared, own = discrepancy(model, independent(model), guide, (x, y), Trace_ELBO(), 250)
    assert z < bonferroni(shared.numel())
    assert own.sum() < shared.sum()


def test_a_bug_is_noticed(monkeypatch):
    """Planted: the examples' draws are from another distribution."""
    model, guide, x, y = setup()
    handler = IndependentMessenger()
    make = IndependentMessenger._flip

    def biased(self, msg, draw):
        make(self, msg, draw)
        site = msg["value"]._origin
        object.__setattr__(
            site.found, "view", lambda drawn, view=site.found.view: 1.5 * view(drawn)
        )

    monkeypatch.setattr(IndependentMessenger, "_flip", biased)
    z, shared, _ = discrepancy(model, handler(model), guide, (x, y), Trace_ELBO(), 250)
    assert z > bonferroni(shared.numel())


def test_what_it_does_not_support():
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        return F.layer_norm(x, (3,), w)

    handler = IndependentMessenger()
    with pytest.warns(FlipoutWarning, match="'w' .* independent cannot be used in .*layer_norm"):
        handler(model)(torch.randn(4, 3))
    assert handler(model)(torch.randn(4, 3)).shape == (4, 3)
    assert handler.decisions["w"].startswith("shared")
    with pytest.raises(MissingRuleError, match=r"hide it with independent\(hide=\[...\]\)"):
        independent(model, on_missing_rule="error")(torch.randn(4, 3))


def test_queries_and_traces_are_plain():
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        assert w.shape == (2, 3)
        assert w.norm() > 0
        assert w.detach().dim() == 2
        return F.linear(x, w)

    trace = pyro.poutine.trace(independent(model, on_missing_rule="error")).get_trace(
        torch.randn(4, 3)
    )
    assert type(trace.nodes["w"]["value"]) is torch.Tensor


def test_no_examples():
    model, _, x, _ = setup()
    assert independent(model.net)(x[:0]).shape == (0, 2)
