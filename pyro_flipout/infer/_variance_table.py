# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Measured variances, on their way into a Dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyro_flipout.infer._gradients import Piece, Sampler
from pyro_flipout.infer._moments import Moments

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["Table"]


class Table:
    """The measurements, from which the Dataset is made."""

    def __init__(
        self,
        estimators: list[str],
        sizes: list[int],
        sampler: Sampler,
        pieces: list[Piece],
        entries: bool,
    ) -> None:
        self.estimators, self.sizes, self.pieces = estimators, sizes, pieces
        self.names = sampler.names
        self.sites = list(dict.fromkeys(piece.site for piece in pieces))
        self.groups = [[piece] for piece in pieces]
        self.groups += [[p for p in pieces if p.site == site] for site in self.sites]
        shape = len(estimators), len(sizes)
        self.values = np.full((*shape, len(self.groups)), np.nan)
        self.errors = self.values.copy()
        self.seconds = np.full(shape, np.nan)
        self.entries = {
            name: np.full(
                (*shape, *p.shape), np.nan, dtype=np.float32 if p.element_size() < 8 else float
            )
            for name, p in zip(sampler.names, sampler.parameters, strict=True)
            if entries
        }

    def put(self, estimator: str, size: int, moments: Moments, seconds: float) -> None:
        at = self.estimators.index(estimator), self.sizes.index(size)
        self.values[at] = [spread.mean for spread in moments.spreads]
        self.errors[at] = [spread.error for spread in moments.spreads]
        self.seconds[at] = seconds
        for array, variance in zip(self.entries.values(), moments.variances, strict=True):
            array[at] = variance.cpu().numpy()

    def dataset(self, num_repeats: int, batches: str) -> xr.Dataset:
        import xarray as xr

        from pyro_flipout.infer import variance_accessor  # noqa: F401  (registers it)

        cut, both = len(self.pieces), ("estimator", "batch_size")
        entries = {
            f"{name}_entries": ((*both, *(f"{name}_dim_{i}" for i in range(a.ndim - 2))), a)
            for name, a in self.entries.items()
        }
        return xr.Dataset(
            {
                "variance": ((*both, "parameter"), self.values[..., :cut]),
                "variance_se": ((*both, "parameter"), self.errors[..., :cut]),
                "site_variance": ((*both, "site"), self.values[..., cut:]),
                "site_variance_se": ((*both, "site"), self.errors[..., cut:]),
                "seconds": (both, self.seconds),
                **entries,
            },
            {
                "estimator": self.estimators,
                "batch_size": self.sizes,
                "parameter": [piece.label for piece in self.pieces],
                "site": self.sites,
                "site_of_parameter": ("parameter", [piece.site for piece in self.pieces]),
                "num_entries": ("parameter", [piece.size for piece in self.pieces]),
            },
            {"num_repeats": num_repeats, "batches": batches},
        )
