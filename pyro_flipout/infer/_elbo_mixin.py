# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""An ELBO with a mixin: it stays an instance of its class."""

from __future__ import annotations

import functools
import types
from typing import Any, ClassVar

__all__ = ["ElboMixin", "mixed"]


class ElboMixin:
    """Base of the mixins. An ELBO that has some can be copied and pickled.

    :cvar own: name of the attribute that the mixin adds.
    """

    own: ClassVar[str]

    @staticmethod
    def for_copy(own: Any) -> Any:
        """What a copy has of that attribute."""
        return own

    def __reduce__(self) -> Any:
        cls: Any = type(self)
        state, layers = dict(vars(self)), []
        while issubclass(cls, ElboMixin):
            mixin, cls = cls.__bases__
            layers.append((mixin, mixin.for_copy(state.pop(mixin.own))))
        return _rebuild, (cls, state, layers[::-1])


@functools.cache
def _class(cls: type, mixin: Any) -> type:
    return types.new_class(
        cls.__name__,
        (mixin, cls),
        exec_body=lambda ns: ns.update(__module__=cls.__module__, __doc__=cls.__doc__),
    )


def _rebuild(cls: Any, state: dict[str, Any], layers: list[tuple[Any, Any]]) -> Any:
    for mixin, own in layers:
        cls, state = _class(cls, mixin), {**state, mixin.own: own}
    elbo = cls.__new__(cls)
    vars(elbo).update(state)
    return elbo


def mixed(elbo: Any, mixin: type[ElboMixin], own: Any) -> Any:
    """A copy of ``elbo`` with ``mixin``, whose attribute is ``own``."""
    return _rebuild(type(elbo), vars(elbo), [(mixin, own)])
