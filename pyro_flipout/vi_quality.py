# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""How good a variational posterior is, and what importance sampling can correct.

The ratio of the densities, :math:`r_s = p(y, w_s) / q(w_s)` for draws :math:`w_s \sim q`,
is constant if q is the posterior. The heavier its right tail, the more of the posterior q
misses; the shape :math:`\hat k` of a Pareto distribution fitted to that tail says how heavy
it is [1].

References

[1] Y. Yao, A. Vehtari, D. Simpson, A. Gelman, Yes, but Did It Work?: Evaluating Variational
    Inference, ICML 2018, https://arxiv.org/abs/1802.02538
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pyro_flipout._arviz_groups import container, groups_of, psis

__all__ = ["VIQuality", "importance_resample", "vi_quality"]

GOOD, USABLE = 0.5, 0.7  # Yao et al. 2018, section 2.1
MIN_DRAWS = 100  # a Pareto fit to the largest 20 % of fewer says little
NEGLIGIBLE = 0.01  # difference of log ratios; float32's rounding of log_p and log_q is below it


@dataclass(frozen=True)
class VIQuality:
    r"""The verdict of :func:`vi_quality`.

    :ivar khat: shape of the Pareto tail of the importance ratios; -inf if the largest of them are
        equal to within 1 %, so that there is no tail, and nan if ties among them forbid a fit.
    :ivar verdict: ``"good"`` (:math:`\hat k < 0.5`), ``"usable"`` (below 0.7), ``"bad"``, or
        ``"unknown"`` if :math:`\hat k` is nan.
    :ivar effective_draws: Kish's effective number of importance-weighted draws.
    :ivar log_weights: ``(draw,)``, smoothed and normalised.
    :ivar note: what is unusual about the ratios; empty if nothing is.
    """

    khat: float
    verdict: str
    effective_draws: float
    log_weights: np.ndarray
    note: str = ""

    def __str__(self) -> str:
        advice = {
            "good": "q is close to the posterior",
            "usable": "use importance_resample to correct q",
            "bad": "q misses too much of the posterior for importance sampling to correct",
        }
        reason = "; ".join(filter(None, (self.note or advice.get(self.verdict), self._zeros())))
        draws = len(self.log_weights)
        return (
            f"Pareto k = {self.khat:.2f}: {self.verdict} ({reason}); "
            f"{self.effective_draws:.0f} effective of {draws} draws"
        )

    def _zeros(self) -> str:
        zeros = int(np.isneginf(self.log_weights).sum())
        return f"density 0 under the model for {zeros} of the draws" if zeros else ""


def vi_quality(idata: Any) -> VIQuality:
    """Judges the variational posterior as a whole by the Pareto k of its density ratios.

    It is a strict test: with thousands of weights the joint ratio is nearly always ``"bad"``,
    while predictions, which depend on few directions of them, may be fine.

    Ratios that are equal to within 1 %, as those of the exact posterior are up to rounding, have
    no tail: they are ``"good"``, with a Pareto k of -inf.

    :param idata: what :func:`pyro_flipout.to_arviz` returns.
    :raises ValueError: without ``log_p`` and ``log_q`` in ``sample_stats``, if they are not finite
        (``log_p`` may be -inf for some draws), or with fewer than 100 draws.
    """
    stats = dict(groups_of(idata)).get("sample_stats")
    if stats is None or not {"log_p", "log_q"} <= set(stats):
        raise ValueError(
            "vi_quality: expected log_p and log_q in the group sample_stats; to_arviz leaves them "
            "out with per_example=True, which has no joint density"
        )
    ratios = (stats["log_p"] - stats["log_q"]).values.ravel()
    if len(ratios) < MIN_DRAWS:
        raise ValueError(f"vi_quality: got {len(ratios)} draws, expected at least {MIN_DRAWS}")
    bad = np.flatnonzero(np.isnan(ratios) | (ratios == np.inf))
    if len(bad):
        raise ValueError(
            f"vi_quality: log_p - log_q is not a number or infinite for {len(bad)} of "
            f"{len(ratios)} draws, the first of them number {bad[0]}; look at the log-densities of "
            "that draw, or leave such draws out: idata.isel(draw=...)"
        )
    if np.isneginf(ratios).all():
        raise ValueError(
            f"vi_quality: log_p is -inf for all {len(ratios)} draws; expected draws of positive "
            "density under the model: compare the supports of model and guide"
        )
    log_weights, khat, note = _fit_tail(ratios)
    verdict = (
        "unknown" if np.isnan(khat) else "good" if khat < GOOD else "usable" if khat < USABLE
        else "bad"
    )  # fmt: skip
    effective = float(np.exp(-np.logaddexp.reduce(2 * log_weights)))
    return VIQuality(khat, verdict, effective, log_weights, note)


def _fit_tail(ratios: np.ndarray) -> tuple[np.ndarray, float, str]:
    """Fits the tail by ArviZ where there is one, which either line of ArviZ expects.

    :param ratios: log ratios ``(draw,)``, finite or -inf.
    :returns: normalised log weights ``(draw,)``, the shape of the tail, what is unusual about it.
    """
    size = int(min(len(ratios) / 5, 3 * len(ratios) ** 0.5))  # of the tail: [1], as in ArviZ
    ratios = ratios - ratios.max()
    unsmoothed = ratios - np.logaddexp.reduce(ratios)
    finite, tail = ratios[np.isfinite(ratios)], np.sort(ratios)[-size:]
    if len(finite) <= size:
        note = f"only {len(finite)} ratios are positive: too few for a tail of {size}"
        return unsmoothed, np.nan, note
    if np.ptp(finite) < NEGLIGIBLE:
        return unsmoothed, -np.inf, "the positive ratios are equal to within 1 %: they have no tail"
    if -tail[0] < NEGLIGIBLE:
        note = f"the {size} largest ratios are equal to within 1 %: they have no tail"
        return unsmoothed, -np.inf, note
    # The fit is scaled by the distance from the tail's least value to its first quartile.
    least, quartile = np.exp(tail[[0, int(size / 4 + 0.5) - 1]])
    if quartile == 0:  # beyond the range of float64
        return unsmoothed, np.inf, ""
    if quartile == least:
        note = f"many of the {size} largest ratios are the same: no Pareto tail fits such ties"
        return unsmoothed, np.nan, note
    return *psis(ratios), ""


def importance_resample(idata: Any, num_samples: int | None = None, seed: int = 0) -> Any:
    """Resamples the draws in proportion to their Pareto-smoothed importance ratios.

    The same draws are taken in every group of the posterior: ``posterior``,
    ``posterior_predictive``, ``log_likelihood``, ``predictions`` and ``sample_stats``. Systematic
    resampling: draw s is taken ``num_samples * weight`` times, up to less than one.

    :param idata: what :func:`pyro_flipout.to_arviz` returns; not changed.
    :param num_samples: number of draws to take; as many as there are by default.
    :param seed: of the one uniform number that is drawn.
    """
    weights = np.exp(vi_quality(idata).log_weights)
    num_samples = len(weights) if num_samples is None else num_samples
    if num_samples < 1:
        raise ValueError(f"importance_resample: got num_samples={num_samples}, expected >= 1")
    steps = (np.arange(num_samples) + np.random.default_rng(seed).random()) / num_samples
    cumulative = np.cumsum(weights)
    taken = np.searchsorted(cumulative / cumulative[-1], steps, side="right")
    resampled = {}
    for name, group in groups_of(idata):
        if "draw" in group.dims and not name.startswith("prior"):
            group = group.isel(draw=taken).assign_coords(draw=np.arange(num_samples))
        resampled[name] = group
    return container(resampled)
