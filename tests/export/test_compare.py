"""Comparisons on a model whose differences are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from export.compare import compare
from export.decisions import NEAR, largest, nearness, ranking
from export.exportable import Exportable, Score, in_torch, samples_of


def exportable(**options) -> Exportable:
    torch.manual_seed(0)
    batches = [torch.randn(size, 4) for size in (1, 5, 2)]
    return Exportable(
        nn.Linear(4, 3).eval(),
        ("x",),
        ("y",),
        (batches[1],),
        samples_of(("x",), *((batch,) for batch in batches)),
        **options,
    )


def test_the_model_itself_agrees():
    model = exportable(decide=largest())
    found = compare(model, in_torch(model.module))
    assert (found.rows, found.max_error, found.rms_relative_error) == (8, 0.0, 0.0)
    assert (found.decisions.count, found.decisions.share) == (8, 1.0)


def test_errors_decisions_and_the_score_are_those_of_a_known_shift():
    score = Score("mean", lambda outputs: float(outputs[0].mean()))
    model = exportable(decide=largest(), score=score)
    run = in_torch(model.module)
    shift = np.array([10.0, 0.0, 0.0], np.float32)
    found = compare(model, lambda sample: [run(sample)[0] + shift])
    whole = np.concatenate([run(sample)[0] for sample in model.samples])
    assert found.max_error == pytest.approx(10.0, rel=1e-6)
    assert found.mean_error == pytest.approx(10.0 / 3, rel=1e-6)
    assert found.max_relative_error == pytest.approx(10.0 / np.abs(whole).max(), rel=1e-6)
    assert found.rms_relative_error == pytest.approx(np.sqrt(100 / 3) / np.sqrt((whole**2).mean()), rel=1e-6)
    assert found.decisions.share == (whole.argmax(1) == 0).mean()
    name, before, after, change = found.score
    assert name == "mean"
    assert after - before == pytest.approx(10 / 3, rel=1e-4) == change


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_nan_in_any_batch_is_an_error_of_nan(batch):
    model = exportable()
    run = in_torch(model.module)

    def broken(sample):
        (out,) = run(sample)
        if len(out) == (1, 5, 2)[batch]:
            out[-1, 2] = np.nan
        return [out]

    found = compare(model, broken)
    assert np.isnan(found.max_relative_error)
    assert not found.max_relative_error <= 1e-4


def test_relative_scores_change_relative_to_themselves():
    assert Score("mse", lambda _: 0.0, relative=True).change(2.0, 2.1) == pytest.approx(0.05)
    assert Score("auc", lambda _: 0.0).change(0.8, 0.75) == pytest.approx(0.05)


def test_ties_are_candidates_closer_than_rounding():
    before = np.array([[1.0, 1.0 - NEAR / 2, 0.0], [1.0, 0.9, 0.0], [0.0, 0.5, 1.0]])
    after = np.array([[0.9, 1.0, 0.0], [0.9, 1.0, 0.0], [0.0, 0.5, 1.0]])
    found = largest()(before, after)
    assert (found.count, found.same, found.ties, found.share) == (3, 1, 1, 0.5)


def test_rankings_compare_neighbours():
    before = np.array([[0.1], [0.4], [0.2], [0.3]])
    assert ranking(before, before * 2).share == 1.0
    swapped = np.array([[0.1], [0.4], [0.3], [0.2]])
    found = ranking(before, swapped)
    assert (found.count, found.same) == (3, 2)


def test_continuous_decisions_are_near_or_not():
    before = np.array([[0.0], [10.0]])
    assert nearness(1e-3)(before, before + 0.009).share == 1.0
    assert nearness(1e-3)(before, before + np.array([[0.0], [0.02]])).share == 0.5
