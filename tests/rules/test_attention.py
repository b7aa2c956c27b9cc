"""Transformers of plain ``torch.nn``: layers, fast paths, layouts, and the words of the errors."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import nn
from torch.func import functional_call

from pyro_flipout import ExampleDimError, FlipoutWarning
from pyro_flipout.tensor import Execution, FlipoutTensor, flip
from tests.helpers import check_network
from tests.rules.cases import N, data
from tests.rules.networks import CLOSE, assert_same, by_example, draw_codes, flipped

pytestmark = pytest.mark.usefixtures("float64")
E, L, S = 4, 3, 6
WIDTH = {"d_model": E, "nhead": 2, "dim_feedforward": 6, "dropout": 0.0}


def encoder(layers=2, nested=True, **options):
    layer = nn.TransformerEncoderLayer(**WIDTH, **options)
    return nn.TransformerEncoder(
        layer, layers, nn.LayerNorm(E), enable_nested_tensor=nested and options["batch_first"]
    )


def sequences(length, example_dim):
    return data(N, length, E) if example_dim == 0 else data(length, N, E)


LAYOUTS = pytest.mark.parametrize(
    ("training", "example_dim"), list(itertools.product((True, False), (0, 1)))
)


@LAYOUTS
@pytest.mark.parametrize("grad", [True, False])
def test_encoder(training, example_dim, grad):
    """In evaluation without gradients, torch has a fast path that knows no flipped weights."""
    module = encoder(batch_first=example_dim == 0).train(training)
    values = flipped(module, Execution(example_dim))
    x = sequences(L, example_dim)
    with torch.set_grad_enabled(grad):
        out = functional_call(module, values, (x,))
    expected = by_example(module, values, x, example_dim=example_dim)
    if grad:
        assert_same(out, expected, values)
    torch.testing.assert_close(out, expected, **CLOSE)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_encoder_options(norm_first, activation):
    module = encoder(batch_first=True, norm_first=norm_first, activation=activation).eval()
    values, x = flipped(module), data(N, L, E)
    assert_same(functional_call(module, values, (x,)), by_example(module, values, x), values)


@LAYOUTS
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_transformer(training, example_dim):
    module = nn.Transformer(
        E, 2, 1, 1, 6, 0.0, batch_first=example_dim == 0, norm_first=True
    ).train(training)
    values = flipped(module, Execution(example_dim))
    source, target = sequences(S, example_dim), sequences(L, example_dim)
    mask = module.generate_square_subsequent_mask(L, dtype=torch.float64)
    out = functional_call(
        module, values, (source, target), {"tgt_mask": mask, "tgt_is_causal": True}
    )
    expected = by_example(
        module, values, source, target, example_dim=example_dim, tgt_mask=lambda n: mask
    )
    assert_same(out, expected, values)


def test_decoder_layer_evaluation():
    module = nn.TransformerDecoderLayer(**WIDTH, batch_first=True).eval()
    values, x, memory = flipped(module), data(N, L, E), data(N, S, E)
    out = functional_call(module, values, (x, memory))
    assert_same(out, by_example(module, values, x, memory), values)


# ---------------------------------------------------------------------- nested tensors

LENGTHS = torch.tensor([3, 1, 2, 3, 2])
PADDING = torch.arange(L) >= LENGTHS.unsqueeze(-1)  # (N, L)
NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@NESTED
@pytest.mark.parametrize("only", [None, ["layers.0.norm2.bias"]])
def test_padded_evaluation(only):
    """No nested tensors where the first layer is flipped. Padding is anything in torch too."""
    module = encoder(batch_first=True).eval()
    values, x = flipped(module, only=only), data(N, L, E)
    with torch.no_grad():
        out = functional_call(module, values, (x,), {"src_key_padding_mask": PADDING})
        expected = by_example(module, values, x, src_key_padding_mask=lambda n: PADDING[n : n + 1])
    torch.testing.assert_close(out[~PADDING], expected[~PADDING], **CLOSE)


@NESTED
@pytest.mark.parametrize("only", ["layers.1.norm1.weight", "layers.1.linear1.weight"])
def test_padded_evaluation_of_later_layers(only):
    x, call = data(N, L, E), {"src_key_padding_mask": PADDING}
    module = encoder(batch_first=True).eval()
    values = flipped(module, only=[only])
    with torch.no_grad(), pytest.warns(FlipoutWarning, match="enable_nested_tensor=False"):
        functional_call(module, values, (x,), call)
    module = encoder(batch_first=True, nested=False).eval()
    values = flipped(module, only=[only])
    with torch.no_grad():
        out = functional_call(module, values, (x,), call)
        expected = by_example(module, values, x, src_key_padding_mask=lambda n: PADDING[n : n + 1])
    torch.testing.assert_close(out[~PADDING], expected[~PADDING], **CLOSE)


# ------------------------------------------------------------------------------- exact


def centered(module, execution=None):
    execution = execution or Execution()
    return {n: flip(p, p, execution=execution) for n, p in module.named_parameters()}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 3}, {"add_bias_kv": True}])
def test_delta_zero_gives_the_plain_function(need_weights, training, options):
    """Dropout included: its random numbers are consumed in torch's order."""
    module = nn.MultiheadAttention(E, 2, dropout=0.3, batch_first=True, **options).train(training)
    x = data(N, L, E), data(N, S, options.get("kdim", E)), data(N, S, options.get("vdim", E))
    weights = centered(module)
    draw_codes(weights)  # so that the calls draw the masks of dropout alone
    results = []
    for values in (dict(module.named_parameters()), weights):
        torch.manual_seed(0)
        call = {"need_weights": need_weights, "attn_mask": torch.eye(L, S) > 0}
        results.append(functional_call(module, values, x, call))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-14)


