"""Every rule under forward-mode differentiation, and recurrent layers under ``torch.func``."""

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pyro_flipout import flip, testing
from pyro_flipout.rules import _scan
from pyro_flipout.tensor import RULES, FlipoutTensor
from tests.rules import cases, cases_recurrent
from tests.rules.networks import CLOSE, by_example, flipped
from tests.rules.test_oracle import CASES, params

# torch compiles its own forward derivatives when it makes the first tangent.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning:torch.jit")

# Those with gradients of their own in all their cases, of the others one case a function.
OWN_GRADIENTS = ("conv", "linear", "recurrent")
OTHERS = ("contraction", "elementwise", "embedding", "normalization")


check_rule = testing.check_rule


def family(op):
    return RULES[op].apply.__module__.rpartition(".")[2]


def has_tangents(op, label):
    """Whether torch's own function has forward derivatives."""
    return "packed" not in label and label != "projection, all" and op is not F.embedding_bag


def chosen_cases():
    own = [case for case in CASES if family(case[0]) in OWN_GRADIENTS]
    others = {case[0]: case for case in reversed(CASES) if family(case[0]) in OTHERS}
    return [case for case in own + list(others.values()) if has_tangents(*case[:2])]


def dual(arg):
    """The argument of a case with a random tangent."""
    if isinstance(arg, FlipoutTensor):
        (term,) = arg.terms or arg._terms
        center, delta = (dual(t.detach().requires_grad_()) for t in (arg._center, term.delta))
        site, execution = term.draws[0].site, arg.execution
        out = flip(center + delta, center, delta, site=site, execution=execution)
        out.draws[0].shared = term.draws[0].shared
        return out
    if type(arg) is Tensor and arg.requires_grad:
        return fwad.make_dual(arg, torch.randn_like(arg))
    return arg


def check_tangents(fn, *args, **kwargs):
    check_rule(fn, *testing._map(args, dual), **testing._map(kwargs, dual))


def compare_tangents(actual, expected, inputs, tol):
    assert any(fwad.unpack_dual(a).tangent is not None for a in actual)
    for a, b in zip(actual, expected, strict=True):
        for x, y in zip(fwad.unpack_dual(a), fwad.unpack_dual(b), strict=True):
            x, y = (torch.zeros_like(a) if t is None else t for t in (x, y))
            torch.testing.assert_close(x, y, atol=tol, rtol=tol)


@pytest.mark.parametrize("check", params(chosen_cases()))
def test_tangents(check, monkeypatch):
    for module in (cases, cases_recurrent):
        monkeypatch.setattr(module, "check_rule", check_tangents)
    monkeypatch.setattr(testing, "_compare", compare_tangents)
    with fwad.dual_level():
        check()


# ------------------------------------------------------------------- recurrent layers


class First(nn.Module):
    """The output of a layer without its last state."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


KINDS = {
    "LSTM": lambda: nn.LSTM(3, 2, batch_first=True),
    "projected": lambda: nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True, proj_size=2),
    "GRU": lambda: nn.GRU(3, 2, batch_first=True, bias=False),
    "RNN": lambda: nn.RNN(3, 2, 2, batch_first=True, nonlinearity="relu", bidirectional=True),
}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@kinds
@pytest.mark.usefixtures("float64")
def test_recurrent_layers_differentiate_twice_under_torch_func(make):
    """Whose backward pass otherwise has no derivative."""
    module, x = First(make()), torch.randn(5, 4, 3)
    values = flipped(module)

    def loss(x):
        return functional_call(module, values, (x,)).sin().sum()

    def expected(x):
        return by_example(module, values, x).sin().sum()

    vector = torch.randn_like(x)
    product = torch.func.jvp(torch.func.grad(loss), (x,), (vector,))
    wanted = torch.autograd.functional.hvp(expected, x, vector)
    torch.testing.assert_close(product[1], wanted[1], **CLOSE)


@kinds
@pytest.mark.usefixtures("float64")
def test_recurrent_layers_under_vmap(make):
    module, xs = First(make()), torch.randn(2, 5, 4, 3)
    values = flipped(module)
    out = torch.vmap(lambda x: functional_call(module, values, (x,)))(xs)
    for x, y in zip(xs, out, strict=True):
        torch.testing.assert_close(y, by_example(module, values, x), **CLOSE)


@pytest.mark.usefixtures("float64")
def test_unpacked_loop_of_packed_rows(monkeypatch):
    """All packed cases, of which torch itself has no forward derivative to compare."""
    monkeypatch.setattr(_scan, "has_own_gradients", lambda: False)
    for op, label, check in CASES:
        if family(op) == "recurrent" and not has_tangents(op, label):
            check()
