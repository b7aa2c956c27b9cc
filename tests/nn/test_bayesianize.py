"""Conversion: every chosen parameter is a site, and nothing else is changed."""

import copy
import pickle

import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.nn.utils import parametrizations

from pyro_flipout import flipout
from pyro_flipout.nn import FlipoutLinear, HorseshoePrior, bayesianize, bayesianize_
from tests.helpers import Recording, randomize
from tests.nn.networks import NETWORKS, LeNet, N, Sequences, TiedLM, image, tokens


def run(model, guide, x):
    """The output, the flipped weights and the trace of one execution."""
    trace = poutine.trace(guide).get_trace(x)
    handler = Recording(on_missing_rule="error")
    traced = poutine.trace(poutine.replay(handler(model), trace=trace)).get_trace(x)
    return traced.nodes["_RETURN"]["value"], handler.seen, traced


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoDiagonalNormal])
@pytest.mark.parametrize("network", NETWORKS)
def test_explicit_weights(network, guide_class, float64):
    make, data = NETWORKS[network]
    net, x = make().eval(), data()  # batch norm and its buffers: by example only in eval
    model = bayesianize(net)
    assert list(model.parameters()) == []
    guide = guide_class(model)
    guide(x)
    randomize(guide, 0.1)
    out, seen, _ = run(model, guide, x)
    names = {model_name(net, name) for name, _ in net.named_parameters()}
    assert set(seen) == names
    weights = {name: w.materialize() for name, w in seen.items()}
    rows = []
    for n in range(N):
        own = {k: weights[model_name(net, k)][n] for k, _ in net.named_parameters()}
        rows.append(torch.func.functional_call(net, own, (x[n : n + 1],)))
    torch.testing.assert_close(out, torch.cat(rows), atol=1e-9, rtol=1e-9)


def model_name(net, name):
    # Pyro gives a shared module the last of its paths.
    return name.replace("block", "again") if isinstance(net, TiedLM) else name


def test_each_site_once(float64):
    model, x = bayesianize(TiedLM()), tokens()
    guide = AutoNormal(model)
    guide(x)
    _, _, trace = run(model, guide, x)
    sites = [n for n, s in trace.nodes.items() if s["type"] == "sample"]
    assert sorted(sites) == [
        "again.bias", "again.weight", "decode.bias", "embed.weight", "scales.0",
    ]  # fmt: skip
    trace.compute_log_prob()
    expected = sum(
        dist.Normal(0.0, 1.0).log_prob(trace.nodes[site]["value"]).sum() for site in sites
    )
    torch.testing.assert_close(trace.log_prob_sum(), expected)


