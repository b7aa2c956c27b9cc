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

from pyro_flipout.errors import ExampleDimError
from pyro_flipout.rules._product import check_layout, per_example
from pyro_flipout.rules.shape import align, common_lead, expand_weight, map_values, repeats
from pyro_flipout.tensor import (
    FlipoutTensor,
    NoExampleDim,
    NoRule,
    Term,
    example_dim_error,
    implements,
)


def example_dim_of(weight: FlipoutTensor, other: Any) -> int | None:
    """Dimension of the result that counts the examples; ``None`` if ``other`` is no data."""
    if not isinstance(other, Tensor) or isinstance(other, (FlipoutTensor, torch.nn.Parameter)):
        return None
    check_layout(other)
    shape = torch.broadcast_shapes(weight.shape, other.shape)
    execution = weight.execution
    if execution.constants:
        return None
    offset = len(shape) - other.dim()
    dim, extra = execution.example_dim + offset, len(shape) - weight.dim()
    if weight.lead_dims and offset == extra:
        # The data begin where the weight does, with its particles, if it has them.
        dim += other.shape[:1] == weight.shape[:1]
    if offset and any(n > 1 for n in weight.shape[weight.lead_dims : max(dim - extra, 0)]):
        return None  # (h, w) against (out, in, 1, 1): examples are in front of the weight's own
    free = _is_free(weight, shape, dim)
    first = shape[offset] if offset < len(shape) else None  # a number has no dimension
    if not free and first == execution.num_examples and _is_free(weight, shape, offset):
        dim, free = offset, True  # a time-major model after taking its last step
    if not free:
        if len(shape) > max(dim, 2) and shape[dim] == 1:
            execution.perhaps_one = True
        if other.dim() <= weight.dim():
            return None  # (out, 1) against (out, in): a constant that broadcasts
        raise example_dim_error(weight, "elementwise arithmetic", other.shape)
    if shape == weight.shape and execution.num_examples not in (None, shape[dim]):
        return None
    execution.count(shape[dim], f"data of shape {tuple(other.shape)}")
    return dim


def _is_free(weight: FlipoutTensor, shape: torch.Size, dim: int) -> bool:
    """Whether the weight only repeats along a dimension of the result, or does not have it."""
    if dim >= len(shape):
        return False
    own = dim - (len(shape) - weight.dim())
    if own < 0:
        return True
    if weight.shape[own] == 1:
        return shape[dim] != 1 or weight.execution.num_examples == 1
    return weight.execution.num_examples in (None, shape[dim]) and repeats(weight, own)


def _against_data(op: Callable[..., Tensor], a: Any, b: Any, **kwargs: Any) -> Tensor | None:
    """Applies ``op`` if one operand is data, else returns ``None``."""
    weight, other = (a, b) if isinstance(a, FlipoutTensor) else (b, a)
    dim = example_dim_of(weight, other)
    if dim is None:
        return None
    ndim = max(weight.dim(), other.dim())
    explicit = _explicit(weight, ndim, dim)
    return op(explicit, b, **kwargs) if weight is a else op(a, explicit, **kwargs)


def _explicit(weight: FlipoutTensor, ndim: int, dim: int) -> Tensor:
    """The weights of all examples; a result with them has the weight's particles too."""
    if weight.lead_dims:
        weight.execution.particles_seen = True
    return per_example(weight, ndim, dim)


def _sum(a: Any, b: Any, plain: Tensor, sign: complex) -> FlipoutTensor:
    """The flipped weight ``a + sign * b``; ``plain`` is its shared draw."""
    terms: list[Term] = []
    center: Any = 0.0
    execution = None
    for operand, factor in ((a, 1.0), (b, sign)):
        if isinstance(operand, FlipoutTensor):
            execution = execution or operand.execution
            operand = expand_weight(operand, plain.shape)
            center = center + factor * operand.center
            for t in operand.terms:
                delta = t.delta if factor == 1 else factor * t.delta
                terms.append(Term(delta.to(plain.dtype), t.draws, t.factors))
        else:
            center = center + factor * operand
    assert execution is not None
    return FlipoutTensor.build(plain, center, terms, execution, common_lead(plain, a, b))


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
def add(op: Callable[..., Tensor], input: Any, other: Any, *, alpha: Any = 1) -> Tensor:
    a, b = input, other
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
def mul(op: Callable[..., Tensor], input: Any, other: Any) -> Tensor:
    a, b = input, other
    if isinstance(a, FlipoutTensor) and isinstance(b, FlipoutTensor):
        return _product(a, b)
    out = _against_data(operator.mul, a, b)
    if out is not None:
        return out
    weight, factor = (a, b) if isinstance(a, FlipoutTensor) else (b, a)
    shape = torch.broadcast_shapes(weight.shape, getattr(factor, "shape", ()))
    return map_values(expand_weight(weight, shape), lambda value: value * factor)


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
    plain = a.plain * b.plain
    lead = common_lead(plain, a, b)
    return FlipoutTensor.build(plain, a.center * b.center, terms, a.execution, lead)


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
def div(
    op: Callable[..., Tensor], input: Any, other: Any, *, rounding_mode: str | None = None
) -> Tensor:
    a, b = input, other
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


