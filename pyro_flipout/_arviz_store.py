# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Where the arrays of :func:`pyro_flipout.to_arviz` are gathered, and which are too large."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_flipout._arviz_groups import Variable, site_dims
from pyro_flipout.errors import warn

__all__ = ["Group", "Policy", "describe", "to_numpy"]

FATES = "drop", "keep", "summary"


@dataclass
class Policy:
    """Which sites are kept whole.

    :ivar sites: patterns of the only sites to keep, whole; None for all that are not too large.
    :ivar max_size: the most values of a site in all draws.
    :ivar large: what becomes of larger ones: ``"drop"``, ``"keep"``, ``"summary"``, or the number
        of elements to thin them to; None drops them with a warning.
    """

    sites: Sequence[str] | None = None
    max_size: int = 10_000_000
    large: str | int | None = None

    def __post_init__(self) -> None:
        count = isinstance(self.large, int) and not isinstance(self.large, bool) and self.large > 0
        if not (count or self.large is None or self.large in FATES):
            raise ValueError(
                f"to_arviz: got large={self.large!r}, expected one of {FATES} or a number of "
                "elements to thin to"
            )

    def of(self, name: str, size: int) -> str | int | None:
        """What becomes of a site with ``size`` values in all draws."""
        if self.sites is not None:
            named = any(fnmatchcase(name, pattern) for pattern in self.sites)
            return "keep" if named else "drop"
        return "keep" if size <= self.max_size else self.large


@dataclass
class Group:
    """One group: an array ``(draw, *shape)`` of each variable, batch beside batch.

    :ivar dims: the user's names of dimensions, by variable.
    :ivar plate: the plate that counts the examples; batches are joined along it.
    """

    num_draws: int
    plate: str | None = None
    dims: Mapping[str, Sequence[str]] = field(default_factory=dict)
    policy: Policy | None = None
    coords: dict[str, np.ndarray] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    _parts: dict[str, list[np.ndarray]] = field(default_factory=dict)
    _names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _axes: dict[str, int | None] = field(default_factory=dict)
    _moments: dict[tuple[str, int], tuple[int, np.ndarray, np.ndarray]] = field(
        default_factory=dict
    )

    @property
    def names(self) -> Iterable[str]:
        """The variables that were put here, left out or not."""
        return self._names

    def put(
        self,
        name: str,
        draw: int,
        batch: int,
        value: Tensor,
        site: Any = None,
        event_dim: int = 0,
        drop: int = 0,
        batches: int = 1,
        summed: int = 0,
    ) -> None:
        """Stores a value of one draw on one batch.

        :param value: ``(*batch_shape, *event_shape)``.
        :param site: the trace's node, for its plates.
        :param drop: how many of the first examples to leave out.
        :param batches: how many batches there will be, as far as is known.
        :param summed: how many of the rightmost dimensions of the site, which the user's names
            count, the value lacks.
        """
        plates, axis = self._plates(site, tuple(value.shape), event_dim)
        if axis is None and batch > 0:
            return  # not of single examples: the first batch had it
        if axis is not None and drop:
            value = value.narrow(axis, drop, value.shape[axis] - drop)
        size = value.numel() * self.num_draws * (batches if axis is not None else 1)
        fate = "keep" if self.policy is None else self.policy.of(name, size)
        named = self.dims.get(name)
        named = named if named is None else named[: max(len(named) - summed, 0)]
        self._names[name] = site_dims(name, value.shape, plates, named)
        self._axes[name] = axis
        if fate == "keep":
            self._array(name, batch, value)[draw] = to_numpy(value)
        elif fate == "summary":
            self._summarise(name, batch, value)
        elif isinstance(fate, int) and (axis is None or batches == 1):
            self._thin(name, draw, value, fate)
        if fate != "keep" and (self.policy is None or self.policy.sites is None):
            self.left_out[name] = describe(self.num_draws, value.shape, value.element_size())

    def _plates(
        self, site: Any, shape: tuple[int, ...], event_dim: int
    ) -> tuple[dict[int, str], int | None]:
        """Position → plate, and the position of the plate of the examples."""
        found, axis = {}, None
        for frame in [] if site is None else site["cond_indep_stack"]:
            position = len(shape) - event_dim + (frame.dim or 0)
            if frame.vectorized and position >= 0 and shape[position] == frame.size:
                found[position] = frame.name
                axis = position if frame.name == self.plate else axis
        return found, axis

    def _array(self, name: str, batch: int, value: Tensor) -> np.ndarray:
        parts = self._parts.setdefault(name, [])
        if len(parts) == batch:
            dtype = to_numpy(value.new_empty(0)).dtype
            parts.append(np.zeros((self.num_draws, *value.shape), dtype))
        return parts[-1]

    def _thin(self, name: str, draw: int, value: Tensor, count: int) -> None:
        flat = value.reshape(-1)
        index = np.linspace(0, flat.numel() - 1, min(count, flat.numel())).astype(int)
        self._names[name], self._axes[name] = (f"{name}_element",), None
        self.coords[f"{name}_element"] = index
        kept = flat[torch.as_tensor(index, device=flat.device)]
        self._array(name, 0, kept)[draw] = to_numpy(kept)

    def _summarise(self, name: str, batch: int, value: Tensor) -> None:
        """Running mean and sum of squared deviations (Welford's)."""
        values = to_numpy(value).astype(np.float64)
        zero = np.zeros_like(values)
        count, mean, squares = self._moments.get((name, batch), (0, zero, zero))
        shift = values - mean
        mean = mean + shift / (count + 1)
        self._moments[name, batch] = count + 1, mean, squares + shift * (values - mean)

    def variables(self) -> dict[str, Variable]:
        """The variables, their batches joined."""
        return {
            name: Variable(_join(parts, self._axes[name], 1), self._names[name])
            for name, parts in self._parts.items()
        }

    def summaries(self) -> dict[str, Variable]:
        """Mean and standard deviation of what was summarised: ``(2, *shape)``."""
        parts: dict[str, list[np.ndarray]] = {}
        for (name, _), (count, mean, squares) in self._moments.items():
            sd = np.sqrt(squares / max(count - 1, 1))
            parts.setdefault(name, []).append(np.stack([mean, sd]))
        return {
            name: Variable(
                _join(found, self._axes[name], 1), ("statistic", *self._names[name]), sampled=False
            )
            for name, found in parts.items()
        }

    def tell(self) -> None:
        """Warns of what was left out unasked."""
        if self.left_out and self.policy is not None and self.policy.large is None:
            sites = ", ".join(f"'{name}' ({why})" for name, why in self.left_out.items())
            warn(
                f"to_arviz leaves out of the posterior: {sites}; choose large='summary', "
                "large=<number of elements to thin to>, large='keep' or large='drop', or name "
                "what you want in sites"
            )


def to_numpy(value: Tensor) -> np.ndarray:
    """A tensor as an array; NumPy has no bfloat16."""
    value = value.detach().cpu()
    found: np.ndarray = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return found


def _join(parts: list[np.ndarray], axis: int | None, lead: int) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, lead + (axis or 0))


def describe(num_draws: int, shape: Sequence[int], itemsize: int) -> str:
    """How large an array would be, in words."""
    size = num_draws * int(np.prod(shape)) * itemsize
    unit = "GB" if size >= 1e9 else "MB"
    amount = size / (1e9 if unit == "GB" else 1e6)
    return f"{num_draws} draws of {tuple(shape)}: {amount:.3g} {unit}"
