"""Metrics against hand-computed examples, closed forms and other libraries."""

import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from pyro_flipout import metrics

PROBS = np.array([[0.9, 0.1, 0.0], [0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [0.1, 0.2, 0.7]])
LABELS = np.array([0, 2, 0, 2])


@pytest.fixture(params=["numpy", "torch"])
def kind(request):
    return torch.as_tensor if request.param == "torch" else np.asarray


def test_accuracy_nll_and_brier_by_hand(kind):
    probs, labels = kind(PROBS), kind(LABELS)
    assert metrics.accuracy(probs, labels) == 0.75
    nll = -np.log([0.9, 0.3, 0.4, 0.7])
    np.testing.assert_allclose(metrics.nll(probs, labels, reduction="none"), nll)
    assert metrics.nll(probs, labels) == pytest.approx(sk.log_loss(LABELS, PROBS, labels=[0, 1, 2]))
    brier = [0.01 + 0.01, 0.04 + 0.25 + 0.49, 0.36 + 0.16 + 0.04, 0.01 + 0.04 + 0.09]
    np.testing.assert_allclose(metrics.brier(probs, labels, reduction="none"), brier)
    assert metrics.brier(probs, labels) == pytest.approx(np.mean(brier))


def test_brier_of_two_classes_is_twice_that_of_scikit_learn():
    p, labels = np.array([0.2, 0.7, 0.9, 0.4]), np.array([0, 1, 1, 1])
    probs = np.stack([1 - p, p], -1)
    assert metrics.brier(probs, labels) == pytest.approx(2 * sk.brier_score_loss(labels, p))


def test_impossible_class_has_infinite_nll_without_a_warning():
    assert metrics.nll(PROBS[:1], np.array([2])) == math.inf


def test_ece_by_hand(kind):
    """Five bins: (0.4, 0.6] holds 0.5 wrong; 0.4 right is in (0.2, 0.4]; 0.7; 0.9."""
    found = metrics.reliability(kind(PROBS), kind(LABELS), bins=5)
    np.testing.assert_array_equal(found.count, [1, 1, 1, 1])
    np.testing.assert_allclose(found.confidence, [0.4, 0.5, 0.7, 0.9])
    np.testing.assert_array_equal(found.accuracy, [1, 0, 1, 1])
    assert metrics.ece(PROBS, LABELS, bins=5) == pytest.approx((0.6 + 0.5 + 0.3 + 0.1) / 4)
    # One bin: mean confidence 0.625, accuracy 0.75.
    assert metrics.ece(PROBS, LABELS, bins=1) == pytest.approx(0.125)
    # Bins that hold 2, 1 and 1 weigh as much: gaps 0.05, 0.3 and 0.1.
    assert metrics.ece(PROBS, LABELS, bins=4) == pytest.approx((2 * 0.05 + 0.3 + 0.1) / 4)
    # Two bins of two: (0.45, 0.5) and (0.8, 1).
    assert metrics.adaptive_ece(PROBS, LABELS, bins=2) == pytest.approx((0.05 + 0.2) / 2)


def test_adaptive_bins_hold_equally_many():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([0.3] * 4, size=103)
    found = metrics.reliability(probs, rng.integers(4, size=103), bins=10, adaptive=True)
    assert set(found.count) <= {10, 11}
    assert found.count.sum() == 103
    assert (np.diff(found.confidence) > 0).all()


def test_calibrated_labels_have_a_small_error_and_overconfident_ones_a_large():
    rng = np.random.default_rng(1)
    probs = rng.dirichlet([1.0] * 3, size=20_000)
    labels = (probs.cumsum(-1) > rng.random((20_000, 1))).argmax(-1)
    sharp = probs**3 / (probs**3).sum(-1, keepdims=True)
    assert metrics.ece(probs, labels) < 0.02 < 0.1 < metrics.ece(sharp, labels)
    assert metrics.adaptive_ece(probs, labels) < 0.02 < 0.1 < metrics.adaptive_ece(sharp, labels)


def test_plot_reliability():
    axes = metrics.plot_reliability(metrics.reliability(PROBS, LABELS), label="q")
    assert axes.get_xlabel() == "confidence"
    np.testing.assert_allclose(axes.containers[0].lines[0].get_ydata(), [1, 0, 1, 1])
    # Two examples of which one is right: 0.5 with a standard error of 0.5 / sqrt(2).
    axes = metrics.plot_reliability(metrics.reliability(PROBS, LABELS, bins=4), color="k")
    bars = np.array(axes.containers[0].lines[2][0].get_segments())[:, :, 1]
    np.testing.assert_allclose(np.ptp(bars, 1), [math.sqrt(2) / 2, 0, 0], atol=1e-9)
    plt.close("all")


def test_entropy_split_by_hand(kind):
    """Two draws that are sure and disagree: all epistemic. Two that agree on 1/2: all aleatoric."""
    probs = np.array([[[1.0, 0.0], [0.5, 0.5], [0.9, 0.1]], [[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]]])
    total, aleatoric, epistemic = metrics.predictive_uncertainty(kind(probs))
    mixed = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)), math.log(2)
    mean = -(0.7 * math.log(0.7) + 0.3 * math.log(0.3))
    np.testing.assert_allclose(total, [math.log(2), math.log(2), mean])
    np.testing.assert_allclose(aleatoric, [0, math.log(2), np.mean(mixed)], atol=1e-12)
    np.testing.assert_allclose(epistemic, total - aleatoric, atol=1e-12)


