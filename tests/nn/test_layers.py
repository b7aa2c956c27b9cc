"""Flipout layers: torch's constructor, one W_n for each example, no handler."""

import copy
import inspect
import io
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule
from torch import nn

import pyro_flipout.nn as fnn
from pyro_flipout import ExampleDimError, FlipoutTensor, FlipoutWarning, flipout
from pyro_flipout.infer import AutoMeanField
from tests.helpers import Recording
from tests.nn.oracle import Execution, assert_explicit, ready

N = 5
tokens = torch.randint(0, 7, (N, 3), generator=torch.Generator().manual_seed(0))


def data(*shape):
    return lambda: torch.randn(*shape)


# layer, its twin, arguments, keywords, data, dimension of the examples in data and in output
CASES = {
    "linear": (fnn.FlipoutLinear, nn.Linear, (4, 3), {}, data(N, 4), 0, 0),
    "linear, tokens": (fnn.FlipoutLinear, nn.Linear, (4, 3), {}, data(N, 6, 4), 0, 0),
    "linear, no bias": (fnn.FlipoutLinear, nn.Linear, (4, 3), {"bias": False}, data(N, 4), 0, 0),
    "conv1d": (fnn.FlipoutConv1d, nn.Conv1d, (2, 4, 3), {"padding": 1}, data(N, 2, 8), 0, 0),
    "conv2d": (
        fnn.FlipoutConv2d,
        nn.Conv2d,
        (2, 4, 3),
        {"padding": 1, "padding_mode": "reflect", "stride": 2, "groups": 2},
        data(N, 2, 6, 6),
        0,
        0,
    ),
    "conv3d": (fnn.FlipoutConv3d, nn.Conv3d, (1, 2, 2), {}, data(N, 1, 3, 3, 3), 0, 0),
    "conv_transpose1d": (
        fnn.FlipoutConvTranspose1d,
        nn.ConvTranspose1d,
        (2, 3, 3),
        {"stride": 2, "output_padding": 1},
        data(N, 2, 4),
        0,
        0,
    ),
    "conv_transpose2d": (
        fnn.FlipoutConvTranspose2d,
        nn.ConvTranspose2d,
        (2, 4, 3),
        {"groups": 2},
        data(N, 2, 4, 4),
        0,
        0,
    ),
    "conv_transpose3d": (
        fnn.FlipoutConvTranspose3d,
        nn.ConvTranspose3d,
        (1, 2, 2),
        {},
        data(N, 1, 2, 2, 2),
        0,
        0,
    ),
    "embedding": (fnn.FlipoutEmbedding, nn.Embedding, (7, 4), {}, lambda: tokens, 0, 0),
    "embedding_bag": (
        fnn.FlipoutEmbeddingBag,
        nn.EmbeddingBag,
        (7, 4),
        {"mode": "sum", "padding_idx": 0},
        lambda: tokens,
        0,
        0,
    ),
    "rnn": (fnn.FlipoutRNN, nn.RNN, (3, 4), {"nonlinearity": "relu"}, data(6, N, 3), 1, 1),
    "lstm": (
        fnn.FlipoutLSTM,
        nn.LSTM,
        (3, 4),
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        data(N, 6, 3),
        0,
        0,
    ),
    "lstm, time-major": (fnn.FlipoutLSTM, nn.LSTM, (3, 4), {"proj_size": 2}, data(6, N, 3), 1, 1),
    "gru": (fnn.FlipoutGRU, nn.GRU, (3, 4), {"batch_first": True}, data(N, 6, 3), 0, 0),
    "rnn_cell": (fnn.FlipoutRNNCell, nn.RNNCell, (3, 4), {}, data(N, 3), 0, 0),
    "lstm_cell": (fnn.FlipoutLSTMCell, nn.LSTMCell, (3, 4), {}, data(N, 3), 0, 0),
    "gru_cell": (fnn.FlipoutGRUCell, nn.GRUCell, (3, 4), {}, data(N, 3), 0, 0),
}
LAYERS = [
    cls for name, cls in sorted(vars(fnn).items()) if name.startswith("Flipout") and name[7] > "@"
]
GUIDES = [AutoNormal, AutoDiagonalNormal, AutoMeanField]


