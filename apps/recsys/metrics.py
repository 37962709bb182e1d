"""How good scores are: by task, and by user. All vectorised over rows.

What is undefined is NaN: what needs two classes where there is one, and everything where a score is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Num

Scores = Float[np.ndarray, " n"]
Labels = Float[np.ndarray, " n"]
Users = Int[np.ndarray, " n"]


def auc(scores: Scores, labels: Labels) -> float:
    """Chance that a positive row is scored above a negative one, ties counting half."""
    positive = labels > 0.5
    count, others = int(positive.sum()), int((~positive).sum())
    if not count or not others or np.isnan(scores).any():
        return math.nan
    return float((_ranks(scores)[positive].sum() - count * (count + 1) / 2) / (count * others))


def _ranks(scores: Scores, start: Bool[np.ndarray, " n"] | None = None) -> Float[np.ndarray, " n"]:
    """Rank of every score from 1 up, equal ones sharing their mean rank.

    Args:
        scores: sorted already, and `start` given: ranks begin anew wherever it is true; or in any order.
        start: where a group begins.
    """
    if start is None:
        order = np.argsort(scores, kind="stable")
        ranks = np.empty(len(scores))
        ranks[order] = _ranks(scores[order], np.arange(len(scores)) == 0)
        return ranks
    place = np.arange(len(scores))
    group = np.maximum.accumulate(np.where(start, place, 0))  # where each row's group begins
    tie = np.flatnonzero(start | _begins(scores))
    ends = np.append(tie[1:], len(scores))
    mean = (tie + ends - 1) / 2  # of the places of equal scores
    return np.repeat(mean, ends - tie) - group + 1


def _begins(values: Num[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Where values differ from the one before."""
    begins = np.ones(len(values), bool)
    begins[1:] = values[1:] != values[:-1]
    return begins


@dataclass(frozen=True)
class UserAUC:
    """AUC within users who have rows of both classes."""

    gauc: float
    """Weighted by rows: GAUC (Zhu et al. 2017)."""
    uauc: float
    """Every user alike."""
    users: int
    """Users who count."""


def user_auc(scores: Scores, labels: Labels, user: Users) -> UserAUC:
    """AUC of each user, averaged; users with one class are left out."""
    if not len(scores) or np.isnan(scores).any():
        return UserAUC(math.nan, math.nan, 0)
    order = np.lexsort((scores, user))
    scores, positive, user = scores[order], labels[order] > 0.5, user[order]
    start = _begins(user)
    first = np.flatnonzero(start)
    ranks = np.add.reduceat(np.where(positive, _ranks(scores, start), 0.0), first)
    rows = np.diff(np.append(first, len(user)))
    ones = np.add.reduceat(positive.astype(np.int64), first)
    both = (ones > 0) & (ones < rows)
    if not both.any():
        return UserAUC(math.nan, math.nan, 0)
    ranks, rows, ones = ranks[both], rows[both], ones[both]
    values = (ranks - ones * (ones + 1) / 2) / (ones * (rows - ones))
    return UserAUC(float((values * rows).sum() / rows.sum()), float(values.mean()), int(both.sum()))


def log_loss(probabilities: Scores, labels: Labels) -> float:
    """Mean negative log-likelihood in nats."""
    if not len(labels):
        return math.nan
    p = np.clip(probabilities.astype(np.float64), 1e-15, 1 - 1e-15)
    return float(-(labels * np.log(p) + (1 - labels) * np.log1p(-p)).mean())


@dataclass(frozen=True)
class Calibration:
    """Predicted against observed rates, in bins of equally many rows."""

    predicted: Float[np.ndarray, " bins"]
    observed: Float[np.ndarray, " bins"]
    rows: Int[np.ndarray, " bins"]

    @property
    def ece(self) -> float:
        """Expected calibration error: mean distance of the two, weighted by rows."""
        if not self.rows.sum():
            return math.nan
        return float((np.abs(self.predicted - self.observed) * self.rows).sum() / self.rows.sum())


