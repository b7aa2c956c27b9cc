# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""A flipped product with its gradient, as one node of autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_flipout.rules._explicit import Explicit, explicit_gradients, explicit_product
from pyro_flipout.rules._kernel import Kernel, Placed
from pyro_flipout.signs import flip_signs

__all__ = ["apply_flipped"]


class _FlippedProduct(torch.autograd.Function):
    """``f(x, C) + b + R ∘ f(x ∘ S, Δ) + T ∘ β``, saving x, C and Δ and nothing of x's size more.

    The bias has the centre b and the perturbation β with signs T, or b alone.

    The flipped half runs over a few examples at a time: their flipped data and its product are
    still in the cache when they are read again, and take no memory of the data's size. Or all
    of it is done by explicit weights.
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
        explicit: Explicit | None,
    ) -> Tensor:
        ctx.save_for_backward(data, center, delta)
        ctx.kernel, ctx.into_data, ctx.into_out = kernel, into_data, into_out
        ctx.of_bias, ctx.explicit = of_bias, explicit
        if explicit is not None:
            own_bias = bias, bias_delta, of_bias
            return explicit_product(explicit, kernel, data, center, delta, own_bias)
        out = kernel.forward(data, center, bias if of_bias is None else None)
        for rows, before, after, of in _chunks(data, out, into_data, into_out, of_bias):
            flipped = kernel.forward(_flip(data[rows], before), delta, None)
            own = None
            if of is not None and bias is not None and bias_delta is not None:
                own = bias, bias_delta, of[0]
            together = after is not None and of is not None and after[1:] == of[1:]
            if after is None:
                out[rows].add_(flipped)
            else:
                after[0].add_times(out[rows], flipped, *after[1:], own if together else None)
            if own is not None and of is not None and not together:
                of[0].add_vectors(out[rows], *own[:2], *of[1:])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        data, center, delta = ctx.saved_tensors
        kernel, need = ctx.kernel, ctx.needs_input_grad
        grad_bias = grad.transpose(kernel.bias_dim, -1).flatten(0, -2).sum(0) if need[3] else None
        grad_beta = _grad_of_bias_delta(grad, ctx.of_bias) if need[4] else None
        if ctx.explicit is not None and not torch.is_grad_enabled():
            saved = data, center, delta
            grads = explicit_gradients(ctx.explicit, kernel, grad, *saved, need[:3])
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
