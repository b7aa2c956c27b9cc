# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Running a model again without a trace of it.

What a run of a Pyro model changes besides its result is put back: random number generators, the
state of the handlers around it, the parameter store, and the buffers of modules. Handlers that
record a trace do not see the run.
"""

from __future__ import annotations

import random
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import pyro
import pyro.poutine.runtime as runtime
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Isolated", "isolated"]

T = TypeVar("T")
_DEPTH = 8
"""Of containers within containers among the attributes of a handler."""


class Isolated:
    """Runs functions again and again from the state in which the block was entered.

    :ivar modes: the modules that were called, and whether each was in training mode.
    :ivar watch: whether to look for tensors that a run writes to; others will write to the same.
    """

    def __init__(self) -> None:
        self.watch = False
        self._written = _Written()
        self.modes: dict[nn.Module, bool] = {}
        self._generators = _generators()
        around = [*runtime._PYRO_STACK, runtime._ENUM_ALLOCATOR, runtime._DIM_ALLOCATOR]
        self._handlers = [_State(handler) for handler in around]
        self._names = set(pyro.get_param_store().keys())
        self._buffers: list[tuple[nn.Module, str, Tensor | None, Tensor | None]] = []

    def run(self, fn: Callable[[], T]) -> T:
        """Calls ``fn``, then puts back what it changed."""
        try:
            if not self.watch:
                return fn()
            with self._written:
                return fn()
        finally:
            self.restore()

    def restore(self) -> None:
        """Puts everything back."""
        _set_generators(self._generators)
        for state in self._handlers:
            state.restore()
        store = pyro.get_param_store()
        for name in set(store.keys()) - self._names:
            del store[name]
        self._written.restore()
        with torch.no_grad():
            for module, name, buffer, before in self._buffers:
                module._buffers[name] = buffer
                if buffer is not None and before is not None and not _same(buffer, before):
                    buffer.copy_(before)

    def saw(self, module: nn.Module) -> None:
        """Remembers the buffers of a module, before it is called for the first time."""
        if module in self.modes:
            return
        for part in module.modules():
            if part not in self.modes:
                self.modes[part] = part.training
                for name, buffer in part._buffers.items():
                    copy = None if buffer is None else buffer.detach().clone()
                    self._buffers.append((part, name, buffer, copy))


class _Written(TorchDispatchMode):
    """Keeps what was in the tensors that a program writes to, unless it has made them itself."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: set[int] = set()
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _written_by(func, args, kwargs):
            self._keep(tensor)
        out = func(*args, **kwargs)
        given = {_address(tensor) for tensor in _tensors_in((args, list(kwargs.values())))}
        for tensor in _tensors_in(out):
            address = _address(tensor)
            if address is not None and address not in given:  # a view is of what was there
                self._made.add(address)
        return out

    def _keep(self, tensor: Tensor) -> None:
        address = _address(tensor)
        if address is None or address in self._made or address in self._kept:
            return
        storage = tensor.untyped_storage()
        whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        self._kept[address] = whole, whole.clone()

    def restore(self) -> None:
        """Writes back what was there."""
        for whole, before in self._kept.values():
            if not torch.equal(whole, before):
                whole.copy_(before)
        self._made.clear()


def _written_by(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The arguments that an operator writes to."""
    schema = func._schema
    if not schema.is_mutable and "batch_norm" not in schema.name:
        return
    for position, argument in enumerate(schema.arguments):
        # Kernels of batch norm write to running statistics without saying so.
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes or argument.name in ("running_mean", "running_var"):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from _tensors_in(value)


def _tensors_in(obj: Any) -> Iterator[Tensor]:
    if isinstance(obj, Tensor):
        yield obj
    elif isinstance(obj, (list, tuple)):
        for item in obj:
            yield from _tensors_in(item)


def _address(tensor: Tensor) -> int | None:
    if type(tensor) is not Tensor and not isinstance(tensor, nn.Parameter):
        return None
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return None
    return tensor.untyped_storage().data_ptr() or None


@contextmanager
def isolated() -> Iterator[Isolated]:
    """A block in which models are run again without a trace of it.

    Pyro's stack is without the handlers that make traces; warnings are not shown, since the run
    that counts will give them.
    """
    state, thread = Isolated(), threading.get_ident()

    def before_forward(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == thread:
            state.saw(module)

    stack = list(runtime._PYRO_STACK)
    hook = register_module_forward_pre_hook(before_forward)
    try:
        runtime._PYRO_STACK[:] = [f for f in stack if not _is_left_out(f)]
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            yield state
    finally:
        hook.remove()
        runtime._PYRO_STACK[:] = stack
        state.restore()


def _is_left_out(frame: Messenger) -> bool:
    """Whether a handler records what is run, or would flip it."""
    return isinstance(frame, TraceMessenger) or hasattr(frame, "_probe")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _generators() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()  # noqa: NPY002


def _set_generators(states: tuple[Any, ...]) -> None:
    cpu, cuda, python, numpy = states
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002


class _State:
    """The attributes of a handler, and the contents of the containers among them.

    :param handler: a handler, or another object that runs change.
    """

    def __init__(self, handler: object) -> None:
        self._attributes = vars(handler)
        self._containers: list[tuple[Any, Any]] = []
        self._numbers: list[tuple[Any, Any]] = []
        # Pyro's own handlers write into no tensor, and may hold large ones that are observed.
        self._seen: set[int] = set()
        self._is_users = not type(handler).__module__.startswith("pyro.")
        self._add(self._attributes, _DEPTH)

    def _add(self, obj: Any, depth: int) -> None:
        if self._is_users and isinstance(obj, Tensor) and obj.layout == torch.strided:
            self._numbers.append((obj, obj.detach().clone()))
        elif self._is_users and isinstance(obj, np.ndarray):
            self._numbers.append((obj, obj.copy()))
        if not isinstance(obj, (dict, list, set, deque)) or depth < 0 or id(obj) in self._seen:
            return
        self._seen.add(id(obj))
        self._containers.append((obj, obj.copy()))
        for item in obj.values() if isinstance(obj, dict) else obj:
            self._add(item, depth - 1)

    def restore(self) -> None:
        for container, before in self._containers:
            if isinstance(container, list):
                container[:] = before
            elif isinstance(container, deque):
                container.clear()
                container.extend(before)
            else:
                container.clear()
                container.update(before)
        for numbers, before in self._numbers:
            if isinstance(numbers, np.ndarray):
                numbers[...] = before
            elif not _same(numbers, before):
                with torch.no_grad():
                    numbers.copy_(before)
