# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""``found.flipout.plot()`` and ``found.flipout.decompose()`` of measured gradient variances."""

from __future__ import annotations

from typing import Any

import xarray as xr

from pyro_flipout.infer.variance_decomposition import decompose_variance
from pyro_flipout.infer.variance_plot import plot_gradient_variance

__all__ = ["VarianceAccessor"]


@xr.register_dataset_accessor("flipout")  # type: ignore[no-untyped-call]
class VarianceAccessor:
    """What the Dataset of :func:`~pyro_flipout.infer.gradient_variance` can do.

    :param found: the Dataset.
    """

    def __init__(self, found: xr.Dataset) -> None:
        self._found = found

    def plot(self, **options: Any) -> Any:
        """Draws it; see :func:`~pyro_flipout.infer.plot_gradient_variance`."""
        return plot_gradient_variance(self._found, **options)

    def decompose(self, by: str = "site") -> xr.Dataset:
        """Estimates what it is made of; see :func:`~pyro_flipout.infer.decompose_variance`."""
        return decompose_variance(self._found, by)
