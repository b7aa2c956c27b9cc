# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""What a gradient's variance is made of.

The variance of the mean of N examples' gradients :math:`G_n` is, for each entry
(Wen et al. 2018, theorem 2 [1]),

============  =================================================================
independent   :math:`\alpha / N`
shared        :math:`\alpha / N + (1 - 1/N) (\beta + \gamma)`
flipout       :math:`\alpha / N + (1 - 1/N) \gamma`
============  =================================================================

:math:`\alpha` is the variance of one example's gradient; :math:`\beta + \gamma` what two
examples' gradients have in common if they share a draw of the weights, :math:`\gamma` what is
left of it under flipout. This holds for examples drawn independently and an objective that is
their mean, with a KL term at a fixed weight or in closed form.

References

[1] `Flipout: Efficient Pseudo-Independent Weight Perturbations on Mini-Batches`,
    Yeming Wen, Paul Vicol, Jimmy Ba, Dustin Tran, Roger Grosse,
    https://arxiv.org/abs/1803.04386
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["decompose_variance", "design", "measured_variable"]

_MODELLED = {"independent": (0, 0), "flipout": (0, 1), "shared": (1, 1)}
_QUANTILE = 1.6449  # of a standard normal at 0.95
_RESULTS = (
    *("alpha", "beta", "gamma"),
    *("alpha_se", "beta_se", "gamma_se"),
    *("helps_from", "helps_from_se", "helps_until", "helps_until_se", "helps_until_lower"),
    *("chi_square", "degrees_of_freedom"),
)


def design(estimator: str, batch_size: Any) -> np.ndarray:
    """The factors of alpha, beta and gamma in the variance.

    :param estimator: ``"shared"``, ``"flipout"`` or ``"independent"``.
    :param batch_size: values of N, shape ``(*)``.
    :returns: array of shape ``(*, 3)``.
    :raises ValueError: if the estimator is another, or a value of N is below 1.

    >>> design("flipout", [1, 4])
    array([[1.  , 0.  , 0.  ],
           [0.25, 0.  , 0.75]])
    """
    if estimator not in _MODELLED:
        raise ValueError(f"design: got estimator={estimator!r}, expected one of {list(_MODELLED)}")
    sizes = np.asarray(batch_size, dtype=float)
    if not (sizes >= 1).all():
        raise ValueError(f"design: got batch_size={batch_size!r}, expected values >= 1")
    beta, gamma = _MODELLED[estimator]
    one = 1 / sizes
    return np.stack([one, beta * (1 - one), gamma * (1 - one)], -1)


def decompose_variance(found: xr.Dataset, by: str = "site") -> xr.Dataset:
    r"""Estimates :math:`\alpha`, :math:`\beta` and :math:`\gamma` from measured variances.

    A weighted least-squares fit to all measured N at once, with the *relative* standard errors as
    measured and those of the fit in place of the measured variance: to weigh each variance by its
    own error would favour those that came out low.

    :param found: of :func:`~pyro_flipout.infer.gradient_variance`, with the estimators
        ``"shared"`` and ``"flipout"`` and two sizes N at least; ``"independent"`` adds to it,
        others are left out.
    :param by: ``"site"`` or ``"parameter"``.
    :returns: ``xarray.Dataset`` over ``by`` with ``alpha``, ``beta``, ``gamma`` and their standard
        errors ``*_se``; ``helps_from`` :math:`= \alpha / (\beta + \gamma)`, the N at which a shared
        draw's variance stops falling; ``helps_until`` :math:`= \alpha / \gamma`, the N at which
        flipout's does, infinite if :math:`\gamma \leq 0` was found, and ``helps_until_lower``, a
        95 % lower bound; ``chi_square`` and ``degrees_of_freedom`` of the fit; and ``predicted``
        over ``(estimator, batch_size, by)``. Least squares knows no bounds, so that a component
        that is 0 may come out negative, within its error.
    :raises TypeError: if ``found`` is no Dataset.
    :raises ValueError: if the measurements cannot tell the three apart, have no standard errors,
        or are not there.
    """
    import xarray as xr

    name = measured_variable("decompose_variance", found, by)
    used = [e for e in found.estimator.values if e in _MODELLED]
    sizes = found.batch_size.values
    missing = {"shared", "flipout"} - set(used)
    if missing or len(np.unique(sizes)) < 2:
        raise ValueError(
            f"decompose_variance: got estimators {list(found.estimator.values)} at batch sizes "
            f"{list(sizes)}, expected 'shared', 'flipout' and at least two sizes"
        )
    matrix = np.concatenate([design(e, sizes) for e in used])  # (E * B, 3)
    values, errors = (
        found[v].sel(estimator=used).transpose(by, "estimator", "batch_size").values
        for v in (name, f"{name}_se")
    )
    if np.isnan(errors[values > 0]).any():
        raise ValueError(
            f"decompose_variance: {name}_se is nan, expected a standard error for each variance, "
            "by which to weigh it; measure with gradient_variance(..., num_repeats=3) or more"
        )
    fits = [_fit(matrix, v.ravel(), e.ravel()) for v, e in zip(values, errors, strict=True)]
    columns = np.array([_summary(fit) for fit in fits])
    predicted = np.stack([(matrix @ fit.estimate).reshape(len(used), -1) for fit in fits], -1)
    return xr.Dataset(
        {
            **{key: (by, columns[:, i]) for i, key in enumerate(_RESULTS)},
            "predicted": (("estimator", "batch_size", by), predicted),
        },
        {by: found[by].values, "estimator": used, "batch_size": sizes},
    )


