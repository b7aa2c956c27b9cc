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

__all__ = ["Isolated", "isolated"]

T = TypeVar("T")
_DEPTH = 3
"""Of containers within containers among the attributes of a handler."""


class Isolated:
    """Runs functions again and again from the state in which the block was entered.

    :ivar modes: the modules that were called, and whether each was in training mode.
    """

    def __init__(self) -> None:
        self.modes: dict[nn.Module, bool] = {}
        self._generators = _generators()
        # Pyro's one allocator of enumeration dimensions is part of the state of `EnumMessenger`.
        self._handlers = [_State(o) for o in (*runtime._PYRO_STACK, runtime._ENUM_ALLOCATOR)]
        self._names = set(pyro.get_param_store().keys())
        self._buffers: list[tuple[nn.Module, str, Tensor | None, Tensor | None]] = []

    def run(self, fn: Callable[[], T]) -> T:
        """Calls ``fn``, then puts back what it changed."""
        try:
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
    """The attributes of a handler (or an allocator), and the contents of the containers among them."""

    def __init__(self, handler: Any) -> None:
        self._attributes = vars(handler)
        self._containers: list[tuple[Any, Any]] = []
        self._add(self._attributes, _DEPTH)

    def _add(self, obj: Any, depth: int) -> None:
        if not isinstance(obj, (dict, list, set)) or depth < 0:
            return
        self._containers.append((obj, obj.copy()))
        for item in obj.values() if isinstance(obj, dict) else obj:
            self._add(item, depth - 1)

    def restore(self) -> None:
        for container, before in self._containers:
            if isinstance(container, list):
                container[:] = before
            else:
                container.clear()
                container.update(before)
