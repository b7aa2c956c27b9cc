# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""Multiplication by signs in one pass over the data, for the products of library calls.

:math:`X \circ S` is written, and :math:`R \circ Y + b + T \circ \beta` added to an output, each by
one kernel that forms the signs in registers from integer codes.

Import this module only where Triton is installed; :mod:`pyro_flipout.signs` does so.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_flipout.kernels import _launch
from pyro_flipout.kernels._launch import Flips, Layout

__all__ = ["add_flipped", "flipped", "sum_flipped"]

Bias = tuple[Tensor, Tensor, Tensor]
"""Centre, perturbation and codes of a bias, each of shape ``(count,)``."""


def flipped(
    x: Tensor, codes: Tensor, flips: Flips, example_dim: int, dim: int, out: Tensor | None = None
) -> Tensor | None:
    """``S ∘ x``, or None if ``x`` lies in memory as the kernel cannot read it.

    :param codes: ``int32`` codes along ``dim``, shape ``(x.size(dim),)``, or ``(1,)``.
    :param out: where to write, laid out as ``x``; may be ``x``.
    """
    if out is None:
        order = _order(x)
        x = x if order is not None else x.contiguous()
        out = torch.empty_like(x)
    order = _order(out)
    layout = _layout(out, order, example_dim, dim)
    if layout is None or out.shape != x.shape or _order(x) != order or x.dtype != out.dtype:
        return None
    _launch.flip(x, out, _codes(codes, x.size(dim)), layout, flips, add=False)
    return out


def add_flipped(
    out: Tensor,
    x: Tensor | None,
    codes: Tensor | None,
    flips: Flips,
    example_dim: int,
    dim: int,
    bias: Bias | None = None,
) -> bool:
    """Adds ``S ∘ x`` and a bias to ``out``; False, and nothing, if the kernel cannot.

    :param x: laid out as ``out``, or None for the bias alone.
    :param codes: of ``x``.
    """
    order = _order(out)
    layout = _layout(out, order, example_dim, dim)
    if layout is None:
        return False
    if x is not None:
        if x.shape != out.shape or x.dtype != out.dtype:
            return False
        if _order(x) != order:
            x = torch.empty_like(out).copy_(x)
    if bias is not None and any(t.dtype != out.dtype for t in bias[:2]):
        return False
    count = out.size(dim)
    if bias is not None:
        if any(t.shape != (count,) for t in bias[:2]):
            return False
        bias = bias[0].contiguous(), bias[1].contiguous(), _codes(bias[2], count)
    codes = None if codes is None else _codes(codes, count)
    _launch.flip(x, out, codes, layout, flips, add=True, bias=bias)
    return True


def sum_flipped(x: Tensor, codes: Tensor, flips: Flips) -> Tensor:
    """The sum over the rows of ``S ∘ x``, of ``x`` ``(N, count)``: shape ``(count,)``."""
    of_bias = flips._replace(of_bias=_codes(codes, x.size(1)))
    total = _launch.bias_grads(x, of_bias, (False, True))[1]
    assert total is not None, "it was asked for"
    return total


def _codes(codes: Tensor, count: int) -> Tensor:
    return codes.expand(count).contiguous()


def _order(x: Tensor) -> list[int] | None:
    """The dimensions of ``x`` from the one whose neighbours lie farthest apart, None if strided."""
    if x.is_contiguous():
        return list(range(x.dim()))
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return [0, 2, 3, 1]
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return [0, 2, 3, 4, 1]
    return None


def _layout(x: Tensor, order: list[int] | None, example_dim: int, dim: int) -> Layout | None:
    if order is None:
        return None
    example_at, at = order.index(example_dim), order.index(dim)
    if example_at > at:
        return None
    sizes = [x.size(d) for d in order]
    between = math.prod(sizes[example_at + 1 : at])
    columns = math.prod(sizes[at + 1 :])
    if columns == 1:
        return Layout(math.prod(sizes[:at]), sizes[at], between, along_rows=False)
    rows = math.prod(sizes[: at + 1])
    return Layout(rows, columns, between * sizes[at], along_rows=True)
