# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Mini-batches of a model's arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_flipout._checks import checked_integer, is_integer
from pyro_flipout._containers import holds_rows, leaves, map_leaves, select

__all__ = ["Batches", "Data"]

Batches = Callable[[int], "tuple[Any, ...]"]


def example_dim_of(obj: Any, dim: int, rows: int) -> int | None:
    """The dimension of an argument that counts the examples, ``None`` if there is none.

    ``dim``, or the first of one that has no time, such as the labels ``(N,)`` of data
    ``(T, N, features)``.
    """
    return _example_dim(obj.shape, dim, rows) if isinstance(obj, Tensor) else None


def _example_dim(shape: Sequence[int], dim: int, rows: int) -> int | None:
    return next((d for d in (dim, 0) if len(shape) > d and shape[d] == rows), None)


class Data:
    """What mini-batches are made of: the rows of tensors and arrays, in containers too.

    :raises TypeError: if ``args`` or ``kwargs`` are no arguments of a model, or hold data of which
        rows cannot be taken.
    :raises ValueError: if ``dim`` or ``batches`` is out of range.
    """

    def __init__(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], dim: int, batches: str | Batches
    ) -> None:
        if not callable(batches) and batches not in ("resampled", "fixed"):
            raise ValueError(
                f'gradient_variance: got batches={batches!r}, expected "resampled", "fixed" or a '
                "function of the batch size"
            )
        if not isinstance(kwargs, Mapping):
            raise TypeError(
                f"gradient_variance: got kwargs of type {type(kwargs).__name__}, expected a dict "
                "of keyword arguments"
            )
        self.args, self.kwargs = _arguments(args, "args"), dict(kwargs)
        self.dim = checked_integer("gradient_variance", "example_dim", dim, 0)
        self.batches = batches
        self.kind = "function" if callable(batches) else batches
        data = (leaf for leaf in leaves((self.args, self.kwargs)) if _has_dim(leaf, self.dim))
        self.rows = next((int(leaf.shape[self.dim]) for leaf in data), 0)
        if self.rows and self.kind != "function":
            self._map(self._check)

    def check_sizes(self, sizes: Any) -> list[int]:
        """The batch sizes in ascending order, each once.

        :param sizes: those that were asked for; None for powers of 4.
        :raises ValueError: if one is no positive integer, or there are not enough data.
        """
        if sizes is None:
            sizes = [4**k for k in range(7) if 4**k <= max(self.rows, 1)]
        if not isinstance(sizes, Iterable) or isinstance(sizes, str):
            raise ValueError(
                f"gradient_variance: got batch_sizes={sizes!r}, expected a list of integers >= 1"
            )
        found = list(sizes)
        if not found or not all(is_integer(size, 1) for size in found):
            raise ValueError(f"gradient_variance: got batch_sizes={found}, expected integers >= 1")
        checked = sorted({int(size) for size in found})
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
            return _arguments(self.batches(size), "what batches(N) returned"), self.kwargs
        index = torch.arange(size) if self.kind == "fixed" else torch.randint(self.rows, (size,))
        return self._map(lambda leaf, path: self._take(leaf, index))

    def _map(self, function: Callable[[Any, str], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replaces the leaves of all arguments."""

        def mapped(value: Any, path: str) -> Any:
            return map_leaves(value, function, path, "gradient_variance", self._is_list)

        return (
            tuple(mapped(value, f"args[{i}]") for i, value in enumerate(self.args)),
            {name: mapped(value, f"kwargs[{name!r}]") for name, value in self.kwargs.items()},
        )

    def _is_list(self, obj: Any) -> bool:
        """Whether a list or tuple has one item for each example."""
        return (
            type(obj) in (list, tuple)
            and len(obj) == self.rows
            and not any(self._dim_of(leaf) is not None for leaf in leaves(obj))
        )

    def _dim_of(self, leaf: Any) -> int | None:
        return _example_dim(leaf.shape, self.dim, self.rows) if _has_dim(leaf, 0) else None

    def _take(self, leaf: Any, index: Tensor) -> Any:
        """The rows of one leaf; what has none is given back itself."""
        if self._is_list(leaf):
            return type(leaf)(leaf[i] for i in index.tolist())
        dim = self._dim_of(leaf)
        return leaf if dim is None else select(leaf, dim, index)

    def _check(self, leaf: Any, path: str) -> Any:
        if not (_has_dim(leaf, 0) or self._is_list(leaf)) and holds_rows(leaf, self.rows, self.dim):
            raise TypeError(
                f"gradient_variance: {path}, a {type(leaf).__name__}, holds data of {self.rows} "
                "rows, and it is not known how to take some of them; expected tensors or arrays, "
                "in lists, tuples, dicts or dataclasses at most; or give batches=a function of N "
                "that returns the arguments of one mini-batch"
            )
        return leaf


def _arguments(args: Any, name: str) -> tuple[Any, ...]:
    """Positional arguments, which are not one argument that happens to be iterable."""
    if not isinstance(args, (tuple, list)):
        raise TypeError(
            f"gradient_variance: got {name} of type {type(args).__name__}, expected a tuple of the "
            "model's arguments; write (batch,) for a model of one argument"
        )
    return tuple(args)


def _has_dim(leaf: Any, dim: int) -> bool:
    """Whether it is a tensor or an array that has a dimension ``dim``."""
    if isinstance(leaf, Tensor):
        return leaf.dim() > dim and not leaf.is_nested
    return isinstance(leaf, np.ndarray) and leaf.ndim > dim
