# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""Scores of probabilistic predictions: classification, regression, out-of-distribution.

Every function takes NumPy arrays or torch tensors, on any device, and gives NumPy floats or
arrays. Class probabilities have shape ``(*, classes)``, draws of a posterior predictive
``(draws, *)``; ``*`` counts the examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pyro_flipout._checks import is_integer, is_number

__all__ = [
    "OODScores",
    "Reliability",
    "Uncertainty",
    "accuracy",
    "adaptive_ece",
    "brier",
    "crps_ensemble",
    "crps_gaussian",
    "ece",
    "interval_coverage",
    "nll",
    "ood_scores",
    "plot_reliability",
    "predictive_uncertainty",
    "reliability",
]

Array = np.ndarray
Reduction = Literal["mean", "none"]


def accuracy(probs: ArrayLike, labels: ArrayLike) -> float:
    """Share of examples whose most probable class is the right one.

    :param probs: ``(*, classes)``.
    :param labels: ``(*)``, integers.
    """
    probs, labels = _classes(probs, labels)
    return float(_reduce(probs.argmax(-1) == labels, "mean"))


def nll(probs: ArrayLike, labels: ArrayLike, reduction: Reduction = "mean") -> Any:
    """Negative log-likelihood of the right class: ``(*)`` or its mean.

    :param probs: ``(*, classes)``. A probability of 0 of the right class gives infinity.
    :param labels: ``(*)``, integers.
    """
    probs, labels = _classes(probs, labels)
    right = np.take_along_axis(probs, labels[..., None], -1)[..., 0]
    with np.errstate(divide="ignore"):
        return _reduce(-np.log(right), reduction)


def brier(probs: ArrayLike, labels: ArrayLike, reduction: Reduction = "mean") -> Any:
    """Brier score, the squared distance to the one-hot label, summed over classes: 0 to 2."""
    probs, labels = _classes(probs, labels)
    one_hot = np.eye(probs.shape[-1])[labels]
    return _reduce(((probs - one_hot) ** 2).sum(-1), reduction)


@dataclass(frozen=True)
class Reliability:
    """Bins of a reliability diagram, without the empty ones: each ``(bins)``.

    :ivar count: number of examples.
    :ivar confidence: their mean probability of the predicted class.
    :ivar accuracy: share of them that are right.
    """

    count: Array
    confidence: Array
    accuracy: Array

    @property
    def ece(self) -> float:
        """Mean gap between confidence and accuracy, weighted by the number of examples."""
        gaps = np.abs(self.confidence - self.accuracy)
        return float((self.count * gaps).sum() / self.count.sum())


def reliability(
    probs: ArrayLike, labels: ArrayLike, bins: int = 15, adaptive: bool = False
) -> Reliability:
    """Bins the examples by the probability of their predicted class.

    :param probs: ``(*, classes)``.
    :param labels: ``(*)``, integers.
    :param bins: number of bins, which are (lower, upper] of equal width, as in Guo et al. 2017
        (https://arxiv.org/abs/1706.04599).
    :param adaptive: bins of equally many examples instead, as in Nguyen and O'Connor 2015
        (https://arxiv.org/abs/1508.05154).
    """
    probs, labels = _classes(probs, labels)
    if not is_integer(bins, 1):
        raise ValueError(f"reliability: got bins={bins!r}, expected at least 1, an integer")
    if not labels.size:
        raise ValueError(f"reliability: got probs of shape {probs.shape}, expected examples")
    confidence = probs.max(-1).ravel()
    right = (probs.argmax(-1) == labels).ravel()
    if adaptive:
        which = np.empty(len(right), int)
        order = np.argsort(confidence, kind="stable")
        which[order] = np.arange(len(right)) * bins // len(right)
    else:
        edges = np.linspace(0.0, 1.0, bins + 1)
        which = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    full = count > 0
    mean_confidence, mean_right = (
        np.bincount(which, weights=values, minlength=bins)[full] / count[full]
        for values in (confidence, right)
    )
    return Reliability(count[full], mean_confidence, mean_right)


