"""Oracle cases of weights that are functions of weights."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flipout import FlipoutWarning
from pyro_flipout.testing import constant, random_weight
from tests.rules import cases
from tests.rules.cases import N, const, data, weights

CASES = []
case = functools.partial(cases.case, table=CASES)
W = random_weight


def parameter(*shape):
    return constant(nn.Parameter(torch.randn(*shape, dtype=torch.float64)))


def pyro_parameter(*shape):
    value = torch.randn(*shape, dtype=torch.float64)
    value.unconstrained = lambda: value  # as pyro.param marks its values
    return constant(value)


# ----------------------------------------------------------------------- arithmetic

case(
    F.linear,
    "non-centred",
    lambda: (data(N, 3), *weights((2, 3), (), (2, 3))),
    fn=lambda x, mu, tau, z: F.linear(x, mu + tau * z),
)
case(
    F.linear,
    "non-centred, plain scale of each row",
    lambda: (data(N, 3), *weights((2, 3), (2, 3)), const(2, 1)),
    fn=lambda x, mu, z, tau: F.linear(x, mu + tau.exp() * z),
)
case(
    F.linear,
    "horseshoe",
    lambda: (data(N, 3), *weights((2, 3), (2, 1), (3,), (2,))),
    fn=lambda x, z, local, glob, b: F.linear(x, z * local * glob, b),
)
case(
    F.linear,
    "residual",
    lambda: (data(N, 3), W(3, 3)),
    fn=lambda x, w: F.linear(x, torch.eye(3, dtype=x.dtype) + 0.1 * w),
)
MASK = torch.tensor([[True, False, True], [False, True, True]])
case(
    F.linear,
    "mask",
    lambda: (data(N, 3), W(2, 3)),
    fn=lambda x, w: F.linear(x, w * MASK.double()),
)
case(
    F.linear,
    "autoregressive mask",
    lambda: (data(N, 3), W(3, 3)),
    fn=lambda x, w: F.linear(x, w.tril(-1)),
)
for op in (torch.where, Tensor.where):

    def where(condition, a, b, op=op):
        return op(condition, a, b) if op is torch.where else op(a, condition, b)

    case(
        op, "two weights", lambda: (constant(MASK), *weights((2, 3), (2, 3))), where, num_examples=N
    )
    case(op, "a number", lambda: (constant(MASK), W(2, 3), 0.0), where, num_examples=N)
    case(op, "a constant first", lambda: (constant(MASK), const(3), W(2, 3)), where, num_examples=N)
    case(op, "a row", lambda: (constant(MASK[0]), *weights((2, 3), (2, 1))), where, num_examples=N)
case(
    F.dropout,
    "DropConnect",
    lambda: (data(N, 3), W(2, 3)),
    fn=lambda x, w: (torch.manual_seed(3), F.linear(x, F.dropout(w, 0.4)))[1],
)
case(F.dropout, "evaluation", lambda: ((W(2, 3), 0.4), {"training": False}), num_examples=N)
case(F.dropout, "keywords", lambda: ((W(2, 3),), {"p": 0.0, "training": True}), num_examples=N)

# ------------------------------------------------------------------ products of weights

MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
for op in MATMUL:
    case(op, "low rank", lambda: tuple(weights((4, 2), (2, 3))), num_examples=N)
    case(op, "a parameter last", lambda: (W(4, 2), parameter(2, 3)), num_examples=N)
    case(op, "a parameter first", lambda: (parameter(4, 2), W(2, 3)), num_examples=N)
case(torch.matmul, "a parameter of Pyro", lambda: (W(4, 2), pyro_parameter(2, 3)), num_examples=N)
case(torch.matmul, "Gram", lambda: (W(4, 2),), fn=lambda w: w @ w.t(), num_examples=N)
case(torch.matmul, "heads", lambda: tuple(weights((5, 4, 2), (5, 2, 3))), num_examples=N)
case(torch.matmul, "broadcast", lambda: tuple(weights((5, 4, 2), (2, 3))), num_examples=N)
case(torch.matmul, "by a vector", lambda: (W(4, 2), parameter(2)), num_examples=N)
case(torch.matmul, "by a vector, first", lambda: (parameter(2), W(2, 3)), num_examples=N)
for op in (torch.mv, Tensor.mv):
    case(op, "parameter", lambda: (W(4, 2), parameter(2)), num_examples=N)
for op in (torch.inner, Tensor.inner):
    case(op, "two weights", lambda: tuple(weights((4, 2), (3, 2))), num_examples=N)
case(F.linear, "two weights", lambda: tuple(weights((4, 2), (3, 2), (3,))), num_examples=N)
case(torch.tensordot, "two weights", lambda: (*weights((4, 2), (2, 3)), 1), num_examples=N)
case(torch.addmm, "two weights", lambda: tuple(weights((3,), (4, 2), (2, 3))), num_examples=N)
for equation, shapes in {
    "ok,ki->oi": ((4, 2), (2, 3)),
    "ok,ik->io": ((4, 2), (3, 2)),
    "hok,hki->hoi": ((5, 4, 2), (5, 2, 3)),
    "k,ok->ok": ((2,), (4, 2)),
    "ok,i->oi": ((4, 2), (3,)),
}.items():
    case(
        torch.einsum,
        f"two weights {equation}",
        lambda equation=equation, shapes=shapes: (equation, *weights(*shapes)),
        num_examples=N,
    )
case(torch.einsum, "parameter", lambda: ("ok,ki->oi", parameter(4, 2), W(2, 3)), num_examples=N)
case(
    F.linear,
    "low rank with data",
    lambda: (data(N, 3), *weights((4, 2), (2, 3), (4,))),
    fn=lambda x, u, v, b: F.linear(x, u @ v, b),
)
case(
    F.linear,
    "low rank, transposed factor",
    lambda: (data(N, 3), *weights((4, 2), (3, 2))),
    fn=lambda x, u, v: F.linear(x, u @ v.t()),
)
case(
    F.linear,
    "low rank adaptation",  # W + U V with W flipped too
    lambda: (data(N, 3), *weights((4, 3), (4, 2), (2, 3))),
    fn=lambda x, w, u, v: F.linear(x, w + u @ v),
)
case(
    F.linear,
    "low rank, the factors used again",
    lambda: (data(N, 3), *weights((4, 2), (2, 3))),
    fn=lambda x, u, v: F.linear(x, u @ v) + x @ v.t() @ u.t(),
)
# ------------------------------------------------------------------------ queries

# The norm of a shared draw is no per-example value, so the checks are of their own.


def norm_is_plain(op, **options):
    def check():
        w = W(2, 3)
        assert op(w, **options) == op(w.plain, **options)
        assert not any(draw.shared for draw in w.draws)
        with pytest.warns(FlipoutWarning, match="norm along a dimension is not linear"):
            op(W(2, 3, 4), dim=(1, 2))

    return check


for op in (torch.norm, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm):
    CASES.append((op, "of the whole weight", norm_is_plain(op)))
CASES.append(
    (torch.linalg.matrix_norm, "of the whole weight", norm_is_plain(torch.linalg.matrix_norm))
)


def detach_is_plain():
    w = W(2, 3)
    assert type(w.detach()) is Tensor
    assert torch.equal(w.detach(), w.plain)


CASES.append((Tensor.detach, "shared draw", detach_is_plain))


def gradient_is_of_the_shared_draw():
    w = W(2, 3)
    with pytest.warns(FlipoutWarning, match="torch.autograd.grad, .* another one for each"):
        (grad,) = torch.autograd.grad((w.plain * 3.0).sum(), w)
    assert torch.equal(grad, torch.full_like(grad, 3.0))


CASES.append((torch.autograd.grad, "shared draw", gradient_is_of_the_shared_draw))

# --------------------------------------------------------------------- weight norm

for dim in (0, 1, -1):
    shape = {0: (2, 1, 1), 1: (1, 3, 1), -1: ()}[dim]
    case(
        torch._weight_norm,
        f"length of each {dim}",
        lambda dim=dim, shape=shape: (const(2, 3, 4), W(*shape), dim),
        num_examples=N,
    )
case(
    torch._weight_norm,
    "layer",
    lambda: (data(N, 3), const(2, 3), W(2, 1)),
    fn=lambda x, v, g: F.linear(x, torch._weight_norm(v, g, 0)),
)
case(
    F.linear,
    "weight norm by hand",
    lambda: (data(N, 3), parameter(2, 3), W(2, 1)),
    fn=lambda x, v, g: F.linear(x, g * (v / v.norm(dim=1, keepdim=True))),
)
