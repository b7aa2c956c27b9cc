# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The arguments of a model, as :func:`pyro_flipout.to_arviz` needs them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_flipout._arviz_runs import Batch, rows_of, signature_of

__all__ = ["draw_seeds", "examples_site", "inputs_of", "length_of"]


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
    bound: Mapping[str, Any] = {"args": batch.args, "kwargs": batch.kwargs}
    signature = signature_of(model)
    if signature is not None:
        with contextlib.suppress(TypeError):
            bound = signature.bind(*batch.args, **batch.kwargs).arguments
    return _tensors_in(bound)


def _tensors_in(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors in nested dicts (by their keys), tuples and lists (by their positions)."""
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, (tuple, list)):
            found |= _tensors_in({f"{name}_{i}": v for i, v in enumerate(value)})
        elif isinstance(value, Mapping):
            found |= _tensors_in({str(k): v for k, v in value.items()})
    return found


def draw_seeds(rng: np.random.Generator, num: int) -> list[int]:
    """Seeds for torch's generator."""
    found: list[int] = rng.integers(2**63, size=num).tolist()
    return found


def length_of(loader: Any) -> int | None:
    """Number of batches, if the loader knows it."""
    try:
        return len(loader)
    except TypeError:
        return None