def test_tied_weights_nested_and_copied(float64):
    class Outer(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = bayesianize(TiedLM())

        def forward(self, x):
            return self.net(x)

    x = tokens()
    for model in (Outer(), copy.deepcopy(Outer())):
        names = set(poutine.trace(model).get_trace(x).stochastic_nodes)
        assert "net.embed.weight" in names
        assert len(names) == 5
    model = pickle.loads(pickle.dumps(bayesianize(TiedLM())))
    trace = poutine.trace(model).get_trace(x)
    assert len(trace.stochastic_nodes) == 5
    assert model.decode._sites.ties["weight"][0] is model.embed


@pytest.mark.parametrize("prior", [None, HorseshoePrior()])
def test_the_second_use_read_first(prior):
    class Reverse(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.decode = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(x) - self.encode(x)

    model = bayesianize_(Reverse(), prior)
    trace = poutine.trace(flipout(model)).get_trace(torch.randn(3, 4))
    hyper = ["encode.weight_scale"] if prior else []
    assert trace.stochastic_nodes == [*hyper, "encode.weight"]
    assert trace.nodes["_RETURN"]["value"].abs().max() == 0


# ---------------------------------------------------------------- what is not changed


def test_constructor_state_and_buffers():
    net = LeNet()
    before = {name: value.clone() for name, value in net.named_buffers()}
    shown = [m.extra_repr() for m in net.modules() if not isinstance(m, nn.Linear)]
    model = bayesianize_(net)
    assert model is net
    assert isinstance(model, LeNet)
    assert isinstance(model.features[0], PyroModule[nn.Conv2d])
    assert model.features[0].padding_mode == "circular"
    assert [m.extra_repr() for m in net.modules() if not isinstance(m, nn.Linear)] == shown
    after = dict(net.named_buffers())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.nothing is None


def test_lstm_state():
    model = bayesianize(Sequences())
    assert (model.lstm.num_layers, model.lstm.bidirectional) == (2, True)
    assert "_flat_weights" not in vars(model.lstm)
    assert model.double()(tokens()).dtype == torch.float64


def test_slices_keep_their_names():
    model, x = bayesianize_(LeNet()), image()
    for _ in range(2):
        names = poutine.trace(model).get_trace(x).stochastic_nodes
        assert "features.0.weight" in names
    assert model.features[0]._pyro_context is model._pyro_context
    assert type(model.features[1:]) is nn.Sequential


def test_copy_leaves_the_network_alone():
    net = LeNet()
    model = bayesianize(net)
    assert type(net.head) is nn.Linear
    assert len(list(net.parameters())) == 7
    assert model is not net


def test_pickle_and_deepcopy(float64):
    for make, data in NETWORKS.values():
        model, x = bayesianize(make().eval()), data()
        trace = poutine.trace(model).get_trace(x)
        state = torch.get_rng_state()
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(torch.get_rng_state(), state)
            assert type(copied) is type(model)
            assert repr(copied) == repr(model)
            torch.testing.assert_close(
                poutine.replay(copied, trace=trace)(x), trace.nodes["_RETURN"]["value"]
            )


def test_moves_take_the_priors_along():
    prior = dist.TransformedDistribution(
        dist.StudentT(torch.tensor(3.0), 0.0, 1.0),
        [dist.transforms.AffineTransform(torch.tensor(1.0), torch.tensor(2.0))],
    )
    model = bayesianize(nn.Linear(2, 3), prior).double()
    trace = poutine.trace(model).get_trace(torch.randn(4, 2, dtype=torch.float64))
    trace.compute_log_prob()
    assert trace.nodes["weight"]["value"].dtype == torch.float64
    assert trace.nodes["weight"]["log_prob_sum"].dtype == torch.float64


# ----------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("hide", "expose", "sites"),
    [
        (["*.bias", "head"], None, {"features.0.weight", "features.1.weight", "features.4.weight"}),
        ([nn.BatchNorm2d, "*.bias", "head"], None, {"features.0.weight", "features.4.weight"}),
        (None, [nn.Linear], {"head.weight", "head.bias"}),
        (["head.bias"], ["head"], {"head.weight"}),
        (None, ["features.?.bias"], {"features.0.bias", "features.1.bias"}),
        ([nn.Sequential], None, {"head.weight", "head.bias"}),
    ],
)  # fmt: skip
def test_hide_and_expose(hide, expose, sites):
    net = LeNet()
    names = {name for name, _ in net.named_parameters()}
    kept = {name: p for name, p in net.named_parameters() if name not in sites}
    model = bayesianize_(net, hide=hide, expose=expose)
    assert {name for name, _ in model.named_parameters()} == names - sites
    assert all(p is kept[name] for name, p in model.named_parameters())
    assert set(poutine.trace(model).get_trace(image()).stochastic_nodes) == sites


def test_attention_output():
    model = bayesianize(nn.MultiheadAttention(4, 2, batch_first=True), expose=["out_proj"])
    assert set(dict(model.named_parameters())) == {"in_proj_weight", "in_proj_bias"}
    model = bayesianize(
        nn.Transformer(4, 2, 1, 1, 8, batch_first=True), expose=[nn.MultiheadAttention]
    )
    assert not any("attn" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"hide": ["body"]},
            ValueError,
            "hide has 'body'.*no parameter of LeNet.*features.0.weight",
        ),
        ({"expose": [nn.GRU]}, ValueError, "expose has GRU"),
        ({"hide": "head"}, TypeError, "hide='head', expected a list"),
        ({"hide": [nn.Linear(1, 1)]}, TypeError, "expected a name or a module class"),
        ({"hide": ["*"]}, ValueError, "no floating-point parameter of LeNet is chosen"),
        ({"prior": torch.distributions.Normal(0.0, 1.0)}, TypeError, "pyro.distributions"),
        ({"prior": lambda name, p: 1.0}, TypeError, "prior of 'features.0.weight': got 1.0"),
        (
            {"prior": dist.Normal(torch.zeros(5), 1.0)},
            ValueError,
            r"Normal of shape \(5,\).*parameter's shape \(4, 1, 3, 3\)",
        ),
    ],
)
def test_errors(options, error, words):
    net = LeNet()
    with pytest.raises(error, match=words):
        bayesianize_(net, **options)
    assert type(net) is LeNet
    assert type(net.head) is nn.Linear