def test_delta_zero_gives_the_fast_path():
    module, x = encoder(batch_first=True).eval(), data(N, L, E)
    with torch.no_grad():
        fast = module(x)
        torch.testing.assert_close(functional_call(module, centered(module), (x,)), fast, **CLOSE)


def test_examples_ignore_each_other():
    module, x = nn.MultiheadAttention(E, 2, batch_first=True), data(N, L, E)
    values = flipped(module)
    out = functional_call(module, values, (x, x, x))[0]
    (grad,) = torch.autograd.grad(out[1].sum(), x)
    assert grad[1].abs().min() > 0
    assert grad[[0, *range(2, N)]].abs().max() == 0


# ------------------------------------------------------------------------------- words


class Projected(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.linear = nn.Linear(E, E)
        self.attention = nn.MultiheadAttention(E, 2, batch_first=batch_first)

    def forward(self, x):
        x = self.linear(x)
        return self.attention(x, x, x)[0]


def test_time_first_needs_example_dim():
    module, x = Projected(batch_first=False), data(L, N, E)
    with pytest.raises(ExampleDimError) as error:
        functional_call(module, flipped(module, Execution(0)), (x,))
    for words in (
        "site 'attention.in_proj_weight'",
        "(3, 5, 4)",
        "has 3 examples, counted in dimension 0",
        "batch_first=True; for a time-major model, set flipout(example_dim=1)",
    ):
        assert words in str(error.value)
    values = flipped(module, Execution(1))
    expected = by_example(module, values, x, example_dim=1)
    assert_same(functional_call(module, values, (x,)), expected, values)


def test_time_first_without_example_dim_is_shared():
    module, x = Projected(batch_first=False), data(L, N, E)
    values = flipped(module)
    with pytest.warns(FlipoutWarning, match=r"a time-major model, set flipout\(example_dim=1\)"):
        out = functional_call(module, values, (x,))
    assert out.shape == (L, N, E)
    assert [n for n, v in values.items() if v.terms] == ["linear.weight", "linear.bias"]


def test_batch_first_needs_example_dim():
    module, x = Projected(batch_first=True), data(N, L, E)
    with pytest.raises(ExampleDimError, match=r"set flipout\(example_dim=0\), since example_dim=1"):
        functional_call(module, flipped(module, Execution(1)), (x,))


def test_other_number_of_examples_is_shared():
    module, x = nn.MultiheadAttention(E, 2, batch_first=True), data(2 * N, L, E)
    values = flipped(module)
    values["in_proj_weight"].execution.count(N, "")
    with pytest.warns(FlipoutWarning, match="has 10 examples, but this execution has 5; keep"):
        functional_call(module, values, (x, x, x))
    assert not any(v.terms for v in values.values())


def test_unbatched_is_shared():
    module, x = nn.MultiheadAttention(E, 2), data(L, E)
    values = flipped(module)
    with pytest.warns(FlipoutWarning, match="the unbatched query of shape .* has no example dim"):
        out, _ = functional_call(module, values, (x, x, x))
    plain = {name: v.plain for name, v in values.items()}
    assert torch.equal(out, functional_call(module, plain, (x, x, x))[0])


def test_flipped_query_is_shared():
    module, x = nn.MultiheadAttention(E, 2, batch_first=True), data(N, L, E)
    values = flipped(module)
    query = flip(torch.randn(1, L, E), torch.zeros(1, L, E), site="queries")
    with pytest.warns(FlipoutWarning, match="is itself a flipped weight"):
        functional_call(module, values, (query.expand(N, L, E), x, x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 3}, r"3 heads, expected an embedding of dimension 4, divisible"),
        ({"is_causal": True}, "is_causal=True without the attn_mask"),
        ({"static_k": torch.zeros(2 * N, L, 2)}, "cannot be added to a static key or value"),
    ],
)
def test_contradictory_arguments(change, words):
    module, x = nn.MultiheadAttention(E, 2, add_bias_kv=True), data(L, N, E)
    w = flipped(module)
    arguments = {
        "query": x,
        "key": x,
        "value": x,
        "embed_dim_to_check": E,
        "num_heads": 2,
        **{name: w[name] for name in ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v")},
        "add_zero_attn": False,
        "dropout_p": 0.0,
        "out_proj_weight": w["out_proj.weight"],
        "out_proj_bias": w["out_proj.bias"],
    }
    with pytest.raises((ValueError, RuntimeError), match=words):
        F.multi_head_attention_forward(**{**arguments, **change})


# -------------------------------------------------------------------- under the handler


class Classifier(nn.Module):
    def __init__(self, training):
        super().__init__()
        self.tokens = nn.Embedding(7, E)
        self.positions = nn.Embedding(S, E)
        self.encoder = encoder(batch_first=True)
        self.out = nn.Linear(E, 2)
        self.train(training)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.size(1)))
        return self.out(self.encoder(x).mean(1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("guide", [AutoNormal, AutoDiagonalNormal])
def test_network(training, guide):
    check_network(Classifier(training), guide, torch.randint(7, (N, L)))


def test_attention_weights_are_flipped():
    module, x = nn.MultiheadAttention(E, 2, batch_first=True), data(1, L, E).expand(N, L, E)
    values = flipped(module)
    _, scores = functional_call(module, values, (x, x, x))
    assert not isinstance(scores, FlipoutTensor)
    assert (scores[0] - scores[1]).abs().max() > 1e-3
