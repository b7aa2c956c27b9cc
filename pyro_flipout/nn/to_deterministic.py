# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""A plain network at the posterior mean."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_flipout.nn.bayesian_module import BayesianModule, Sites

__all__ = ["to_deterministic"]

_OURS = ("pyro.nn.module", "pyro_flipout.nn.")
_PYRO = ("_pyro_name", "_pyro_context", "_pyro_params", "_pyro_samples", "_sites")


def to_deterministic(model: nn.Module, guide: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """A plain torch network whose weights are the posterior mean.

    Flipout layers and converted modules become what they were, with the median of each site,
    which is the mean of a symmetric posterior, for a parameter. Nothing of Pyro is left, except
    where a class with a ``forward`` of its own was written as a PyroModule: it stays one,
    without sites.

    >>> import torch
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_flipout.nn import FlipoutLinear
    >>> model = PyroModule[nn.Sequential](FlipoutLinear(4, 8), nn.ReLU(), FlipoutLinear(8, 1))
    >>> guide = AutoNormal(model)
    >>> _ = guide(torch.randn(1, 4))
    >>> to_deterministic(model, guide)[0]
    Linear(in_features=4, out_features=8, bias=True)

    :param model: the network, or the part of a model that is one, such as ``model.net``.
    :param guide: an autoguide of the whole model, or values by site name.
    :param args: arguments for ``guide.median``, which most guides do not need.
    :returns: a copy; the model is not changed.
    :raises TypeError: if the guide has no median.
    :raises ValueError: if it has none for a site.
    """
    values = _values(guide, args, kwargs)
    plain = copy.deepcopy(getattr(model, "_handled_model", model))
    made: dict[str, nn.Parameter] = {}
    for module in plain.modules():
        if isinstance(module, PyroModule):
            _restore(module, values, made)
    for module in plain.modules():
        if isinstance(module, PyroModule):
            _strip(module)
    return plain


def _values(guide: Any, args: Any, kwargs: Any) -> Mapping[str, Tensor]:
    if isinstance(guide, Mapping):
        return guide
    if not hasattr(guide, "median"):
        raise TypeError(
            f"to_deterministic: got {type(guide).__name__}, which has no median(); expected an "
            "autoguide, or a dict of values by site name"
        )
    if not args and getattr(guide, "prototype_trace", True) is None:
        raise ValueError("to_deterministic: the guide was never called; train it first")
    values: Mapping[str, Tensor] = guide.median(*args, **kwargs)
    return values


def _restore(module: Any, values: Mapping[str, Tensor], made: dict[str, nn.Parameter]) -> None:
    """Puts parameters where the sites are."""
    sites = getattr(module, "_sites", Sites())
    for name in [name for name in module._pyro_samples if name not in sites.hyper]:
        owner, attr = sites.ties.get(name, (module, name))
        site = ".".join(part for part in (owner._pyro_name, attr) if part)
        if site not in values:
            raise ValueError(
                f"to_deterministic: the guide has no site '{site}', only {list(values)[:4]}...; "
                "give the part of the model that the guide was made for"
            )
        if site not in made:
            value = values[site].detach().clone()
            if isinstance(owner, BayesianModule):
                value = owner._plain_value(attr, value)
            made[site] = nn.Parameter(value)
        module._parameters[name] = made[site]
    for name in list(module._pyro_params):
        value = getattr(module, name).detach().clone()
        del module._parameters[f"{name}_unconstrained"]
        module._parameters[name] = nn.Parameter(value)
    parameters = module._parameters
    for name in [n for n in sites.order if n in parameters]:
        parameters[name] = parameters.pop(name)


def _strip(module: Any) -> None:
    """Gives a module its class back, and takes Pyro's attributes away."""
    module._pyro_samples.clear()
    module._pyro_params.clear()
    plain = _plain_class(type(module))
    if plain is None:
        if isinstance(module, BayesianModule):
            module._sites = Sites(module._sites.order)
        module._pyro_context = type(module._pyro_context)()
        return
    module.__class__ = plain
    for name in (*_PYRO, "_shown", "example_dim", "_zero_padding"):
        vars(module).pop(name, None)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def _plain_class(cls: type) -> type[nn.Module] | None:
    """The class that a PyroModule was made of, None if there is none."""
    for base in cls.__mro__:
        if not issubclass(base, nn.Module) or base.__module__.startswith(_OURS):
            if base is PyroModule:
                return nn.Module
            continue
        if not issubclass(base, PyroModule):
            return base
        if "forward" in vars(base):
            return None
    return nn.Module