def ece(probs: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error with bins of equal width; see :func:`reliability`."""
    return reliability(probs, labels, bins).ece


def adaptive_ece(probs: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error with bins of equally many examples."""
    return reliability(probs, labels, bins, adaptive=True).ece


def plot_reliability(found: Reliability, ax: Any = None, **kwargs: Any) -> Any:
    """Draws a reliability diagram with matplotlib: accuracy against confidence.

    Points below the diagonal are overconfident; bars are one standard error of the accuracy.

    :param ax: matplotlib axes; new ones by default.
    :param kwargs: for ``ax.errorbar``.
    :returns: the axes.
    """
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.subplots(layout="constrained")[1]
    error = np.sqrt(found.accuracy * (1 - found.accuracy) / found.count)
    ax.plot([0, 1], [0, 1], ":", color="0.3")
    bars = ax.errorbar(found.confidence, found.accuracy, error, **{"capsize": 2, **kwargs})
    sizes = 10 + 500 * found.count / found.count.sum()
    ax.scatter(found.confidence, found.accuracy, sizes, color=bars.lines[0].get_color(), alpha=0.6)
    ax.set(xlabel="confidence", ylabel="accuracy", title="Reliability")
    return ax


class Uncertainty(NamedTuple):
    """Entropy of predictions in nats, split in two: each ``(*)``.

    :ivar total: entropy of the mean prediction.
    :ivar aleatoric: mean entropy of the draws' predictions: noise in the labels.
    :ivar epistemic: their difference, the mutual information of label and weights.
    """

    total: Array
    aleatoric: Array
    epistemic: Array


def predictive_uncertainty(probs: ArrayLike) -> Uncertainty:
    """Splits predictive entropy into aleatoric and epistemic.

    Depeweg et al. 2018 (https://arxiv.org/abs/1710.07283).

    :param probs: ``(draws, *, classes)``, the class probabilities under each draw of the weights.
    :raises ValueError: if they are not probabilities, or not at least one draw of them.
    """
    probs = _probabilities(probs)
    if probs.ndim < 2 or len(probs) == 0:
        raise ValueError(
            f"predictive_uncertainty: got probs of shape {probs.shape}, expected (draws, *, "
            "classes) with at least one draw; one draw of them is probs[None]"
        )
    total, aleatoric = _entropy(probs.mean(0)), _entropy(probs).mean(0)
    return Uncertainty(total, aleatoric, np.maximum(total - aleatoric, 0.0))


def crps_ensemble(draws: ArrayLike, truth: ArrayLike, reduction: Reduction = "mean") -> Any:
    r"""Continuous ranked probability score of an ensemble, in units of the target.

    .. math:: \mathbb{E}|X - y| - \tfrac12 \mathbb{E}|X - X'|

    with both expectations over the ensemble itself (Gneiting and Raftery 2007, eq. 21).

    :param draws: ``(draws, *)``.
    :param truth: ``(*)``.
    :returns: the mean, or ``(*)``. Lower is better.
    """
    draws, truth = _ensemble("crps_ensemble", draws, truth)
    draws = np.sort(draws, 0)
    size = len(draws)
    ranks = (2 * np.arange(1, size + 1) - size - 1).reshape(-1, *[1] * truth.ndim)
    spread = (ranks * draws).sum(0) / size**2  # half of E|X - X'|, by order statistics
    return _reduce(np.abs(draws - truth).mean(0) - spread, reduction)


def crps_gaussian(
    loc: ArrayLike, scale: ArrayLike, truth: ArrayLike, reduction: Reduction = "mean"
) -> Any:
    """The same score of a Normal prediction, in closed form (Gneiting et al. 2005, eq. 5).

    :param loc: ``(*)``, or one number.
    :param scale: ``(*)``, or one number; positive.
    :param truth: ``(*)``.
    """
    from scipy.special import ndtr

    loc, scale, truth = _array(loc), _array(scale), _array(truth)
    for name, values in (("loc", loc), ("scale", scale)):
        if values.shape not in ((), truth.shape):
            raise ValueError(
                f"crps_gaussian: got {name} of shape {values.shape} for truth of shape "
                f"{truth.shape}, expected the same, or one number"
            )
    if not np.all(scale > 0):
        raise ValueError(f"crps_gaussian: got a scale of {scale.min()}, expected positive ones")
    z = (truth - loc) / scale
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return _reduce(
        scale * (z * (2 * ndtr(z) - 1) + 2 * density - 1 / math.sqrt(math.pi)), reduction
    )


def interval_coverage(
    draws: ArrayLike, truth: ArrayLike, level: float = 0.9, reduction: Reduction = "mean"
) -> Any:
    """Share of targets in the central interval of that level; calibrated if it is ``level``.

    :param draws: ``(draws, *)``.
    :param truth: ``(*)``.
    """
    if not (is_number(level) and 0 < level < 1):
        raise ValueError(f"interval_coverage: got level={level!r}, expected one between 0 and 1")
    draws, truth = _ensemble("interval_coverage", draws, truth)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    covered = ((low <= truth) & (truth <= high)).astype(float)
    unknown = np.isnan(low) | np.isnan(truth)  # neither covered nor not
    return _reduce(np.where(unknown, np.nan, covered), reduction)


class OODScores(NamedTuple):
    """How well a score tells unfamiliar inputs from familiar ones.

    :ivar auroc: area under the ROC curve: 0.5 for chance, 1 at best.
    :ivar aupr: average precision, unfamiliar inputs being the positives.
    :ivar fpr95: share of familiar inputs flagged when 95 % of the unfamiliar ones are.
    """

    auroc: float
    aupr: float
    fpr95: float


def ood_scores(familiar: ArrayLike, unfamiliar: ArrayLike) -> OODScores:
    """Scores a detector of out-of-distribution inputs; needs scikit-learn.

    :param familiar: ``(*)``, for example the epistemic part of :func:`predictive_uncertainty`:
        higher means less familiar.
    :param unfamiliar: ``(*)``, the same for out-of-distribution inputs.
    :raises ValueError: if one of them is empty or not finite.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    parts = [_array(values).ravel() for values in (familiar, unfamiliar)]
    for name, values in zip(("familiar", "unfamiliar"), parts, strict=True):
        if not values.size or not np.isfinite(values).all():
            raise ValueError(
                f"ood_scores: got {values.size} {name} scores, of which "
                f"{np.isfinite(values).sum()} are finite, expected at least one, and all finite"
            )
    scores = np.concatenate(parts)
    labels = np.arange(len(scores)) >= len(parts[0])
    rates, found, _ = roc_curve(labels, scores, drop_intermediate=False)
    return OODScores(
        float(roc_auc_score(labels, scores)),
        float(average_precision_score(labels, scores)),
        float(rates[np.argmax(found >= 0.95)]),
    )


def _array(values: Any) -> Array:
    """A float64 array of an array or tensor."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double()
    return np.asarray(values, dtype=np.float64)


def _ensemble(name: str, draws: Any, truth: Any) -> tuple[Array, Array]:
    draws, truth = _array(draws), _array(truth)
    if draws.ndim == 0 or draws.shape[1:] != truth.shape or not len(draws):
        raise ValueError(
            f"{name}: got draws of shape {draws.shape} for truth of shape {truth.shape}, expected "
            "draws of shape (draws, *truth.shape), and at least one"
        )
    if len(draws) == 0:
        raise ValueError(f"{name}: got draws of shape {draws.shape}, expected at least one draw")
    return draws, truth


def _probabilities(values: Any) -> Array:
    probs: Array = _array(values)
    if not probs.ndim:
        raise ValueError("got probs that are a single number, expected shape (*, classes)")
    if not probs.shape[-1]:
        raise ValueError(f"got probs of shape {probs.shape}, expected (*, classes)")
    if np.any(probs < 0) or not np.allclose(probs.sum(-1), 1.0, atol=1e-3):
        raise ValueError("got probs that do not sum to 1; give probabilities, not logits")
    return probs


def _classes(probs: Any, labels: Any) -> tuple[Array, Array]:
    probs = _probabilities(probs)
    labels = np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels)
    if labels.shape != probs.shape[:-1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"got labels of shape {labels.shape} and type {labels.dtype} for probs of shape "
            f"{probs.shape}, expected integers of shape {probs.shape[:-1]}"
        )
    if labels.size and not (labels.min() >= 0 and labels.max() < probs.shape[-1]):
        raise ValueError(f"got labels outside 0 to {probs.shape[-1] - 1}")
    return probs, labels


def _entropy(probs: Array) -> Array:
    logs = np.log(probs, out=np.zeros_like(probs), where=probs > 0)
    entropy: Array = -(probs * logs).sum(-1)
    return entropy


def _reduce(values: Array, reduction: str) -> Any:
    if reduction not in ("mean", "none"):
        raise ValueError(f'got reduction={reduction!r}, expected "mean" or "none"')
    if reduction == "none":
        return values
    if not values.size:
        raise ValueError(
            f"got arrays of shape {values.shape}, without an example to take the mean of; use "
            'reduction="none" where there may be none'
        )
    return float(values.mean())
