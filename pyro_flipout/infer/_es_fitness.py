# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Fitness of a population: checks, and the values that weigh its perturbations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["SHAPINGS", "checked_fitness"]


def _none(fitness: Tensor, antithetic: bool) -> Tensor:
    return fitness


def _center(fitness: Tensor, antithetic: bool) -> Tensor:
    """Less the mean of all *other* members, on which a member's own signs have no influence."""
    if antithetic or len(fitness) < 2:  # a constant cancels within a pair
        return fitness
    return (fitness - fitness.mean()) * (len(fitness) / (len(fitness) - 1))


def _normalize(fitness: Tensor, antithetic: bool) -> Tensor:
    centered = fitness - fitness.mean()
    largest = centered.abs().max()
    if not largest > 0:
        return centered
    centered = centered / largest  # whose squares do not overflow
    return centered / centered.pow(2).mean().sqrt()


def _rank(fitness: Tensor, antithetic: bool) -> Tensor:
    """Ranks from -1/2 to 1/2; equal members share the mean of theirs."""
    _, group, count = torch.unique(fitness, return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    rank: Tensor = (last - (count + 1) / 2)[group].to(fitness.dtype)
    return rank / (len(fitness) - 1) - 0.5 if len(fitness) > 1 else rank * 0


SHAPINGS: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "none": _none,
    "center": _center,
    "normalize": _normalize,
    "rank": _rank,
}
"""What becomes of the fitness ``(N,)``, by name."""


def checked_fitness(fitness: Any, num_members: int) -> Tensor:
    """The fitness as a plain tensor ``(N,)`` without history.

    :raises TypeError: if it is no tensor of real numbers.
    :raises ValueError: if it has another shape, or is not finite.
    """
    if not isinstance(fitness, Tensor) or fitness.is_complex():
        kind = fitness.dtype if isinstance(fitness, Tensor) else type(fitness).__name__
        raise TypeError(f"FlipES.backward: got fitness of type {kind}, expected a real Tensor")
    if fitness.shape != (num_members,):
        raise ValueError(
            f"FlipES.backward: got fitness of shape {tuple(fitness.shape)}, expected "
            f"({num_members},), one value for each member; with k rows for a member, take their "
            f"mean: fitness.view({num_members}, -1).mean(1)"
        )
    bad = (~fitness.isfinite()).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(f"{n} ({fitness[n].item()})" for n in bad[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            f"FlipES.backward: the fitness of member {shown}{more} of {num_members} is not finite; "
            "es.member(n) gives the weights of one; use a smaller sigma, or replace their fitness "
            "by that of the worst"
        )
    if not fitness.is_floating_point():
        return fitness.double()
    # Sums and ranks overflow half precision.
    return fitness.detach().to(torch.promote_types(fitness.dtype, torch.float))