def calibration(probabilities: Scores, labels: Labels, bins: int = 20) -> Calibration:
    """The calibration curve; equal predictions share a bin, so that there may be fewer bins."""
    order = np.argsort(probabilities, kind="stable")
    p, y = probabilities[order].astype(np.float64), labels[order]
    place = np.maximum.accumulate(np.where(_begins(p), np.arange(len(p)), 0))  # of the first that is equal
    rank = place * bins // max(len(p), 1)
    rows = np.bincount(rank, minlength=bins)
    full = rows > 0
    predicted, observed = (np.bincount(rank, values, bins)[full] / rows[full] for values in (p, y))
    return Calibration(predicted, observed, rows[full])


@dataclass(frozen=True)
class ListQuality:
    """How well the first k of each user's list are chosen, over users with a positive row."""

    ndcg: float
    """1 when all positives come first."""
    hit_rate: float
    """Share of users with a positive among the first k."""
    users: int


def list_quality(scores: Scores, labels: Labels, user: Users, k: int = 10) -> ListQuality:
    """NDCG@k and HR@k of the rows of every user ranked by score.

    Equal scores count by what their orders give on average (McSherry & Najork 2008), so that the order of the log, or
    one score for all, gains nothing.
    """
    if not (labels > 0.5).any() or np.isnan(scores).any():
        return ListQuality(math.nan, math.nan, 0)
    order = np.lexsort((-scores, user))
    scores, positive, user = scores[order], labels[order] > 0.5, user[order]
    start = _begins(user)
    tie = np.flatnonzero(start | _begins(scores))
    size, ones = np.diff(np.append(tie, len(user))), np.add.reduceat(positive.astype(np.int64), tie)
    place = tie - np.maximum.accumulate(np.where(start[tie], tie, 0))  # of each tie in the list of its user
    first = np.flatnonzero(start[tie])  # tie of each user
    gains = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(k) + 2))])
    gain = ones / size * (gains[np.minimum(place + size, k)] - gains[np.minimum(place, k)])
    total = np.add.reduceat(ones, first)
    counts = total > 0
    found = np.add.reduceat(gain, first)[counts] / gains[np.minimum(total[counts], k)]
    missed = np.multiply.reduceat(_missed(ones, size, np.clip(k - place, 0, size)), first)[counts]
    return ListQuality(float(found.mean()), float(1 - missed.mean()), int(counts.sum()))


def _missed(
    ones: Int[np.ndarray, " n"], size: Int[np.ndarray, " n"], drawn: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Chance that so many rows, drawn from as many as there are without putting back, are none of the positive ones."""
    chance = np.ones(len(ones))
    for i in range(int(drawn.max())):
        more = np.flatnonzero(drawn > i)
        chance[more] *= np.maximum(size[more] - ones[more] - i, 0) / (size[more] - i)
    return chance


def task_metrics(probabilities: Scores, labels: Labels, user: Users | None = None, k: int = 10) -> dict[str, float]:
    """All figures of one task over the rows inside it (label not NaN).

    Args:
        probabilities: of a positive.
        labels: 0 or 1; NaN outside of the task.
        user: whose rows; None: no figures by user.
        k: length of lists.
    """
    inside = ~np.isnan(labels)
    probabilities, labels = probabilities[inside], labels[inside]
    figures = {
        "rows": float(len(labels)),
        "positive_rate": float(labels.mean()) if len(labels) else math.nan,
        "auc": auc(probabilities, labels),
        "log_loss": log_loss(probabilities, labels),
        "ece": calibration(probabilities, labels).ece if len(labels) else math.nan,
    }
    if user is not None:
        by_user = user_auc(probabilities, labels, user[inside])
        lists = list_quality(probabilities, labels, user[inside], k)
        figures |= {"gauc": by_user.gauc, "uauc": by_user.uauc, "gauc_users": float(by_user.users)}
        figures |= {f"ndcg_{k}": lists.ndcg, f"hit_rate_{k}": lists.hit_rate}
    return figures
