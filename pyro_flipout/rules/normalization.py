# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Normalisation layers: their affine weights scale and shift each example by its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pyro_flipout.rules._product import NESTED
from pyro_flipout.rules.conv import channelwise
from pyro_flipout.tensor import FlipoutTensor, NoRule, NotExamples, implements

FLIPS = "affine weight and bias"


def _affine(out: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _check(*tensors: Any) -> None:
    if any(isinstance(tensor, FlipoutTensor) for tensor in tensors):
        raise NoRule("the input or a running statistic is itself a flipped weight")
    if any(isinstance(tensor, Tensor) and tensor.is_nested for tensor in tensors):
        raise NotExamples(NESTED)


@implements(F.layer_norm, flips=FLIPS, per_particle=True)
def layer_norm(
    op: Callable[..., Tensor],
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    _check(input)
    return _affine(op(input, normalized_shape, None, None, eps), weight, bias)


@implements(F.rms_norm, flips="affine weight", per_particle=True)
def rms_norm(
    op: Callable[..., Tensor],
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    _check(input)
    return _affine(op(input, normalized_shape, None, eps), weight, None)


def _per_channel(
    out: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:  # out (N, C, *)
    spatial = out.dim() - 2
    return _affine(
        out,
        None if weight is None else channelwise(weight, spatial),
        None if bias is None else channelwise(bias, spatial),
    )


@implements(F.group_norm, flips=FLIPS, per_particle=True)
def group_norm(
    op: Callable[..., Tensor],
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    _check(input)
    return _per_channel(op(input, num_groups, None, None, eps), weight, bias)


@implements(F.batch_norm, F.instance_norm, flips=FLIPS, per_particle=True)
def batch_norm(
    op: Callable[..., Tensor],
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    _check(input, running_mean, running_var)
    out = op(input, running_mean, running_var, None, None, *args, **kwargs)
    return _per_channel(out, weight, bias)
