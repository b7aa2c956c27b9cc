# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Embeddings: one table for each example, for all its tokens."""

from __future__ import annotations

from typing import Any

from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_flipout.nn.bayesian_module import mixin
from pyro_flipout.nn.layer import FlipoutLayer

__all__ = ["FlipoutEmbedding", "FlipoutEmbeddingBag", "PaddedEmbedding"]


@mixin(nn.Embedding)
class PaddedEmbedding:
    """Keeps the embedding of ``padding_idx`` at zero, where it was.

    No gradient ever reaches that row, so a site would give it the prior's noise for good.
    """

    padding_idx: Any
    _zero_padding = False

    def _before_site(self, name: str, parameter: Tensor) -> None:
        if self.padding_idx is not None:
            row = parameter[self.padding_idx]
            self._zero_padding = row.is_meta or not bool(row.any())

    def _plain_value(self, name: str, value: Tensor) -> Tensor:
        if self._zero_padding:
            value = value.clone()
            value[self.padding_idx] = 0.0
        return value

    def forward(self, input: Tensor) -> Tensor:
        """The rows of the table."""
        out: Tensor = super().forward(input)  # type: ignore[misc]
        if not self._zero_padding:
            return out
        return out.masked_fill(input.eq(self.padding_idx).unsqueeze(-1), 0.0)


class _FromNothing:
    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{cls.__name__}.from_pretrained: a Bayesian table has no value to start from; convert "
            "a plain one instead: bayesianize(nn.Embedding.from_pretrained(table), "
            "prior=PretrainedPrior(0.1)), and start the guide at init_to_pretrained"
        )


class FlipoutEmbedding(  # type: ignore[misc]
    _FromNothing, PaddedEmbedding, FlipoutLayer, nn.Embedding, PyroModule
):
    """Rows of a table :math:`W_n`, as ``torch.nn.Embedding``.

    The row of ``padding_idx`` is zero. Takes the arguments of its twin, and those of
    :class:`~pyro_flipout.nn.layer.FlipoutLayer`.
    """


class FlipoutEmbeddingBag(  # type: ignore[misc]
    _FromNothing, FlipoutLayer, nn.EmbeddingBag, PyroModule
):
    """Sums, means or maxima of rows of a table :math:`W_n`, as ``torch.nn.EmbeddingBag``.

    A bag is an example. Takes the arguments of its twin, and those of
    :class:`~pyro_flipout.nn.layer.FlipoutLayer`.
    """
