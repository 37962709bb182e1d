"""Measures against scikit-learn and against loops over users."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import ndcg_score, roc_auc_score

from apps.recsys.metrics import auc, calibration, list_quality, log_loss, task_metrics, user_auc


def log(rows: int = 4000, seed: int = 0, ties: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = rng.random(rows)
    scores = scores.round(1) if ties else scores
    return scores, (rng.random(rows) < 0.2 + 0.4 * scores).astype(float), rng.integers(0, rows // 6, rows)


@pytest.mark.parametrize("ties", [True, False])
def test_auc_is_that_of_scikit_learn(ties):
    scores, labels, _ = log(ties=ties)
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize("ties", [True, False])
def test_user_auc_is_a_loop_over_users(ties):
    scores, labels, user = log(ties=ties)
    values, weights = [], []
    for one in np.unique(user):
        own = user == one
        if 0 < labels[own].sum() < own.sum():
            values.append(roc_auc_score(labels[own], scores[own]))
            weights.append(own.sum())
    found = user_auc(scores, labels, user)
    assert found.gauc == pytest.approx(np.average(values, weights=weights), abs=1e-12)
    assert (found.uauc, found.users) == (pytest.approx(np.mean(values), abs=1e-12), len(values))


@pytest.mark.parametrize("ties", [True, False])
def test_lists_are_those_of_scikit_learn(ties):
    scores, labels, user = log(ties=ties)
    ndcg, hits = [], []
    for one in np.unique(user):
        own = user == one
        if labels[own].sum() and own.sum() > 1:
            ndcg.append(ndcg_score([labels[own]], [scores[own]], k=3))
            hits.append(np.mean([drawn[:3].any() for drawn in orders(scores[own], labels[own])]))
        elif labels[own].sum():
            ndcg.append(1.0)
            hits.append(True)
    found = list_quality(scores, labels, user, k=3)
    assert (found.ndcg, found.hit_rate) == (pytest.approx(np.mean(ndcg)), pytest.approx(np.mean(hits), abs=0.01))


def orders(scores: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Labels from the highest score down, equal ones in several random orders."""
    rng = np.random.default_rng(0)
    return [labels[np.lexsort((rng.random(len(scores)), -scores))] for _ in range(60)]


def test_equal_scores_gain_nothing_from_the_order_of_the_log():
    labels, user = np.array([1.0, 0.0, 0.0, 0.0, 1.0]), np.array([7, 7, 7, 7, 3])
    found = list_quality(np.full(5, 0.5), labels, user, k=2)
    assert found.hit_rate == pytest.approx((2 / 4 + 1) / 2)
    assert found.ndcg == pytest.approx(((1 + 1 / math.log2(3)) / 4 + 1) / 2)
    assert found == list_quality(np.full(5, 0.5), labels[::-1], user[::-1], k=2)


def test_log_loss_and_calibration():
    scores, labels, _ = log(20_000)
    truth = 0.2 + 0.4 * scores
    assert log_loss(truth, labels) == pytest.approx(sklearn_log_loss(labels, truth))
    assert calibration(truth, labels).ece < 0.03
    assert calibration(truth + 0.2, labels).ece == pytest.approx(0.2, abs=0.02)
    assert calibration(truth, labels).rows.sum() == 20_000
    assert calibration(np.full(20_000, labels.mean()), labels).ece == pytest.approx(0, abs=1e-9)  # one bin
    assert math.isfinite(log_loss(np.array([0.0, 1.0]), np.array([1.0, 0.0])))


def test_the_calibration_curve_is_that_of_scikit_learn():
    scores, labels, _ = log(20_000, ties=False)
    observed, predicted = calibration_curve(labels, scores, n_bins=10, strategy="quantile")
    found = calibration(scores, labels, bins=10)
    np.testing.assert_allclose(found.predicted, predicted, atol=1e-3)
    np.testing.assert_allclose(found.observed, observed, atol=1e-3)


def test_a_score_that_is_no_number_is_no_good_score():
    scores, labels, user = log(600)
    scores[3] = np.nan
    figures = task_metrics(scores, labels, user)
    assert all(math.isnan(figures[name]) for name in ("auc", "log_loss", "ece", "gauc", "uauc", "ndcg_10"))


def test_one_class_is_undefined_and_rows_outside_do_not_count():
    scores, labels, user = log(600)
    figures = task_metrics(scores, np.zeros(600), user)
    assert all(math.isnan(figures[name]) for name in ("auc", "gauc", "uauc", "ndcg_10"))
    outside = np.where(np.arange(600) % 2, np.nan, labels)
    assert task_metrics(scores, outside, user) == task_metrics(scores[::2], labels[::2], user[::2])
    nothing = task_metrics(scores, np.full(600, np.nan), user)
    assert nothing["rows"] == 0
    assert math.isnan(nothing["auc"])


def test_a_million_rows_take_a_second_or_two():
    scores, labels, user = log(1_000_000, ties=False)
    started = time.process_time()
    auc(scores, labels), user_auc(scores, labels, user)
    assert time.process_time() - started < 8
