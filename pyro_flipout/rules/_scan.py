# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""One direction of one recurrent layer: all its steps are one node of the autograd graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_flipout._modes import has_own_gradients
from pyro_flipout.errors import FlipoutError
from pyro_flipout.rules._cells import Cell
from pyro_flipout.rules._loop import Backward, Plan, run_forward, run_unrolled
from pyro_flipout.rules._signed import explicit_bias, matrices_of

__all__ = ["Scan", "scan"]


def scan(
    cell: Cell,
    rows: Tensor,
    sizes: Sequence[int],
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    reverse: bool = False,
    order: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Runs one direction of one layer on flipped weights.

    :param rows: input of all steps ``(sum(sizes), in)``.
    :param sizes: number of sequences of every step, not increasing.
    :param states: first state ``(N, P)``, for an LSTM also the cell state ``(N, H)``.
    :param weights: ``w_ih``, ``w_hh``, perhaps ``b_ih`` and ``b_hh``, perhaps ``w_hr``.
    :param reverse: whether the last step comes first.
    :param order: the numbers of the examples in the order of their rows, if they are not in turn.
    :returns: output of all steps ``(sum(sizes), P)``, and the last states.
    """
    w_ih, w_hh, *rest = weights
    device, dtype = rows.device.type, w_ih.dtype
    autocast = torch.is_autocast_enabled(device)
    split = [
        matrices_of(weight, torch.get_autocast_dtype(device) if autocast else dtype, order)
        for weight in (w_ih, w_hh, *rest[2 if has_biases else 0 :])
    ]
    states = [state.to(dtype) for state in states]
    shape = len(states[0]), w_ih.size(0)
    biases = [explicit_bias(b, shape[0], order) for b in rest[:2]] if has_biases else []
    b_ih, b_hh = biases or [states[0].new_zeros(shape)] * 2
    both = (b_ih + b_hh, None) if cell.one_product else (b_ih, b_hh)
    plan = Plan(cell, sizes, reverse, [pairs for _, pairs in split])
    matrices = [matrix for part in split for matrix in part[0]]
    c0 = states[1] if len(states) > 1 else None
    run = Scan.apply if has_own_gradients() else _unrolled
    out, *ends = run(plan, rows, *both, states[0], c0, *matrices)
    return out, *ends[: len(states)]


def _unrolled(plan: Plan, x: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    with torch.autocast(x.device.type, enabled=False):
        return run_unrolled(plan, x, *args)


class Scan(torch.autograd.Function):
    """The node. Its dtype is that of ``h0``; products are in the dtype of the matrices.

    :param x: input of all steps ``(rows, in)``.
    :param b_ih: biases of the input product ``(N, num_gates * H)``.
    :param b_hh: those of the hidden product, ``None`` if ``cell.one_product``.
    :param h0: first state ``(N, P)``; without projection P is H.
    :param c0: first cell state ``(N, H)`` of an LSTM.
    :param matrices: those of all products, in the order of ``plan.signs``.
    :returns: output ``(rows, P)``, last state, last cell state, and buffers kept for backward.
    """

    @staticmethod
    def forward(
        plan: Plan,
        x: Tensor,
        b_ih: Tensor,
        b_hh: Tensor | None,
        h0: Tensor,
        c0: Tensor | None,
        *matrices: Tensor,
    ) -> tuple[Tensor | None, ...]:
        with torch.autocast(x.device.type, enabled=False):
            return run_forward(plan, x, b_ih, b_hh, h0, c0, *matrices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.plan, *tensors = inputs
        buffers = output[3:]
        ctx.num_inputs = len(tensors)
        ctx.mark_non_differentiable(*buffers)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *buffers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs, buffers = saved[: ctx.num_inputs], saved[ctx.num_inputs :]
        with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
            results = _gradients(ctx.plan, inputs, buffers, grads, ctx.needs_input_grad[1])
        if torch.is_grad_enabled():
            results = _once(results, (*inputs, *grads))
        return None, *results


def _gradients(
    plan: Plan,
    inputs: Sequence[Any],
    buffers: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    need_dx: bool,
) -> tuple[Tensor | None, ...]:
    x, b_ih, _, h0, c0, *matrices = inputs
    d_after, dh, dc, *_ = grads
    d_after = torch.zeros_like(buffers[1]) if d_after is None else d_after
    dh = torch.zeros_like(h0) if dh is None else dh.clone()
    if dc is None:
        dc = h0.new_zeros(len(h0), b_ih.size(1) // plan.cell.num_gates)
    dx = torch.empty_like(x) if need_dx else None
    loop = Backward(plan, matrices, dh, dc.clone())
    loop.run(x, d_after, dx, *buffers)
    return dx, loop.db_ih, loop.db_hh, loop.dh, None if c0 is None else loop.dc, *loop.d_matrices


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(num_results: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors[:num_results]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise FlipoutError(
            "flipout: second derivatives of a recurrent layer with flipped weights are not "
            "implemented; take them with torch.func, as in torch.func.hessian, or hide the layer's "
            "sites with flipout(hide=[...])"
        )


def _once(results: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Makes gradients that depend on ``inputs``, but cannot be differentiated again."""
    known = [result for result in results if result is not None]
    others = [tensor for tensor in inputs if tensor is not None]
    marked = iter(_Once.apply(len(known), *known, *others))  # type: ignore[no-untyped-call]
    return tuple(None if result is None else next(marked) for result in results)
