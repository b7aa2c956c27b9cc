# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Arithmetic: a weight against data, and linear maps of a weight.

A tensor that broadcasts to the weight's own shape is a constant, and the result is a
flipped weight again. A tensor that extends the weight's shape by a dimension which can
count the examples is data, and the result is plain: each example meets its own weight.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flipout.rules._product import per_example
from pyro_flipout.rules.shape import align, expand_weight, map_values
from pyro_flipout.tensor import (
    FlipoutTensor,
    NoRule,
    Term,
    example_dim_error,
    implements,
)


def example_dim_of(weight: FlipoutTensor, other: Any) -> int | None:
    """Dimension of the result that counts the examples; ``None`` if ``other`` is no data."""
    if not isinstance(other, Tensor) or isinstance(other, (FlipoutTensor, torch.nn.Parameter)):
        return None
    shape = torch.broadcast_shapes(weight.shape, other.shape)
    execution = weight.execution
    offset = len(shape) - other.dim()
    free = [d for d in _free_dims(weight, shape) if d >= offset]
    dim = execution.example_dim + offset
    if weight.lead_dims and offset == len(shape) - weight.dim():
        # The data begin where the weight does, with its particles, if it has them.
        dim += other.shape[:1] == weight.shape[:1]
    if dim not in free and offset in free and shape[offset] == execution.num_examples:
        dim = offset  # a time-major model after taking its last step
    if dim not in free:
        if other.dim() <= weight.dim():
            return None  # (out, 1) against (out, in): a constant that broadcasts
        raise example_dim_error(weight, "elementwise arithmetic", other.shape)
    if shape == weight.shape and execution.num_examples not in (None, shape[dim]):
        return None
    execution.count(shape[dim], f"data of shape {tuple(other.shape)}")
    return dim


def _free_dims(weight: FlipoutTensor, shape: torch.Size) -> list[int]:
    """Dimensions of the result that the weight only repeats along, or does not have."""
    extra = len(shape) - weight.dim()
    repeated = [
        extra + d
        for d, size in enumerate(weight.shape)
        if (size == 1 and shape[extra + d] != 1) or (size > 1 and weight.plain.stride(d) == 0)
    ]
    return [*range(extra), *repeated]


def _against_data(op: Callable[..., Tensor], a: Any, b: Any, **kwargs: Any) -> Tensor | None:
    """Applies ``op`` if one operand is data, else returns ``None``."""
    weight, other = (a, b) if isinstance(a, FlipoutTensor) else (b, a)
    dim = example_dim_of(weight, other)
    if dim is None:
        return None
    ndim = max(weight.dim(), other.dim())
    explicit = per_example(weight, ndim, dim)
    return op(explicit, b, **kwargs) if weight is a else op(a, explicit, **kwargs)


def _sum(a: Any, b: Any, plain: Tensor, sign: float) -> FlipoutTensor:
    """The flipped weight ``a + sign * b``; ``plain`` is its shared draw."""
    terms: list[Term] = []
    center: Any = 0.0
    execution = None
    for operand, factor in ((a, 1.0), (b, sign)):
        if isinstance(operand, FlipoutTensor):
            execution = execution or operand.execution
            operand = expand_weight(operand, plain.shape)
            center = center + factor * operand.center
            terms += [
                Term(t.delta if factor == 1 else factor * t.delta, t.draws, t.factors)
                for t in operand.terms
            ]
        else:
            center = center + factor * operand
    assert execution is not None
    return FlipoutTensor.build(plain, center, terms, execution)


def _plain(obj: Any) -> Any:
    return obj.plain if isinstance(obj, FlipoutTensor) else obj


@implements(
    torch.add,
    torch.sub,
    torch.subtract,
    torch.rsub,
    Tensor.add,
    Tensor.sub,
    Tensor.subtract,
    Tensor.__add__,
    Tensor.__radd__,
    Tensor.__sub__,
    Tensor.__rsub__,
    flips="against data every entry of the weight; else a flipped weight again",
)
def add(op: Callable[..., Tensor], a: Any, b: Any, *, alpha: Any = 1) -> Tensor:
    if op is torch.rsub or op is Tensor.__rsub__:
        a, b = b, a
    sign = 1.0 if op in _ADDITIONS else -1.0
    if op is torch.rsub and alpha != 1:
        raise NoRule("torch.rsub with alpha other than 1 is not covered; write it out")
    step = sign * alpha
    if not (isinstance(a, FlipoutTensor) and isinstance(b, FlipoutTensor)):
        out = _against_data(lambda x, y: torch.add(x, y, alpha=step), a, b)
        if out is not None:
            return out
    return _sum(a, b, _plain(a) + step * _plain(b), step)


