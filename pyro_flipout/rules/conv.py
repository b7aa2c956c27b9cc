# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Convolutions. All pixels of an example share its signs, one for each channel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flipout.rules._kernel import Kernel
from pyro_flipout.rules._product import find_examples, flipped_product
from pyro_flipout.tensor import FlipoutTensor, NoRule, NotExamples, implements

FLIPS = "output and input channels of the weight, channels of the bias"
LIMITS = "unbatched input has no example dimension: shared"


@implements(F.conv1d, F.conv2d, F.conv3d, flips=FLIPS, limits=LIMITS, per_particle=True)
def conv(
    op: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    spatial = _check(input, weight)

    def apply(x: Tensor, w: Tensor) -> Tensor:
        return op(x, w, None, stride, padding, dilation, groups)

    if isinstance(weight, FlipoutTensor):
        dim = find_examples(weight, input, [1, *range(2, input.dim())], op.__name__)
        kernel = _kernel(weight, stride, padding, dilation, groups)
        fused = None if kernel is None else bias
        out = flipped_product(
            weight, input, apply, {1: 1}, {0: 1}, dim, groups=groups, kernel=kernel, bias=fused
        )
        bias = bias if kernel is None else None
    else:
        out = apply(input, weight)
    return out if bias is None else out + channelwise(bias, spatial)


def _kernel(
    weight: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    output_padding: Any = None,
) -> Kernel | None:
    """The convolution and its gradient, transposed if it has ``output_padding``."""
    spatial = weight.dim() - 2
    stride, dilation, out_pad = (
        _ntuple(v, spatial) for v in (stride, dilation, output_padding or 0)
    )
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(t % 2 for t in total) or any(s != 1 for s in stride):
            return None  # pads one side more, or is refused: left to torch
        padding = [t // 2 for t in total]
    padding = _ntuple(0 if padding == "valid" else padding, spatial)
    transposed = output_padding is not None
    options = (stride, padding, dilation, transposed, out_pad)

    def forward(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return torch.convolution(x, w, b, *options, groups)

    def backward(
        grad: Tensor, x: Tensor, w: Tensor, need: tuple[bool, bool], count: int = 1
    ) -> tuple[Tensor | None, Tensor | None]:
        mask = [*need, False]
        grads = torch.ops.aten.convolution_backward(
            grad, x, w, None, *options, groups * count, mask
        )
        return grads[0], grads[1]

    def forward_each(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        b = b if b is None else b.flatten()
        out = torch.convolution(_abreast(x), w.flatten(0, 1), b, *options, groups * len(w))
        return _apart(out, len(w))

    def backward_each(
        grad: Tensor, x: Tensor, w: Tensor, need: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        of_x, of_w = backward(_abreast(grad), _abreast(x), w.flatten(0, 1), need, len(w))
        of_x = of_x if of_x is None else _apart(of_x, len(w))
        return of_x, of_w if of_w is None else of_w.unflatten(0, w.shape[:2])

    def pixels(data: Tensor) -> int:
        count = math.prod(data.shape[2:])
        return count if transposed else count // math.prod(stride)

    return Kernel(forward, backward, forward_each, backward_each, pixels, min_uses=128, bias_dim=1)


def _abreast(x: Tensor) -> Tensor:
    """Data ``(c, k, C, *)`` for c weights as ``(k, c * C, *)`` for a grouped convolution."""
    return x.transpose(0, 1).flatten(1, 2)


def _apart(x: Tensor, count: int) -> Tensor:
    """The inverse of :func:`_abreast`."""
    each: Tensor = x.unflatten(1, (count, -1))
    return each.transpose(0, 1)


def _ntuple(value: Any, count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else [*value] * (count // len(value))


@implements(
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    flips=FLIPS,
    limits=LIMITS,
    per_particle=True,
)
def conv_transpose(
    op: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,  # (in, out / groups, *kernel)
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    spatial = _check(input, weight)

    def apply(x: Tensor, w: Tensor) -> Tensor:
        return op(x, w, None, stride, padding, output_padding, groups, dilation)

    if isinstance(weight, FlipoutTensor):
        dim = find_examples(weight, input, [1, *range(2, input.dim())], op.__name__)
        kernel = _kernel(weight, stride, padding, dilation, groups, output_padding)
        fused = None if kernel is None else bias
        out = flipped_product(
            weight,
            input,
            apply,
            {0: 1},
            {1: 1},
            dim,
            out_groups=groups,
            kernel=kernel,
            bias=fused,
        )
        bias = bias if kernel is None else None
    else:
        out = apply(input, weight)
    return out if bias is None else out + channelwise(bias, spatial)


def _check(input: Tensor, weight: Tensor) -> int:
    """Number of spatial dimensions."""
    if isinstance(input, FlipoutTensor):
        raise NoRule("the input is itself a flipped weight")
    spatial = weight.dim() - 2
    if input.dim() == spatial + 1:
        raise NotExamples(
            f"input of shape {tuple(input.shape)} has no example dimension; "
            "add one in front, as in x.unsqueeze(0)"
        )
    return spatial


def channelwise(bias: Tensor, spatial: int) -> Tensor:
    """Aligns a weight ``(C,)`` with data ``(N, C, *spatial)``."""
    return torch.reshape(bias, (-1, *(1,) * spatial))
