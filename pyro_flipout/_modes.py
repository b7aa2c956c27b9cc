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
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "as_subclass",
    "autocast",
    "forward_mode",
    "fused",
    "generator_state",
    "graphed",
    "has_own_gradients",
    "in_backward",
    "looked_at",
    "recorded",
    "recording",
    "transformed",
    "untransformed",
]

T = TypeVar("T")
S = TypeVar("S", bound=Tensor)


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


def forward_mode() -> bool:
    """Whether tangents are computed (``torch.autograd.forward_ad``), which our gradients lack."""
    return torch.autograd.forward_ad._current_level >= 0


def has_own_gradients() -> bool:
    """Whether products and recurrent layers may use gradients of their own."""
    return not (transformed() or forward_mode())


@contextmanager
def untransformed() -> Iterator[None]:
    """Leaves the transforms of ``torch.func`` for a while: what is made now is a plain tensor."""
    if not transformed():
        yield
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        yield


def in_backward() -> bool:
    """Whether autograd runs backward, as when ``torch.utils.checkpoint`` recomputes."""
    return bool(torch._C._current_graph_task_id() != -1)


class _Recording(threading.local):
    on = False
    fusing = False


_RECORDING = _Recording()


@contextmanager
def recording(fuse: bool) -> Iterator[None]:
    """While :func:`~pyro_flipout.infer.captured` records what torch computes.

    :param fuse: whether a compiler will fuse it.
    """
    before = _RECORDING.on, _RECORDING.fusing
    _RECORDING.on, _RECORDING.fusing = True, fuse
    try:
        yield
    finally:
        _RECORDING.on, _RECORDING.fusing = before


def recorded() -> bool:
    """Whether :func:`recording` is on."""
    return _RECORDING.on


def fused() -> bool:
    """Whether a compiler will fuse what is recorded: results of their own serve it best."""
    return _RECORDING.fusing


def looked_at(look: Callable[[], T]) -> T:
    """What is read off tensors to see how they are laid out, and is the same in every execution.

    Nothing of it is recorded.
    """
    if not recorded():
        return look()
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    with disable_proxy_modes_tracing():
        return look()


def as_subclass(x: Tensor, cls: type[S]) -> S:
    """``x.as_subclass(cls)``, which is a wrapper to look at, and not an operation to record.

    PyTorch 2.4 refuses it under a mode of ``torch.utils._python_dispatch``.
    """
    if not torch._C._len_torch_dispatch_stack():
        return x.as_subclass(cls)
    with _disable_current_modes():
        return x.as_subclass(cls)


def graphed() -> bool:
    """Whether a CUDA graph is captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def generator_state(device: torch.device) -> Tensor | None:
    """State of the default generator of a device, to tell whether it has been there before.

    ``None`` where it cannot be read, or a replay has another one: in a recorded program and in
    a CUDA graph.
    """
    if recorded() or graphed():
        return None
    if device.type == "cpu":
        return torch.default_generator.get_state()
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None