_ADDITIONS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}


@implements(
    torch.mul,
    torch.multiply,
    Tensor.mul,
    Tensor.multiply,
    Tensor.__mul__,
    Tensor.__rmul__,
    flips="against data every entry of the weight; else a flipped weight again",
)
def mul(op: Callable[..., Tensor], a: Any, b: Any) -> Tensor:
    if isinstance(a, FlipoutTensor) and isinstance(b, FlipoutTensor):
        return _product(a, b)
    out = _against_data(operator.mul, a, b)
    if out is not None:
        return out
    weight, other = (a, b) if isinstance(a, FlipoutTensor) else (b, a)
    shape = torch.broadcast_shapes(weight.shape, getattr(other, "shape", ()))
    return map_values(expand_weight(weight, shape), lambda value: value * other)


def _product(a: FlipoutTensor, b: FlipoutTensor) -> FlipoutTensor:
    """The product of two flipped weights, exactly: the signs of a product multiply."""
    shape = torch.broadcast_shapes(a.shape, b.shape)
    a, b = expand_weight(a, shape), expand_weight(b, shape)
    terms = [Term(t.delta * b.center, t.draws, t.factors) for t in a.terms]
    terms += [Term(t.delta * a.center, t.draws, t.factors) for t in b.terms]
    terms += [
        Term(s.delta * t.delta, s.draws + t.draws, s.factors + t.factors)
        for s in a.terms
        for t in b.terms
    ]
    return FlipoutTensor.build(a.plain * b.plain, a.center * b.center, terms, a.execution)


@implements(
    torch.div,
    torch.divide,
    torch.true_divide,
    Tensor.div,
    Tensor.divide,
    Tensor.true_divide,
    Tensor.__truediv__,
    Tensor.__rtruediv__,
    flips="against data every entry of the weight; divided by a constant a flipped weight",
    limits="a constant divided by the weight is not linear: no rule",
)
def div(op: Callable[..., Tensor], a: Any, b: Any, *, rounding_mode: str | None = None) -> Tensor:
    if op is Tensor.__rtruediv__:
        a, b = b, a
    if rounding_mode is not None:
        raise NoRule("division with a rounding_mode is not linear in the weight")
    if not (isinstance(a, FlipoutTensor) and isinstance(b, FlipoutTensor)):
        out = _against_data(operator.truediv, a, b)
        if out is not None:
            return out
    if isinstance(b, FlipoutTensor):
        raise NoRule("division by a flipped weight is not linear in it")
    shape = torch.broadcast_shapes(a.shape, getattr(b, "shape", ()))
    return map_values(expand_weight(a, shape), lambda value: value / b)


_IN_PLACE: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.add_: torch.add,
    Tensor.__iadd__: torch.add,
    Tensor.sub_: torch.sub,
    Tensor.__isub__: torch.sub,
    Tensor.mul_: torch.mul,
    Tensor.__imul__: torch.mul,
    Tensor.div_: torch.div,
    Tensor.__itruediv__: torch.div,
}


@implements(
    *_IN_PLACE,
    flips="every entry of the weight, against data changed in place",
    limits="changing a flipped weight in place: no rule",
)
def in_place(op: Callable[..., Tensor], a: Any, b: Any, **kwargs: Any) -> Tensor:
    if isinstance(a, FlipoutTensor):
        raise NoRule("a flipped weight cannot be changed in place")
    dim = example_dim_of(b, a)
    if dim is None:
        raise NoRule("the tensor changed in place has no example dimension")
    return op(a, per_example(b, a.dim(), dim), **kwargs)


@implements(
    torch.neg, torch.negative, Tensor.neg, Tensor.negative, Tensor.__neg__, flips="all signs"
)
def neg(op: Callable[..., Tensor], input: FlipoutTensor) -> Tensor:
    return map_values(input, torch.neg)


@implements(F.prelu, flips="the slope of every channel", per_particle=True)
def prelu(op: Callable[..., Tensor], input: Tensor, weight: Tensor) -> Tensor:
    if isinstance(input, FlipoutTensor):
        raise NoRule("the input is itself a flipped weight")
    slope = align(weight, input.dim(), 1) if weight.numel() > 1 else weight
    return torch.relu(input) - slope * torch.relu(-input)
