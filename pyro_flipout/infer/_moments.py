# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""Variance over repeats, streaming, with its standard error.

Welford's update of one entry's sum of squares [1] is, at repeat :math:`r = 2, \dots, R`,

.. math:: h_r = \tfrac{r-1}{r} (g_r - \bar g_{r-1})^2,
    \qquad s^2 = \frac{1}{R-1} \sum_{r=2}^R h_r .

So the sample variance is the mean of :math:`R - 1` increments, each an unbiased estimate of the
variance (they are squared Helmert contrasts, independent of one another for Gaussian gradients).
An average of variances over entries is the mean of averaged increments, and its standard error
follows from *their* spread, which knows how the entries of one gradient go together.

References

[1] `Note on a method for calculating corrected sums of squares and products`,
    B. P. Welford, Technometrics 4(3), 1962
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flipout.infer._gradients import Piece

__all__ = ["Moments", "Spread"]


class Spread:
    """Mean of a stream of numbers, and its standard error."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0

    def add(self, value: float) -> None:
        """Takes one number."""
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self._squares += step * (value - self.mean)

    @property
    def error(self) -> float:
        """Standard error of the mean; nan below two numbers."""
        if self.count < 2:
            return math.nan
        return math.sqrt(self._squares / (self.count - 1) / self.count)


class Moments:
    """Mean and variance of gradients: the memory of one gradient, of two with ``entries``.

    :param groups: lists of pieces whose variance is averaged over all their entries.
    :param entries: whether to keep the variance of each entry.
    """

    def __init__(self, groups: Sequence[Sequence[Piece]], entries: bool = False) -> None:
        self.groups = groups
        self.count = 0
        self.spreads = [Spread() for _ in groups]
        self._entries = entries
        self._means: list[Tensor] = []
        self._squares: list[Tensor] = []

    def add(self, grads: Sequence[Tensor]) -> None:
        """Takes one gradient, a tensor for each parameter."""
        self.count += 1
        if self.count == 1:
            self._means = [grad.clone() for grad in grads]
            self._squares = [torch.zeros_like(grad) for grad in grads] if self._entries else []
            return
        increments = []
        for position, (mean, grad) in enumerate(zip(self._means, grads, strict=True)):
            step = grad - mean
            mean.add_(step, alpha=1 / self.count)
            increments.append(step.square_().mul_((self.count - 1) / self.count))
            if self._entries:
                self._squares[position].add_(increments[-1])
        for spread, group in zip(self.spreads, self.groups, strict=True):
            total = sum(_total(increments[piece.position], piece.index) for piece in group)
            spread.add(total / sum(piece.size for piece in group))

    @property
    def means(self) -> list[Tensor]:
        """Mean of every entry, in the parameters' shapes."""
        return self._means

    @property
    def variances(self) -> list[Tensor]:
        """Variance of every entry, in the parameters' shapes."""
        return [squares / (self.count - 1) for squares in self._squares]


def _total(increments: Tensor, index: Tensor | None) -> float:
    flat = increments.flatten()
    return float((flat if index is None else flat[index]).sum(dtype=torch.float64))
