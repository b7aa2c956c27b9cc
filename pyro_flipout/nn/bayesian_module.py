# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""PyroModules whose parameters are sample sites, and what they keep of the parameters.

Pyro forgets a parameter when a ``PyroSample`` takes its place. :class:`BayesianModule` keeps
what is needed besides: which names were parameters, in which order, which of them are one
tied weight; and its priors follow the module in ``.to()``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from pyro_flipout.nn.site_prior import Hierarchy, convert

__all__ = ["MIXINS", "BayesianModule", "Sites", "bayesian_class", "make_site_", "mixin", "tie_"]

C = TypeVar("C", bound=type)


@dataclass
class Sites:
    """What a module knows of its sample sites.

    :ivar order: names of all parameters the module had, sites now or not.
    :ivar hyper: names of the sites that are parameters of priors.
    :ivar ties: for a name, the module and the name there of which it is another use.
    """

    order: list[str] = field(default_factory=list)
    hyper: list[str] = field(default_factory=list)
    ties: dict[str, tuple[Any, str]] = field(default_factory=dict)


class BayesianModule:
    """Mixin of PyroModules whose parameters may be sample sites."""

    _sites: Sites
    _pyro_samples: dict[str, Any]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, prior in self._pyro_samples.items():
            self._pyro_samples[name] = convert(prior, fn)
        return self

    def _pyro_get_fullname(self, name: str) -> str:
        # The other uses of a tied weight are read under the first one's name, so that
        # Pyro's cache gives them its value: one site, one draw.
        sites = self.__dict__.get("_sites")
        if sites is not None and name in sites.ties:
            source, name = sites.ties[name]
            return source._pyro_get_fullname(name)  # type: ignore[no-any-return]
        return super()._pyro_get_fullname(name)  # type: ignore[no-any-return, misc]

    def extra_repr(self) -> str:
        """What torch shows of the module."""
        with torch.random.fork_rng(devices=[]):  # torch looks at weights, which draws them
            return super().extra_repr()  # type: ignore[misc, no-any-return]

    def _before_site(self, name: str, parameter: Tensor) -> None:
        """Called while the parameter is still there."""

    def _plain_value(self, name: str, value: Tensor) -> Tensor:
        """The parameter of the plain module that stands for a site's value."""
        return value


# ------------------------------------------------------------------- the class of a module

MIXINS: dict[type[nn.Module], type] = {}
"""What the Bayesian version of a torch module needs besides, by its class."""

_CLASSES: dict[type, type] = {}


def mixin(*modules: type[nn.Module]) -> Callable[[C], C]:
    """Registers the decorated mixin for the Bayesian versions of ``modules``.

    :raises ValueError: if one of them has one.
    """

    def decorator(cls: C) -> C:
        for module in modules:
            if module in MIXINS:
                raise ValueError(f"mixin: {module.__name__} has {MIXINS[module].__name__} already")
            MIXINS[module] = cls
        return cls

    return decorator


def bayesian_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The PyroModule with the ``forward`` of ``cls`` that can have sites for parameters."""
    base: Any = PyroModule[cls]
    if issubclass(base, BayesianModule):
        return cls
    if base not in _CLASSES:
        origins = {made: module for module, made in PyroModule._pyro_mixin_cache.items()}
        origin = origins.get(base, base)
        mixins = [m for module, m in MIXINS.items() if issubclass(base, module)]
        namespace = {
            "__module__": __name__,
            "__doc__": base.__doc__,
            "__reduce__": lambda self: (_new, (origin,), _state(self)),
        }
        name = f"Bayesian{origin.__name__}"
        _CLASSES[base] = type(base)(name, (*mixins, BayesianModule, base), namespace)
    return _CLASSES[base]


def _new(origin: type[nn.Module]) -> nn.Module:
    cls = bayesian_class(origin)
    return cls.__new__(cls)


def _state(module: nn.Module) -> Any:
    return module.__getstate__()


# ------------------------------------------------------------------------------- sites


def make_site_(module: Any, name: str, prior: Any) -> None:
    """Makes a parameter of a :class:`BayesianModule` a sample site, in place.

    :param prior: a distribution of the parameter's shape, or a Hierarchy.
    :raises ValueError: if a site of the prior's own needs a name that is taken.
    """
    sites: Sites = module._sites
    module._before_site(name, getattr(module, name))
    if isinstance(prior, Hierarchy):
        hyper = [f"{name}_{suffix}" for suffix in prior.hyper]
        for attr, distribution in zip(hyper, prior.hyper.values(), strict=True):
            if hasattr(module, attr):
                raise ValueError(
                    f"prior of '{name}': its site would be called '{attr}', which "
                    f"{type(module).__name__} has already; choose another suffix"
                )
            setattr(module, attr, PyroSample(distribution))
        sites.hyper += hyper
        setattr(module, name, PyroSample(_Conditional(hyper, prior.conditional)))
    else:
        setattr(module, name, PyroSample(prior))


def tie_(module: Any, name: str, source: Any, source_name: str) -> None:
    """Makes a weight another use of the sample site of another module, in place.

    Both modules are parts of one PyroModule. There is one site, under the name that it has
    in ``source``, and every example sees one draw of it in both.

    >>> import torch
    >>> from pyro_flipout.nn import FlipoutEmbedding, FlipoutLinear
    >>> model = PyroModule[torch.nn.Sequential](FlipoutEmbedding(9, 4), FlipoutLinear(4, 9))
    >>> tie_(model[1], "weight", model[0], "weight")

    :param module: a Flipout layer or converted module, whose own site goes.
    :param source: the one that keeps its site.
    :raises TypeError: if one of them is neither.
    :raises ValueError: if ``source`` has no such site.
    """
    for each in (module, source):
        if not isinstance(each, BayesianModule):
            raise TypeError(
                f"tie_: got a {type(each).__name__}, expected a Flipout layer or a module "
                "converted by bayesianize_"
            )
    if source_name not in source._pyro_samples:
        raise ValueError(
            f"tie_: {type(source).__name__} has no site '{source_name}', only "
            f"{list(source._pyro_samples)}"
        )
    setattr(module, name, PyroSample(_Tied(source, source_name)))
    sites: Sites = module._sites
    sites.ties[name] = source._sites.ties.get(source_name, (source, source_name))


@dataclass(frozen=True)
class _Conditional:
    """Prior of a weight given the sites of its hyperparameters."""

    hyper: list[str]
    conditional: Callable[..., Any]

    def __call__(self, module: nn.Module) -> Any:
        return self.conditional(*(getattr(module, name) for name in self.hyper))


@dataclass(frozen=True, repr=False)
class _Tied:
    """Prior of a weight that is another module's."""

    source: Any
    name: str

    def __call__(self, module: nn.Module) -> Any:
        prior = self.source._pyro_samples[self.name]
        return prior if hasattr(prior, "sample") else prior(self.source)
