# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Ragged sets: the user names the example that each row belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pyro_flipout.errors import FlipoutError
from pyro_flipout.plan.rows import data_of
from pyro_flipout.tensor import OWNED, FlipoutTensor, Rows

__all__ = ["examples"]


@contextmanager
def examples(
    owner: Tensor | PackedSequence, num_examples: int | None = None, *, dim: int = 0
) -> Iterator[None]:
    """Names the example that each row of the data belongs to, for sets of different sizes.

    Atoms of molecules, nodes of graphs, tokens without padding, instances of bags: where the rows
    of all examples lie one after another in one dimension, the example that owns a row cannot be
    seen from its place. In this block, data with as many rows as ``owner`` has entries are flipped
    by owner, for every operation that has a rule: row r sees the weight of example ``owner[r]``.
    Data with another number of rows are flipped as outside of the block. Without flipped weights
    the block does nothing.

    >>> import torch, pyro, pyro.distributions as dist
    >>> from pyro_flipout import examples, flipout
    >>> def model(atoms, molecule, energy):
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    ...     with examples(molecule, len(energy)):
    ...         h = torch.tanh(torch.nn.functional.linear(atoms, w)).squeeze(-1)
    ...     mean = torch.zeros(len(energy)).index_add(0, molecule, h)
    ...     with pyro.plate("molecules", len(energy)):
    ...         pyro.sample("energy", dist.Normal(mean, 1.0), obs=energy)
    >>> atoms, molecule = torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 1, 2])
    >>> flipout(model)(atoms, molecule, torch.randn(3))

    :param owner: the number of the example of each row, an integer tensor of shape ``(R,)`` with
        entries from 0 to N - 1 (PyTorch Geometric's ``batch``); or a packed sequence, whose rows
        belong to its sequences.
    :param num_examples: the number N of examples, if the last ones may own no row.
    :param dim: dimension of the data that counts the rows.
    :raises TypeError: if ``owner`` is not a tensor of integers.
    :raises ValueError: if it has another shape, or entries that are not numbers of examples.
    """
    block = _Owners(owner, num_examples, dim)
    before = OWNED.blocks
    OWNED.blocks = (*before, block)
    try:
        yield
    finally:
        OWNED.blocks = before


class _Owners:
    """Decides the rows of the calls inside a block."""

    def __init__(self, owner: Tensor | PackedSequence, num_examples: int | None, dim: int) -> None:
        if isinstance(owner, PackedSequence):
            num_examples = int(owner.batch_sizes[0]) if num_examples is None else num_examples
            owner = _packed_owners(owner)
        if not isinstance(owner, Tensor) or owner.is_floating_point() or owner.is_complex():
            kind = owner.dtype if isinstance(owner, Tensor) else type(owner).__name__
            raise TypeError(
                f"examples: got an owner of type {kind}, expected a tensor of integers, the number "
                "of the example that each row belongs to"
            )
        if owner.dim() != 1 or owner.dtype == torch.bool:
            raise ValueError(
                f"examples: got an owner of shape {tuple(owner.shape)} and type {owner.dtype}, "
                "expected one integer for each row, shape (R,)"
            )
        low, high = (int(owner.min()), int(owner.max())) if owner.numel() else (0, -1)
        if low < 0 or (num_examples is not None and high >= num_examples):
            raise ValueError(
                f"examples: got owners from {low} to {high} for "
                f"{'an unknown number of' if num_examples is None else num_examples} examples, "
                "expected entries from 0 to N - 1"
            )
        self.owner, self.dim, self.highest = owner.long(), dim, high
        self.num_examples = high + 1 if num_examples is None else num_examples
        self.said = num_examples is not None

    def route(
        self, func: Callable[..., Any], args: Any, kwargs: Any, weights: Sequence[FlipoutTensor]
    ) -> Rows | None:
        """The rows of a call, ``None`` if its data have others."""
        data = data_of(args, kwargs)
        if data is None or data.dim() <= self.dim or data.size(self.dim) != len(self.owner):
            return None
        if any(weight.lead_dims for weight in weights):
            raise FlipoutError(
                "examples: the weights have particle dimensions, expected one draw of them; use "
                "vectorize_particles=False"
            )
        execution = weights[0].execution
        known = execution.num_examples
        if known is None:
            execution.count(self.num_examples, "the owners of the rows")
        elif self.highest >= known or (self.said and self.num_examples != known):
            raise FlipoutError(
                f"examples: got owners of {self.num_examples} examples, but this execution has "
                f"{known}; give every row the number of its example in the mini-batch"
            )
        return Rows("owners", self.dim, len(self.owner), self.owner)


def _packed_owners(packed: PackedSequence) -> Tensor:
    """The number, in the mini-batch, of the sequence that each row of a packed sequence is of."""
    sizes = packed.batch_sizes.tolist()
    order = packed.sorted_indices
    if order is None:
        order = torch.arange(sizes[0] if sizes else 0, device=packed.data.device)
    return torch.cat([order[:size] for size in sizes]) if sizes else order
