# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""Pseudo-random signs for the examples of a mini-batch, from integer codes.

The variance of a mini-batch gradient depends only on *pairs* of examples, so the
sign vectors of different examples need only be pairwise independent. Example
:math:`n` therefore gets the odd integer :math:`a_n = 2n + 1`, each row or column
:math:`i` of a weight a uniformly random 32-bit integer :math:`B_i` (its *code*), and

.. math::
    \operatorname{sign}(n, i) = (-1)^{\operatorname{popcount}(a_n \mathbin{\&} B_i)}.

Since :math:`a_n`, :math:`a_m` and :math:`a_n \oplus a_m` are all non-zero for
:math:`n \ne m`, ``(sign(n, i), sign(m, i))`` is uniform on
:math:`\{-1, 1\}^2`: the sign vectors of any two examples are exactly independent.
The product of two signs of one example is the sign of the XOR of their codes.

Memory is O(d) instead of O(N d), and codes do not depend on N.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MAX_EXAMPLES", "code_bits", "dense_signs", "draw_codes", "paired_signs"]

MAX_EXAMPLES = 2**31
"""Largest number of examples that 32-bit codes can tell apart."""


def draw_codes(
    shape: tuple[int, ...] | torch.Size, device: torch.device | str | None = None
) -> Tensor:
    """Draws one uniformly random 32-bit code for each entry of ``shape``.

    Uses the default generator of ``device``, so ``pyro.set_rng_seed`` makes it
    reproducible on CPU and CUDA.

    :param shape: shape of the codes, usually that of a weight with every
        dimension but one of size 1.
    :param device: device of the weight.
    :returns: ``int32`` tensor of shape ``shape``.

    >>> draw_codes((3, 1)).shape
    torch.Size([3, 1])
    """
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)


def code_bits(num_examples: int) -> int:
    """Number of code bits that ``num_examples`` examples use.

    >>> [code_bits(n) for n in (1, 2, 3, 8192)]
    [1, 2, 3, 14]
    """
    if not 0 <= num_examples <= MAX_EXAMPLES:
        raise ValueError(
            f"signs: got {num_examples} examples, expected 0 to {MAX_EXAMPLES}; "
            "split the mini-batch"
        )
    return max(num_examples - 1, 0).bit_length() + 1


def dense_signs(codes: Tensor, num_examples: int, dtype: torch.dtype) -> Tensor:
    """Builds the matrix of signs that the codes stand for, by doubling.

    :param codes: ``int32`` tensor of any shape ``(*)``.
    :param num_examples: the number N of examples.
    :param dtype: dtype of the signs; any floating dtype holds them exactly.
    :returns: tensor of shape ``(N, *)`` with entries ±1.

    >>> dense_signs(torch.tensor([0, 1, 2, 3], dtype=torch.int32), 3, torch.float)
    tensor([[ 1., -1.,  1., -1.],
            [ 1., -1., -1.,  1.],
            [ 1., -1.,  1., -1.]])
    """
    bits = code_bits(num_examples)
    out = torch.empty((num_examples, *codes.shape), dtype=dtype, device=codes.device)
    if num_examples == 0:
        return out
    flips = 1 - 2 * ((codes >> _bit_range(bits, codes)) & 1).to(dtype)  # (bits, *)
    out[0] = flips[0]
    done = 1
    for flip in flips[1:]:
        step = min(done, num_examples - done)
        torch.mul(out[:step], flip, out=out[done : done + step])
        done += step
    return out


def paired_signs(codes: Tensor, examples: Tensor, dtype: torch.dtype) -> Tensor:
    """Signs of single pairs of a code and an example, without the matrix of all.

    :param codes: ``int32`` tensor of any shape.
    :param examples: number n of the example for each code, an integer tensor that
        broadcasts with ``codes``.
    :param dtype: dtype of the signs.
    :returns: tensor of the broadcast shape with entries ±1, equal to
        ``dense_signs(codes, N, dtype)[n]``.

    >>> codes = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    >>> paired_signs(codes, torch.tensor([0, 0, 1, 1]), torch.float)
    tensor([ 1., -1., -1.,  1.])
    """
    bits = (2 * examples.to(torch.int32) + 1) & codes
    for shift in (16, 8, 4, 2, 1):  # folds the parity into the lowest bit
        bits = bits ^ (bits >> shift)
    return (1 - 2 * (bits & 1)).to(dtype)


def _bit_range(bits: int, codes: Tensor) -> Tensor:
    positions = torch.arange(bits, dtype=torch.int32, device=codes.device)
    return positions.reshape(bits, *(1,) * codes.dim())
