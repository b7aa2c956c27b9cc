# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Gradient variance against the size of the mini-batch, as in the paper's Figure 1."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_flipout._checks import is_number
from pyro_flipout.infer.variance_decomposition import (
    decompose_variance,
    design,
    measured_variable,
)

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["plot_gradient_variance"]

STYLES = {
    "shared": ":",
    "flipout": "-",
    "independent": "--",
    "local_reparameterization": "-.",
}
"""Dotted for shared and solid for flipout, as in the paper."""


def plot_gradient_variance(
    found: xr.Dataset,
    by: str = "site",
    only: Iterable[str] | None = None,
    predicted: bool = False,
    bars: float = 1.645,
    ax: Any = None,
) -> Any:
    r"""Draws log-log variance against N: a colour for each layer, a line style for each estimator.

    Dotted for a shared draw and solid for flipout, as in Figure 1 of Wen et al. (2018). Needs
    matplotlib.

    :param found: of :func:`~pyro_flipout.infer.gradient_variance`.
    :param by: ``"site"`` or ``"parameter"``.
    :param only: names of the sites or parameters to draw; all if omitted.
    :param predicted: whether to draw the curves of
        :func:`~pyro_flipout.infer.decompose_variance` over the measured points, which are
        then not joined.
    :param float bars: half length of the error bars in standard errors; by default that of
        90 % intervals.
    :param ax: matplotlib axes to draw into; new ones if omitted.
    :returns: the axes.
    :raises TypeError: if ``found`` is no Dataset.
    :raises ValueError: if ``by`` or a name in ``only`` is unknown, or ``bars`` is out of range.
    """
    variable = measured_variable("plot_gradient_variance", found, by)
    if not (is_number(bars) and bars >= 0):
        raise ValueError(
            f"plot_gradient_variance: got bars={bars!r}, expected a finite number >= 0"
        )
    known = [str(name) for name in found[by].values]
    names = known if only is None else [only] if isinstance(only, str) else list(only)
    if set(names) - set(known):
        raise ValueError(f"plot_gradient_variance: got only={names}, expected some of {known}")
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.figure(layout="constrained").add_subplot()
    curves = decompose_variance(found, by) if predicted else None
    for color, name in enumerate(names):
        for estimator in found.estimator.values:
            at = {"estimator": estimator, by: name}
            values, errors = (found[v].sel(at).values for v in (variable, f"{variable}_se"))
            style = {"color": f"C{color}", "linestyle": STYLES.get(str(estimator), "--")}
            points = {**style, "linestyle": ""} if _covers(curves, estimator) else style
            ax.errorbar(
                found.batch_size.values,
                values,
                np.minimum(bars * errors, 0.999 * values),  # a bar to 0 has no end in logarithms
                marker=".",
                label=None if points is not style else f"{name}, {estimator}",
                **points,
            )
            if points is not style:
                _draw_curve(ax, curves, by, name, estimator, style)
    ax.set(xscale="log", yscale="log", xlabel="mini-batch size N", ylabel="gradient variance")
    ax.legend(frameon=False, fontsize="small")
    return ax


def _covers(curves: Any, estimator: Any) -> bool:
    return curves is not None and estimator in curves.estimator.values


def _draw_curve(
    ax: Any, curves: Any, by: str, name: str, estimator: Any, style: dict[str, Any]
) -> None:
    sizes = np.geomspace(curves.batch_size.values[0], curves.batch_size.values[-1], 100)
    at = curves.sel({by: name})
    parts = [float(at[key]) for key in ("alpha", "beta", "gamma")]
    ax.plot(sizes, design(str(estimator), sizes) @ parts, label=f"{name}, {estimator}", **style)
