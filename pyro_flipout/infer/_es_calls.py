# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Rows of the arguments and results of a module, in blocks of one base perturbation each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_flipout._containers import holds_rows, leaves, map_leaves

__all__ = ["block_of", "count_rows", "join"]


def count_rows(args: Any, num_owners: int, example_dim: int, caller: str, owner: str) -> int:
    """Number of rows of the data, from the first tensor among the arguments.

    :param num_owners: how many members or environments the rows belong to.
    :param caller: the class, for the messages.
    :param owner: ``"member"`` or ``"environment"``, likewise.
    :raises ValueError: if there is none, or if the owners cannot have equally many.
    """
    tensors = (leaf for leaf in leaves(args) if isinstance(leaf, Tensor))
    data = next((t for t in tensors if t.dim() > example_dim), None)
    if data is None:
        raise ValueError(
            f"{caller}: no argument of the module is a tensor with a dimension {example_dim} "
            "that counts rows"
        )
    rows = data.size(example_dim)
    if rows == 0 or rows % num_owners:
        raise ValueError(
            f"{caller}: got data of shape {tuple(data.shape)} with {rows} rows in dimension "
            f"{example_dim}, expected a positive multiple of the {num_owners} {owner}s; for k rows "
            f"for each {owner}, repeat_interleave(k): row i belongs to {owner} i // k"
        )
    return rows


def block_of(args: Any, start: int, size: int, rows: int, example_dim: int) -> Any:
    """The rows ``start`` to ``start + size`` of all the tensors in nested arguments.

    :raises ValueError: if a tensor has another number of rows.
    :raises TypeError: if other data have as many rows, or a container cannot be made anew.
    """

    def block(leaf: Any, path: str) -> Any:
        if isinstance(leaf, Tensor) and not leaf.is_nested:
            return _block(leaf, start, size, rows, example_dim) if leaf.dim() else leaf
        if holds_rows(leaf, rows, example_dim):
            raise TypeError(
                f"FlipES: with several bases arguments are tensors, in lists, tuples, dicts or "
                f"dataclasses at most; got a {type(leaf).__name__} that holds data of {rows} rows; "
                "use num_bases=1"
            )
        return leaf

    return map_leaves(args, block, "the arguments", "FlipES")


def _block(data: Tensor, start: int, size: int, rows: int, example_dim: int) -> Tensor:
    if data.dim() <= example_dim or data.size(example_dim) != rows:
        raise ValueError(
            f"FlipES: with several bases every argument has its rows in dimension "
            f"{example_dim}; got one of shape {tuple(data.shape)} beside data of {rows} rows; "
            "use num_bases=1, or change the layout within the module's forward"
        )
    return data.narrow(example_dim, start, size)


def join(parts: Sequence[Any], size: int, example_dim: int) -> Any:
    """Undoes :func:`block_of` on the results of all blocks.

    :raises ValueError: if a result has not one row for each row of the data.
    """
    first = parts[0]
    if len(parts) == 1 or first is None:
        return first
    if isinstance(first, Tensor):
        if first.dim() <= example_dim or first.size(example_dim) != size:
            raise ValueError(
                f"FlipES: with several bases every result has its rows in dimension {example_dim}; "
                f"got one of shape {tuple(first.shape)} for {size} rows of data; use num_bases=1, "
                "or change the layout within the module's forward"
            )
        return torch.cat(list(parts), example_dim)
    if isinstance(first, (list, tuple)):
        return _like(first, [join(p, size, example_dim) for p in zip(*parts, strict=True)])
    if isinstance(first, dict):
        return {key: join([part[key] for part in parts], size, example_dim) for key in first}
    raise TypeError(
        f"FlipES: with several bases results are tensors, tuples, lists or dicts of them; got "
        f"{type(first).__name__}; use num_bases=1"
    )


def _like(obj: Any, items: list[Any]) -> Any:
    return type(obj)(*items) if hasattr(obj, "_fields") else type(obj)(items)