def _choice(op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, Any, Any]:
    names = (
        ["condition", "input", "other"] if op is torch.where else ["input", "condition", "other"]
    )
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    if set(bound) != set(names):
        raise NoRule("torch.where without values to choose from")
    return bound["condition"], bound["input"], bound["other"]


def _has_more_rows(data: Tensor, weight: FlipoutTensor) -> bool:
    """Whether the weight is without the example dimension of ``data``, or repeats along it.

    As a mask token ``(1, 1, D)`` or one expanded does, which repeats along all but the features: a
    kernel ``(1, in, k)`` is chosen against a constant.
    """
    own, dim = weight.dim() - weight.lead_dims, weight.execution.example_dim
    if data.dim() != own or own < 3 or weight.lead_dims or dim >= own - 1:
        return data.dim() > own
    if data.size(dim) == 1:
        weight.execution.perhaps_one = True
        return False
    return all(
        weight.size(d) == 1 or (weight.size(d) == data.size(d) and repeats(weight, d))
        for d in range(own - 1)
    )


def _dim_of_choice(condition: Any, a: Any, b: Any) -> int | None:
    """Dimension of the result that counts the examples; ``None`` if there are no data."""
    weight, data = (a, b) if isinstance(a, FlipoutTensor) else (b, a)
    if not isinstance(weight, FlipoutTensor) or isinstance(condition, FlipoutTensor):
        return None
    if not isinstance(data, Tensor) or not _has_more_rows(data, weight):
        return None  # a condition alone may be a constant
    if torch.broadcast_shapes(condition.shape, data.shape) != data.shape:
        return None  # the condition has the examples, or more of them
    try:
        return example_dim_of(weight, data)
    except (ExampleDimError, NoExampleDim):
        return None


@implements(
    torch.where,
    Tensor.where,
    flips="against data every entry of the weight; else a flipped weight again",
    limits="a condition larger than both that are no data: no rule",
)
def where(op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    condition, a, b = _choice(op, *args, **kwargs)
    dim = _dim_of_choice(condition, a, b)
    if dim is not None:
        ndim = max(t.dim() for t in (condition, a, b) if isinstance(t, Tensor))
        a, b = (_explicit(t, ndim, dim) if isinstance(t, FlipoutTensor) else t for t in (a, b))
        return torch.where(condition, a, b)
    plain = torch.where(condition, getattr(a, "plain", a), getattr(b, "plain", b))
    shape = torch.broadcast_shapes(getattr(a, "shape", ()), getattr(b, "shape", ()))
    if isinstance(condition, FlipoutTensor) or plain.shape != shape:
        raise NoRule("the condition is a flipped weight, or larger than what it chooses from")
    center = torch.where(condition, getattr(a, "center", a), getattr(b, "center", b))
    terms: list[Term] = []
    for weight, chosen in ((a, condition), (b, ~condition)):
        if isinstance(weight, FlipoutTensor):
            execution = weight.execution
            expanded = expand_weight(weight, shape)
            terms += [
                Term(t.delta.to(plain.dtype).masked_fill(~chosen, 0), t.draws, t.factors)
                for t in expanded.terms
            ]
    return FlipoutTensor.build(plain, center, terms, execution, common_lead(plain, a, b))


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
def in_place(op: Callable[..., Tensor], input: Any, other: Any, **kwargs: Any) -> Tensor:
    a, b = input, other
    if isinstance(a, FlipoutTensor):
        raise NoRule("a flipped weight cannot be changed in place")
    dim = example_dim_of(b, a)
    if dim is None:
        raise NoRule("the tensor changed in place has no example dimension")
    return op(a, _explicit(b, a.dim(), dim), **kwargs)


@implements(
    torch.complex,
    flips="against data every entry of the weight; else a flipped weight again",
)
def complex_of(op: Callable[..., Tensor], real: Tensor, imag: Tensor) -> Tensor:
    if not (isinstance(real, FlipoutTensor) and isinstance(imag, FlipoutTensor)):
        out = _against_data(op, real, imag)
        if out is not None:
            return out
    return _sum(real, imag, op(_plain(real), _plain(imag)), 1j)


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
    return torch.relu(input) + slope * input.clamp(max=0)  # its gradient at 0 is torch's