def test_crps_of_an_ensemble_equals_its_definition(kind):
    rng = np.random.default_rng(2)
    draws, truth = rng.normal(size=(7, 3, 2)), rng.normal(size=(3, 2))
    expected = np.abs(draws - truth).mean(0) - 0.5 * np.abs(draws[:, None] - draws).mean((0, 1))
    found = metrics.crps_ensemble(kind(draws), kind(truth), reduction="none")
    np.testing.assert_allclose(found, expected)
    assert metrics.crps_ensemble(draws[:1], truth) == pytest.approx(np.abs(draws[0] - truth).mean())


def test_crps_of_a_gaussian_equals_the_integral_and_the_ensembles_limit():
    from scipy import integrate, stats

    loc, scale, truth = 0.3, 1.7, 1.1
    integral = sum(
        integrate.quad(lambda t: (stats.norm.cdf(t, loc, scale) - (t >= truth)) ** 2, a, b)[0]
        for a, b in ((-np.inf, truth), (truth, np.inf))
    )
    found = metrics.crps_gaussian(loc, scale, truth)
    assert found == pytest.approx(integral, rel=1e-6)
    draws = stats.norm.ppf((np.arange(4000) + 0.5) / 4000, loc, scale)
    assert metrics.crps_ensemble(draws[:, None], [truth]) == pytest.approx(found, rel=1e-3)


def test_interval_coverage_by_hand(kind):
    draws = np.linspace(0, 1, 101)[:, None] * np.ones(4)
    truth = np.array([0.04, 0.06, 0.94, 0.96])
    assert metrics.interval_coverage(kind(draws), kind(truth), 0.9) == 0.5
    inside = metrics.interval_coverage(draws, truth, 0.9, reduction="none")
    np.testing.assert_array_equal(inside, [0, 1, 1, 0])
    with pytest.raises(ValueError, match="level=90"):
        metrics.interval_coverage(draws, truth, 90)


def test_ood_scores_by_hand(kind):
    familiar, unfamiliar = np.array([0.1, 0.2, 0.3, 0.6]), np.array([0.5, 0.7, 0.8])
    found = metrics.ood_scores(kind(familiar), kind(unfamiliar))
    assert found.auroc == pytest.approx(11 / 12)
    # Ranked: 0.8 and 0.7 found at precision 1; 0.5 is third of four.
    assert found.aupr == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert found.fpr95 == 0.25
    assert metrics.ood_scores(familiar, familiar).auroc == 0.5
    # 95 % of 20: the 19 above 1, which 18 of the familiar ones exceed too.
    steps = np.arange(20)
    assert metrics.ood_scores(steps, steps + 0.5).fpr95 == pytest.approx(18 / 20)


def test_shapes_are_not_broadcast():
    column, row = np.zeros((5, 1)), np.zeros(5)
    with pytest.raises(ValueError, match=r"scale of shape \(5, 1\) for truth of shape \(5,\)"):
        metrics.crps_gaussian(row, column + 1, row)
    with pytest.raises(ValueError, match=r"loc of shape \(5, 1\)"):
        metrics.crps_gaussian(column, row + 1, row)
    for score in (metrics.crps_ensemble, metrics.interval_coverage):
        with pytest.raises(
            ValueError, match=r"draws of shape \(9, 5, 1\) for truth of shape \(5,\)"
        ):
            score(np.zeros((9, 5, 1)), row)
    assert metrics.crps_gaussian(0.0, 1.0, row) == metrics.crps_gaussian(row, row + 1, row)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_is_positive(scale):
    with pytest.raises(ValueError, match=f"scale of {scale}, expected positive"):
        metrics.crps_gaussian(0.0, scale, np.zeros(5))


