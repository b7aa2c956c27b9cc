# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The prior of one parameter: in its shape and dtype, on its device, and moved with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import Distribution, Transform

__all__ = ["Hierarchy", "Prior", "convert", "expand_prior", "home", "prior_of"]


@dataclass(frozen=True)
class Hierarchy:
    """A prior whose own parameters are sample sites.

    :ivar hyper: distributions by suffix; that of ``weight`` with suffix ``scale`` is the
        site ``weight_scale``.
    :ivar conditional: function of their values, in this order, that returns the weight's
        distribution. Pickled with the model: a function at module level, or a partial.
    """

    hyper: dict[str, Any]
    conditional: Callable[..., Any]


Prior: TypeAlias = "Distribution | Callable[[str, Tensor], Distribution | Hierarchy | None]"
"""What ``prior=`` takes."""


def prior_of(
    prior: Prior, bias_prior: Prior | None, name: str, parameter: Tensor
) -> Distribution | Hierarchy | None:
    """The prior of one parameter.

    :param bias_prior: for parameters with "bias" in the last part of their name; None
        for ``prior``.
    :raises TypeError: if the prior, or what it returns, is none.
    :raises ValueError: if it does not have the parameter's shape.
    """
    result: Any = prior
    if bias_prior is not None and "bias" in name.rpartition(".")[2]:
        result = bias_prior
    if callable(result) and not isinstance(result, Distribution):
        result = result(name, parameter)
    if result is None or isinstance(result, Hierarchy):
        return result
    if not isinstance(result, TorchDistributionMixin):
        raise TypeError(
            f"prior of '{name}': got {result!r}, expected a distribution of pyro.distributions, "
            "or a function of name and parameter that returns one, a Hierarchy, or None"
        )
    site_prior: Distribution = expand_prior(result, name, parameter)
    return site_prior


def expand_prior(prior: Any, name: str, parameter: Tensor) -> Any:
    """A prior in shape, dtype and on the device of a parameter, all dimensions event."""
    like = home(parameter)
    prior = convert(prior, lambda t: t.to(like))
    ndim, event_dim = parameter.dim(), prior.event_dim
    own, event = parameter.shape[: ndim - event_dim], parameter.shape[ndim - event_dim :]
    try:
        if event_dim > ndim or prior.event_shape != event:
            raise ValueError
        return prior.expand(own).to_event(len(own))
    except (RuntimeError, ValueError):
        raise ValueError(
            f"prior of '{name}': got {type(prior).__name__} of shape "
            f"{tuple(prior.batch_shape + prior.event_shape)}, expected one that expands to the "
            f"parameter's shape {tuple(parameter.shape)}"
        ) from None


def home(parameter: Tensor) -> Tensor:
    """A tensor like the parameter where a prior can be: not on the meta device."""
    return torch.empty_like(parameter, device="cpu" if parameter.is_meta else None)


def convert(obj: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a distribution in the dtype and on the device that ``fn`` gives to a tensor."""
    if isinstance(obj, Tensor):
        if not obj.is_floating_point():
            return obj.to(fn(obj.new_empty(0)).device)
        return obj.to(fn(obj.new_empty(0)))
    if isinstance(obj, (list, tuple)) and type(obj) in (list, tuple):
        return type(obj)(convert(item, fn) for item in obj)
    if isinstance(obj, (Distribution, Transform)):
        obj = copy.copy(obj)
        for name, item in vars(obj).items():
            vars(obj)[name] = convert(item, fn)
    return obj