def test_every_layer_has_a_case():
    tested = {case[0] for case in CASES.values()}
    assert set(LAYERS) - tested == {fnn.FlipoutBilinear, fnn.FlipoutMultiheadAttention}


@pytest.mark.parametrize("guide_class", GUIDES)
@pytest.mark.parametrize("case", CASES)
def test_layer_alone(case, guide_class, float64):
    layer, twin, args, kwargs, make, dim, out_dim = CASES[case]
    model, plain, x = layer(*args, **kwargs), twin(*args, **kwargs), make()
    guide = ready(model, guide_class, x)
    run = Execution(model, guide, x)
    assert_explicit(run, plain, (x,), guide, (dim,), out_dim)


def test_bilinear(float64):
    model, plain = fnn.FlipoutBilinear(3, 4, 2), nn.Bilinear(3, 4, 2)
    args = torch.randn(N, 3), torch.randn(N, 4)
    guide = ready(model, AutoNormal, *args)
    assert_explicit(Execution(model, guide, *args), plain, args, guide, (0, 0))


@pytest.mark.parametrize(
    "kwargs",
    [{"batch_first": True}, {}, {"batch_first": True, "kdim": 4, "vdim": 4, "add_bias_kv": True}],
)
def test_attention(kwargs, float64):
    model, plain = (
        fnn.FlipoutMultiheadAttention(4, 2, **kwargs),
        nn.MultiheadAttention(4, 2, **kwargs),
    )
    x = torch.randn(N, 3, 4) if kwargs else torch.randn(3, N, 4)
    dim = 0 if kwargs else 1
    guide = ready(model, AutoNormal, x, x, x)
    run = Execution(model, guide, x, x, x)
    assert "out_proj.weight" in run.draws
    assert_explicit(run, plain, (x, x, x), guide, (dim,) * 3, dim)


class Mixed(PyroModule):
    """Flipout layers between plain ones, one called twice, one read outside of its call."""

    def __init__(self, linear=fnn.FlipoutLinear):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.shared = linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.last = linear(4, 4, bias=False)

    def forward(self, x):
        x = nn.functional.linear(self.first(x), self.last.weight.t())
        x = torch.tanh(self.shared(self.norm(torch.tanh(self.shared(x)))))
        return self.last(x)


@pytest.mark.parametrize("guide_class", GUIDES)
def test_mixed_with_plain_layers_and_shared_use(guide_class, float64):
    model, plain, x = Mixed(), Mixed(nn.Linear), torch.randn(N, 3, 4)
    plain.load_state_dict(model.state_dict(), strict=False)
    guide = ready(model, guide_class, x)
    run = Execution(model, guide, x)
    assert set(run.draws) == {"shared.weight", "shared.bias", "last.weight"}
    expected = []
    for n in range(N):
        own = {name: w[n] for name, w in run.explicit().items()}
        expected.append(torch.func.functional_call(plain, own, (x[n : n + 1],)))
    torch.testing.assert_close(run.out, torch.cat(expected), atol=1e-9, rtol=1e-9)
    assert len({id(w.execution) for w in run.draws.values()}) == 1


def test_two_draws_in_two_executions():
    model, x = fnn.FlipoutLinear(4, 3), torch.randn(N, 4)
    guide = ready(model, AutoNormal, x)
    trace = poutine.trace(guide).get_trace(x)
    runs = [Execution(model, guide, x, trace=trace) for _ in range(2)]
    weights = [run.draws["weight"] for run in runs]
    assert torch.equal(weights[0].plain, weights[1].plain)
    assert not torch.equal(weights[0].materialize(), weights[1].materialize())
    assert model._pyro_context.cache == {}


def test_the_handler_outside_decides():
    model, x = Mixed(), torch.randn(N, 4)
    guide = ready(model, AutoNormal, x)
    trace = poutine.trace(guide).get_trace(x)
    handler = Recording(hide=["shared.bias"])
    run = Execution(handler(model), guide, x, trace=trace)
    assert set(handler.seen) == {"shared.weight", "last.weight"}
    assert not isinstance(run.draws["shared.bias"], FlipoutTensor)
    assert run.draws["last.weight"].execution is handler.seen_execution
    with flipout(hide_fn=lambda site: True):
        assert torch.equal(poutine.replay(model, trace=trace)(x), _shared(model, trace, x))


