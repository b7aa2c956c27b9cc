# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Which parameters of a network are meant: by name, or by the type of their module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from pyro.nn import PyroModule
from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["Chosen", "Pattern", "Use", "choose"]

Pattern = str | type[nn.Module]
"""Name of a parameter or of a module, in which ``*`` stands for anything, or a module class."""


@dataclass(frozen=True)
class Use:
    """One place where a parameter is found.

    :ivar name: full name, as in ``named_parameters``.
    :ivar path: path of the module that owns it.
    :ivar within: that module and those around it, by path.
    """

    name: str
    path: str
    attr: str
    owner: nn.Module
    within: dict[str, nn.Module] = field(repr=False)

    def matches(self, pattern: Pattern) -> bool:
        """Whether a pattern means this parameter, or a module around it."""
        if isinstance(pattern, str):
            return any(fnmatchcase(name, pattern) for name in (self.name, *self.within) if name)
        return any(isinstance(module, pattern) for module in self.within.values())


@dataclass(frozen=True)
class Chosen:
    """A parameter and the places where it is used, of which tied weights have several."""

    parameter: torch.Tensor
    uses: list[Use]

    @property
    def name(self) -> str:
        """Its first name, which is that of ``named_parameters``."""
        return self.uses[0].name


def choose(
    module: nn.Module,
    hide: Iterable[Pattern] | None,
    expose: Iterable[Pattern] | None,
    caller: str,
) -> list[Chosen]:
    """The floating-point parameters that ``expose`` means and ``hide`` does not.

    :param hide: names and types to leave out; None for none.
    :param expose: names and types to consider; None for all.
    :param caller: name of the public function, for messages.
    :returns: each parameter once, with all its uses.
    :raises TypeError: if a pattern is neither a name nor a module class.
    :raises ValueError: if a pattern means no parameter, if nothing is chosen, or if two
        names of one tied parameter are in ``hide`` and in ``expose``.
    """
    hidden, exposed = _patterns("hide", hide, caller), _patterns("expose", expose, caller)
    found = _find(module, caller)
    uses = [use for chosen in found for use in chosen.uses]
    for option, patterns in (("hide", hidden), ("expose", exposed)):
        for pattern in patterns or ():
            if not any(use.matches(pattern) for use in uses):
                raise ValueError(
                    f"{caller}: {option} has {_show(pattern)}, which means no parameter of "
                    f"{type(module).__name__}; expected a name or pattern such as "
                    f"{[use.name for use in uses[:4]]}, a path of a module, or a module class"
                )
    result = [chosen for chosen in found if _is_chosen(chosen, hidden, exposed, caller)]
    if not result:
        raise ValueError(
            f"{caller}: no floating-point parameter of {type(module).__name__} is chosen; it has "
            f"{[chosen.name for chosen in found[:4]]}; check hide and expose"
        )
    return result


def _find(module: nn.Module, caller: str) -> list[Chosen]:
    within: dict[str, nn.Module] = {}
    found: dict[int, Chosen] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        within[path] = owner
        around = {p: m for p, m in within.items() if p in ("", path) or path.startswith(f"{p}.")}
        for attr, parameter in owner._parameters.items():
            name = f"{path}.{attr}" if path else attr
            if is_lazy(parameter):
                raise ValueError(
                    f"{caller}: '{name}' has no shape yet; call the lazy module on data first"
                )
            if parameter is None or not parameter.is_floating_point():
                continue
            if not _is_constrained(owner, attr):
                chosen = found.setdefault(id(parameter), Chosen(parameter, []))
                chosen.uses.append(Use(name, path, attr, owner, around))
    return list(found.values())


def _is_constrained(owner: nn.Module, attr: str) -> bool:
    """Whether it is the unconstrained value of a PyroParam, which is no weight."""
    name = attr.removesuffix("_unconstrained")
    return isinstance(owner, PyroModule) and name != attr and name in owner._pyro_params


def _is_chosen(
    chosen: Chosen,
    hide: list[Pattern] | None,
    expose: list[Pattern] | None,
    caller: str,
) -> bool:
    hidden = [use for use in chosen.uses if any(map(use.matches, hide or ()))]
    exposed = [use for use in chosen.uses if expose is None or any(map(use.matches, expose))]
    if hidden and exposed and expose is not None and not any(use in hidden for use in exposed):
        raise ValueError(
            f"{caller}: '{hidden[0].name}' in hide and '{exposed[0].name}' in expose are one tied "
            "parameter; remove one of them"
        )
    return bool(exposed) and not hidden


def _patterns(option: str, patterns: Iterable[Pattern] | None, caller: str) -> list[Pattern] | None:
    if patterns is None:
        return None
    if isinstance(patterns, (str, type)):
        raise TypeError(f"{caller}: got {option}={_show(patterns)}, expected a list of such")
    result = list(patterns)
    for pattern in result:
        if not isinstance(pattern, str) and not (
            isinstance(pattern, type) and issubclass(pattern, nn.Module)
        ):
            raise TypeError(
                f"{caller}: got {pattern!r} in {option}, expected a name or a module class"
            )
    return result


def _show(pattern: Pattern) -> str:
    return repr(pattern) if isinstance(pattern, str) else pattern.__name__
