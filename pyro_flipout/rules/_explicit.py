# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""Flipped products by the weights of the examples themselves, a few at a time.

Flipping data and output takes two products. The weight :math:`W_n = C + \Delta \circ r_n s_n^\top`
takes one, and a few passes over the weight to make it and to take its gradient apart. That is less
where an example has many rows of data (tokens, pixels), or where a group of examples has its signs
in common. Weights are made in a buffer that the caches hold and written over by the next ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flipout.rules._kernel import Bias, Kernel
from pyro_flipout.signs import Signs

__all__ = ["Explicit", "explicit_gradients", "explicit_product", "plan_explicit"]

_BUFFER = 2**18
"""Entries of the weights that are made at once."""


@dataclass(frozen=True)
class Explicit:
    """How the weights of a product are made.

    :ivar group_size: how many neighbouring examples share a weight; the last group may have fewer.
    :ivar factors: signs, and the dimension of the weight that they vary along; one or two.
    :ivar at_once: how many weights are made at once.
    :ivar example_dim: dimension of the data and of the output that counts the examples.
    """

    group_size: int
    factors: Sequence[tuple[Signs, int]]
    at_once: int
    example_dim: int

    def signs(self, ndim: int) -> list[Tensor]:
        """Signs that broadcast to weights ``(groups, *weight.shape)`` of ``ndim`` dimensions."""
        return [
            signs.of_groups.reshape(-1, *(1,) * dim, signs.count, *(1,) * (ndim - 2 - dim))
            for signs, dim in self.factors
        ]

    def chunks(self, num_examples: int) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
        """Groups whose weights are made at once, their examples, and the sizes (c, k) of these."""
        size = self.group_size
        whole = num_examples // size
        for start in range(0, whole, self.at_once):
            stop = min(start + self.at_once, whole)
            yield slice(start, stop), slice(start * size, stop * size), (stop - start, size)
        if num_examples % size:
            last = slice(whole * size, num_examples)
            yield slice(whole, whole + 1), last, (1, num_examples % size)

    def put_weights(
        self, out: Tensor, signs: Sequence[Tensor], which: slice, center: Tensor, delta: Tensor
    ) -> Tensor:
        """Makes the weights of some groups in the buffer ``out``."""
        weights = out[: which.stop - which.start]
        *first, last = (s[which] for s in signs)
        for factor in first:
            delta = torch.mul(delta, factor, out=weights)
        return torch.addcmul(center, delta, last, out=weights)


def plan_explicit(
    kernel: Kernel,
    data: Tensor,
    weight: Tensor,
    factors: Sequence[tuple[Signs, int]],
    example_dim: int,
) -> Explicit | None:
    """The way to make the weights, ``None`` where two products are faster or more exact.

    :param factors: signs, and the dimension of ``weight`` that they vary along.
    """
    count = data.size(example_dim)
    if not (factors and count and weight.numel()) or data.device.type != "cpu":
        return None
    if data.dtype.itemsize < 4:
        return None  # half precision would round the perturbation away
    size = factors[0][0].group_size
    if kernel.uses(data.movedim(example_dim, 0)) * min(size, count) < kernel.min_uses:
        return None
    if any(signs.count not in (1, weight.size(dim)) for signs, dim in factors):
        return None
    at_once = min(max(_BUFFER // weight.numel(), 1), -(-count // size))
    return Explicit(size, factors, at_once, example_dim)


def explicit_product(
    plan: Explicit, kernel: Kernel, data: Tensor, center: Tensor, delta: Tensor, bias: Bias
) -> Tensor:
    """The product of every example with its own weight, plus its own bias."""
    signs, buffer = plan.signs(center.dim() + 1), _buffer(plan, center)
    bias_center, bias_delta, placed = bias
    of_bias = None if placed is None else placed[0].of_groups
    data, out = data.movedim(plan.example_dim, 0), None
    for groups, rows, sizes in plan.chunks(len(data)):
        weights = plan.put_weights(buffer, signs, groups, center, delta)
        biases = None if bias_center is None else bias_center.expand(sizes[0], -1)
        if of_bias is not None and biases is not None and bias_delta is not None:
            biases = torch.addcmul(biases, bias_delta, of_bias[groups])
        part = kernel.forward_each(data[rows].unflatten(0, sizes), weights, biases).flatten(0, 1)
        if out is None:
            shape = list(part.shape[1:])
            shape.insert(plan.example_dim, len(data))
            out = part.new_empty(shape)
        out.movedim(plan.example_dim, 0)[rows] = part
    assert out is not None, "there is an example"
    return out


def explicit_gradients(
    plan: Explicit,
    kernel: Kernel,
    grad: Tensor,
    data: Tensor,
    center: Tensor,
    delta: Tensor,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the data, the centre and the perturbation, where they are needed."""
    signs, buffer = plan.signs(center.dim() + 1), _buffer(plan, center)
    into_data = torch.empty_like(data) if need[0] else None
    into_center, into_delta = (
        torch.zeros_like(t) if n else None for t, n in ((center, need[1]), (delta, need[2]))
    )
    weights, where = buffer, (plan.example_dim, 0)
    data, grad = data.movedim(*where), grad.movedim(*where)
    for groups, rows, sizes in plan.chunks(len(data)):
        if into_data is not None:
            weights = plan.put_weights(buffer, signs, groups, center, delta)
        of_data, of_weights = kernel.backward_each(
            grad[rows].unflatten(0, sizes),
            data[rows].unflatten(0, sizes),
            weights[: sizes[0]],
            (need[0], need[1] or need[2]),
        )
        if into_data is not None:
            into_data.movedim(*where)[rows] = of_data.flatten(0, 1)
        if into_center is not None:
            into_center.add_(_sum(of_weights))
        if into_delta is not None:
            _add_flipped(into_delta, of_weights, [s[groups] for s in signs])
    return into_data, into_center, into_delta


def _buffer(plan: Explicit, weight: Tensor) -> Tensor:
    if weight.dim() == 2 and weight.stride(0) < weight.stride(1):  # a transpose, read in its order
        return weight.new_empty(plan.at_once, *weight.t().shape).transpose(1, 2)
    return weight.new_empty(plan.at_once, *weight.shape)


def _add_flipped(total: Tensor, parts: Tensor, signs: Sequence[Tensor]) -> None:
    """Adds the sum of ``parts`` times all their signs, at the cost of ``parts``."""
    *first, last = signs
    for factor in first:
        parts.mul_(factor)
    if len(parts) == 1:
        total.addcmul_(parts[0], last[0])
    else:
        total.add_(parts.mul_(last).sum(0))


def _sum(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)