def _shared(model, trace, x):
    values = {name: trace.nodes[name]["value"] for name in ("shared.weight", "shared.bias")}
    values["last.weight"] = trace.nodes["last.weight"]["value"]
    return poutine.condition(model, data=values)(x)


# ----------------------------------------------------------------- nothing else moves


@pytest.mark.parametrize("cls", LAYERS)
def test_signature_and_doc(cls):
    signature = inspect.signature(cls)
    assert {"prior", "bias_prior", "example_dim"} < set(signature.parameters)
    assert "args" not in signature.parameters
    twin = getattr(nn, cls.__name__.removeprefix("Flipout"))
    assert issubclass(cls, twin)
    assert issubclass(cls, PyroModule)
    assert "torch.nn" in cls.__doc__
    if not issubclass(twin, nn.RNNBase):
        assert set(inspect.signature(twin).parameters) < set(signature.parameters)


def test_positional_arguments_of_rnn():
    layer = fnn.FlipoutRNN(3, 4, 1, "relu", False, True)
    assert (layer.nonlinearity, layer.bias, layer.batch_first) == ("relu", False, True)
    names = list(inspect.signature(fnn.FlipoutRNN).parameters)
    assert names[:5] == ["input_size", "hidden_size", "num_layers", "nonlinearity", "bias"]


def roundtrips(model):
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


@pytest.mark.parametrize("case", CASES)
def test_copies(case, float64):
    layer, _, args, kwargs, make, *_ = CASES[case]
    model, x = layer(*args, **kwargs), make()
    guide = ready(model, AutoNormal, x)
    trace = poutine.trace(guide).get_trace(x)
    for copied in roundtrips(model):
        assert type(copied) is layer
        torch.manual_seed(0)
        a = poutine.replay(copied, trace=trace)(x)
        torch.manual_seed(0)
        b = poutine.replay(model, trace=trace)(x)
        torch.testing.assert_close(a, b)
    assert repr(copied) == repr(model)


def test_extra_repr():
    layer = fnn.FlipoutLinear(4, 3, prior=dist.Normal(0.0, 2.0), bias_prior=fnn.LaplacePrior(0.5))
    state = torch.get_rng_state()
    assert repr(layer) == (
        "FlipoutLinear(in_features=4, out_features=3, bias=True, "
        "prior=Normal(loc: 0.0, scale: 2.0), bias_prior=LaplacePrior(scale=0.5))"
    )
    assert torch.equal(torch.get_rng_state(), state)
    attention = fnn.FlipoutMultiheadAttention(4, 2, prior=fnn.KaimingPrior(1.0))
    assert "embed_dim=4, num_heads=2, prior=KaimingPrior(gain=1.0" in repr(attention)


def test_state_dict_and_moves():
    model = Mixed()
    assert set(model.state_dict()) == {"first.weight", "first.bias", "norm.weight", "norm.bias"}
    model = model.to(torch.float64)
    x = torch.randn(N, 4, dtype=torch.float64)
    guide = AutoNormal(model)
    guide(x)
    assert {p.dtype for p in guide.parameters()} == {torch.float64}
    assert model(x).dtype == torch.float64
    lstm = fnn.FlipoutLSTM(3, 4).double()
    state = torch.get_rng_state()
    lstm.to(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert lstm(torch.randn(2, N, 3))[0].dtype == torch.float32


def test_meta_device():
    model = PyroModule[nn.Sequential](fnn.FlipoutEmbedding(7, 4, padding_idx=0, device="meta"))
    model.to_empty(device="cpu")
    assert model(tokens).device.type == "cpu"
    assert model(torch.zeros(2, 2, dtype=torch.long)).abs().max() == 0


def regression(net):
    def model(x, y=None):
        mean = net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean.squeeze(-1), 0.5), obs=y)

    return model


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_svi_and_predictive(elbo):
    net = PyroModule[nn.Sequential](fnn.FlipoutLinear(4, 8), nn.Tanh(), fnn.FlipoutLinear(8, 1))
    model = regression(net)
    guide = AutoMeanField(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo())
    x, y = torch.randn(20, 4), torch.randn(20)
    losses = [svi.step(x, y) for _ in range(20)]
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = Predictive(model, guide=guide, num_samples=4)(x)
    assert samples["y"].shape == (4, 20)