def test_tied_names_that_contradict():
    with pytest.raises(ValueError, match="'decode.weight' in hide and 'embed.weight' in expose"):
        bayesianize_(TiedLM(), hide=["decode.weight"], expose=["embed"])
    model = bayesianize_(TiedLM(), hide=["decode.weight"])
    assert model.decode.weight is model.embed.weight


def test_what_cannot_be_converted():
    with pytest.raises(TypeError, match="convert it first"):
        bayesianize_(flipout(bayesianize(nn.Linear(2, 2))))
    with pytest.raises(TypeError, match="'' is a DataParallel"):
        bayesianize_(nn.DataParallel(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="lazy"):
        bayesianize_(nn.Sequential(nn.LazyLinear(2)))
    with pytest.raises(TypeError, match="expected an nn.Module"):
        bayesianize_(torch.tanh)


# ------------------------------------------------------------------ unusual networks


def test_a_pyro_module():
    class Half(PyroModule):
        def __init__(self):
            super().__init__()
            self.plain = nn.Linear(4, 4)
            self.flip = FlipoutLinear(4, 4, bias_prior=lambda name, p: None)
            self.own = PyroSample(dist.Normal(0.0, 1.0))
            self.scale = PyroParam(torch.tensor(2.0), dist.constraints.positive)
            self.direct = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return self.flip(self.plain(x)) * self.scale + self.own + self.direct

    x = torch.randn(3, 4)
    model = bayesianize_(Half())
    model = copy.deepcopy(model)
    assert isinstance(model, Half)
    assert [name for name, _ in model.named_parameters()] == ["scale_unconstrained"]
    trace = poutine.trace(model).get_trace(x)
    assert set(trace.stochastic_nodes) == {
        "plain.weight", "plain.bias", "flip.weight", "flip.bias", "own", "direct",
    }  # fmt: skip
    guide = AutoNormal(model)
    guide(x)
    _, seen, _ = run(model, guide, x)
    assert set(seen) == set(trace.stochastic_nodes)


def test_parametrizations(float64):
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    model, x = bayesianize(net), torch.randn(3, 4)
    names = poutine.trace(model).get_trace(x).stochastic_nodes
    assert "0.parametrizations.weight.original1" in names
    hidden = bayesianize(net, hide=["0"])
    assert set(poutine.trace(hidden).get_trace(x).stochastic_nodes) == {
        "1.weight",
        "1.bias",
    }
    torch.testing.assert_close(hidden[0](x), net[0](x))


def test_trains_the_deterministic_parts():
    net = bayesianize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), expose=["1"])
    trace = poutine.trace(net, param_only=True).get_trace(torch.randn(3, 4))
    assert {"0.weight", "0.bias"} <= set(trace.nodes)
    assert trace.nodes["0.weight"]["value"] is net[0].weight
