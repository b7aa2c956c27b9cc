# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Launches of the Triton kernels: arguments, grids, and how sums over rows are split."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_flipout.kernels import _triton, allows_tf32
from pyro_flipout.signs import code_bits


class Flips(NamedTuple):
    """Which signs the entries of a row have.

    :ivar into_data: codes of the data's columns, or None.
    :ivar into_out: codes of the output's columns, or None.
    :ivar of_bias: codes of the bias, which are those of columns of the output too, or None.
    :ivar examples: the number N of examples.
    :ivar rows_each: row ``m`` belongs to example ``n = m // rows_each % examples``.
    :ivar group_size: examples with the same ``n // group_size`` have their signs in common.
    """

    into_data: Tensor | None
    into_out: Tensor | None
    of_bias: Tensor | None
    examples: int
    rows_each: int
    group_size: int = 1

    def reversed(self) -> Flips:
        """Those of the product that takes the output's gradient to the data's."""
        return self._replace(into_data=self.into_out, into_out=self.into_data)

    def rows(self) -> dict[str, int]:
        """What tells the kernels the signs of a row from codes."""
        bits = code_bits(-(-self.examples // self.group_size))
        return {
            "rows_each": self.rows_each,
            "examples": self.examples,
            "group_size": self.group_size,
            "BITS": 8 if bits <= 8 else 16 if bits <= 16 else 32,
        }

    def arguments(self) -> dict[str, Any]:
        """What the kernels of products need to know."""
        return self.rows() | {
            "in_codes": self.into_data,
            "out_codes": self.into_out,
            "HAS_IN": self.into_data is not None,
            "HAS_OUT": self.into_out is not None,
        }


def product(
    x: Tensor,
    center: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    bias_delta: Tensor | None,
    flips: Flips,
) -> Tensor:
    """``x centerᵀ + R ∘ ((x ∘ S) deltaᵀ)`` and biases, of rows ``x`` (M, K): shape (M, O)."""
    (m, k), o = x.shape, len(center)
    out = x.new_empty(m, o)
    bias, bias_delta = (None if t is None else t.contiguous() for t in (bias, bias_delta))

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (-(-m // meta["BM"]) * -(-o // meta["BO"]),)

    arguments = flips.arguments() | _common(x, m, k, o) | _blocks(GROUP=2)
    strides = (*x.stride(), *center.stride(), *delta.stride(), out.stride(0))
    names = ("x_m", "x_k", "c_o", "c_k", "d_o", "d_k", "out_m")
    arguments |= dict(zip(names, strides, strict=True))
    with _on_device(x):
        _triton.product[grid](
            x=x, center=center, delta=delta, bias=bias, bias_delta=bias_delta, out=out,
            bias_codes=flips.of_bias, HAS_BIAS=bias is not None,
            HAS_BIAS_DELTA=bias_delta is not None, **arguments,
        )  # fmt: skip
    return out


class Layout(NamedTuple):
    """How a contiguous tensor is read as rows and columns, one of which have the signs.

    :ivar rows: of all columns.
    :ivar columns: entries of each row.
    :ivar rows_each: row ``r`` belongs to example ``r // rows_each % examples``.
    :ivar along_rows: whether row ``r`` has the code ``r % count``; else the columns have them.
    """

    rows: int
    columns: int
    rows_each: int
    along_rows: bool


def flip(
    x: Tensor | None,
    out: Tensor,
    codes: Tensor | None,
    layout: Layout,
    flips: Flips,
    add: bool,
    bias: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Writes ``S ∘ x`` to ``out``, or adds it, and adds a bias of centre, perturbation and codes.

    :param x: contiguous, or None for a bias alone.
    :param codes: of ``x``, shape ``(count,)``.
    """
    center, delta, bias_codes = bias or (None, None, None)
    most = 64 if _triton.INTERPRETED else 256
    bc = min(1 << (layout.columns - 1).bit_length(), most)
    bm = (512 if _triton.INTERPRETED else 4096) // bc
    like = bias_codes if codes is None else codes
    assert like is not None, "there is something to flip"
    arguments = flips.rows() | {"rows_each": layout.rows_each}
    with _on_device(out):
        _triton.flips[(-(-layout.rows // bm) * -(-layout.columns // bc),)](
            x, out, codes, center, delta, bias_codes, layout.rows, layout.columns, like.numel(),
            ALONG_ROWS=layout.along_rows, HAS_X=x is not None, ADD=add, HAS_BIAS=bias is not None,
            ACC=_triton.DTYPES[_accumulator(out.dtype)], BM=bm, BC=bc, **arguments,
        )  # fmt: skip


def weight_grads(
    grad: Tensor, x: Tensor, flips: Flips, need: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """``gradᵀ x`` and ``(R ∘ grad)ᵀ (x ∘ S)`` of rows ``grad`` (M, O) and ``x`` (M, K)."""
    (m, k), o = x.shape, grad.shape[1]
    rows_per_split = _rows_per_split(x, m, k, o)
    splits = -(-m // rows_per_split)
    # Sums over parts of the rows are kept apart and added in a fixed order: no atomics.
    dtype = x.dtype if splits == 1 else _accumulator(x.dtype)
    center, delta = (x.new_empty(splits, o, k, dtype=dtype) if n else None for n in need)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return -(-o // meta["BO"]) * -(-k // meta["BK"]), splits

    arguments = flips.arguments() | _common(x, m, k, o) | _blocks()
    names = ("g_m", "g_o", "x_m", "x_k")
    arguments |= dict(zip(names, (*grad.stride(), *x.stride()), strict=True))
    with _on_device(x):
        _triton.weight_grads[grid](
            grad=grad, x=x, grad_center=center, grad_delta=delta, rows_per_split=rows_per_split,
            CENTER=need[0], DELTA=need[1], **arguments,
        )  # fmt: skip
    return _total(center, x.dtype), _total(delta, x.dtype)


def bias_grads(
    grad: Tensor, flips: Flips, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The sums over the rows of ``grad`` (M, O) and of ``T ∘ grad``."""
    m, o = grad.shape
    blocks = {"BM": 16, "BO": 16} if _triton.INTERPRETED else {"BM": 32, "BO": 64}
    rows_per_split = _split(grad, m, -(-o // blocks["BO"]), 4 * blocks["BM"])
    splits = -(-m // rows_per_split)
    accumulator = _accumulator(grad.dtype)
    center, delta = (grad.new_empty(splits, o, dtype=accumulator) if n else None for n in need)
    with _on_device(grad):
        _triton.bias_grads[(-(-o // blocks["BO"]), splits)](
            grad, center, delta, flips.of_bias, m, o, rows_per_split=rows_per_split,
            g_m=grad.stride(0), g_o=grad.stride(1), CENTER=need[0], DELTA=need[1],
            ACC=_triton.DTYPES[accumulator], **flips.rows(), **blocks,
        )  # fmt: skip
    return _total(center, grad.dtype), _total(delta, grad.dtype)


def _total(parts: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if parts is None:
        return None
    return (parts[0] if len(parts) == 1 else parts.sum(0)).to(dtype)


def _rows_per_split(x: Tensor, m: int, k: int, o: int) -> int:
    block = 16 if _triton.INTERPRETED else 64
    return _split(x, m, -(-k // block) * -(-o // block), 4 * block)


def _split(x: Tensor, m: int, programs: int, least: int) -> int:
    """Rows that one program sums over, so few programs still keep every processor busy."""
    processors = 4 if _triton.INTERPRETED else _processors(x.device)
    splits = min(max(2 * processors // programs, 1), -(-m // least))
    multiple = least // 4
    return -(-m // (splits * multiple)) * multiple


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _common(x: Tensor, m: int, k: int, o: int) -> dict[str, Any]:
    """What both kernels are told of the sizes and of the precision."""
    tf32 = x.dtype == torch.float32 and allows_tf32()
    return {
        "M": m,
        "K": k,
        "OUT": o,
        # Block shapes are tuned once for each; a last mini-batch should not need its own.
        "bucket": 256 if m <= 256 else 2048 if m <= 2048 else 8192,
        "PRECISION": "tf32" if tf32 else "ieee",
        "ACC": _triton.DTYPES[_accumulator(x.dtype)],
        # The interpreter keeps bfloat16 as integers and would multiply those.
        "UPCAST": _triton.INTERPRETED,
    }


def _blocks(**more: int) -> dict[str, int]:
    return {**_triton.SMALL, **more} if _triton.INTERPRETED else {}


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    # Triton launches on the current device, whatever the tensors' is.
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
