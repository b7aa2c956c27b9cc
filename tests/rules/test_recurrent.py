"""Recurrent modules as users write them, and the autograd node behind them."""

import contextlib
import dataclasses

import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.overrides import BaseTorchFunctionMode
from torch.utils.checkpoint import checkpoint

from pyro_flipout import ExampleDimError, FlipoutWarning, MissingRuleError, flip
from pyro_flipout.errors import FlipoutError
from pyro_flipout.rules import _cells, _signed, recurrent
from pyro_flipout.rules._loop import Plan
from pyro_flipout.rules._scan import Scan
from pyro_flipout.tensor import Execution
from tests.helpers import check_network
from tests.rules.cases_recurrent import CASES
from tests.rules.networks import draw_codes

N, T, I, H = 5, 4, 3, 2  # noqa: E741
KINDS = [nn.LSTM, nn.GRU, nn.RNN]
LENGTHS = torch.tensor([2, 4, 1, 3, 3])  # not sorted

pytestmark = pytest.mark.usefixtures("float64")


def flipped(module, delta=1.0, example_dim=0, **options):
    """The module's parameters as flipped weights of one execution."""
    execution = Execution(example_dim, **options)
    result = {}
    for name, p in module.named_parameters():
        d = delta * torch.randn_like(p)
        result[name] = flip(p.detach() + d, p.detach(), d, site=name, execution=execution)
    return result


def one_by_one(module, weights, *inputs):
    """The plain module run example by example, each on its explicit weights."""
    explicit = {name: w.materialize() for name, w in weights.items()}
    return [
        functional_call(module, {k: w[n] for k, w in explicit.items()}, (x,))
        for n, x in enumerate(zip(*inputs, strict=True) if len(inputs) > 1 else inputs[0])
    ]


def leaves(obj):
    if isinstance(obj, (tuple, list)):
        return [leaf for item in obj for leaf in leaves(item)]
    return [obj]


def assert_equal(actual, expected, tol=1e-10):
    for a, b in zip(leaves(actual), leaves(expected), strict=True):
        torch.testing.assert_close(a, b, atol=tol, rtol=tol)


# ------------------------------------------------------------------------ networks


class Net(nn.Module):
    """A recurrent layer between two dense ones, with the examples in ``example_dim``."""

    def __init__(self, kind, batch_first=True, lengths=False, **options):
        super().__init__()
        self.first = nn.Linear(I, I)
        self.rnn = kind(I, H, batch_first=batch_first, **options)
        directions = 2 if options.get("bidirectional") else 1
        self.head = nn.Linear(directions * (options.get("proj_size") or H), 2)

    def forward(self, x, lengths=None):
        x = self.first(x)
        if lengths is None:
            return self.head(self.rnn(x)[0])
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=T)
        return self.head(out)


@pytest.mark.parametrize("guide", [AutoNormal, AutoDiagonalNormal])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"bias": False},
        {"batch_first": False},
        {"num_layers": 2, "batch_first": False, "bidirectional": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_network(kind, options, guide):
    batch_first = options.get("batch_first", True)
    x = torch.randn(N, T, I) if batch_first else torch.randn(T, N, I)
    check_network(Net(kind, **options), guide, x, example_dim=0 if batch_first else 1)


def test_network_with_projection():
    net = Net(nn.LSTM, proj_size=1, num_layers=2, bidirectional=True)
    check_network(net, AutoNormal, torch.randn(N, T, I))


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS.sort(descending=True).values], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_network_on_packed_sequences(kind, lengths):
    check_network(Net(kind, bidirectional=True), AutoNormal, torch.randn(N, T, I), lengths)


