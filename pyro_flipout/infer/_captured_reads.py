# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""What a program reads off tensors while it is recorded."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import (
    get_innermost_proxy_mode,
    get_proxy_slot,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_flipout._modes import looked_at
from pyro_flipout.errors import is_library
from pyro_flipout.infer._captured_watch import Watch, of_library
from pyro_flipout.tensor import FlipoutTensor

__all__ = ["LINE", "reads_watched", "users_line"]

LINE = "captured_line"
"""Key in the ``meta`` of a node whose shape depends on data: the line of code it came from."""

MOST_ENTRIES = 10_000
"""Entries of a tensor that the program holds and may read numbers off: they are compared."""

_READS: frozenset[Any] = frozenset(
    {
        Tensor.__array__,
        Tensor.__deepcopy__,
        Tensor.__dlpack__,
        Tensor.__reduce_ex__,
        Tensor.apply_,
        Tensor.map_,
        Tensor.numpy,
        Tensor.tolist,
    }
)
"""Functions that give the entries of a tensor to Python, or change them there."""

_COPIES: frozenset[Any] = frozenset(
    {torch.as_tensor, torch.asarray, torch.tensor, Tensor.new_tensor}
)
"""Functions that read numbers of the tensors in a list."""

_SPLITS: frozenset[Any] = frozenset({torch.tensor_split, Tensor.tensor_split})
"""Functions that read numbers off their second argument."""


class _Calls(TorchFunctionMode):
    """Refuses functions that read entries of a tensor without an operation of torch."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _read_by(func, args, kwargs):
            _read(tensor, func.__name__, self.watch)
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Notes of which tensors that the program holds a number is read, and where shapes vary."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags:
            for tensor in args:
                if isinstance(tensor, Tensor) and _recorded(tensor) is None:
                    _read(
                        tensor,
                        "item" if "_local_scalar" in func.name() else func.name(),
                        self.watch,
                    )
        result = func(*args, **kwargs)
        if torch.Tag.dynamic_output_shape in func.tags:
            several = isinstance(result, (tuple, list))
            known = _recorded(result[0] if several else result)
            if known is not None:
                node = known.proxy.node
                (node.args[0] if several else node).meta[LINE] = users_line(_frames())
        return result


@contextlib.contextmanager
def reads_watched(watch: Watch) -> Iterator[None]:
    """While a program is recorded: numbers that Python reads off tensors are noted or refused.

    :param watch: told of tensors that the program holds and reads numbers off.
    :raises RuntimeError: for others.
    """
    with _Calls(watch), _Operations(watch):
        yield


def _read_by(func: Any, args: Any, kwargs: Any) -> Iterable[Tensor]:
    """Tensors whose entries a call gives to Python."""
    if func in _READS:
        return _tensors(args[:1])
    if func in _COPIES:
        data = [*args, *kwargs.values()]
        return _tensors([part for part in data if isinstance(part, (list, tuple))])
    if func in _SPLITS:
        return _tensors([*args[1:], *kwargs.values()])
    return ()


def _tensors(it: Iterable[Any]) -> Iterator[Tensor]:
    for part in it:
        if isinstance(part, Tensor):
            yield part.plain if isinstance(part, FlipoutTensor) else part
        elif isinstance(part, (list, tuple)):
            yield from _tensors(part)


def _read(tensor: Tensor, name: str, watch: Watch) -> None:
    """A number of a tensor is read.

    :raises RuntimeError: unless the tensor is data that the program holds, and small.
    """
    if get_innermost_proxy_mode() is None:
        return
    known = _recorded(tensor)
    if known is not None and known.constant is not None:
        return
    if known is None and not tensor.requires_grad and tensor.numel() <= MOST_ENTRIES:
        looked_at(lambda: watch.add_value(tensor))
        return
    kind = "a parameter" if known is None and tensor.requires_grad else "a tensor"
    raise RuntimeError(f"{name} gives Python the numbers of {kind} of shape {tuple(tensor.shape)}")


def _recorded(tensor: Tensor) -> Any:
    """What the recorder knows of a tensor that it computes; None if the program only holds it."""
    mode = get_innermost_proxy_mode()
    return None if mode is None else get_proxy_slot(tensor, mode.tracer, None)


def _frames() -> Iterator[tuple[FrameType, int]]:
    """Frames that are executed, from the innermost outwards."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def users_line(frames: Iterable[tuple[FrameType, int]]) -> str:
    """The first of some lines of code that is the user's, for a message."""
    for frame, line in frames:
        file = frame.f_code.co_filename
        library = is_library(file) or of_library(frame.f_globals.get("__name__"))
        if os.path.isfile(file) and not library:
            return f", at line {line} of {os.path.basename(file)}"
    return ""
