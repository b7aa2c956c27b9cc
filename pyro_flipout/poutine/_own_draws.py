# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""What the other estimators have in common: a weight with rules of its own, and few of them.

Such a weight is found, kept plain in traces and left shared by the same code as a flipped one
(it is a :class:`~pyro_flipout.FlipoutTensor`); only what torch functions do with it differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from pyro_flipout._functions import differentiating, share_in_functions, watch_gradient
from pyro_flipout._modes import as_subclass
from pyro_flipout.errors import MissingRuleError
from pyro_flipout.poutine.flipout_messenger import FlipoutMessenger, _particle_dims
from pyro_flipout.poutine.symmetric_draw import Message, SymmetricDraw
from pyro_flipout.rules import query
from pyro_flipout.tensor import (
    RULES,
    Draw,
    Execution,
    FlipoutTensor,
    NoRule,
    NotExamples,
    Term,
    _is_query,
    describe,
)

__all__ = ["OwnDrawsMessenger", "OwnDrawsTensor", "Site", "transposes"]

T = TypeVar("T", bound="OwnDrawsTensor")
_GETTERS = (Tensor.T, Tensor.mT)


class Site:
    """What all views of one site's weight in one execution share.

    :ivar found: the shared draw and its distribution.
    :ivar used: whether examples have seen it.
    """

    def __init__(self, found: SymmetricDraw) -> None:
        self.found = found
        self.used = False


class OwnDrawsTensor(FlipoutTensor):
    """A weight of which every example sees a draw that is not made of signs.

    :cvar estimator: its name, for messages.
    :cvar rules: what torch functions do with it, called as ``rule(op, *args, **kwargs)``.
    """

    estimator: ClassVar[str]
    rules: ClassVar[dict[Callable[..., Any], Callable[..., Any]]]

    _origin: Site
    _maps: tuple[Callable[[Tensor], Tensor], ...]

    @classmethod
    def make(
        cls: type[T],
        plain: Tensor,
        terms: Sequence[Term],
        execution: Execution,
        origin: Site,
        maps: tuple[Callable[[Tensor], Tensor], ...] = (),
    ) -> T:
        """Wraps the shared draw ``plain``, the image of the site's under ``maps``."""
        self = as_subclass(plain, cls)
        self._plain, self._terms, self._execution = plain, tuple(terms), execution
        self._origin, self._maps = origin, maps
        self._center = self.image(origin.found.center)
        watch_gradient(self)
        return self

    def image(self, value: Tensor) -> Tensor:
        """What became of a value of the site's shape."""
        for fn in self._maps:
            value = fn(value)
        return value

    def mark_used(self) -> None:
        """Notes that examples have seen draws of their own."""
        self._origin.used = True
        for draw in self.draws:
            draw.used = True

    def mapped(self: T, fn: Callable[[Tensor], Tensor]) -> T:
        """The weight under one more linear map, which moves entries only."""
        maps = (*self._maps, fn)
        return self.make(fn(self._plain), self._terms, self._execution, self._origin, maps)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if differentiating():
            share_in_functions(func, _walk((args, kwargs), cls))
        own = [w for w in _walk((args, kwargs), cls) if w.terms]
        rule = cls.rules.get(func)
        known = RULES.get(func)
        asks = known.apply.__module__ == query.__name__ if known else _is_query(func)
        if own and (rule or not asks):
            try:
                if rule is None:
                    raise NoRule("it has no rule")
                return rule(func, *args, **kwargs)
            except (NoRule, NotExamples) as why:
                cls.refuse(own, describe(func), str(why))
        return func(*_plain(args, cls), **_plain(kwargs, cls))

    @classmethod
    def refuse(
        cls, weights: Sequence[Any], call: str, reason: str, remedy: str | None = None
    ) -> None:
        """Leaves the weights of a call shared, or raises."""
        message = f"{cls.estimator} cannot be used in {call}: {reason}"
        for weight in weights:
            if weight.execution.on_missing_rule == "error":
                remedy = f"hide it with {cls.estimator}(hide=[...])"
                raise MissingRuleError(f"site '{weight.site}': {message}; {remedy}")
            weight.execution.share(weight.draws, message)


class OwnDrawsMessenger(FlipoutMessenger):
    """Finds symmetric draws as flipout does, and makes another kind of weight of them."""

    tensor: ClassVar[type[OwnDrawsTensor]]
    can_audit = False

    def _check_group_size(self, group_size: int) -> None:
        if group_size != 1:
            raise ValueError(
                f"{self.tensor.estimator}: got group_size={group_size}, expected 1: it has no "
                "signs that a group could share; leave it out"
            )

    def why_not(self, found: SymmetricDraw) -> str | None:
        """The reason to leave a symmetric draw shared, if there is one."""

    def _flip(self, msg: Message, draw: SymmetricDraw) -> None:
        name, value = msg["name"], msg["value"]
        reason = self.why_not(draw)
        if _particle_dims(msg):
            reason = "it has particle dimensions; use vectorize_particles=False"
        if reason is not None:
            self._share(name, f"{self.tensor.estimator} cannot be used: {reason}")
            return
        self.decisions[name] = self.tensor.estimator
        execution = self._execution_of(name)
        delta = value - draw.center if draw.delta is None else draw.delta
        terms = [Term(delta, (Draw(name, value, execution),))]
        msg["value"] = self.tensor.make(value, terms, execution, Site(draw))


def transposes(op: Callable[..., Any], input: Any, *args: Any) -> Any:
    """Rule of the transposes of a weight."""
    return input.mapped(lambda value: op(value, *args))


TRANSPOSES: list[Callable[..., Any]] = [
    Tensor.t,
    Tensor.transpose,
    *(getter.__get__ for getter in _GETTERS),  # type: ignore[attr-defined]
]


def _walk(obj: Any, cls: type[T]) -> list[T]:
    if isinstance(obj, cls):
        return [obj]
    if isinstance(obj, dict):
        obj = list(obj.values())
    return [w for item in obj for w in _walk(item, cls)] if isinstance(obj, (list, tuple)) else []


def _plain(obj: Any, cls: type) -> Any:
    """Replaces weights of one class by their shared draws; others keep their own rules."""
    if isinstance(obj, cls):
        return obj.plain  # type: ignore[attr-defined]
    if type(obj) in (list, tuple):
        return type(obj)(_plain(item, cls) for item in obj)
    if type(obj) is dict:
        return {key: _plain(item, cls) for key, item in obj.items()}
    return obj
