# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The log-densities of a run, element by element."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent

__all__ = ["Density", "elementwise_log_prob", "log_densities", "plate_sizes"]


@dataclass(frozen=True)
class Density:
    """The log-density of one site.

    :ivar value: not summed over dimensions that are independent (``to_event``): shape
        ``batch_shape + event_shape`` of what ``to_event`` was called on.
    :ivar plates: names of its vectorised plates, and the dimensions of ``value`` they are.
    :ivar states: dimensions of ``value`` that are states of enumerated variables: batch dimensions
        of no plate. The density is no term of a sum along them.
    """

    value: Tensor
    plates: Mapping[str, int]
    states: tuple[int, ...] = ()


def log_densities(trace: Trace, without: Collection[str]) -> dict[str, Density]:
    """Log-densities of the sample sites of a trace.

    :param without: sites to leave out: the weights.
    """
    found = {}
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or name in without or site_is_subsample(node):
            continue
        infer: dict[str, Any] = dict(node["infer"] or {})
        if infer.get("_deterministic") or node["mask"] is False:
            continue
        value: Any = node["value"]
        try:
            density = elementwise_log_prob(node["fn"], value)
        except NotImplementedError:
            if node["is_observed"]:
                raise
            continue  # objectives that need no density of it, as one with a closed form, are fine
        mask = node["mask"]
        if isinstance(mask, Tensor):
            density = torch.where(_as_wide_as(mask, density, node["fn"]), density, 0.0)
        found[name] = _described(density, node)
    return found


def _described(value: Tensor, node: Any) -> Density:
    # Batch dimensions come first; of them those of plates are counted from the right.
    batch_dims = value.dim() - _independent_dims(node["fn"])
    plates = {
        frame.name: batch_dims + frame.dim
        for frame in node["cond_indep_stack"]
        if frame.vectorized and batch_dims + frame.dim >= 0
    }
    states = tuple(
        dim for dim in range(batch_dims) if dim not in plates.values() and value.size(dim) > 1
    )
    return Density(value, plates, states)


def _independent_dims(fn: Any) -> int:
    """How many dimensions :func:`elementwise_log_prob` does not sum over."""
    if isinstance(fn, Independent):
        return fn.reinterpreted_batch_ndims + _independent_dims(fn.base_dist)
    if getattr(fn, "_mask", None) is not None and hasattr(fn, "base_dist"):
        return _independent_dims(fn.base_dist)
    return 0


def elementwise_log_prob(fn: Any, value: Tensor) -> Tensor:
    """The log-density before independent dimensions are summed over.

    :param fn: a distribution.
    :param value: shape ``batch_shape + event_shape`` of ``fn``.
    """
    if isinstance(fn, Independent):
        return elementwise_log_prob(fn.base_dist, value)
    masked = getattr(fn, "_mask", None)
    if masked is not None and hasattr(fn, "base_dist"):
        density = elementwise_log_prob(fn.base_dist, value)
        if isinstance(masked, Tensor):
            return torch.where(_as_wide_as(masked, density, fn), density, 0.0)
        return density if masked else torch.zeros_like(density)
    density = fn.log_prob(value)
    assert isinstance(density, Tensor)
    return density


def _as_wide_as(mask: Tensor, density: Tensor, fn: Any) -> Tensor:
    """A mask of ``batch_shape``, with dimensions for what was not summed over."""
    more = density.dim() - len(torch.broadcast_shapes(mask.shape, fn.batch_shape))
    return mask.reshape(*mask.shape, *(1,) * max(more, 0)).bool()


def plate_sizes(trace: Trace, particles: Collection[str]) -> list[int]:
    """Sizes of the vectorised plates of the sites, those of the most sites first.

    Where no site is in a plate, sizes of the leftmost independent dimensions of what is observed.

    :param particles: names of plates that are no data.
    """
    counts: dict[int, int] = {}
    events: dict[int, int] = {}
    nodes: list[Any] = list(trace.nodes.values())
    for node in nodes:
        if node["type"] != "sample" or site_is_subsample(node):
            continue
        frames = [f for f in node["cond_indep_stack"] if f.vectorized and f.name not in particles]
        for frame in frames:
            counts[int(frame.size)] = counts.get(int(frame.size), 0) + 1
            # A plate that subsamples may pick from what was computed for all of the data.
            counts.setdefault(int(frame.full_size or frame.size), 0)
        if not frames and node["is_observed"] and isinstance(node["fn"], Independent):
            size = int(node["fn"].event_shape[0]) if node["fn"].event_shape else 1
            events[size] = events.get(size, 0) + 1
    sizes = counts or events
    return sorted(sizes, key=lambda size: -sizes[size])
