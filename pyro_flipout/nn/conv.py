# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Convolutions: one kernel for each example, at all its positions."""

from __future__ import annotations

from pyro.nn import PyroModule
from torch import nn

from pyro_flipout.nn.layer import FlipoutLayer

__all__ = [
    "FlipoutConv1d",
    "FlipoutConv2d",
    "FlipoutConv3d",
    "FlipoutConvTranspose1d",
    "FlipoutConvTranspose2d",
    "FlipoutConvTranspose3d",
]


class FlipoutConv1d(FlipoutLayer, nn.Conv1d, PyroModule):  # type: ignore[misc]
    """A convolution of ``(N, C, L)``, as ``torch.nn.Conv1d``.

    Takes the arguments of its twin, and those of
    :class:`~pyro_flipout.nn.layer.FlipoutLayer`.
    """


class FlipoutConv2d(FlipoutLayer, nn.Conv2d, PyroModule):  # type: ignore[misc]
    """A convolution of ``(N, C, H, W)``, as ``torch.nn.Conv2d``.

    Takes the arguments of its twin, and those of
    :class:`~pyro_flipout.nn.layer.FlipoutLayer`.
    """


class FlipoutConv3d(FlipoutLayer, nn.Conv3d, PyroModule):  # type: ignore[misc]
    """A convolution of ``(N, C, D, H, W)``, as ``torch.nn.Conv3d``.

    Takes the arguments of its twin, and those of
    :class:`~pyro_flipout.nn.layer.FlipoutLayer`.
    """


class FlipoutConvTranspose1d(FlipoutLayer, nn.ConvTranspose1d, PyroModule):  # type: ignore[misc]
    """A transposed convolution of ``(N, C, L)``, as ``torch.nn.ConvTranspose1d``.

    Takes the arguments of its twin, and those of
    :class:`~pyro_flipout.nn.layer.FlipoutLayer`.
    """


class FlipoutConvTranspose2d(FlipoutLayer, nn.ConvTranspose2d, PyroModule):  # type: ignore[misc]
    """A transposed convolution of ``(N, C, H, W)``, as ``torch.nn.ConvTranspose2d``.

    Takes the arguments of its twin, and those of
    :class:`~pyro_flipout.nn.layer.FlipoutLayer`.
    """


class FlipoutConvTranspose3d(FlipoutLayer, nn.ConvTranspose3d, PyroModule):  # type: ignore[misc]
    """A transposed convolution of ``(N, C, D, H, W)``, as ``torch.nn.ConvTranspose3d``.

    Takes the arguments of its twin, and those of
    :class:`~pyro_flipout.nn.layer.FlipoutLayer`.
    """
