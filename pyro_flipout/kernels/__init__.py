# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Fused GPU kernels in Triton, and the choice between them and library calls.

Triton is imported when a kernel is first used. Without it everything runs on library calls.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch
from torch import Tensor

from pyro_flipout._modes import has_own_gradients, recorded
from pyro_flipout.errors import warn

__all__ = ["available", "flipped_linear", "possible", "signs_available"]

_VARIABLE = "PYRO_FLIPOUT_TRITON"
_INTERPRETER = "TRITON_INTERPRET" in os.environ  # Triton too reads it only once


def possible(x: Tensor) -> bool:
    """Whether it is worth asking :func:`available`, at no cost where the data are on the CPU."""
    mode = _mode(x)
    return mode == "1" or (mode == "auto" and _installed())


def available(x: Tensor, center: Tensor, delta: Tensor, *biases: Tensor | None) -> bool:
    """Whether :func:`flipped_linear` should compute a flipped linear product.

    The environment variable ``PYRO_FLIPOUT_TRITON`` decides: ``0`` never; ``1`` wherever the
    kernel can; ``auto``, the default, where it can and is expected to be faster than two library
    calls. It can where Triton is installed, the arguments are plain tensors of float32, float16
    or bfloat16 on one CUDA device of compute capability 8.0 or later, and nothing traces,
    compiles or transforms the program (``torch.compile``, ``torch.jit``, ``torch.func``). With
    ``1`` it also can on the CPU in Triton's interpreter (``TRITON_INTERPRET=1``), for tests.

    What ``auto`` expects was measured on an H200 (``benchmarks/triton_linear.py --graph``): the
    kernel spares reads and writes of data and output, and its products are slower than the
    library's. It pays while ``K O / (K + O)`` is at most 256 in 16 bits and at most 128 in TF32,
    and never for float32 without TF32. Its first call of a size tries some shapes of blocks,
    which takes seconds.

    :param x: data, shape ``(*, K)``.
    :param center: shape ``(O, K)``.
    :param delta: shape ``(O, K)``.
    :param biases: each of shape ``(O,)`` or None.
    :raises ValueError: if the variable has another value.
    :raises ImportError: if it is ``1``, the data are on a GPU and Triton is not installed.
    """
    mode = _mode(x)
    tensors = [t for t in (x, center, delta, *biases) if t is not None]
    if mode == "0" or _transformed() or not _plain(tensors) or not _fit(*tensors):
        return False
    if not _can(x, mode):
        return False
    dtype = _dtype(tensors)
    return _runs(x, dtype, mode) and (mode == "1" or _pays(dtype, *center.shape))


def signs_available(*tensors: Tensor) -> bool:
    """Whether :mod:`~pyro_flipout.kernels.triton_signs` should multiply by signs.

    Where ``PYRO_FLIPOUT_TRITON`` and the tensors allow kernels (see :func:`available`), it should:
    it takes one pass over the data where library calls take two or more.
    """
    mode = _mode(tensors[0])
    if mode == "0" or _transformed() or not _plain(list(tensors)) or not _can(tensors[0], mode):
        return False
    from pyro_flipout.kernels import _triton

    if not all(t.numel() for t in tensors) or tensors[0].dtype not in _triton.DTYPES:
        return False
    return mode == "1" if _triton.INTERPRETED else tensors[0].is_cuda


def flipped_linear(*args: Any, **kwargs: Any) -> Tensor:
    """:func:`pyro_flipout.kernels.triton_linear.flipped_linear`, imported at the first call."""
    from pyro_flipout.kernels.triton_linear import flipped_linear as fused

    return fused(*args, **kwargs)


def allows_tf32() -> bool:
    """Whether the user lets float32 matrix products on CUDA use TF32."""
    matmul: Any = torch.backends.cuda.matmul
    # Reading `allow_tf32` raises after the precision was set by its newer name.
    precision = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32 if precision is None else precision == "tf32")


def _mode(x: Tensor) -> str:
    """What the variable says, ``0`` where nothing could run a kernel."""
    if not (x.is_cuda or _INTERPRETER):
        return "0"
    mode = os.environ.get(_VARIABLE, "auto")
    if mode not in ("0", "1", "auto"):
        raise ValueError(f"{_VARIABLE} is {mode!r}, expected 0, 1 or auto")
    return mode


def _can(x: Tensor, mode: str) -> bool:
    """Whether Triton is there and works.

    :raises ImportError: if it was asked for and is not there.
    :raises RuntimeError: if it was asked for and does not work.
    """
    if not _installed():
        if mode == "1" and x.is_cuda:
            raise ImportError(
                f"{_VARIABLE} is 1, but Triton is not installed; install triton, or set it to auto"
            )
        return False
    failure = _failure(x.device) if x.is_cuda else None
    if failure is not None and mode == "1":
        raise RuntimeError(f"{_VARIABLE} is 1, but Triton cannot run a kernel here") from failure
    return failure is None


@functools.cache
def _installed() -> bool:
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return True


@functools.cache
def _failure(device: torch.device) -> Exception | None:
    """What Triton raises when it runs its first kernel, of which it warns; None if nothing.

    It needs a C compiler, which a container may lack, and a GPU that is not too old.
    """
    try:
        _try_kernel(device)
    except Exception as failure:
        warn(
            f"Triton cannot run a kernel on {device} ({type(failure).__name__}: {failure}); signs "
            "and products are computed by library calls, which takes longer: mend it (it needs a "
            f"C compiler), or set {_VARIABLE}=0"
        )
        return failure
    return None


def _try_kernel(device: torch.device) -> None:
    from pyro_flipout.kernels import triton_signs
    from pyro_flipout.kernels._launch import Flips

    # Example 1 has the odd integer 3, which has one bit in common with the code 2.
    codes = torch.full((2,), 2, dtype=torch.int32, device=device)
    x = torch.ones(2, 2, device=device)
    triton_signs.flipped(x, codes, Flips(None, None, None, 2, 1), 0, 1)


def _plain(tensors: list[Tensor]) -> bool:
    """Whether these are strided tensors of one device, and no subclass that wants to know."""
    return all(
        type(t) in (Tensor, torch.nn.Parameter)
        and t.layout == torch.strided
        and t.device == tensors[0].device
        for t in tensors
    )


def _fit(x: Tensor, center: Tensor, delta: Tensor, *biases: Tensor) -> bool:
    return (
        x.dim() > 1
        and center.dim() == 2
        and delta.shape == center.shape
        and x.shape[-1] == center.shape[1]
        and all(bias.shape == center.shape[:1] for bias in biases)
        and x.numel() > 0
        and center.numel() > 0
    )


def _transformed() -> bool:
    """Whether the program is traced, compiled or transformed, and would lose the kernel."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or not has_own_gradients()
        or recorded()
    )


def _dtype(tensors: list[Tensor]) -> torch.dtype | None:
    """The dtype of the product, or None if the arguments have several."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensors[0].dtype if len({t.dtype for t in tensors}) == 1 else None


def _runs(x: Tensor, dtype: torch.dtype | None, mode: str) -> bool:
    from pyro_flipout.kernels import _triton

    if _triton.INTERPRETED:  # far too slow but for tests
        return mode == "1" and dtype in _triton.DTYPES
    if not x.is_cuda or dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


def _pays(dtype: torch.dtype | None, outputs: int, inputs: int) -> bool:
    if dtype == torch.float32 and not allows_tf32():
        return False
    return inputs * outputs <= (128 if dtype == torch.float32 else 256) * (inputs + outputs)
