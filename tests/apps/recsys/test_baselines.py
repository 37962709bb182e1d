"""Baselines find what is there to find; the benchmark compares what it says it compares."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch

from apps.recsys.baselines import gradient_boosting, logistic_regression, popularity
from apps.recsys.batch import Batch, DenseInput, InputSpec, SequenceInput, SparseInput, TableSpec, TaskSpec
from apps.recsys.loading import load_trained
from apps.recsys.metrics import auc

SPEC = InputSpec(
    tables=(TableSpec("item", 12, 8),),
    sparse=(SparseInput("item", "item"),),
    dense=(DenseInput("x", "standard"), DenseInput("y", "bins", edges=(0.0,))),
    sequences=(SequenceInput("seen", "item", 3, "target", "item"),),
    tasks=(TaskSpec("click", "all", None, 1.0, 0.5), TaskSpec("never", "all", "click", 1.0, 0.1)),
)


def rows(count: int, seed: int) -> Batch:
    """Clicks depend on the item and on x; nobody ever does the second task."""
    rng = np.random.default_rng(seed)
    item, x = rng.integers(2, 12, count), rng.normal(size=(count, 2)).astype(np.float32)
    chance = 1 / (1 + np.exp(-(np.where(item % 2, 1.5, -1.5) + 2 * x[:, 0])))
    labels = np.stack([rng.random(count) < chance, np.zeros(count)], 1).astype(np.float32)
    seen = rng.integers(0, 12, (count, 3))
    return Batch(
        torch.from_numpy(item)[:, None], torch.from_numpy(x), {"seen": torch.from_numpy(seen)}, torch.from_numpy(labels)
    )


TRAIN, TEST = rows(6000, 0), rows(2000, 1)


def quality(scores: np.ndarray) -> float:
    assert scores.shape == (2000, 2)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert (scores[:, 1] < 0.05).all()
    return auc(scores[:, 0], TEST.labels[:, 0].numpy())


def test_popularity_is_the_items_smoothed_rate():
    scores = popularity(TRAIN, TEST, SPEC, "item")
    own = TRAIN.sparse[:, 0] == TEST.sparse[0, 0]
    mean = float(TRAIN.labels[:, 0].mean())
    rate = (float(TRAIN.labels[own, 0].sum()) + 20 * mean) / (int(own.sum()) + 20)
    assert scores[0, 0] == pytest.approx(rate, rel=1e-5)
    assert 0.6 < quality(scores) < 0.8
    assert len(np.unique(popularity(TRAIN, TEST, SPEC)[:, 0])) == 1  # without an item all are alike


def test_logistic_regression_takes_ids_and_numbers_and_leaves_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    found = quality(logistic_regression(TRAIN, TEST, SPEC))
    assert torch.equal(before, torch.random.get_rng_state())
    assert found > 0.87


def test_gradient_boosting_takes_a_task_of_one_class():
    pytest.importorskip("sklearn")
    assert quality(gradient_boosting(TRAIN, TEST, SPEC)) > 0.87


@pytest.mark.parametrize("fit", [popularity, logistic_regression, gradient_boosting])
@pytest.mark.parametrize("kind", ["ids", "numbers", "nothing seen"])
def test_baselines_take_logs_of_one_kind_of_feature(fit, kind):
    if fit is gradient_boosting:
        pytest.importorskip("sklearn")
    ids, numbers = (SPEC.sparse, ()) if kind == "ids" else ((), SPEC.dense)
    spec = dataclasses.replace(SPEC, sparse=ids, dense=numbers, sequences=())
    dense = TRAIN.dense * float("nan") if kind == "nothing seen" else TRAIN.dense
    given = Batch(TRAIN.sparse[:, : len(ids)], dense[:, : len(numbers)], labels=TRAIN.labels)[:500]
    scores = fit(given, given[:40], spec)
    assert scores.shape == (40, 2)
    assert ((scores >= 0) & (scores <= 1)).all()


def test_benchmark_measures_training_and_ranking(rec, small, tmp_path):
    options = ["--rounds=1", "--batch_sizes=[20,100]", "--json", tmp_path / "b.json"]
    done = rec("benchmark", *small(tmp_path, data__rows=1000), *options)
    assert (done.code, done.err) == (0, "")
    moe, twin = json.loads((tmp_path / "b.json").read_text())
    assert (moe["model"], twin["model"]) == ("MMoE", "dense twin")
    assert moe["to_first"] == 1
    assert twin["to_first"] == pytest.approx(twin["samples_per_cpu_s"] / moe["samples_per_cpu_s"])
    assert 0 < moe["call_p50_ms"] <= moe["call_p99_ms"]
    assert (moe["batch"], moe["ranked_rows"]) == (100, 20)


def test_benchmark_of_a_trained_model_is_of_that_model(rec, home_run, tmp_path):
    options = ["--ckpt_path", home_run, "--rounds=1", "--batch_sizes=[20,100]", "--json", tmp_path / "b.json"]
    done = rec("benchmark", *options)
    assert (done.code, done.err) == (0, "")
    moe, _ = json.loads((tmp_path / "b.json").read_text())
    trained = load_trained(home_run / "checkpoints" / "best.ckpt")
    assert (moe["model"], moe["parameters"]) == ("HoME", sum(p.numel() for p in trained.model.parameters()))


def test_peers_that_are_not_installed_are_one_line(rec, small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_rechub", None)
    monkeypatch.delitem(sys.modules, "apps.recsys.benchmark_peers", raising=False)
    line = rec("benchmark", *small(tmp_path, data__rows=1000), "--peers=true", "--rounds=1").line
    assert line.startswith("peers=true: ")
    assert line.endswith("pip install torch-rechub")
