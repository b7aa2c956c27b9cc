# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Conversion of any network to a Bayesian one."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from pyro.nn import PyroModule
from pyro.nn.module import to_pyro_module_
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from pyro_flipout.nn.bayesian_module import (
    BayesianModule,
    Sites,
    bayesian_class,
    make_site_,
    mixin,
    tie_,
)
from pyro_flipout.nn.choice import Chosen, Pattern, choose
from pyro_flipout.nn.layer import STANDARD_NORMAL
from pyro_flipout.nn.site_prior import Prior, prior_of

__all__ = ["bayesianize", "bayesianize_"]

M = TypeVar("M", bound=nn.Module)


def bayesianize_(
    module: M,
    prior: Prior | None = None,
    bias_prior: Prior | None = None,
    *,
    hide: Iterable[Pattern] | None = None,
    expose: Iterable[Pattern] | None = None,
) -> M:
    """Makes the parameters of a network sample sites, in place.

    Every module becomes a PyroModule and keeps all it has besides. Wrap the network in
    :func:`~pyro_flipout.flipout` to train it. A tied weight, one parameter used in several
    places, becomes one site under the first of its names.

    >>> from pyro_flipout.nn import KaimingPrior
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 1))
    >>> _ = bayesianize_(net, prior=KaimingPrior(), hide=[nn.BatchNorm1d])
    >>> sorted(name for name, _ in net.named_parameters())
    ['2.bias', '2.weight']

    :param module: any network.
    :param prior: a distribution, or a function of a parameter's full name and value that
        returns one, or None to leave it a parameter; standard normal if omitted. See
        :mod:`pyro_flipout.nn.priors`.
    :param bias_prior: of parameters with "bias" in their name; ``prior`` if omitted.
    :param hide: what stays a parameter: names of parameters or modules, in which ``*`` stands
        for anything, or module classes.
    :param expose: what alone is considered, likewise.
    :returns: ``module`` itself.
    :raises TypeError: if it is no network that can be converted.
    :raises ValueError: if a name or class means no parameter, or a prior does not fit.
    """
    _refuse(module)
    chosen = choose(module, hide, expose, "bayesianize_")
    prior = STANDARD_NORMAL if prior is None else prior
    priors = [prior_of(prior, bias_prior, each.name, each.parameter) for each in chosen]
    _to_pyro(module)
    for each, given in zip(chosen, priors, strict=True):
        if given is not None:
            _to_site(each, given)
    return module


def bayesianize(
    module: M,
    prior: Prior | None = None,
    bias_prior: Prior | None = None,
    *,
    hide: Iterable[Pattern] | None = None,
    expose: Iterable[Pattern] | None = None,
) -> M:
    """A Bayesian copy of a network; see :func:`bayesianize_`."""
    _refuse(module)
    return bayesianize_(copy.deepcopy(module), prior, bias_prior, hide=hide, expose=expose)


def _refuse(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"bayesianize_: got {module!r}, expected an nn.Module instance")
    if hasattr(module, "_handled_by"):
        raise TypeError(
            "bayesianize_: got a module under flipout(...); convert it first, then wrap"
        )
    for path, part in module.named_modules():
        if isinstance(part, (DataParallel, DistributedDataParallel, torch.jit.ScriptModule)):
            raise TypeError(
                f"bayesianize_: '{path}' is a {type(part).__name__}, which cannot be converted; "
                "convert the module that it was made of, then wrap that"
            )


def _to_pyro(module: nn.Module) -> None:
    """As Pyro's ``to_pyro_module_``, which does not know modules that are None."""
    for child in module._modules.values():
        if child is not None:
            _to_pyro(child)
    if isinstance(module, PyroModule):
        for name, child in module._modules.items():
            if isinstance(child, PyroModule):
                module.add_module(name, child)  # gives it its name and context
        return
    order = list(module._modules)
    to_pyro_module_(module, recurse=False)
    for name in order:  # Pyro puts a child that is None first
        module._modules[name] = module._modules.pop(name)
    if isinstance(module, nn.Sequential):
        _upgrade(module)


def _upgrade(module: Any) -> Sites:
    """Makes a PyroModule a :class:`BayesianModule`."""
    if not isinstance(module, BayesianModule):
        order = [name for name, value in module._parameters.items() if value is not None]
        if isinstance(module, nn.RNNBase):
            vars(module).pop("_flat_weights", None)  # holds the parameters
        module.__class__ = bayesian_class(type(module))
        module._sites = Sites(order)
    sites: Sites = module._sites
    return sites


def _to_site(chosen: Chosen, prior: Any) -> None:
    first, *others = chosen.uses
    _upgrade(first.owner)
    make_site_(first.owner, first.attr, prior)
    done = {(id(first.owner), first.attr)}
    for use in others:
        if (id(use.owner), use.attr) not in done:  # a module may have several paths
            done.add((id(use.owner), use.attr))
            _upgrade(use.owner)
            tie_(use.owner, use.attr, first.owner, first.attr)


@mixin(nn.Sequential)
class Slices:
    """A slice of a converted ``nn.Sequential`` is plain, so that its layers keep their names."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))  # type: ignore[attr-defined]
        return super().__getitem__(index)  # type: ignore[misc]
