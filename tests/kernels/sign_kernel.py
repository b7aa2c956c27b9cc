"""A kernel that writes out the signs which the fused kernels form in registers."""

import torch
import triton
import triton.language as tl

from pyro_flipout.kernels._triton import _flip, _odd_integers


@triton.jit
def _signs(examples, codes, out, BITS: tl.constexpr):
    rows, columns = tl.arange(0, 16), tl.arange(0, 16)
    odd = _odd_integers(tl.load(examples + rows), 1, 2**31 - 1, 1)
    where = out + rows[:, None] * 16 + columns[None, :]
    tl.store(where, _flip(tl.load(where), odd, tl.load(codes + columns), BITS))


def signs_of_pairs(examples, codes, bits, dtype):
    """Signs (16, 16) of 16 numbers of examples and 16 codes."""
    out = torch.ones(16, 16, dtype=dtype, device=codes.device)
    _signs[(1,)](examples, codes, out, BITS=bits)
    return out