def test_predictive_gives_the_shared_draw():
    model = PyroModule[nn.Sequential](fnn.FlipoutLinear(4, 4), nn.Tanh(), fnn.FlipoutLinear(4, 1))
    x = torch.randn(N, 4)
    guide = ready(model, AutoNormal, x)
    samples = Predictive(guide, num_samples=3)(x)
    out = Predictive(model, samples, return_sites=["_RETURN"])(x)["_RETURN"]
    for i in range(3):
        weights = {name: value[i].reshape(value[i].shape) for name, value in samples.items()}
        h = torch.tanh(nn.functional.linear(x, weights["0.weight"], weights["0.bias"]))
        expected = nn.functional.linear(h, weights["2.weight"], weights["2.bias"])
        torch.testing.assert_close(out[i], expected)


@pytest.mark.parametrize("handler", [poutine.condition, poutine.do])
def test_set_values_are_left_alone(handler):
    model, x = Mixed(), torch.randn(N, 4)
    values = {"shared.weight": torch.randn(4, 4), "shared.bias": torch.randn(4)}
    values["last.weight"] = torch.randn(4, 4)
    h = nn.functional.linear(model.first(x), values["last.weight"].t())
    for between in (model.norm, lambda h: h):
        h = nn.functional.linear(h, values["shared.weight"], values["shared.bias"])
        h = between(torch.tanh(h))
    expected = nn.functional.linear(h, values["last.weight"])
    assert torch.equal(handler(model, data=values)(x), expected)


def test_nuts():
    net = PyroModule[nn.Sequential](fnn.FlipoutLinear(2, 2), nn.Tanh(), fnn.FlipoutLinear(2, 1))
    model = regression(net)
    mcmc = MCMC(NUTS(model, max_tree_depth=2), num_samples=2, warmup_steps=2, disable_progbar=True)
    mcmc.run(torch.randn(6, 2), torch.randn(6))  # warnings are errors
    assert mcmc.get_samples()["0.weight"].shape == (2, 2, 2)


def test_trace_is_plain_and_has_each_site_once():
    model, x = Mixed(), torch.randn(N, 4)
    guide = ready(model, AutoNormal, x)
    run = Execution(model, guide, x)
    sites = [n for n, s in run.trace.nodes.items() if s["type"] == "sample"]
    assert sorted(sites) == ["last.weight", "shared.bias", "shared.weight"]
    for name in sites:
        assert type(run.trace.nodes[name]["value"]) is torch.Tensor
    run.trace.compute_log_prob()
    for name in sites:
        value = run.guide_trace.nodes[name]["value"]
        expected = dist.Normal(0.0, 1.0).log_prob(value).sum()
        torch.testing.assert_close(run.trace.nodes[name]["log_prob_sum"], expected)


def test_particles():
    net = PyroModule[nn.Sequential](fnn.FlipoutLinear(4, 8), nn.Tanh(), fnn.FlipoutLinear(8, 1))
    model = regression(net)
    x, y = torch.randn(20, 4), torch.randn(20)
    guide = AutoNormal(model)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    assert torch.isfinite(torch.tensor(elbo.loss(model, guide, x, y)))


# --------------------------------------------------------------------- priors and options


def test_prior_and_bias_prior():
    seen = []

    def prior(name, parameter):
        seen.append((name, tuple(parameter.shape)))
        return dist.Laplace(0.0, 3.0)

    layer = fnn.FlipoutMultiheadAttention(4, 2, prior=prior, bias_prior=dist.Normal(1.0, 2.0))
    assert seen == [("in_proj_weight", (12, 4)), ("out_proj.weight", (4, 4))]
    trace = poutine.trace(layer).get_trace(*(torch.randn(2, 3, 4),) * 3)
    assert trace.nodes["in_proj_weight"]["fn"].base_dist.scale.unique().item() == 3.0
    assert trace.nodes["out_proj.bias"]["fn"].base_dist.loc.unique().item() == 1.0
    assert trace.nodes["out_proj.bias"]["fn"].event_shape == (4,)


def test_deterministic_biases(float64):
    layer, x = fnn.FlipoutLinear(4, 3, bias_prior=lambda name, p: None), torch.randn(N, 4)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    run = Execution(layer, ready(layer, AutoNormal, x), x)
    assert set(run.draws) == {"weight"}
    expected = torch.einsum("noi,ni->no", run.explicit()["weight"], x) + layer.bias
    torch.testing.assert_close(run.out, expected)


