# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""What torch's modes ask of a product with a gradient of its own, and whether it is recorded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["autocast", "graphed", "looked_at", "recorded", "recording", "transformed"]

T = TypeVar("T")


def autocast(*tensors: Tensor | None) -> list[Any]:
    """What autocast would do to the arguments of a matrix product."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]


def transformed() -> bool:
    """Whether ``torch.func`` transforms the program, which it cannot do with our own gradients."""
    return torch._C._are_functorch_transforms_active()


class _Recording(threading.local):
    depth = 0


_RECORDING = _Recording()


@contextmanager
def recording() -> Iterator[None]:
    """While :func:`~pyro_flipout.infer.captured` records what torch computes."""
    _RECORDING.depth += 1
    try:
        yield
    finally:
        _RECORDING.depth -= 1


def recorded() -> bool:
    """Whether :func:`recording` is on."""
    return _RECORDING.depth > 0


def looked_at(look: Callable[[], T]) -> T:
    """What is read off tensors to see how they are laid out, and is the same in every execution.

    Nothing of it is recorded.
    """
    if not recorded():
        return look()
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    with disable_proxy_modes_tracing():
        return look()


def graphed() -> bool:
    """Whether a CUDA graph is captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
