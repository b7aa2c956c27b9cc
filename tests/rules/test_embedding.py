"""Embeddings: options that act on the whole mini-batch, and the words of the errors."""

import pytest
import torch
import torch.nn.functional as F
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_flipout import ExampleDimError, FlipoutError, FlipoutWarning
from pyro_flipout.signs import dense_signs, draw_codes, paired_signs
from pyro_flipout.tensor import Execution, FlipoutTensor, flip
from pyro_flipout.testing import random_weight
from tests.helpers import check_network
from tests.rules.cases import N
from tests.rules.networks import CLOSE

pytestmark = pytest.mark.usefixtures("float64")
V, D, T = 7, 3, 4


def tokens(*shape):
    return torch.randint(V, shape)


@pytest.mark.parametrize("num_examples", [1, 2, 5, 64, 1000])
def test_paired_signs(num_examples):
    codes = draw_codes((40,))
    dense = dense_signs(codes, num_examples, torch.float64)  # (N, 40)
    examples = torch.arange(num_examples).unsqueeze(-1)
    assert torch.equal(paired_signs(codes, examples, torch.float64), dense)
    some = torch.randint(num_examples, (40,))
    assert torch.equal(paired_signs(codes, some, torch.float64), dense[some, torch.arange(40)])


def test_paired_signs_of_the_last_example():
    codes = draw_codes((1000,))
    last = torch.tensor(2**31 - 1)
    expected = [(-1) ** ((2**32 - 1) & int(c)).bit_count() for c in codes]
    assert paired_signs(codes, last, torch.float64).tolist() == expected


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}])
def test_scale_grad_by_freq(options):
    """The frequency is that of the whole mini-batch, as in torch."""
    x, w = tokens(N, T), random_weight(V, D)
    inputs = w.center, w.terms[0].delta
    cotangent = torch.randn(N, T, D)
    plain, scaled = (
        torch.autograd.grad(
            F.embedding(x, w, scale_grad_by_freq=by_freq, **options), inputs, cotangent
        )
        for by_freq in (False, True)
    )
    count = torch.bincount(x.flatten(), minlength=V).clamp(min=1).unsqueeze(-1)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a / count, b, **CLOSE)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_scale_grad_by_freq_in_bags(mode):
    """The same factors as torch's, which are not 1 / frequency on the CPU of torch 2.13."""
    x, w = tokens(N, T), random_weight(V, D)
    plain = w.plain.detach().requires_grad_()

    def grads(weight, inputs, by_freq):
        out = F.embedding_bag(x, weight, mode=mode, scale_grad_by_freq=by_freq)
        return torch.autograd.grad(out.sum(), inputs)

    factor = grads(plain, [plain], True)[0] / grads(plain, [plain], False)[0]
    inputs = w.center, w.terms[0].delta
    for a, b in zip(grads(w, inputs, True), grads(w, inputs, False), strict=True):
        torch.testing.assert_close(a, b * factor.nan_to_num(0), **CLOSE)


@pytest.mark.parametrize("function", [F.embedding, F.embedding_bag])
def test_sparse(function):
    """Sparse gradients reach the centre and the perturbation, with the dense values."""
    x, loc = tokens(N, T), torch.randn(V, D).requires_grad_()
    delta = torch.randn(V, D).requires_grad_()
    w = flip((loc + delta).detach(), loc, delta)
    sparse, dense = (
        torch.autograd.grad(function(x, w, sparse=sparse).sin().sum(), (loc, delta))
        for sparse in (True, False)
    )
    for a, b in zip(sparse, dense, strict=True):
        assert a.is_sparse
        torch.testing.assert_close(a.to_dense(), b, **CLOSE)


def test_sparse_through_a_guide():
    """``loc + scale * eps`` as Pyro draws it."""
    x, loc, scale = tokens(N, T), torch.randn(V, D), torch.rand(V, D)
    loc.requires_grad_(), scale.requires_grad_()
    value = loc + scale * torch.randn(V, D)
    w = flip(value, loc)
    sparse, dense = (
        torch.autograd.grad(
            F.embedding(x, w, sparse=sparse).sin().sum(), (loc, scale), retain_graph=True
        )
        for sparse in (True, False)
    )
    for a, b in zip(sparse, dense, strict=True):
        torch.testing.assert_close(a.to_dense(), b, **CLOSE)