def test_an_unknown_target_is_neither_covered_nor_missed():
    draws, truth = np.linspace(0, 1, 11)[:, None] * np.ones(3), np.array([0.5, np.nan, 9.0])
    draws[:, 2][0] = np.nan
    inside = metrics.interval_coverage(draws, truth, reduction="none")
    np.testing.assert_array_equal(inside, [1, np.nan, np.nan])
    assert np.isnan(metrics.interval_coverage(draws, truth))


NONE = np.zeros((0, 3)), np.zeros(0, int)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda: metrics.accuracy(*NONE), r"shape \(0,\), without an example"),
        (lambda: metrics.nll(*NONE), "without an example to take the mean of"),
        (lambda: metrics.brier(*NONE), 'reduction="none"'),
        (lambda: metrics.reliability(*NONE), r"reliability: got probs of shape \(0, 3\)"),
        (lambda: metrics.ece(*NONE), "expected examples"),
        (lambda: metrics.crps_ensemble(np.zeros((5, 0)), np.zeros(0)), "without an example"),
        (lambda: metrics.crps_gaussian(0.0, 1.0, []), "without an example"),
        (lambda: metrics.interval_coverage(np.zeros((5, 0)), np.zeros(0)), "without an example"),
        (lambda: metrics.crps_ensemble(np.zeros((0, 4)), np.zeros(4)), r"\(0, 4\).*at least one"),
        (lambda: metrics.interval_coverage(np.zeros((0, 4)), np.zeros(4)), "at least one"),
        (lambda: metrics.predictive_uncertainty(np.zeros((0, 4, 3))), "at least one draw"),
        (lambda: metrics.ood_scores([], [1.0]), "got 0 familiar scores"),
        (lambda: metrics.ood_scores([1.0], torch.zeros(0)), "got 0 unfamiliar scores"),
    ],
)
def test_no_examples_or_draws(score, message):
    with pytest.raises(ValueError, match=message):
        score()


def test_no_examples_have_no_scores():
    for score in (metrics.nll, metrics.brier):
        assert score(*NONE, reduction="none").shape == (0,)
    assert metrics.predictive_uncertainty(np.zeros((5, 0, 3))).total.shape == (0,)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda: metrics.predictive_uncertainty([0.5, 0.5]), r"\(2,\), expected \(draws, \*, cla"),
        (lambda: metrics.accuracy(1.0, 0), "a single number, expected shape"),
        (lambda: metrics.ece(PROBS, LABELS, bins=2.5), "bins=2.5, expected at least 1, an integer"),
        (lambda: metrics.adaptive_ece(PROBS, LABELS, bins="3"), "bins='3'"),
        (lambda: metrics.interval_coverage(PROBS, PROBS[0], "0.9"), "level='0.9', expected"),
        (lambda: metrics.interval_coverage(PROBS, PROBS[0], math.nan), "level=nan, expected"),
        (lambda: metrics.crps_gaussian(0.0, math.nan, LABELS), "a scale of nan"),
        (lambda: metrics.ood_scores([0.0, math.nan], [1.0]), "2 familiar scores, of which 1 are"),
        (lambda: metrics.ood_scores([0.0], [math.inf]), "1 unfamiliar scores, of which 0 are"),
    ],
)
def test_values_out_of_range(score, message):
    with pytest.raises(ValueError, match=message):
        score()


def test_a_single_example_is_enough():
    assert metrics.accuracy(PROBS[0], 0) == 1.0
    assert metrics.predictive_uncertainty(PROBS).total.shape == ()


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="probabilities, not logits"):
        metrics.predictive_uncertainty(np.array([[[2.0, -1.0]]]))
    with pytest.raises(ValueError, match="probabilities, not logits"):
        metrics.nll(np.array([[2.0, -1.0]]), np.array([0]))
    with pytest.raises(ValueError, match="labels of shape"):
        metrics.accuracy(PROBS, LABELS[:2])
    with pytest.raises(ValueError, match="outside 0 to 2"):
        metrics.accuracy(PROBS, LABELS + 1)
    with pytest.raises(ValueError, match="bins=0"):
        metrics.ece(PROBS, LABELS, bins=0)
    with pytest.raises(ValueError, match="reduction='sum'"):
        metrics.nll(PROBS, LABELS, reduction="sum")
