# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""How good a variational posterior is, and what importance sampling can mend.

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


@dataclass(frozen=True)
class VIQuality:
    r"""The verdict of :func:`vi_quality`.

    :ivar khat: shape of the Pareto tail of the importance ratios.
    :ivar verdict: ``"good"`` (:math:`\hat k < 0.5`), ``"usable"`` (below 0.7) or ``"bad"``.
    :ivar effective_draws: Kish's effective number of importance-weighted draws.
    :ivar log_weights: ``(draw,)``, smoothed and normalised.
    """

    khat: float
    verdict: str
    effective_draws: float
    log_weights: np.ndarray

    def __str__(self) -> str:
        advice = {
            "good": "q is close to the posterior",
            "usable": "use importance_resample to correct q",
            "bad": "q misses too much of the posterior for importance sampling to mend",
        }[self.verdict]
        draws = len(self.log_weights)
        return (
            f"Pareto k = {self.khat:.2f}: {self.verdict} ({advice}); "
            f"{self.effective_draws:.0f} effective of {draws} draws"
        )


def vi_quality(idata: Any) -> VIQuality:
    """Judges the variational posterior as a whole by the Pareto k of its density ratios.

    It is a strict test: with thousands of weights the joint ratio is nearly always ``"bad"``,
    while predictions, which depend on few directions of them, may be fine.

    :param idata: what :func:`pyro_flipout.to_arviz` returns.
    :raises ValueError: without ``log_p`` and ``log_q`` in ``sample_stats``, if they are not finite
        (``log_p`` may be -inf), or with fewer than 100 draws.
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
    log_weights, khat = psis(ratios)
    verdict = "good" if khat < GOOD else "usable" if khat < USABLE else "bad"
    effective = float(np.exp(-np.logaddexp.reduce(2 * log_weights)))
    return VIQuality(khat, verdict, effective, log_weights)


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
