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

__all__ = ["Opaque", "Same", "Watch"]

_LIBRARIES = {"torch", "pyro", "pyro_flipout", "numpy", "functorch"} | sys.stdlib_module_names
_HANDLERS = {"pyro", "pyro_flipout"}


class Opaque:
    """Base class of objects that hold nothing which a program could read."""


_ATOMS = (str, bytes, numbers.Number, type(None), torch.dtype, torch.device)
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
        self._options: list[tuple[Any, str, Any, Hashable]] = []
        self._leaves: list[tuple[Tensor, bool]] = []
        self._values: list[tuple[Tensor, Tensor]] = []
        self._known: set[int] = set()
        for it in _reachable(roots):
            if issubclass(type(it), nn.Module):
                self.add_module(it)
            cls: Any = type(it)
            for name in _options(cls):
                value = _option(it, name)
                self._options.append((it, name, value, _summary(value)))

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
        return (
            all(module.training == mode for module, mode in self._modes)
            and all(tensor.requires_grad is flag for tensor, flag in self._leaves)
            and all(_unchanged(*option) for option in self._options)
            and all(torch.equal(tensor, value) for tensor, value in self._values)
        )


class Same:
    """Equal to what is the same object."""

    __slots__ = ("it",)

    def __init__(self, it: object) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.it is self.it

    def __hash__(self) -> int:
        return id(self.it)


def _option(it: Any, name: str) -> Any:
    # An attribute of a PyroModule may be a sample statement.
    return vars(it).get(name) if isinstance(it, nn.Module) else getattr(it, name, None)


def _unchanged(it: Any, name: str, value: Any, summary: Hashable) -> bool:
    now = _option(it, name)
    if now is value and isinstance(now, _ATOMS):
        return True
    return _summary(now) == summary


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


@functools.cache
def _options(cls: type) -> tuple[str, ...]:
    """Names of the options of a class of handlers, layers or ELBOs: what its constructor takes.

    A captured program follows the factor of ``tempered``, which is a tensor there.
    """
    known = cls.__module__.partition(".")[0] in _HANDLERS
    if not (issubclass(cls, ELBO) or (known and issubclass(cls, (Messenger, nn.Module)))):
        return ()
    names = list(inspect.signature(cls.__init__).parameters)[1:]
    return tuple(n for n in names if not (n == "factor" and issubclass(cls, TemperMessenger)))


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
        return () if _of_library(it.__module__) else (*vars(it).values(), *it.__bases__)
    if isinstance(it, weakref.ReferenceType):
        return (it(),)
    return gc.get_referents(it)


def _of_function(fn: types.FunctionType) -> Iterator[Any]:
    """What a function refers to, of global variables only those that its code names."""
    yield from (fn.__defaults__ or (), fn.__kwdefaults__, vars(fn))
    for cell in fn.__closure__ or ():
        yield from gc.get_referents(cell)
    if _of_library(fn.__module__):
        return
    names, todo, seen = _names(fn.__code__), [fn.__globals__], set[int]()
    while todo:
        namespace = todo.pop()
        seen.add(id(namespace))
        for value in [namespace[name] for name in names if name in namespace]:
            if not isinstance(value, types.ModuleType):
                yield value
            elif not _of_library(value.__name__) and id(vars(value)) not in seen:
                todo.append(vars(value))


def _names(code: types.CodeType) -> set[str]:
    nested = (_names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*nested)


def _of_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES
