"""Oracle cases of rules together: several parts of one weight, broadcasting, more examples.

More than 128 examples have their signs in two factors.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flipout.testing import random_weight
from tests.rules import cases
from tests.rules.cases import N, const, data, weights
from tests.rules.cases_functions import parameter

CASES = []
case = functools.partial(cases.case, table=CASES)
W = random_weight
MANY = 150


# ---------------------------------------------------------------- parts of one weight


def two_parts(first, second):
    """Codes of a strided part begin at the address of a contiguous one's."""

    def make(use):
        return lambda x, w: use(x, first(w)) + use(x, second(w))

    return make


columns = two_parts(lambda w: w[:, ::2], lambda w: w[:, :3])
rows = two_parts(lambda w: w[::2], lambda w: w[:3])
case(F.linear, "columns, strided and not", lambda: (data(N, 3), W(4, 6)), fn=columns(F.linear))
case(F.linear, "rows, strided and not", lambda: (data(N, 3), W(6, 3)), fn=rows(F.linear))
case(torch.matmul, "rows, strided and not", lambda: (data(N, 3), W(6, 4)), fn=rows(torch.matmul))
case(F.conv2d, "rows", lambda: (data(N, 3, 4, 4), W(6, 3, 3, 3)), fn=rows(F.conv2d))
case(
    F.linear,
    "parts of a bias",
    lambda: (data(N, 2), *weights((3, 2), (6,))),
    fn=lambda x, w, b: F.linear(x, w, b[::2]) + F.linear(x, w, b[:3]),
)
case(
    F.pad,
    "both sides, then used",
    lambda: (data(N, 5), W(2, 3)),
    fn=lambda x, w: F.linear(x, F.pad(w, (1, 1))),
)
case(
    F.pad,
    "cut, then used",
    lambda: (data(N, 4), W(3, 4)),
    fn=lambda x, w: F.linear(x, F.pad(w, (1, -1, -1, 2))),
)
case(
    torch.cat,
    "a padded weight",
    lambda: (data(N, 5), *weights((2, 3), (1, 5))),
    fn=lambda x, w, u: F.linear(x, torch.cat([F.pad(w, (1, 1)), u])),
)
case(
    torch.cat,
    "a weight cut from a vector",
    lambda: tuple(weights((6,), (1, 3))),
    fn=lambda v, u: torch.cat([v.view(2, 3), u]),
    num_examples=N,
)

# -------------------------------------------------------------------- broadcasting

for n in (N, MANY):
    case(
        torch.matmul,
        f"a head for each of {n}",
        lambda n=n: (data(n, 7, 3), W(4, 3, 2)),
        fn=lambda x, w: x.unsqueeze(1) @ w,
    )
    case(
        torch.einsum,
        f"data of one feature, {n}",
        lambda n=n: (data(n, 1), W(4, 3)),
        fn=lambda x, w: torch.einsum("ni,oi->no", x, w),
    )
    case(
        torch.einsum,
        f"a weight of one feature, {n}",
        lambda n=n: (data(n, 5), W(1)),
        fn=lambda x, w: torch.einsum("ni,i->ni", x, w),
    )
    case(torch.mv, f"one feature, {n}", lambda n=n: (data(n, 1), W(1)))
    case(torch.matmul, f"one feature, {n}", lambda n=n: (data(n, 1), W(1)))
    case(torch.inner, f"one feature, {n}", lambda n=n: (data(n, 1), W(1)))
    case(
        torch.einsum,
        f"one feature, {n}",
        lambda n=n: (data(n, 1), W(1)),
        fn=lambda x, w: torch.einsum("ni,i->n", x, w),
    )
case(F.linear, "many", lambda: (data(MANY, 3), *weights((2, 3), (2,))))
case(F.conv1d, "many", lambda: (data(MANY, 2, 4), *weights((3, 2, 2), (3,))))
case(torch.mul, "many", lambda: (data(MANY, 3), W(3)))
case(F.linear, "no inputs", lambda: (data(N, 0), W(4, 0)))
case(
    F.linear,
    "a bias for every example",
    lambda: (data(N, 3), W(2, 3), data(N, 2)),
)

# --------------------------------------------------------------- beside parameters

case(
    F.linear,
    "of a weight by a parameter",
    lambda: (data(N, 2), W(4, 3), parameter(2, 3)),
    fn=lambda x, w, p: F.linear(x, F.linear(w, p)),
)
case(
    F.linear,
    "of a weight by data",
    lambda: (data(N, 3), W(4, 3)),
    fn=lambda x, w: F.linear(w, x),
    out_example_dim=1,
)
case(
    torch.matmul,
    "by a view of a parameter",
    lambda: (data(N, 2), W(4, 3), parameter(2, 3)),
    fn=lambda x, w, p: F.linear(x, w @ p.t()),
)
case(
    torch.matmul,
    "of a parameter repeated for every example",
    lambda: (data(N, 2), W(3, 2), parameter(1, 3)),
    fn=lambda x, w, p: torch.relu(p.expand(len(x), 3) @ w) + x,
)
case(
    torch.add,
    "a constant of a wider type",
    lambda: (data(N, 3), W(3, 3), const(3, 3)),
    fn=lambda x, w, c: F.linear(x, w.float().double().float() + c),
    tol=1e-5,
)