class Decoder(nn.Module):
    """Cells called step by step, with a learned first state."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell
        self.state = nn.Parameter(torch.randn(1, H))
        self.head = nn.Linear(H, 2)

    def forward(self, x):
        h = self.state.expand(len(x), H)
        lstm = isinstance(self.cell, nn.LSTMCell)
        state = (h, torch.zeros(len(x), H)) if lstm else h
        out = []
        for x_t in x.unbind(1):
            state = self.cell(x_t, state)
            out.append(self.head(state[0] if lstm else state))
        return torch.stack(out, 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_with_a_learned_first_state(cell, bias):
    check_network(Decoder(cell(I, H, bias=bias)), AutoNormal, torch.randn(N, T, I))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_nonlinearities(nonlinearity):
    net = Net(nn.RNN, nonlinearity=nonlinearity, num_layers=2)
    check_network(net, AutoNormal, torch.randn(N, T, I))


def test_layer_called_twice_has_the_same_weights():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(H, H, batch_first=True)

        def forward(self, x):
            out, h = self.rnn(x)
            return self.rnn(out.flip(1), h)[0]

    check_network(Twice(), AutoNormal, torch.randn(N, T, H))


# ------------------------------------------------------------------ against torch


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_without_perturbation_it_is_torch(kind, batch_first, train):
    options = {"batch_first": batch_first, "num_layers": 3, "bidirectional": True}
    module = kind(I, H, dropout=0.4, **options).train(train)
    x = torch.randn(N, T, I) if batch_first else torch.randn(T, N, I)
    weights = flipped(module, 0.0, example_dim=0 if batch_first else 1)
    draw_codes(weights)  # so that the calls draw the masks of dropout alone
    results = []
    for parameters in ({}, weights):
        torch.manual_seed(1)  # the masks of dropout too
        results.append(functional_call(module, parameters, (x,)))
    assert_equal(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_between_layers_and_in_training_only(kind):
    module = kind(I, H, num_layers=2, dropout=0.5, batch_first=True)
    weights, x = flipped(module), torch.randn(N, T, I)
    first, second = (functional_call(module, weights, (x,))[0] for _ in range(2))
    assert not torch.equal(first, second)
    module.eval()
    out = functional_call(module, weights, (x,))
    expected = one_by_one(module, weights, x[:, None])
    assert_equal(out[0], torch.cat([e[0] for e in expected]))


@pytest.mark.parametrize("kind", KINDS)
def test_keywords(kind):
    op = {nn.LSTM: torch.lstm, nn.GRU: torch.gru, nn.RNN: torch.rnn_tanh}[kind]
    module = kind(I, H)
    weights = list(flipped(module, example_dim=1).values())
    zeros = torch.zeros(1, N, H)
    hx = (zeros, zeros) if kind is nn.LSTM else zeros
    options = {"has_biases": True, "num_layers": 1, "dropout": 0.0, "train": False}
    options["bidirectional"] = False
    x = torch.randn(T, N, I)
    expected = op(x, hx, weights, True, 1, 0.0, False, False, False)
    assert_equal(op(x, hx, weights, **options, batch_first=False), expected)
    assert_equal(op(input=x, hx=hx, params=weights, **options, batch_first=False), expected)
    sizes = torch.full((T,), N)
    packed = op(data=x.flatten(0, 1), batch_sizes=sizes, hx=hx, params=weights, **options)
    assert_equal(packed[0], expected[0].flatten(0, 1))
    assert_equal(packed[1:], expected[1:])


# --------------------------------------------------------------- packed sequences


@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_every_sequence_alone(kind):
    module = kind(I, H, num_layers=2, bidirectional=True, batch_first=True)
    weights = flipped(module)
    order = LENGTHS.argsort(descending=True, stable=True)
    x = torch.randn(N, T, I)[order]
    packed = pack_padded_sequence(x, LENGTHS[order], batch_first=True)
    out, state = functional_call(module, weights, (packed,))
    out, lengths = pad_packed_sequence(out, batch_first=True)
    alone = [row[:length][None] for row, length in zip(x, LENGTHS[order], strict=True)]
    for n, (o, s) in enumerate(one_by_one(module, weights, alone)):
        assert_equal(out[n, : lengths[n]], o[0])
        assert_equal([part[:, n] for part in leaves(state)], [part[:, 0] for part in leaves(s)])


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_unsorted_packed_numbers_the_examples_as_they_come(kind, group_size):
    module = kind(I, H, num_layers=2, bidirectional=True, batch_first=True)
    weights = flipped(module, group_size=group_size)
    x = torch.randn(N, T, I)
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    out, state = functional_call(module, weights, (packed,))
    out, _ = pad_packed_sequence(out, batch_first=True)
    alone = [row[:length][None] for row, length in zip(x, LENGTHS, strict=True)]
    for n, (o, s) in enumerate(one_by_one(module, weights, alone)):
        assert_equal(out[n, : LENGTHS[n]], o[0])
        assert_equal([part[:, n] for part in leaves(state)], [part[:, 0] for part in leaves(s)])


def test_two_packed_sequences_that_are_sorted_apart():
    """One draw of the weights for each example, whatever the orders (two sentences of a pair)."""
    module = nn.GRU(I, H, batch_first=True)
    weights = flipped(module)
    x = torch.randn(2, N, T, I)
    lengths = LENGTHS, LENGTHS.flip(0)

    def last(x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return functional_call(module, weights, (packed,))[1][0]

    both = last(x[0], lengths[0]) * last(x[1], lengths[1])
    explicit = {name: w.materialize() for name, w in weights.items()}
    for n in range(N):
        own = {name: w[n] for name, w in explicit.items()}
        one, two = (
            functional_call(module, own, (s[n, : length[n]][None],))[1][0, 0]
            for s, length in zip(x, lengths, strict=True)
        )
        assert_equal(both[n], one * two)


def test_unsorted_packed_under_modes():
    """Modes of torch functions put frames between the layer and the rule."""
    module = nn.GRU(I, H, batch_first=True)
    weights, x = flipped(module), torch.randn(N, T, I)
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    expected = functional_call(module, weights, (packed,))[1]
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(BaseTorchFunctionMode())
        assert_equal(functional_call(module, weights, (packed,))[1], expected)


def test_flipped_state_of_unsorted_packed():
    module, execution = nn.GRU(I, H, batch_first=True), Execution()
    weights = dict(module.named_parameters())
    center, delta = torch.randn(1, 1, H), torch.randn(1, 1, H)
    h0 = flip(center + delta, center, delta, site="h0", execution=execution)
    x = torch.randn(N, T, I)
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    _, h = functional_call(module, weights, (packed, h0.expand(1, N, H)))
    for n, state in enumerate(h0.materialize()):
        _, own = functional_call(module, weights, (x[n : n + 1, : LENGTHS[n]], state))
        assert_equal(h[:, n], own[:, 0])


def test_packed_names_another_number_of_sequences():
    module = nn.GRU(I, H)
    weights = flipped(module)
    next(iter(weights.values())).execution.count(N + 1, "")
    packed = pack_padded_sequence(torch.randn(T, N, I), [4, 4, 3, 1, 1])
    with pytest.warns(FlipoutWarning, match=r"5 sequences.*6 examples.*one sequence for each"):
        out, _ = functional_call(module, weights, (packed,))
    assert isinstance(out, PackedSequence)
    plain = {name: w.plain for name, w in weights.items()}
    assert_equal(out.data, functional_call(module, plain, (packed,))[0].data)


# ---------------------------------------------------------------- example dimension


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_contradicting_layout_is_an_error(kind, batch_first):
    module = kind(I, H, batch_first=batch_first)
    wrong = 1 if batch_first else 0
    with pytest.raises(ExampleDimError) as error:
        functional_call(module, flipped(module, example_dim=wrong), (torch.randn(T, N, I),))
    for part in (
        "weight_ih_l0",
        "torch.",
        "(4, 5, 3)",
        f"batch_first={batch_first}",
        f"dimension {wrong}",
        f"flipout(example_dim={1 - wrong})",
        f"batch_first={not batch_first}",
    ):
        assert part in str(error.value), part


@pytest.mark.parametrize("kind", KINDS)
def test_unbatched_input_is_one_example(kind):
    module = kind(I, H, batch_first=True)
    weights, x = flipped(module), torch.randn(T, I)
    out, _ = functional_call(module, weights, (x,))
    assert_equal(out, one_by_one(module, weights, [x])[0][0])


@pytest.mark.parametrize("kind", KINDS)
def test_unbatched_input_without_examples_is_shared(kind):
    module = kind(I, H)
    weights, x = flipped(module), torch.randn(T, I)
    with pytest.warns(FlipoutWarning) as told:
        out, _ = functional_call(module, weights, (x,))
    assert len(told) == len(weights)
    assert "(4, 1, 3) is one sequence" in str(told[0].message)
    plain = {name: w.plain for name, w in weights.items()}
    assert_equal(out, functional_call(module, plain, (x,))[0])


def test_unbatched_input_among_batched_is_shared():
    module = nn.LSTM(I, H, batch_first=True)
    weights = flipped(module)
    functional_call(module, weights, (torch.randn(N, T, I),))
    with pytest.warns(FlipoutWarning, match="a batch of 1 sequences"):
        functional_call(module, weights, (torch.randn(T, I),))


def test_cell_counts_its_rows_in_a_time_major_execution():
    cell = nn.LSTMCell(I, H)
    weights = flipped(cell, example_dim=1)
    functional_call(cell, weights, (torch.randn(N, I),))
    assert weights["weight_ih"].execution.num_examples == N
    with pytest.warns(FlipoutWarning, match=r"4 sequences.*5 examples"):
        functional_call(cell, weights, (torch.randn(4, I),))


# ------------------------------------------------------------------------- refused


def test_refused():
    module = nn.GRU(I, H, batch_first=True)
    x = torch.randn(N, T, I)
    execution = Execution(on_missing_rule="error")
    hidden = {
        name: flip(torch.randn(2, *p.shape), torch.zeros(2, *p.shape), execution=execution)
        for name, p in module.named_parameters()
    }
    with pytest.raises(MissingRuleError, match="no matrix"):
        torch.gru(x, torch.zeros(1, N, H), list(hidden.values()), True, 1, 0.0, False, False, True)
    weights = flipped(module, on_missing_rule="error")
    execution = next(iter(weights.values())).execution
    start = flip(torch.randn(1, N, H), torch.zeros(1, N, H), site="start", execution=execution)
    with pytest.raises(MissingRuleError, match="signs of a first state vary"):
        functional_call(module, weights, (x, start))
    data = flip(torch.randn(N, T, I), torch.zeros(N, T, I), site="data", execution=execution)
    with pytest.raises(MissingRuleError, match="input is itself a flipped weight"):
        functional_call(module, weights, (data,))


def test_no_second_derivatives():
    module = nn.LSTM(I, H, batch_first=True)
    x = torch.randn(N, T, I, requires_grad=True)
    out, _ = functional_call(module, flipped(module), (x,))
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(FlipoutError, match="second derivatives"):
        torch.autograd.grad(grad.sum() + out.sum(), x)


# ------------------------------------------------------------------ the autograd node


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", [(4, 4, 4), (4, 3, 3, 1)])
@pytest.mark.parametrize("name", ["LSTM", "LSTM projected", "GRU", "RNN_TANH", "RNN_RELU"])
def test_gradcheck(name, sizes, reverse):
    cell, projected = getattr(_cells, name.split()[0]), "projected" in name
    n, out, gates = sizes[0], 1 if projected else H, cell.num_gates * H

    def signs(size):
        return torch.randint(2, (n, size)) * 2.0 - 1

    shapes = [(gates, I), (gates, out)] + [(out, H)] * projected
    pairs = [[(None, None), (signs(i), signs(o))] for o, i in shapes]
    plan = Plan(cell, sizes, reverse, pairs)
    inputs = [torch.randn(sum(sizes), I), torch.randn(n, gates)]
    inputs += [None if cell.one_product else torch.randn(n, gates), torch.randn(n, out)]
    inputs += [torch.randn(n, H) if cell is _cells.LSTM else None]
    inputs += [torch.randn(shape) for shape in shapes for _ in range(2)]
    inputs = [None if t is None else t.requires_grad_() for t in inputs]

    def fn(*tensors):
        return [t for t in Scan.apply(plan, *tensors)[:3] if t is not None]

    assert torch.autograd.gradcheck(fn, inputs)


def test_backward_twice_and_of_parts_of_the_result():
    module = nn.LSTM(I, H, batch_first=True)
    x = torch.randn(N, T, I, requires_grad=True)
    out, (h, c) = functional_call(module, flipped(module), (x,))
    parts = [torch.autograd.grad(t.sum(), x, retain_graph=True)[0] for t in (out, h, c)]
    (together,) = torch.autograd.grad(out.sum() + h.sum() + c.sum(), x)
    assert_equal(sum(parts), together)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    module = nn.GRU(I, H, batch_first=True)
    weights = flipped(module)
    x = torch.randn(N, T, I, requires_grad=True)

    def call(x):
        return functional_call(module, weights, (x,))[0]

    grads = [
        torch.autograd.grad(out.sum(), x) if not reentrant else backward(out, x)
        for out in (call(x), checkpoint(call, x, use_reentrant=reentrant))
    ]
    assert_equal(*grads)


def backward(out, x):
    x.grad = None
    out.sum().backward()
    return x.grad


def test_torch_func_grad():
    module = nn.LSTM(I, H, batch_first=True)
    weights = flipped(module)
    x = torch.randn(N, T, I, requires_grad=True)

    def loss(x):
        return functional_call(module, weights, (x,))[0].sum()

    assert_equal(torch.func.grad(loss)(x.detach()), torch.autograd.grad(loss(x), x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    module = kind(I, 8, num_layers=2, batch_first=True).float()
    weights = flipped(module, 0.1)
    x = torch.randn(N, T, I, dtype=torch.float, requires_grad=True)
    expected = functional_call(module, weights, (x,))[0]
    with torch.autocast("cpu", torch.bfloat16):
        out = functional_call(module, weights, (x,))[0]
        (grad,) = torch.autograd.grad(out.sum(), x)
    assert out.dtype == torch.float
    assert not torch.equal(out, expected)
    torch.testing.assert_close(out, expected, atol=0.03, rtol=0)
    torch.testing.assert_close(
        grad, torch.autograd.grad(expected.sum(), x)[0], atol=0.05, rtol=0.05
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_module(dtype):
    module = nn.LSTM(I, H, batch_first=True).to(dtype)
    out, _ = functional_call(module, flipped(module), (torch.randn(N, T, I).to(dtype),))
    assert out.dtype == dtype


# ------------------------------------------------------------------------ planted bug


@pytest.mark.parametrize("label", ["plain", "packed", "bidirectional"])
@pytest.mark.parametrize("op", [torch.lstm, torch.gru, torch.rnn_tanh])
def test_signs_of_their_own_at_each_step_fail_the_oracle(op, label, monkeypatch):
    (check,) = (check for case, name, check in CASES if case is op and name == label)
    check()
    right = _signed.StepProduct.add

    def redrawn(self, y, x):
        other = _signed.StepProduct(_signed.Product([]))
        signs = torch.randint(2, (len(x), 1)) * 2.0 - 1
        other.parts = [
            (matrix, None if before is None else before[: len(x)] * signs, after)
            for matrix, before, after in self.parts
        ]
        right(other, y, x)

    monkeypatch.setattr(_signed.StepProduct, "add", redrawn)
    with pytest.raises(AssertionError):
        check()


def test_states_of_a_layer_that_is_not_flipped(monkeypatch):
    """cuDNN refuses states that are not contiguous; on a CPU torch takes any."""
    bind, calls = recurrent.Call.bind, []

    def spy(rows, batch_sizes, hx, *args):
        calls.append([*(s.is_contiguous() for s in hx), batch_sizes.device.type])
        return torch.lstm(rows, batch_sizes, hx, *args)

    monkeypatch.setattr(
        recurrent.Call, "bind", lambda *args: dataclasses.replace(bind(*args), op=spy)
    )
    module = nn.LSTM(I, H, num_layers=2, batch_first=True)
    weights = {k: w for k, w in flipped(module).items() if k.endswith("l1")}
    states = tuple(torch.randn(N, 2, H).transpose(0, 1) for _ in range(2))
    monkeypatch.setitem(recurrent.CELLS, spy, recurrent.CELLS[torch.lstm])
    functional_call(module, weights, (torch.randn(N, T, I), states))
    assert calls == [[True, True, "cpu"]]