def measured_variable(caller: str, found: Any, by: str) -> str:
    """The name of the variable that holds the variances.

    :raises TypeError: if ``found`` is no Dataset.
    :raises ValueError: if ``by`` is unknown, or the Dataset has no such variable.
    """
    import xarray as xr

    if not isinstance(found, xr.Dataset):
        raise TypeError(
            f"{caller}: got found of type {type(found).__name__}, expected the xarray.Dataset of "
            "gradient_variance"
        )
    if by not in ("site", "parameter"):
        raise ValueError(f'{caller}: got by={by!r}, expected "site" or "parameter"')
    name = "site_variance" if by == "site" else "variance"
    dims = {"estimator", "batch_size", by}
    missing = [v for v in (name, f"{name}_se") if v not in found or set(found[v].dims) != dims]
    if missing:
        raise ValueError(
            f"{caller}: got a Dataset without {missing} over {sorted(dims)}, expected that of "
            "gradient_variance with all its dimensions; select several values with a list, as in "
            'found.sel(estimator=["shared", "flipout"])'
        )
    return name


class _Fit(NamedTuple):
    estimate: np.ndarray  # (3,)
    covariance: np.ndarray  # (3, 3)
    chi_square: float
    degrees_of_freedom: int


def _fit(matrix: np.ndarray, values: np.ndarray, errors: np.ndarray) -> _Fit:
    """Least squares, with errors proportional to the fitted values."""
    kept = np.isfinite(values) & (values > 0)
    if kept.sum() < 3 or np.linalg.matrix_rank(matrix[kept]) < 3:
        nothing = np.full(3, np.nan)
        return _Fit(nothing, np.outer(nothing, nothing), np.nan, 0)
    matrix, values = matrix[kept], values[kept]
    relative = np.where(errors[kept] > 0, errors[kept] / values, 1e-6)
    fitted = values
    for _ in range(10):
        scale = relative * np.maximum(fitted, 1e-3 * values)
        weighted = matrix / scale[:, None]
        estimate, *_ = np.linalg.lstsq(weighted, values / scale, rcond=None)
        fitted = matrix @ estimate
    chi_square = float((((values - fitted) / scale) ** 2).sum())
    return _Fit(estimate, np.linalg.inv(weighted.T @ weighted), chi_square, len(values) - 3)


def _summary(fit: _Fit) -> list[float]:
    """The columns of ``_RESULTS``."""
    alpha, _, gamma = fit.estimate
    errors = np.sqrt(np.diag(fit.covariance))
    start = _ratio(fit, np.array([0.0, 1.0, 1.0]))
    end = _ratio(fit, np.array([0.0, 0.0, 1.0]))
    lower = alpha / (max(gamma, 0.0) + _QUANTILE * errors[2])
    return [*fit.estimate, *errors, *start, *end, lower, fit.chi_square, fit.degrees_of_freedom]


def _ratio(fit: _Fit, below: np.ndarray) -> tuple[float, float]:
    """The ratio of alpha to a sum of components, with its error to first order."""
    alpha, divisor = fit.estimate[0], below @ fit.estimate
    if np.isnan(divisor) or divisor <= 0:
        return float(np.inf if divisor <= 0 else np.nan), float(np.nan)
    slope = np.array([1.0, 0.0, 0.0]) / divisor - alpha / divisor**2 * below
    return float(alpha / divisor), float(np.sqrt(slope @ fit.covariance @ slope))
