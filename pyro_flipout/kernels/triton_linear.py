# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""The flipped linear product with both of its products in one Triton kernel.

.. math:: Y = X \bar W^\top + R \circ \bigl((X \circ S) \Delta W^\top\bigr) + b + T \circ \beta

(Wen et al. 2018, eq. 4). Every tile of the data is read once for both products, its signs are
formed in registers from integer codes, and R and the bias, with a perturbation and signs of its
own or without, are applied before the output is written once. Neither signs nor flipped data ever
reach memory.

Import this module only where Triton is installed; :func:`pyro_flipout.kernels.flipped_linear`
does so when it is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_flipout._modes import autocast
from pyro_flipout.kernels import _triton
from pyro_flipout.kernels._launch import Flips, bias_grads, product, weight_grads
from pyro_flipout.signs import Signs, flip_signs

__all__ = ["flipped_linear"]


def flipped_linear(
    x: Tensor,
    center: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    into_data: Tensor | None,
    into_out: Tensor | None,
    example_dim: int = 0,
    bias_delta: Tensor | None = None,
    of_bias: Tensor | None = None,
    group_size: int = 1,
) -> Tensor:
    """``x centerᵀ + R ∘ ((x ∘ S) deltaᵀ) + bias + T ∘ bias_delta`` in one kernel.

    So are its gradients.

    For backward it saves ``x``, the weights and the codes. Under autocast the arguments are
    cast as for a matrix product. Gradients that are to be differentiated again
    (``create_graph=True``) are computed by library calls.

    :param x: data, shape ``(*, K)``, of size N in ``example_dim``; further dimensions share
        the signs of their example.
    :param center: shape ``(O, K)``.
    :param delta: perturbation, shape ``(O, K)``.
    :param bias: shape ``(O,)``, the centre of a bias that is flipped too.
    :param into_data: ``int32`` codes of the weight's columns, shape ``(K,)`` or ``(1,)``; see
        :mod:`pyro_flipout.signs`. No signs S if None.
    :param into_out: ``int32`` codes of the weight's rows, shape ``(O,)`` or ``(1,)``. No signs
        R if None.
    :param example_dim: dimension of ``x`` that counts the examples, not negative.
    :param bias_delta: perturbation of the bias, shape ``(O,)``; needs ``of_bias``.
    :param of_bias: ``int32`` codes of the bias, shape ``(O,)`` or ``(1,)``.
    :param group_size: how many neighbouring examples have their signs in common.
    :returns: shape ``(*, O)``.
    :raises ValueError: if shapes, dtypes or devices do not fit.
    """
    x, center, delta, bias, bias_delta = autocast(x, center, delta, bias, bias_delta)
    _check(x, center, delta, bias, bias_delta, example_dim)
    if (bias_delta is None) != (of_bias is None) or group_size < 1:
        raise ValueError(
            f"flipped_linear: got bias_delta {_shape(bias_delta)}, of_bias {_shape(of_bias)} and "
            f"group_size {group_size}, expected the first two together and groups of at least 1"
        )
    lead = x.shape[:-1]
    flips = Flips(
        _codes(into_data, x.shape[-1], "into_data"),
        _codes(into_out, len(center), "into_out"),
        _codes(of_bias, len(center), "of_bias"),
        lead[example_dim],
        math.prod(lead[example_dim + 1 :]),
        group_size,
    )
    return _apply(x, center, delta, bias, bias_delta, flips, example_dim)  # type: ignore[no-any-return]


class _FlippedLinear(torch.autograd.Function):
    """The fused product, its gradients, and its gradients' gradients by library calls."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        center: Tensor,
        delta: Tensor,
        bias: Tensor | None,
        bias_delta: Tensor | None,
        flips: Flips,
        example_dim: int,
    ) -> Tensor:
        need_x, need_center, need_delta, *_ = ctx.needs_input_grad
        weights = (center, delta) if need_x else (None, None)
        ctx.save_for_backward(x if need_center or need_delta else None, *weights)
        ctx.flips, ctx.example_dim = flips, example_dim
        rows = x.reshape(-1, x.shape[-1])
        out = product(rows, center, delta, bias, bias_delta, flips)
        return out.reshape(*x.shape[:-1], len(center))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, center, delta = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        again = torch.is_grad_enabled()  # the gradients are to be differentiated
        grads = _differentiable if again else _fused_grads
        grads_of_bias = _differentiable_of_bias if again else _fused_of_bias
        with torch.autocast(grad.device.type, enabled=False):
            found = grads(grad, x, center, delta, ctx.flips, ctx.example_dim, need)
            biases = grads_of_bias(grad, ctx.flips, ctx.example_dim, ctx.needs_input_grad[3:5])
        return *found, *biases, None, None


_apply: Callable[..., Any] = _FlippedLinear.apply

_Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Gradients of the data, the centre and the perturbation."""


