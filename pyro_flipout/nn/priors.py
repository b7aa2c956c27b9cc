# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""Priors of the weights of a network.

A prior is a distribution, which is expanded to the shape of every parameter, or a function
of a parameter's name and value that returns a distribution, a
:class:`~pyro_flipout.nn.priors.Hierarchy`, or None to leave the parameter a parameter.

References

[1] `Delving Deep into Rectifiers`, Kaiming He et al., https://arxiv.org/abs/1502.01852

[2] `Understanding the difficulty of training deep feedforward neural networks`,
    Xavier Glorot, Yoshua Bengio, https://proceedings.mlr.press/v9/glorot10a.html

[3] `The horseshoe estimator for sparse signals`, Carlos Carvalho, Nicholas Polson,
    James Scott, https://doi.org/10.1093/biomet/asq017
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_flipout.nn.site_prior import Hierarchy, Prior, expand_prior, home

__all__ = [
    "Hierarchy",
    "HorseshoePrior",
    "IIDPrior",
    "KaimingPrior",
    "LaplacePrior",
    "PretrainedPrior",
    "Prior",
    "StudentTPrior",
    "XavierPrior",
]


# ------------------------------------------------------------------------ independent


@dataclass(frozen=True)
class IIDPrior:
    """The same distribution for every entry.

    :param dist: a distribution of scalars, or one that expands to the parameter's shape.

    >>> IIDPrior(dist.Normal(0.0, 1.0))("weight", torch.zeros(2, 3)).event_shape
    torch.Size([2, 3])
    """

    dist: Any

    def __call__(self, name: str, parameter: Tensor) -> Any:
        """The prior of one parameter."""
        return expand_prior(self.dist, name, parameter)


@dataclass(frozen=True)
class LaplacePrior:
    """Laplace, for weights many of which are small.

    :param scale: its scale; the standard deviation is 1.41 times that.
    """

    scale: float = 1.0

    def __call__(self, name: str, parameter: Tensor) -> Any:
        """The prior of one parameter."""
        return expand_prior(dist.Laplace(0.0, self.scale), name, parameter)


@dataclass(frozen=True)
class StudentTPrior:
    """Student-t, for weights a few of which are large.

    :param df: degrees of freedom; at 1 it is a Cauchy.
    :param scale: its scale.
    """

    df: float = 3.0
    scale: float = 1.0

    def __call__(self, name: str, parameter: Tensor) -> Any:
        """The prior of one parameter."""
        return expand_prior(dist.StudentT(self.df, 0.0, self.scale), name, parameter)


# -------------------------------------------------------------------------- by fan-in


@dataclass(frozen=True)
class KaimingPrior:
    r"""Normal of standard deviation :math:`g / \sqrt{\text{fan in}}` [1].

    The fan-in is that of ``torch.nn.init``: the size of dimension 1 times the receptive
    field. So an output has variance :math:`g^2` times its mean squared input, however wide
    the layer. Parameters with less than two dimensions, such as biases, have none.

    :param gain: g; the square root of 2 keeps the variance through ReLU layers.
    :param bias_scale: standard deviation of parameters with less than two dimensions.

    >>> KaimingPrior(gain=1.0)("weight", torch.zeros(8, 16)).base_dist.scale[0, 0]
    tensor(0.2500)
    """

    gain: float = math.sqrt(2.0)
    bias_scale: float = 1.0

    def __call__(self, name: str, parameter: Tensor) -> Any:
        """The prior of one parameter."""
        fan_in, _ = _fans(parameter)
        scale = self.gain / math.sqrt(fan_in) if parameter.dim() > 1 else self.bias_scale
        return expand_prior(dist.Normal(0.0, scale), name, parameter)


@dataclass(frozen=True)
class XavierPrior:
    r"""Normal of standard deviation :math:`g \sqrt{2 / (\text{fan in} + \text{fan out})}` [2].

    :param gain: g.
    :param bias_scale: standard deviation of parameters with less than two dimensions.
    """

    gain: float = 1.0
    bias_scale: float = 1.0

    def __call__(self, name: str, parameter: Tensor) -> Any:
        """The prior of one parameter."""
        scale = self.gain * math.sqrt(2.0 / sum(_fans(parameter)))
        scale = scale if parameter.dim() > 1 else self.bias_scale
        return expand_prior(dist.Normal(0.0, scale), name, parameter)


def _fans(parameter: Tensor) -> tuple[int, int]:
    if parameter.dim() < 2:
        return 1, 1
    field = math.prod(parameter.shape[2:])
    return max(parameter.size(1) * field, 1), max(parameter.size(0) * field, 1)


# ---------------------------------------------------------------------------- others


@dataclass(frozen=True)
class PretrainedPrior:
    """Normal about the value that the parameter has.

    :param scale: standard deviation.
    :param relative: ``scale`` counts in root mean squares of the parameter.
    :raises ValueError: if ``relative`` and the parameter is zero.

    >>> PretrainedPrior(0.1)("weight", torch.full((1, 2), 3.0)).mean
    tensor([[3., 3.]])
    """

    scale: float = 1.0
    relative: bool = False

    def __call__(self, name: str, parameter: Tensor) -> Any:
        """The prior of one parameter."""
        loc = parameter.detach().clone()
        scale = torch.full_like(loc, self.scale)
        if self.relative:
            scale = scale * loc.pow(2).mean().sqrt()
            if not (scale > 0).all():
                raise ValueError(
                    f"PretrainedPrior: '{name}' is zero, so that relative=True gives no scale; "
                    "use PretrainedPrior(scale) or another prior for it"
                )
        return expand_prior(dist.Normal(loc, scale), name, parameter)


@dataclass(frozen=True)
class HorseshoePrior:
    r"""Normal weights whose scale is a site, :math:`w_i \sim N(0, \tau^2 \lambda_i^2)` [3].

    :math:`\tau` is the site ``<name>_scale``, half-Cauchy, one for the parameter: it says how
    large its weights are at all. With ``local``, every weight has a :math:`\lambda_i`
    besides, half-Cauchy, the site ``<name>_local``: the horseshoe proper, with which most
    weights vanish and a few do not. Without, :math:`\lambda_i = 1`.

    :param scale: scale of the half-Cauchy of :math:`\tau`.
    :param local: whether each weight has a scale of its own.

    >>> sorted(HorseshoePrior(local=True)("weight", torch.zeros(2, 3)).hyper)
    ['local', 'scale']
    """

    scale: float = 1.0
    local: bool = False

    def __call__(self, name: str, parameter: Tensor) -> Hierarchy:
        """The prior of one parameter."""
        like = home(parameter)
        hyper = {"scale": expand_prior(dist.HalfCauchy(self.scale), name, like.new_empty(()))}
        if self.local:
            hyper["local"] = expand_prior(dist.HalfCauchy(1.0), name, like)
        return Hierarchy(hyper, partial(_normal_of_scale, tuple(parameter.shape)))


def _normal_of_scale(shape: tuple[int, ...], *scales: Tensor) -> Any:
    # Scales of vectorised particles have leading dimensions `(P, 1)`, or `(P, 1, *shape)`.
    ndim = len(shape)
    aligned = [scales[0].reshape(scales[0].shape + (1,) * ndim), *scales[1:]]
    scale = math.prod(aligned[1:], start=aligned[0])
    scale = scale.expand(scale.shape[: scale.dim() - ndim] + shape)
    return dist.Normal(torch.zeros_like(scale), scale).to_event(ndim)
