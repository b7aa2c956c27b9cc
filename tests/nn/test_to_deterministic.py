"""A plain network at the posterior mean."""

import pickle

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

import pyro_flipout.nn as fnn
from pyro_flipout import flipout
from pyro_flipout.infer import AutoMeanField
from pyro_flipout.nn import HorseshoePrior, bayesianize, to_deterministic
from tests.helpers import mlp, randomize
from tests.nn.networks import NETWORKS, Sequences, TiedLM, tokens
from tests.nn.oracle import ready

GUIDES = [AutoNormal, AutoDiagonalNormal, AutoMeanField, AutoDelta]


def no_pyro(net):
    return not any(
        isinstance(m, PyroModule) or any("pyro" in key for key in vars(m)) for m in net.modules()
    )


@pytest.mark.parametrize("guide_class", GUIDES)
@pytest.mark.parametrize("network", NETWORKS)
def test_plain_network_at_the_medians(network, guide_class, float64):
    make, data = NETWORKS[network]
    net, x = make().eval(), data()
    model = bayesianize(net, hide=["*bias*"])
    guide = guide_class(model)
    guide(x)
    randomize(guide, 0.1)
    plain = to_deterministic(flipout(model), guide)
    assert no_pyro(plain)
    assert [type(m) for m in plain.modules()] == [type(m) for m in net.modules()]
    assert list(plain.state_dict()) == list(net.state_dict())
    assert repr(plain) == repr(net)
    for module in plain.modules():
        if isinstance(module, nn.LSTM):
            assert [id(w) for w in module._flat_weights] == [id(w) for w in module.parameters()]
    medians = guide.median()
    torch.testing.assert_close(plain(x), poutine.condition(model, data=medians)(x))
    assert all(p.requires_grad and p.is_leaf for p in plain.parameters())
    pickle.loads(pickle.dumps(plain))


def test_at_scale_zero_the_flipped_network_is_the_plain_one(float64):
    net = Sequences()
    x = tokens()
    model = bayesianize(net)
    guide = AutoNormal(model, init_loc_fn=fnn.init_to_pretrained(net), init_scale=1e-15)
    guide(x)
    trace = poutine.trace(guide).get_trace(x)
    out = poutine.replay(flipout(model, on_missing_rule="error"), trace=trace)(x)
    torch.testing.assert_close(out, net(x))
    torch.testing.assert_close(to_deterministic(model, guide)(x), net(x))


def test_layers(float64):
    model = PyroModule[nn.Sequential](
        fnn.FlipoutEmbedding(7, 4, padding_idx=0, prior=HorseshoePrior()),
        fnn.FlipoutLSTM(4, 4, batch_first=True),
    )
    x = tokens()
    guide = ready(model, AutoNormal, x)
    plain = to_deterministic(model, guide)
    assert [type(m) for m in plain.modules()] == [nn.Sequential, nn.Embedding, nn.LSTM]
    assert no_pyro(plain)
    torch.testing.assert_close(plain(x)[0], poutine.condition(model, guide.median())(x)[0])
    assert plain[0].weight[0].abs().max() == 0
    plain = to_deterministic(attention := fnn.FlipoutMultiheadAttention(4, 2), zeros(attention))
    assert type(plain.out_proj) is type(nn.MultiheadAttention(4, 2).out_proj)


def zeros(model):
    trace = poutine.trace(model).get_trace(*(torch.zeros(2, 3, 4),) * 3)
    return {name: torch.zeros_like(trace.nodes[name]["value"]) for name in trace.stochastic_nodes}


def test_tied_weights_stay_tied():
    model = bayesianize(TiedLM())
    guide = AutoNormal(model)
    guide(tokens())
    plain = to_deterministic(model, guide)
    assert plain.decode.weight is plain.embed.weight
    assert plain.block is plain.again
    assert isinstance(model.embed, PyroModule)


def test_part_of_a_model():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = bayesianize(mlp())
            self.scale = PyroParam(torch.tensor(2.0), dist.constraints.positive)

        def forward(self, x):
            return pyro.sample("y", dist.Normal(self.net(x), self.scale).to_event(2))

    model, x = Model(), torch.randn(3, 4)
    guide = AutoNormal(poutine.block(model, hide=["y"]))
    guide(x)
    net = to_deterministic(model.net, guide)
    assert no_pyro(net)
    torch.testing.assert_close(net[0].bias.detach(), guide.median()["net.0.bias"])
    whole = to_deterministic(model, guide)  # its forward is Pyro's: it stays a PyroModule
    assert type(whole) is Model
    assert poutine.trace(whole).get_trace(x).stochastic_nodes == ["y"]
    torch.testing.assert_close(whole.scale.detach(), torch.tensor(2.0))
    assert no_pyro(whole.net)
    assert type(model.net[0]) is not nn.Linear


def test_errors():
    model = bayesianize(mlp())
    with pytest.raises(ValueError, match="never called"):
        to_deterministic(model, AutoNormal(model))
    with pytest.raises(ValueError, match="no site '0.weight'"):
        to_deterministic(model, {})
    with pytest.raises(TypeError, match="no median"):
        to_deterministic(model, lambda x: None)
