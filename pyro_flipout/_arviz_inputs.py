# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The arguments of a model, as :func:`pyro_flipout.to_arviz` needs them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_flipout._arviz_runs import Batch, rows_of

__all__ = ["as_tuple", "draw_seeds", "examples_site", "inputs_of", "length_of"]


def examples_site(
    plate: str | None, value: Tensor, batch: Batch, batch_dim: int
) -> tuple[Any, int]:
    """A site in the plate of the examples, if a dimension of ``value`` counts them."""
    rows = rows_of(batch, batch_dim)
    if plate is None or value.dim() <= batch_dim or value.shape[batch_dim] != rows:
        return None, 0
    frame = CondIndepStackFrame(plate, -1, rows, 0)
    return {"cond_indep_stack": (frame,)}, value.dim() - batch_dim - 1


def inputs_of(model: Callable[..., Any], batch: Batch) -> dict[str, Tensor]:
    """The tensors among the arguments, by the names that the model has for them."""
    forward = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        bound = inspect.signature(forward).bind(*batch.args, **batch.kwargs).arguments
    except (TypeError, ValueError):
        bound = {"args": batch.args, "kwargs": batch.kwargs}
    found: dict[str, Tensor] = {}
    for name, value in bound.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, tuple):
            found |= {f"{name}_{i}": v for i, v in enumerate(value) if isinstance(v, Tensor)}
        elif isinstance(value, dict):
            found |= {k: v for k, v in value.items() if isinstance(v, Tensor)}
    return found


def draw_seeds(rng: np.random.Generator, num: int) -> list[int]:
    """Seeds for torch's generator."""
    found: list[int] = rng.integers(2**63, size=num).tolist()
    return found


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Positional arguments from one argument or several."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def length_of(loader: Any) -> int | None:
    """Number of batches, if the loader knows it."""
    try:
        return len(loader)
    except TypeError:
        return None
