# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Mini-batches of a model's arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Batches", "Data"]

Batches = Callable[[int], "tuple[Any, ...]"]


class Data:
    """What mini-batches are made of."""

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], dim: int, batches: str | Batches
    ) -> None:
        if not callable(batches) and batches not in ("resampled", "fixed"):
            raise ValueError(
                f'gradient_variance: got batches={batches!r}, expected "resampled", "fixed" or a '
                "function of the batch size"
            )
        self.args, self.kwargs, self.dim, self.batches = args, kwargs, dim, batches
        self.kind = "function" if callable(batches) else batches
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() > dim]
        self.rows = tensors[0].size(dim) if tensors else 0

    def check_sizes(self, sizes: Iterable[int] | None) -> list[int]:
        if sizes is None:
            sizes = [4**k for k in range(7) if 4**k <= max(self.rows, 1)]
        checked = sorted({int(size) for size in sizes})
        if not checked or checked[0] < 1:
            raise ValueError(
                f"gradient_variance: got batch_sizes={checked}, expected integers >= 1"
            )
        if self.kind == "function":
            return checked
        if not self.rows or (self.kind == "fixed" and checked[-1] > self.rows):
            raise ValueError(
                f"gradient_variance: got batch_sizes={checked}, but args have {self.rows} rows in "
                f"their dimension {self.dim}; give args more data, or smaller batch_sizes"
            )
        return checked

    def batch(self, size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments for one mini-batch."""
        if callable(self.batches):
            return tuple(self.batches(size)), self.kwargs
        index = torch.arange(size) if self.kind == "fixed" else torch.randint(self.rows, (size,))

        def take(obj: Any) -> Any:
            if isinstance(obj, Tensor) and obj.dim() > self.dim and obj.size(self.dim) == self.rows:
                return obj.index_select(self.dim, index.to(obj.device))
            return obj

        return tuple(map(take, self.args)), {k: take(v) for k, v in self.kwargs.items()}
