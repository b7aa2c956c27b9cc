# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""A flipped product with its gradient, as one node of autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_flipout.signs import Signs, flip_signs

__all__ = ["Bias", "Groups", "Kernel", "Placed", "apply_flipped", "groups_of"]


@dataclass(frozen=True)
class Kernel:
    """An operation linear in data and weight, with its gradient.

    :ivar forward: ``(data, weight, bias) -> out``.
    :ivar backward: ``(grad, data, weight, (need_data, need_weight)) -> (data's, weight's)``.
    :ivar bias_dim: dimension of the output along which the bias lies.
    """

    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, tuple[bool, bool]], tuple[Any, Any]]
    bias_dim: int = -1


Placed = tuple[Signs, int, int]
"""Signs, with the example dimension and the dimension they vary along."""

Bias = tuple[Tensor | None, Tensor | None, Placed | None]
"""Centre and perturbation of a bias, and the signs of the latter."""


class Groups:
    r"""Neighbouring examples that have their signs in common, and so a weight.

    The weight :math:`C + \Delta \circ r_g s_g^\top` of a group is made, used once and written
    over by that of the next one: one product where flipped examples take two, for a few passes
    over the weight for each group.

    :param size: how many examples a group has; the last one may have fewer.
    :param factors: signs of the groups, each of shape ``(groups, *)`` that broadcasts to
        ``(groups, *weight.shape)``; one or two.
    """

    def __init__(self, size: int, factors: Sequence[Tensor]) -> None:
        self.size = size
        self.factors = list(zip(*factors, strict=True))  # by group

    def rows(self, num_examples: int) -> Iterator[tuple[int, slice]]:
        """The number of each group, and its examples."""
        for group, start in enumerate(range(0, num_examples, self.size)):
            yield group, slice(start, min(start + self.size, num_examples))

    def put_weight(self, out: Tensor, group: int, center: Tensor, delta: Tensor) -> None:
        """Sets ``out`` to the weight of a group."""
        *first, last = self.factors[group]
        for signs in first:
            delta = torch.mul(delta, signs, out=out)
        torch.addcmul(center, delta, last, out=out)

    def add_flipped(self, total: Tensor, grad: Tensor, group: int) -> None:
        """Adds to the gradient of Δ that of the weight of a group, which is overwritten."""
        *first, last = self.factors[group]
        for signs in first:
            grad.mul_(signs)
        total.addcmul_(grad, last)


_MIN_POSITIONS = 16
_MIN_PRODUCT = 2**20
"""Multiplications of a group for which its weight is worth making."""


def groups_of(
    data: Tensor, weight: Tensor, factors: Sequence[tuple[Placed, int]], channels: int
) -> Groups | None:
    """The groups of the examples, ``None`` where two products take less time or are more exact.

    :param factors: signs, and the dimension of ``weight`` that has as many entries.
    :param channels: dimension of ``data`` that is contracted with the weight.
    """
    size = min((placed[0].group_size for placed, _ in factors), default=1)
    if size == 1 or data.device.type != "cpu" or data.dtype.itemsize < 4:
        return None  # half precision would round the perturbation away
    sizes = [(placed[0].low.size(1), weight.size(dim)) for placed, dim in factors]
    if any(placed[1] for placed, _ in factors) or any(n not in (1, own) for n, own in sizes):
        return None
    positions = data[:size].numel() // max(data.size(channels), 1)
    if positions < _MIN_POSITIONS or positions * weight.numel() < _MIN_PRODUCT:
        return None
    return Groups(
        size,
        [
            placed[0].of_groups.reshape(-1, *(1,) * dim, n, *(1,) * (weight.dim() - dim - 1))
            for (placed, dim), (n, _) in zip(factors, sizes, strict=True)
        ],
    )


class _FlippedProduct(torch.autograd.Function):
    """``f(x, C) + b + R ∘ f(x ∘ S, Δ) + T ∘ β``, saving x, C and Δ and nothing of x's size more.

    The bias has the centre b and the perturbation β with signs T, or b alone.

    The flipped half runs over a few examples at a time: their flipped data and its product are
    still in the cache when they are read again, and take no memory of the data's size. Or all
    of it is one product for each of the :class:`Groups`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        data: Tensor,
        center: Tensor,
        delta: Tensor,
        bias: Tensor | None,
        bias_delta: Tensor | None,
        kernel: Kernel,
        into_data: Placed | None,
        into_out: Placed | None,
        of_bias: Placed | None,
        groups: Groups | None,
    ) -> Tensor:
        ctx.save_for_backward(data, center, delta)
        ctx.kernel, ctx.into_data, ctx.into_out = kernel, into_data, into_out
        ctx.of_bias, ctx.groups = of_bias, groups
        if groups is not None:
            bias_of = bias, bias_delta, of_bias
            return _forward_by_group(kernel, groups, data, center, delta, bias_of)
        out = kernel.forward(data, center, bias if of_bias is None else None)
        for rows, before, after, of in _chunks(data, out, into_data, into_out, of_bias):
            flipped = kernel.forward(_flip(data[rows], before), delta, None)
            if after is None:
                out[rows].add_(flipped)
            else:
                after[0].add_times(out[rows], flipped, *after[1:])
            if of is not None and bias is not None and bias_delta is not None:
                of[0].add_vectors(out[rows], bias, bias_delta, *of[1:])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        data, center, delta = ctx.saved_tensors
        kernel, need = ctx.kernel, ctx.needs_input_grad
        grad_bias = grad.transpose(kernel.bias_dim, -1).flatten(0, -2).sum(0) if need[3] else None
        grad_beta = _grad_of_bias_delta(grad, ctx.of_bias) if need[4] else None
        if ctx.groups is not None and not torch.is_grad_enabled():
            grads = _grads_by_group(ctx, grad, data, center, delta)
            return *grads, grad_bias, grad_beta, None, None, None, None, None
        grad_data, grad_center = kernel.backward(grad, data, center, (need[0], need[1]))
        grad_delta = None
        if need[0] or need[2]:
            # Writing in place cannot be differentiated again.
            add = _add_differentiable if torch.is_grad_enabled() else _add_in_chunks
            grad_data, grad_delta = add(ctx, grad, data, delta, grad_data)
        grads = grad_data, grad_center, grad_delta
        return *grads, grad_bias, grad_beta, None, None, None, None, None


def _grad_of_bias_delta(grad: Tensor, placed: Placed) -> Tensor:
    signs, example_dim, dim = placed
    others = [d for d in range(grad.dim()) if d not in (example_dim, dim)]
    summed = grad.sum(others) if others else grad
    by_example = summed if example_dim < dim else summed.t()  # (N, d)
    if torch.is_grad_enabled():
        return flip_signs(by_example, signs, 0, 1).sum(0)
    return signs.sum_times(by_example)


def _add_differentiable(
    ctx: Any, grad: Tensor, data: Tensor, delta: Tensor, grad_data: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the data, with what the flipped half adds, and of the perturbation."""
    need = ctx.needs_input_grad
    flipped = _flip(data, ctx.into_data) if need[2] else data
    more, grad_delta = ctx.kernel.backward(
        _flip(grad, ctx.into_out), flipped, delta, (need[0], need[2])
    )
    return None if grad_data is None else grad_data + _flip(more, ctx.into_data), grad_delta


