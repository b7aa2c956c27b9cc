# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The state of Python objects that a recorded program depends on."""

from __future__ import annotations

import functools
import gc
import inspect
import numbers
import sys
import types
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_flipout.infer.tempering import TemperMessenger

__all__ = ["Opaque", "Same", "Watch", "of_library"]

_LIBRARIES = {"torch", "pyro", "pyro_flipout", "numpy", "functorch"} | sys.stdlib_module_names
_HANDLERS = {"pyro", "pyro_flipout"}


class Opaque:
    """Base class of objects that hold nothing which a program could read."""


_ATOMS = (str, bytes, numbers.Number, type(None), torch.dtype, torch.device)
_CONTAINERS = (Mapping, list, tuple, set)
_CLOSED = (Opaque, Tensor, types.ModuleType, types.CodeType, types.FrameType)


class Watch:
    """The modes of modules, the options of handlers and the flags of tensors at one time.

    A recorded program has them as constants. Modules and handlers are found by following the
    references of ``roots``: attributes, containers, closures, bound methods, partial functions,
    wrappers, and the global variables that functions name.

    :param roots: where to start: model, guide and handlers.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self._modes: list[tuple[nn.Module, bool]] = []
        self._options: list[tuple[Any, str, Any, bool, Hashable]] = []
        self._leaves: list[tuple[Tensor, bool]] = []
        self._values: list[tuple[Tensor, Tensor]] = []
        self._known: set[int] = set()
        for it in _reachable(roots):
            if issubclass(type(it), nn.Module):
                self.add_module(it)
            for name in _options(it):
                value = getattr(it, name, None)
                fixed = not isinstance(value, _CONTAINERS)
                self._options.append((it, name, value, fixed, _summary(value)))

    def add_module(self, module: nn.Module) -> None:
        """Notes whether a module is in training mode, unless it is known already."""
        if id(module) not in self._known:
            self._known.add(id(module))
            self._modes.append((module, module.training))

    def add_leaves(self, tensors: Iterable[Tensor]) -> None:
        """Notes whether tensors require a gradient; only leaves can be told to."""
        unique = {id(t): t for t in tensors if t.is_leaf and t.is_floating_point()}
        self._leaves += [(t, t.requires_grad) for t in unique.values()]

    def add_value(self, tensor: Tensor) -> None:
        """Notes the entries of a tensor of which Python has read numbers."""
        self._values.append((tensor, tensor.clone()))

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        for module, mode in self._modes:
            if module.training != mode:
                return False
        for leaf, flag in self._leaves:
            if leaf.requires_grad is not flag:
                return False
        for it, name, value, fixed, summary in self._options:
            now = getattr(it, name, None)
            if not (fixed and now is value) and _summary(now) != summary:
                return False
        return all(torch.equal(tensor, value) for tensor, value in self._values)


class Same:
    """Equal to what is the same object."""

    __slots__ = ("it",)

    def __init__(self, it: object) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.it is self.it

    def __hash__(self) -> int:
        return id(self.it)


def _summary(value: Any) -> Hashable:
    """Equal where values are the same: numbers by value, containers by item, others by identity."""
    if isinstance(value, _ATOMS):
        return type(value), value
    if isinstance(value, Mapping):
        return tuple((_summary(key), _summary(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_summary, value))
    if isinstance(value, (set, frozenset)):
        return frozenset(map(_summary, value))
    return Same(value)


def _options(it: Any) -> tuple[str, ...]:
    """Names of the options of a handler, an ELBO or a layer.

    A captured program follows the factor of ``tempered``, which is a tensor there.
    """
    cls: Any = type(it)
    if issubclass(cls, ELBO):  # those of Pyro's own are part of the key of a program
        return _parameters(cls, frozenset(_parameters(ELBO)))
    if cls.__module__.partition(".")[0] not in _HANDLERS:
        return ()
    if issubclass(cls, TemperMessenger):
        return _parameters(cls, frozenset({"factor"}))
    if issubclass(cls, Messenger):
        return _parameters(cls)
    layer = issubclass(cls, nn.Module) and "example_dim" in vars(it)
    return ("example_dim",) if layer else ()


@functools.cache
def _parameters(cls: Hashable, but: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """What the constructor of a class takes, which handlers keep as attributes of that name."""
    names = list(inspect.signature(cls.__init__).parameters)[1:]  # type: ignore[misc]
    return tuple(name for name in names if name not in but)


def _reachable(roots: Iterable[Any]) -> list[Any]:
    """Modules, handlers and other objects that ``roots`` refer to, directly or not."""
    todo, seen = list(roots), dict[int, Any]()
    while todo:
        it = todo.pop()
        # Numbers, strings and containers of these alone are not tracked.
        if not gc.is_tracked(it) or id(it) in seen or issubclass(type(it), _CLOSED):
            continue
        seen[id(it)] = it
        todo += _referents(it)
    return list(seen.values())


def _referents(it: Any) -> Iterable[Any]:
    if isinstance(it, types.FunctionType):
        return _of_function(it)
    if isinstance(it, type):
        return () if of_library(it.__module__) else (*vars(it).values(), *it.__bases__)
    if isinstance(it, weakref.ReferenceType):
        return (it(),)
    return gc.get_referents(it)


def _of_function(fn: types.FunctionType) -> Iterator[Any]:
    """What a function refers to, of global variables only those that its code names."""
    yield from (fn.__defaults__ or (), fn.__kwdefaults__, vars(fn))
    for cell in fn.__closure__ or ():
        yield from gc.get_referents(cell)
    if of_library(fn.__module__):
        return
    names, todo, seen = _names(fn.__code__), [fn.__globals__], set[int]()
    while todo:
        namespace = todo.pop()
        seen.add(id(namespace))
        for value in [namespace[name] for name in names if name in namespace]:
            if not isinstance(value, types.ModuleType):
                yield value
            elif not of_library(value.__name__) and id(vars(value)) not in seen:
                todo.append(vars(value))


def _names(code: types.CodeType) -> set[str]:
    nested = (_names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*nested)


def of_library(module: str | None) -> bool:
    """Whether a module of Python is torch's, Pyro's, NumPy's, ours or of the standard library."""
    return (module or "").partition(".")[0] in _LIBRARIES
