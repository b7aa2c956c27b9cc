# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Dense layers: ``F.linear`` and ``F.bilinear``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flipout import kernels
from pyro_flipout.rules._kernel import Kernel
from pyro_flipout.rules._product import (
    _route,
    bias_parts,
    calling_frame,
    find_examples,
    flipped_product,
    plain,
)
from pyro_flipout.rules.contraction import contract, meets_constants
from pyro_flipout.tensor import Execution, FlipoutTensor, NoRule, implements


@implements(
    F.linear, flips="outputs and inputs of the weight, outputs of the bias", per_particle=True
)
def linear(op: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    if isinstance(input, FlipoutTensor) or (
        isinstance(weight, FlipoutTensor) and meets_constants(input, weight)
    ):
        rows = "abcdefgh"[: input.dim() - 1]
        columns = "C" if weight.dim() > 1 else ""
        out = contract(op, input, weight, rows + "K", columns + "K", rows + columns)
        return out if bias is None else torch.add(out, bias)
    if not isinstance(weight, FlipoutTensor):
        return torch.add(op(input, weight), bias)  # only the bias is flipped
    last = input.dim() - 1
    dim = _attention_dim(weight, input) if last == 2 else None
    dim = find_examples(weight, input, [last], "F.linear") if dim is None else dim
    if weight.execution.is_single:  # one product, and no kernel for two
        return op(input, weight.plain, None if bias is None else plain(bias))
    out_dims = {0: last} if weight.dim() == 2 else {}  # weight (out, in) or (in,)
    in_dim = weight.dim() - 1
    if weight.dim() != 2:
        out = flipped_product(weight, input, op, {in_dim: last}, out_dims, dim)
        return out if bias is None else torch.add(out, bias)
    if bias is not None and bias.dim() != 1:
        return torch.add(linear(op, input, weight), bias)
    in_one = _in_one_kernel(weight, input, bias, dim)
    if in_one is not None:
        return in_one
    return flipped_product(
        weight, input, op, {in_dim: last}, out_dims, dim, kernel=LINEAR, bias=bias
    )


def _in_one_kernel(
    weight: FlipoutTensor, input: Tensor, bias: Tensor | None, dim: int
) -> Tensor | None:
    """The product in one fused GPU kernel, ``None`` where library calls should compute it."""
    execution = weight.execution
    # Other executions number the examples in their own way.
    if type(execution) is not Execution or not kernels.possible(input):
        return None
    center, terms, last = weight.center, weight.terms, input.dim() - 1
    parts = bias_parts(bias, weight)
    rest = bias if parts is None else None
    fixed, beta, of_bias = parts or (None, None, None)
    if len(terms) != 1 or not kernels.available(input, center, terms[0].delta, fixed, beta):
        return None
    into_data, into_out = (c.get(last) for c in _route(terms[0], {1: last}, {0: last}))
    out = kernels.flipped_linear(
        input, center, terms[0].delta, fixed, into_data, into_out, example_dim=dim,
        bias_delta=beta, of_bias=of_bias, group_size=execution.group_size,
    )  # fmt: skip
    return out if rest is None else torch.add(out, rest)


def _linear_backward(
    grad: Tensor, input: Tensor, weight: Tensor, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    grad_input = grad @ weight if need[0] else None
    if not need[1]:
        return grad_input, None
    if input.dim() > 2:
        grad, input = grad.flatten(0, -2), input.flatten(0, -2)
    return grad_input, grad.t() @ input


def _linear_each(data: Tensor, weights: Tensor, biases: Tensor | None) -> Tensor:
    rows, columns = data.flatten(1, -2), weights.transpose(1, 2)
    if biases is None:
        out = torch.bmm(rows, columns)
    else:
        out = torch.baddbmm(biases.unsqueeze(1), rows, columns)
    return out.view(*data.shape[:-1], -1)


def _linear_each_backward(
    grad: Tensor, data: Tensor, weights: Tensor, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    rows = grad.flatten(1, -2)
    grad_data = torch.bmm(rows, weights).view(data.shape) if need[0] else None
    return grad_data, torch.bmm(rows.transpose(1, 2), data.flatten(1, -2)) if need[1] else None


def _tokens(data: Tensor) -> int:
    return math.prod(data.shape[1:-1])


LINEAR = Kernel(
    F.linear, _linear_backward, _linear_each, _linear_each_backward, uses=_tokens, min_uses=64
)

_IN_PROJECTION = {getattr(getattr(F, "_in_projection", None), "__code__", None)}


def _attention_dim(weight: FlipoutTensor, input: Tensor) -> int | None:
    """The example dimension 1 if attention projects its key, ``None`` elsewhere.

    ``F.multi_head_attention_forward`` does not look at its separate projection weights
    for subclasses. If nothing else in it is flipped, they arrive here one by one.
    """
    if weight.dim() != 2 or calling_frame(_IN_PROJECTION) is None:
        return None
    weight.execution.count(input.size(1), f"data of shape {tuple(input.shape)}")
    return 1


@implements(
    F.bilinear,
    flips="outputs and first inputs of the weight, outputs of the bias",
    per_particle=True,
)
def bilinear(
    op: Callable[..., Tensor],
    input1: Tensor,
    input2: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    if isinstance(input1, FlipoutTensor) or isinstance(input2, FlipoutTensor):
        raise NoRule("an input is itself a flipped weight")
    if isinstance(weight, FlipoutTensor):
        last = input1.dim() - 1
        dim = find_examples(weight, input1, [last], "F.bilinear")
        out = flipped_product(
            weight, input1, lambda x, w: op(x, input2, w), {1: last}, {0: last}, dim
        )
    else:
        out = op(input1, input2, plain(weight))
    return out if bias is None else out + bias
