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


def example_dim_of(obj: Any, dim: int, rows: int) -> int | None:
    """The dimension of an argument that counts the examples, ``None`` if there is none.

    ``dim``, or the first of one that has no time, such as the labels ``(N,)`` of data
    ``(T, N, features)``.
    """
    if not isinstance(obj, Tensor):
        return None
    return next((d for d in (dim, 0) if obj.dim() > d and obj.size(d) == rows), None)


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
            dim = example_dim_of(obj, self.dim, self.rows)
            return obj if dim is None else obj.index_select(dim, index.to(obj.device))

        return tuple(map(take, self.args)), {k: take(v) for k, v in self.kwargs.items()}
