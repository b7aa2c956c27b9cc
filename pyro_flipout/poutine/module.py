# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""A module under a handler that is a module still.

Pyro's generic wrapper returns a ``functools.partial``, which hides the parameters from
``ELBOModule``. Here the wrapped module is a second object of a subclass that *shares*
the ``__dict__`` of the first: the same parameters, buffers, submodules and hooks, and
whatever ``forward`` stores on ``self`` is found on the model. The handlers live outside
that ``__dict__``, so the model itself is not changed.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pyro.poutine.runtime as runtime
import torch
from pyro.poutine.messenger import Messenger

__all__ = ["unwrap_module", "wrap_module"]


def _call_inner(module: Any, handlers: tuple[Messenger, ...], /, *args: Any, **kwargs: Any) -> Any:
    return module._handled_call(handlers, args, kwargs)


class _Handled:
    """Mixin: calls go through the handlers in ``_handled_by``, outermost first."""

    __slots__ = ()
    _handled_model: torch.nn.Module
    _handled_by: tuple[Messenger, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._handled_call(self._handled_by, args, kwargs)

    def _handled_call(self, handlers: tuple[Messenger, ...], args: Any, kwargs: Any) -> Any:
        if not handlers:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        if handlers[0] in runtime._PYRO_STACK:  # the model calls itself
            return self._handled_call(handlers[1:], args, kwargs)
        run_model = getattr(handlers[0], "run_model", None)
        if run_model is not None:
            inner = functools.partial(_call_inner, self, handlers[1:])
            return run_model(self._handled_model, inner, args, kwargs)
        with handlers[0]:
            return self._handled_call(handlers[1:], args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _build, (self._handled_model, self._handled_by)

    def __reduce__(self) -> Any:
        return self.__reduce_ex__(2)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        model = copy.deepcopy(self._handled_model, memo)
        return _build(model, copy.deepcopy(self._handled_by, memo))

    def _replicate_for_data_parallel(self) -> Any:
        model = self._handled_model
        return _build(model._replicate_for_data_parallel(), self._handled_by)


_CLASSES: dict[type, Any] = {}


def _handled_class(cls: type) -> Any:
    if cls not in _CLASSES:
        namespace = {
            "__slots__": ("_handled_by", "_handled_model"),
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
        }
        _CLASSES[cls] = type(cls)(cls.__name__, (_Handled, cls), namespace)
    return _CLASSES[cls]


def _build(model: torch.nn.Module, handlers: tuple[Messenger, ...]) -> torch.nn.Module:
    cls = _handled_class(type(model))
    handled: torch.nn.Module = cls.__new__(cls)
    object.__setattr__(handled, "__dict__", model.__dict__)
    object.__setattr__(handled, "_handled_model", model)
    object.__setattr__(handled, "_handled_by", handlers)
    return handled


def unwrap_module(model: Any) -> tuple[tuple[Messenger, ...], Any]:
    """The handlers of a wrapped module, outermost first, and the module without them."""
    if isinstance(model, _Handled):
        return model._handled_by, model._handled_model
    return (), model


def wrap_module(model: torch.nn.Module, handler: Messenger) -> torch.nn.Module:
    """Returns ``model`` under ``handler``, as a module that shares everything with it.

    :param model: any module; wrapping a wrapped one adds an outer handler.
    :param handler: the handler that calls run under.
    """
    if isinstance(model, _Handled):
        return _build(model._handled_model, (handler, *model._handled_by))
    return _build(model, (handler,))