def _add_in_chunks(
    ctx: Any, grad: Tensor, data: Tensor, delta: Tensor, grad_data: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """As :func:`_add_differentiable`, a few examples at a time and in place."""
    need, grad_delta = ctx.needs_input_grad, None
    for rows, before, after in _chunks(data, grad, ctx.into_data, ctx.into_out):
        flipped = _flip(data[rows], before) if need[2] else data[rows]
        more, part = ctx.kernel.backward(
            _flip(grad[rows], after), flipped, delta, (need[0], need[2])
        )
        grad_delta = part if grad_delta is None or part is None else grad_delta.add_(part)
        if grad_data is None:
            continue
        if before is None:
            grad_data[rows].add_(more)
        else:
            before[0].add_times(grad_data[rows], more, *before[1:])
    return grad_data, grad_delta


def _forward_by_group(
    kernel: Kernel, groups: Groups, data: Tensor, center: Tensor, delta: Tensor, bias: Bias
) -> Tensor:
    own, weight, out = bias[0], torch.empty_like(center), None
    signs = None if bias[2] is None else bias[2][0].of_groups
    for group, rows in groups.rows(len(data)):
        groups.put_weight(weight, group, center, delta)
        if signs is not None and bias[0] is not None and bias[1] is not None:
            own = torch.addcmul(bias[0], bias[1], signs[group])
        part = kernel.forward(data[rows], weight, own)
        if out is None:
            out = part.new_empty(len(data), *part.shape[1:])
        out[rows] = part
    return kernel.forward(data, center, own) if out is None else out  # of no examples


def _grads_by_group(
    ctx: Any, grad: Tensor, data: Tensor, center: Tensor, delta: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the data, the centre and the perturbation; not differentiable again."""
    groups, kernel, need = ctx.groups, ctx.kernel, ctx.needs_input_grad
    wanted = need[0], need[1] or need[2]
    grad_data = torch.empty_like(data) if need[0] else None
    grad_center = torch.zeros_like(center) if need[1] else None
    grad_delta = torch.zeros_like(delta) if need[2] else None
    weight = torch.empty_like(center)
    for group, rows in groups.rows(len(data)):
        if grad_data is not None:
            groups.put_weight(weight, group, center, delta)
        of_rows, of_weight = kernel.backward(grad[rows], data[rows], weight, wanted)
        if grad_data is not None:
            grad_data[rows] = of_rows
        if grad_center is not None:
            grad_center.add_(of_weight)
        if grad_delta is not None:
            groups.add_flipped(grad_delta, of_weight, group)
    return grad_data, grad_center, grad_delta


_CHUNK_BYTES = 2**21
"""Of the larger one of data and output: about what the caches next to a core hold."""

_WHOLE = slice(None)


def _chunks(data: Tensor, out: Tensor, *placed: Placed | None) -> Iterator[tuple[Any, ...]]:
    """Cuts the examples: yields their rows, and the signs there of each of ``placed``."""
    if data.nbytes + out.nbytes < 2 * _CHUNK_BYTES:
        yield _WHOLE, *placed
        return
    signs = [p for p in placed if p is not None]
    if any(p[1] for p in signs) or data.device.type != "cpu" or not signs:
        yield _WHOLE, *placed
        return
    multiple = max(p[0].multiple for p in signs)
    size = max(t.nbytes // max(len(t), 1) for t in (data, out))  # of one example
    step = max(_CHUNK_BYTES // max(size, 1) // multiple, 1) * multiple
    if len(data) < 2 * step:
        yield _WHOLE, *placed
        return
    for start in range(0, len(data), step):
        rows = slice(start, min(start + step, len(data)))
        yield rows, *(_cut(p, rows) for p in placed)


def _cut(placed: Placed | None, rows: slice) -> Placed | None:
    return None if placed is None else (placed[0].cut(rows), *placed[1:])


apply_flipped: Callable[..., Tensor] = _FlippedProduct.apply


def _flip(x: Tensor, placed: Placed | None) -> Tensor:
    return x if placed is None else flip_signs(x, *placed)
