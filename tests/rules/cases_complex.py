"""Oracle cases of complex weights and their real and imaginary parts."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flipout.testing import constant, random_weight
from tests.rules import cases
from tests.rules.cases import N, const, data, weights

CASES = []
case = functools.partial(cases.case, table=CASES)
W = random_weight


def CW(*shape):
    return random_weight(*shape, dtype=torch.complex128)


def complex_data(*shape):
    return torch.randn(*shape, dtype=torch.complex128).requires_grad_()


PARTS = (
    Tensor.real.__get__,
    Tensor.imag.__get__,
    torch.real,
    torch.imag,
    torch.conj,
    Tensor.conj,
    torch.conj_physical,
    Tensor.conj_physical,
    torch.resolve_conj,
    Tensor.resolve_conj,
    torch.resolve_neg,
    Tensor.resolve_neg,
)
for op in PARTS:
    case(op, "complex weight", lambda: (CW(2, 3),), num_examples=N)
    case(
        op,
        "of a conjugate",
        lambda: (CW(2, 3),),
        fn=lambda w, op=op: op(w.conj()),
        num_examples=N,
    )
    case(
        op,
        "of a product with i",
        lambda: (W(2, 3),),
        fn=lambda w, op=op: op(w * (1 - 2j)),
        num_examples=N,
    )
    case(
        op,
        "then data",
        lambda: (complex_data(N, 3), CW(2, 3)),
        fn=lambda x, w, op=op: F.linear(x, op(w).to(x.dtype)),
    )
for op in (Tensor.real.__get__, torch.real):
    case(op, "real weight", lambda: (W(2, 3),), num_examples=N)
    case(op, "real weight, data", lambda: (data(N, 3), W(3, 2)), fn=lambda x, w, op=op: x @ op(w))
for op in (torch.real, torch.imag):
    case(
        op,
        "tied",
        lambda: (data(N, 3), W(3, 2)),
        fn=lambda x, w, op=op: op((x + 0j) @ (w * (1 + 1j))) + x @ op(w * (1 + 1j)),
    )

case(torch.view_as_real, "complex weight", lambda: (CW(2, 3),), num_examples=N)
case(torch.view_as_real, "vector", lambda: (CW(3),), num_examples=N)
case(torch.view_as_real, "scalar", lambda: (CW(),), num_examples=N)
case(torch.view_as_complex, "pairs", lambda: (W(2, 3, 2),), num_examples=N)
case(
    torch.view_as_complex,
    "data",
    lambda: (complex_data(N, 3), W(3, 4, 2)),
    fn=lambda x, w: x @ torch.view_as_complex(w),
)
case(
    torch.view_as_real,
    "there and back",
    lambda: (complex_data(N, 3), CW(3, 4)),
    fn=lambda x, w: x @ torch.view_as_complex(torch.view_as_real(w)),
)
case(torch.complex, "two weights", lambda: tuple(weights((2, 3), (2, 3))), num_examples=N)
case(torch.complex, "a row", lambda: tuple(weights((2, 3), (3,))), num_examples=N)
case(torch.complex, "a constant", lambda: (W(2, 3), const(2, 3)), num_examples=N)
case(torch.complex, "a constant first", lambda: (const(3), W(2, 3)), num_examples=N)
case(torch.complex, "against data", lambda: (data(N, 3), W(3)))
case(
    torch.complex,
    "filter",
    lambda: (data(N, 8), *weights((5,), (5,))),
    fn=lambda x, a, b: torch.fft.irfft(torch.fft.rfft(x) * torch.complex(a, b)),
)
case(
    torch.complex,
    "layer of two weights",
    lambda: (complex_data(N, 3), *weights((2, 3), (2, 3))),
    fn=lambda x, a, b: F.linear(x, torch.complex(a, b)),
)
for op in (Tensor.cdouble, Tensor.cfloat):
    case(op, "real weight", lambda: (cases.integers(),), num_examples=N)

# ------------------------------------------------- products of complex weights and data

case(F.linear, "complex", lambda: (complex_data(N, 3), CW(2, 3)))
case(F.linear, "complex, bias", lambda: (complex_data(N, 3), CW(2, 3), complex_bias()))
case(F.linear, "complex, many examples", lambda: (complex_data(70, 3), CW(2, 3)))
case(torch.matmul, "complex", lambda: (complex_data(N, 3), CW(3, 2)))
case(torch.mul, "complex", lambda: (complex_data(N, 3), CW(3)))
case(torch.einsum, "complex", lambda: ("ni,io->no", complex_data(N, 3), CW(3, 2)))
case(F.conv1d, "complex", lambda: (complex_data(N, 3, 6), CW(2, 3, 2)))
for getter in (Tensor.H, Tensor.mH):
    case(getter.__get__, "complex", lambda: (CW(2, 3),), num_examples=N)
case(torch.adjoint, "complex", lambda: (CW(2, 3),), num_examples=N)
case(
    torch.matmul,
    "complex, by an adjoint",
    lambda: (complex_data(N, 3), CW(2, 3)),
    fn=lambda x, w: x @ w.H,
)


def complex_bias():
    return constant(torch.randn(2, dtype=torch.complex128))
