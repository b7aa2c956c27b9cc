# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""What torch's modes ask of a product with a gradient of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["autocast", "transformed"]


def autocast(*tensors: Tensor | None) -> list[Any]:
    """What autocast would do to the arguments of a matrix product."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]


def transformed() -> bool:
    """Whether ``torch.func`` transforms the program, which it cannot do with our own gradients."""
    return torch._C._are_functorch_transforms_active()
