# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""What the two ways to compute a flipped product need to know of an operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_flipout.signs import Signs

__all__ = ["Bias", "Kernel", "Placed"]


@dataclass(frozen=True)
class Kernel:
    """An operation linear in data and weight, with its gradient.

    The last two do c products at once, with data ``(c, k, *)`` of k examples for each of the c
    weights, and biases ``(c, d)``.

    :ivar forward: ``(data, weight, bias) -> out``.
    :ivar backward: ``(grad, data, weight, (need_data, need_weight)) -> (data's, weight's)``.
    :ivar forward_each: ``(data, weights, biases) -> out``.
    :ivar backward_each: ``(grad, data, weights, needs) -> (data's, weights')``.
    :ivar uses: how often one example uses each entry of the weight, of data ``(N, *)``: its
        tokens, or pixels of the output.
    :ivar min_uses: from how many on c products at once take less time than two products do.
    :ivar bias_dim: dimension of the output along which the bias lies.
    """

    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, tuple[bool, bool]], tuple[Any, Any]]
    forward_each: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    backward_each: Callable[[Tensor, Tensor, Tensor, tuple[bool, bool]], tuple[Any, Any]]
    uses: Callable[[Tensor], int]
    min_uses: int
    bias_dim: int = -1


Placed = tuple[Signs, int, int]
"""Signs, with the example dimension and the dimension they vary along."""

Bias = tuple[Tensor | None, Tensor | None, Placed | None]
"""Centre and perturbation of a bias, and the signs of the latter."""
