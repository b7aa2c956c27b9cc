"""Guides that start at a trained network."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule
from torch import nn

from pyro_flipout.infer import AutoMeanField
from pyro_flipout.nn import HorseshoePrior, bayesianize, init_to_pretrained, scale_fraction
from tests.helpers import mlp
from tests.nn.networks import TiedLM, tokens

X = torch.randn(5, 4)


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoDiagonalNormal, AutoMeanField, AutoDelta])
def test_means_at_the_weights(guide_class):
    net = mlp()
    guide = guide_class(bayesianize(net), init_loc_fn=init_to_pretrained(net))
    guide(X)
    medians = guide.median()
    assert set(medians) == set(dict(net.named_parameters()))
    for name, value in net.named_parameters():
        torch.testing.assert_close(medians[name], value.detach())


def test_shared_modules_and_state_dicts():
    net = TiedLM()
    init = init_to_pretrained(net.state_dict())
    for each in (init, init_to_pretrained(net)):
        pyro.clear_param_store()
        guide = AutoNormal(bayesianize(net), init_loc_fn=each)
        guide(tokens())
        torch.testing.assert_close(guide.median()["again.weight"], net.block.weight.detach())


def test_a_network_converted_in_place_afterwards():
    net = mlp()
    before = net[0].weight.detach().clone()
    init = init_to_pretrained(net)
    net[0].weight.data.zero_()
    guide = AutoNormal(net, init_loc_fn=init)
    assert torch.equal(guide.init_loc_fn({"name": "0.weight", "fn": _like(before)}), before)


def _like(value):
    return dist.Normal(torch.zeros_like(value), 1.0).to_event(2)


def test_prefix():
    class Model(PyroModule):
        def __init__(self, net):
            super().__init__()
            self.net = bayesianize(net)

        def forward(self, x):
            return self.net(x)

    net = mlp()
    guide = AutoNormal(Model(net), init_loc_fn=init_to_pretrained(net, prefix="net"))
    guide(X)
    torch.testing.assert_close(guide.median()["net.0.weight"], net[0].weight.detach())
    guide = AutoNormal(Model(net), init_loc_fn=init_to_pretrained(net))
    with pytest.raises(ValueError, match="has '0.weight'.*'net.0.weight'; say prefix='net'"):
        guide(X)
    guide = AutoNormal(bayesianize(mlp((4, 9, 3))), init_loc_fn=init_to_pretrained(net))
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(9, 4\).*\(8, 4\)"):
        guide(X)


def test_other_sites_fall_back():
    net = nn.Linear(4, 3)
    guide = AutoNormal(bayesianize(net, HorseshoePrior()), init_loc_fn=init_to_pretrained(net))
    guide(X)
    assert guide.median()["weight_scale"] > 0


# ------------------------------------------------------------------------------- scale


def test_scale_of_automeanfield():
    net = mlp()
    guide = AutoMeanField(
        bayesianize(net),
        init_loc_fn=init_to_pretrained(net),
        init_scale=scale_fraction(0.2, minimum=0.01),
    )
    guide(X)
    for name, value in net.named_parameters():
        expected = (0.2 * value.detach().abs()).clamp(min=0.01)
        torch.testing.assert_close(guide.loc_and_scale(name)[1], expected)


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoDiagonalNormal])
def test_scale_of_stock_guides(guide_class):
    net = mlp()
    guide = guide_class(bayesianize(net), init_loc_fn=init_to_pretrained(net))
    guide(X)
    before = {name: id(p) for name, p in guide.named_parameters()}
    assert scale_fraction(0.2, minimum=0.01).set_(guide) is guide
    assert {name: id(p) for name, p in guide.named_parameters()} == before
    trace = poutine.trace(guide).get_trace(X)
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    expected = (0.2 * weights.abs()).clamp(min=0.01)
    draws = [site["fn"].base_dist for site in trace.nodes.values() if _is_auxiliary(site)]
    torch.testing.assert_close(torch.cat([d.scale.detach().flatten() for d in draws]), expected)


def _is_auxiliary(site):
    return site["type"] == "sample" and site["infer"].get("is_auxiliary", False)


def test_scale_errors():
    guide = AutoNormal(bayesianize(mlp()))
    with pytest.raises(ValueError, match="call the guide once"):
        scale_fraction().set_(guide)
    with pytest.raises(TypeError, match="got AutoDelta.*init_scale=scale_fraction"):
        scale_fraction().set_(AutoDelta(bayesianize(mlp())))
    with pytest.raises(ValueError, match="fraction=0"):
        scale_fraction(0)
