# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Dense layers."""

from __future__ import annotations

from pyro.nn import PyroModule
from torch import nn

from pyro_flipout.nn.layer import FlipoutLayer

__all__ = ["FlipoutBilinear", "FlipoutLinear"]


class FlipoutLinear(FlipoutLayer, nn.Linear, PyroModule):  # type: ignore[misc]
    r""":math:`y_n = W_n x_n + b_n`, as ``torch.nn.Linear``.

    Takes the arguments of its twin, and those of
    :class:`~pyro_flipout.nn.layer.FlipoutLayer`.

    >>> import torch
    >>> layer = FlipoutLinear(4, 3)
    >>> layer(torch.randn(10, 4)).shape
    torch.Size([10, 3])
    """


class FlipoutBilinear(FlipoutLayer, nn.Bilinear, PyroModule):  # type: ignore[misc]
    r""":math:`y_{no} = x_n^\top W_{no} x'_n + b_{no}`, as ``torch.nn.Bilinear``.

    Takes the arguments of its twin, and those of
    :class:`~pyro_flipout.nn.layer.FlipoutLayer`.
    """