def test_no_matrix_of_examples_by_vocabulary():
    w = random_weight(50, D)
    F.embedding(tokens(N, T), w)
    assert all(50 not in signs.shape for _, signs in w.execution._signs.values())


def test_ties_of_a_maximum():
    """A token twice in a bag: the gradient of its row is that of torch."""
    x, w = torch.tensor([[1, 1, 2], [3, 3, 3]]), random_weight(V, D)
    inputs = w.center, w.terms[0].delta
    grads = torch.autograd.grad(F.embedding_bag(x, w, mode="max").sum(), inputs)
    explicit = w.materialize()
    rows = [F.embedding_bag(x[n : n + 1], explicit[n], mode="max") for n in range(2)]
    expected = torch.autograd.grad(torch.cat(rows).sum(), inputs)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


# ------------------------------------------------------------------------------- words


@pytest.mark.parametrize("on_missing_rule", ["warn", "error"])
@pytest.mark.parametrize("function", [F.embedding, F.embedding_bag])
def test_max_norm_is_refused(function, on_missing_rule):
    w = random_weight(V, D, execution=Execution(on_missing_rule=on_missing_rule), site="table")
    before = w.plain.clone()
    with pytest.raises(FlipoutError) as error:
        function(tokens(N, T), w, max_norm=1.0)
    for words in ("site 'table'", "max_norm=1.0", "use max_norm=None", "flipout(hide=['table'])"):
        assert words in str(error.value)
    assert torch.equal(w.plain, before)


def test_padding_out_of_range():
    with pytest.raises(ValueError, match="got padding_idx=7, expected one of the 7 rows"):
        F.embedding(tokens(N, T), random_weight(V, D), padding_idx=V)


def test_time_major_step_without_known_examples():
    w = random_weight(V, D, execution=Execution(1))
    with pytest.raises(ExampleDimError, match="you said example_dim=1"):
        F.embedding(tokens(N), w)


def test_token_without_examples_is_a_row():
    """As for the first token of all examples' sentences."""
    w, x = random_weight(V, D), torch.randn(N, D)
    row = F.embedding(torch.tensor(3), w)  # (D,)
    torch.testing.assert_close(x + row, x + w.materialize()[:, 3], **CLOSE)


def test_flattened_tokens_are_shared_at_the_next_function():
    w = random_weight(V, D)
    w.execution.count(N, "")
    rows = F.embedding(tokens(N * T), w)
    assert isinstance(rows, FlipoutTensor)
    with pytest.warns(FlipoutWarning, match=r"torch\.Tensor\.tanh, there is no flipout rule"):
        rows.tanh()


def test_bags_of_a_time_major_model():
    w = random_weight(V, D, execution=Execution(1))
    with pytest.raises(ExampleDimError, match="you said example_dim=1"):
        F.embedding_bag(tokens(N, T), w)


def test_other_number_of_bags_is_shared():
    w = random_weight(V, D)
    w.execution.count(N + 1, "")
    with pytest.warns(FlipoutWarning, match="has 5 rows .* has 6 examples"):
        F.embedding_bag(tokens(N, T), w)


# -------------------------------------------------------------------- under the handler


class Tied(nn.Module):
    """The output layer is the embedding: one draw for both."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(V, D, padding_idx=0)
        self.positions = nn.Embedding(T, D)
        self.hidden = nn.Linear(D, D)

    def forward(self, x):
        x = self.positions(torch.arange(T)) + self.tokens(x)
        return F.linear(self.hidden(x).tanh(), self.tokens.weight)


class Bags(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.bag = nn.EmbeddingBag(V, D, mode=mode)
        self.out = nn.Linear(D, 2)

    def forward(self, x):
        return self.out(self.bag(x).tanh())


@pytest.mark.parametrize("net", [Tied, *(lambda m=m: Bags(m) for m in ("sum", "mean", "max"))])
def test_network(net):
    check_network(net(), AutoNormal, tokens(N, T))