def test_recurrent_layers_set_the_example_dimension(float64):
    class LastStep(PyroModule):
        def __init__(self):
            super().__init__()
            self.body = fnn.FlipoutGRU(3, 4)
            self.head = fnn.FlipoutLinear(4, 2)

        def forward(self, x):  # (T, N, 3)
            return self.head(self.body(x)[0])

    model, x = LastStep(), torch.randn(6, N, 3)
    run = Execution(model, ready(model, AutoNormal, x), x)
    weights = run.explicit()
    body = nn.GRU(3, 4)
    for n in range(N):
        own = {k.removeprefix("body."): w[n] for k, w in weights.items() if k.startswith("body")}
        h = torch.func.functional_call(body, own, (x[:, n : n + 1],))[0]
        expected = nn.functional.linear(h, weights["head.weight"][n], weights["head.bias"][n])
        torch.testing.assert_close(run.out[:, n : n + 1], expected)


def test_example_dims_that_disagree():
    model = PyroModule[nn.Sequential](fnn.FlipoutLinear(3, 3), fnn.FlipoutGRU(3, 4))
    with pytest.raises(
        ExampleDimError, match=r"FlipoutGRU with site '1.weight.*dimension 1.*found 6"
    ):
        model(torch.randn(6, N, 3))
    model = PyroModule[nn.Sequential](fnn.FlipoutLinear(3, 3, example_dim=1), fnn.FlipoutGRU(3, 4))
    assert model(torch.randn(6, N, 3))[0].shape == (6, N, 4)
    with pytest.raises(ValueError, match="example_dim=-1"):
        fnn.FlipoutLinear(3, 3, example_dim=-1)


def test_one_warning_for_a_site_without_rule():
    class Strange(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = fnn.FlipoutLinear(4, 4, bias=False)

        def forward(self, x):
            return x @ torch.matrix_exp(self.linear.weight)

    model, x = Strange(), torch.randn(N, 4)
    guide = ready(model, AutoNormal, x)
    with pytest.warns(FlipoutWarning, match="'linear.weight'.*matrix_exp"):
        Execution(model, guide, x)
    run = Execution(model, guide, x)  # warnings are errors
    assert not isinstance(run.draws["linear.weight"], FlipoutTensor)


def test_layers_outside_of_a_pyro_module():
    net = nn.Sequential(fnn.FlipoutLinear(4, 4), fnn.FlipoutLinear(4, 4))
    with pytest.raises(RuntimeError, match=r"'weight'.*PyroModule\[nn.Sequential\]\(FlipoutLinear"):
        poutine.trace(net).get_trace(torch.randn(2, 4))


def test_padding_is_zero(float64):
    model = fnn.FlipoutEmbedding(7, 4, padding_idx=-1)
    out = model(torch.tensor([[6, 1], [2, 6]]))
    assert torch.equal(out[[0, 1], [0, 1]], torch.zeros(2, 4))
    assert (out[[0, 1], [1, 0]] != 0).all()


@pytest.mark.parametrize("cls", [fnn.FlipoutEmbedding, fnn.FlipoutEmbeddingBag])
def test_from_pretrained_names_the_alternative(cls):
    with pytest.raises(TypeError, match="bayesianize.*init_to_pretrained"):
        cls.from_pretrained(torch.randn(3, 2))


def test_tie(float64):
    model = PyroModule[nn.Sequential](fnn.FlipoutEmbedding(7, 4), fnn.FlipoutLinear(4, 7))
    fnn.tie_(model[1], "weight", model[0], "weight")
    run = Execution(model, ready(model, AutoNormal, tokens), tokens)
    assert set(run.draws) == {"0.weight", "1.bias"}
    weights = run.explicit()
    h = torch.stack([weights["0.weight"][n][tokens[n]] for n in range(N)])
    expected = torch.einsum("nti,noi->nto", h, weights["0.weight"]) + weights["1.bias"][:, None]
    torch.testing.assert_close(run.out, expected)
    with pytest.raises(ValueError, match="no site 'bias'"):
        fnn.tie_(model[1], "bias", model[0], "bias")
    with pytest.raises(TypeError, match="got a Linear"):
        fnn.tie_(nn.Linear(1, 1), "weight", model[0], "weight")