def _fused_grads(
    grad: Tensor,
    x: Tensor | None,
    center: Tensor | None,
    delta: Tensor | None,
    flips: Flips,
    example_dim: int,
    need: tuple[bool, bool, bool],
) -> _Grads:
    rows, grad_x = grad.reshape(-1, grad.shape[-1]), None
    if center is not None and delta is not None:
        flat = product(rows, center.t(), delta.t(), None, None, flips.reversed())
        grad_x = flat.reshape(*grad.shape[:-1], center.shape[1])
    if x is None:
        return grad_x, None, None
    return grad_x, *weight_grads(rows, x.reshape(-1, x.shape[-1]), flips, need[1:])


def _fused_of_bias(
    grad: Tensor, flips: Flips, example_dim: int, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    rows = grad.reshape(-1, grad.shape[-1])
    if need[1]:
        return bias_grads(rows, flips, need)
    return rows.sum(0) if need[0] else None, None


def _differentiable(
    grad: Tensor,
    x: Tensor | None,
    center: Tensor | None,
    delta: Tensor | None,
    flips: Flips,
    example_dim: int,
    need: tuple[bool, bool, bool],
) -> _Grads:
    """The same by library calls, of which autograd knows the derivatives."""

    def flip(t: Tensor, codes: Tensor | None) -> Tensor:
        return _flip(t, codes, flips, example_dim)

    turned = flip(grad, flips.into_out)
    grad_x = grad_center = grad_delta = None
    if center is not None and delta is not None:
        grad_x = grad @ center + flip(turned @ delta, flips.into_data)
    if x is not None and need[1]:
        grad_center = grad.flatten(0, -2).t() @ x.flatten(0, -2)
    if x is not None and need[2]:
        grad_delta = turned.flatten(0, -2).t() @ flip(x, flips.into_data).flatten(0, -2)
    return grad_x, grad_center, grad_delta


def _differentiable_of_bias(
    grad: Tensor, flips: Flips, example_dim: int, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    turned = _flip(grad, flips.of_bias, flips, example_dim) if need[1] else None
    return (
        grad.flatten(0, -2).sum(0) if need[0] else None,
        None if turned is None else turned.flatten(0, -2).sum(0),
    )


def _flip(t: Tensor, codes: Tensor | None, flips: Flips, example_dim: int) -> Tensor:
    if codes is None:
        return t
    signs = Signs(codes, flips.examples, t.dtype, flips.group_size)
    return flip_signs(t, signs, example_dim, t.dim() - 1)


# -------------------------------------------------------------------- arguments


def _shape(t: Tensor | None) -> tuple[int, ...] | None:
    return None if t is None else tuple(t.shape)


def _codes(codes: Tensor | None, size: int, name: str) -> Tensor | None:
    if codes is None:
        return None
    if codes.dtype != torch.int32 or tuple(codes.shape) not in ((size,), (1,)):
        raise ValueError(
            f"flipped_linear: {name} are {codes.dtype} codes of shape {tuple(codes.shape)}, "
            f"expected torch.int32 of shape ({size},); flatten the codes of the sign factor"
        )
    return codes.expand(size).contiguous()


def _check(
    x: Tensor,
    center: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    bias_delta: Tensor | None,
    example_dim: int,
) -> None:
    tensors = {"x": x, "center": center, "delta": delta, "bias": bias, "bias_delta": bias_delta}
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if t is not None}
    if len({(t.dtype, t.device) for t in tensors.values() if t is not None}) > 1:
        found = {name: (t.dtype, t.device) for name, t in tensors.items() if t is not None}
        raise ValueError(f"flipped_linear: got {found}, expected one dtype and device")
    if x.dtype not in _triton.DTYPES or (x.dtype == torch.float64 and not _triton.INTERPRETED):
        raise ValueError(
            f"flipped_linear: got {x.dtype}, expected float32, float16 or bfloat16; use F.linear"
        )
    sizes = tuple(center.shape)
    fits = len(sizes) == 2 and shapes["delta"] == sizes and shapes["x"][-1:] == sizes[1:]
    biases = [shapes[name] for name in ("bias", "bias_delta") if name in shapes]
    if not fits or any(b != sizes[:1] for b in biases) or 0 in (*x.shape, *sizes):
        raise ValueError(
            f"flipped_linear: got shapes {shapes}, expected x (*, K), center and delta (O, K) and "
            "bias and bias_delta (O,), none of them empty"
        )
    if not 0 <= example_dim < x.dim() - 1:
        raise ValueError(
            f"flipped_linear: example_dim is {example_dim}, expected a dimension of x of shape "
            f"{shapes['x']} before its last, not negative"
        )
