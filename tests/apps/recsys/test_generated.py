"""The generated log: always the same, with planted relations and true probabilities."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from apps.recsys.generated import BAYES, TASKS, generate, generated_schema


@pytest.fixture(scope="module")
def log() -> pd.DataFrame:
    return generate(40_000, seed=1)


def test_the_same_seed_gives_the_same_log(log):
    pd.testing.assert_frame_equal(generate(500, seed=1), generate(500, seed=1))
    assert not generate(500, seed=1)["click"].equals(generate(500, seed=2)["click"])


def test_columns_are_those_of_the_schema(log):
    assert set(generated_schema().columns()) | {BAYES.format(task) for task in TASKS} == set(log.columns)


def test_each_step_needs_the_one_before(log):
    steps = log[list(TASKS)].to_numpy()
    assert (np.diff(steps, axis=1) <= 0).all()
    assert (steps.mean(0) > [0.3, 0.15, 0.02, 0.004]).all()


def test_labels_follow_the_probabilities_they_come_with(log):
    for task in TASKS:
        chance = log[BAYES.format(task)]
        assert chance.between(0, 1).all()
        deviation = np.sqrt((chance * (1 - chance)).sum())
        assert abs(log[task].sum() - chance.sum()) < 4 * deviation
        upper = chance > chance.quantile(0.9)  # calibrated at the top too
        spread = np.sqrt((chance * (1 - chance))[upper].sum())
        assert abs(log[task][upper].sum() - chance[upper].sum()) < 4 * spread


def test_there_is_something_to_learn_and_something_left_to_chance(log):
    for task in TASKS:
        assert 0.75 < roc_auc_score(log[task], log[BAYES.format(task)]) < 0.95


def test_users_and_items_have_long_tails_and_some_users_are_new(log):
    for name in ("user_id", "item_id"):
        counts = log[name].value_counts()
        assert counts.max() > 10 * counts.median()
    assert 0.03 < (log["history"].map(len) == 0).mean() < 0.3
    assert log["time"].is_monotonic_increasing
    assert 0 < log["age"].isna().mean() < 0.3