# ----------------------------------------------------------------- tokens and masks

case(
    torch.cat,
    "a class token",
    lambda: (data(N, 6, 3), *weights((1, 1, 3), (4, 3))),
    fn=lambda x, c, w: torch.relu(F.linear(torch.cat([c.expand(len(x), 1, 3), x], 1), w)),
)
case(
    torch.cat,
    "a repeated class token",
    lambda: (data(MANY, 2, 3), W(1, 1, 3)),
    fn=lambda x, c: torch.relu(torch.cat([c.repeat(len(x), 1, 1), x], 1)),
)
case(
    torch.where,
    "a mask token",
    lambda: (data(N, 6, 3), W(3)),
    fn=lambda x, token: torch.relu(torch.where(x[..., :1] > 0, x, token)),
)
case(
    torch.where,
    "a mask token with the examples' dimension",
    lambda: (data(N, 6, 3), *weights((1, 1, 3), (4, 3))),
    fn=lambda x, token, w: torch.relu(F.linear(torch.where(x[..., :1] > 0, x, token), w)),
)
case(
    torch.where,
    "a mask token repeated for every example",
    lambda: (data(N, 6, 3), *weights((1, 1, 3), (4, 3))),
    fn=lambda x, t, w: F.linear(torch.where(x[..., :1] > 0, t.expand(len(x), 1, 3), x), w),
)
case(
    torch.where,
    "a mask of features",
    lambda: (data(N, 3), *weights((3,), (2, 3))),
    fn=lambda x, token, w: F.linear(torch.where(torch.ones(1, 3) > 0, token, x), w),
)
case(
    torch.cat,
    "as many rows as examples",
    lambda: (data(N, 5), W(3)),
    fn=lambda x, w: F.linear(x, torch.cat([w.expand(N, 3), torch.ones(N, 2).double()], 1)),
)
case(
    torch.cat,
    "an empty part",
    lambda: (data(N, 1), W(N, 1)),
    fn=lambda x, w: F.linear(x, torch.cat([w[:, 1:], torch.zeros(N, 1).double()], 1) + w),
)
case(
    torch.mul,
    "a window as high as there are examples",
    lambda: (data(3, 2, 4, 4), W(4, 2, 1, 1)),
    fn=lambda x, w: F.conv2d(x, w[..., 0, 0, None, None] * 2 + w * torch.ones(3, 3).double()),
)
case(
    Tensor.repeat,
    "for every example",
    lambda: (data(N, 3), W(1, 3)),
    fn=lambda x, w: torch.relu(w.repeat(len(x), 1) + x),
)
case(
    Tensor.expand,
    "for every example, scaled",
    lambda: (data(N, 3), W(3)),
    fn=lambda x, w: torch.relu((w.expand(len(x), 3) * 2) + x),
)

# ------------------------------------------------------------------------- numbers

two = torch.tensor(2.0, dtype=torch.float64)
for op in (torch.mul, torch.add, torch.sub, torch.div):
    case(
        op,
        "a number in a tensor",
        lambda: (data(N, 3), W(2, 3)),
        fn=lambda x, w, op=op: F.linear(x, op(w, two)),
    )
case(
    torch.where,
    "a condition in a tensor",
    lambda: (data(N, 3), W(2, 3)),
    fn=lambda x, w: F.linear(x, torch.where(two > 1, w, 0.0)),
)

# ------------------------------------------------------------------------- keywords

for op in (torch.mul, torch.add, torch.sub):
    case(op, "other=", lambda: (data(N, 3), W(3)), fn=lambda x, w, op=op: op(x, other=w))
case(
    torch.matmul, "other=", lambda: (data(N, 3), W(3, 2)), fn=lambda x, w: torch.matmul(x, other=w)
)
case(torch.mm, "mat2=", lambda: (data(N, 3), W(3, 2)), fn=lambda x, w: torch.mm(x, mat2=w))
case(torch.mv, "vec=", lambda: (data(N, 3), W(3)), fn=lambda x, w: torch.mv(x, vec=w))
case(
    torch.addmm,
    "mat1= and mat2=",
    lambda: (data(N, 3), *weights((3, 2), (2,))),
    fn=lambda x, w, b: torch.addmm(b, mat2=w, mat1=x),
)
case(
    torch.addmm,
    "beta=0",
    lambda: (data(N, 3), W(3, 2)),
    fn=lambda x, w: torch.addmm(x.new_full((2,), torch.nan), x, w, beta=0),
)
case(torch.div, "other=", lambda: (W(3),), fn=lambda w: torch.div(w, other=2.0), num_examples=N)
case(Tensor.view, "size=", lambda: (W(2, 3),), fn=lambda w: w.view(size=(2, 1, 3)), num_examples=N)
case(
    Tensor.view_as,
    "of data",
    lambda: (data(N, 3), W(3, 1)),
    fn=lambda x, w: F.linear(x, w.t()) + constant_vector().view_as(w).sum(),
)
case(
    F.prelu,
    "at zero",
    lambda: (zeros(N, 3), W(3)),
)


def constant_vector():
    return torch.arange(3.0, dtype=torch.float64)


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64, requires_grad=True)
