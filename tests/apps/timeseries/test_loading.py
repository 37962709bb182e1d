"""Trained models from checkpoints, with what goes with them."""

from __future__ import annotations

import pytest
import torch

from apps import tree
from apps.errors import UserError
from apps.runs import load_plain
from apps.timeseries.loading import load_trained, load_untrained
from apps.timeseries.models.baselines import SeasonalNaive
from apps.timeseries.models.spec import SeriesSpec
from apps.timeseries.settings import TimeseriesConfig


def test_a_checkpoint_has_all_that_forecasts_need(segmoe_run):
    path = segmoe_run / "checkpoints" / "best.ckpt"
    trained = load_trained(path)
    checkpoint = load_plain(path)  # tensors and plain data only
    assert trained.title == "SegMoE"
    assert trained.spec == SeriesSpec(24, 6, 24)
    assert trained.intervals.errors.shape == (99, 6)
    assert tree.plain(trained.config) == checkpoint["config"]
    assert not trained.model.training
    state = trained.model.state_dict()
    assert all(torch.equal(checkpoint["state_dict"][f"model.{name}"], value) for name, value in state.items())
    assert len(state) == len(checkpoint["state_dict"])


def test_a_checkpoint_from_within_training_has_no_intervals_yet(segmoe_run):
    assert load_trained(segmoe_run / "checkpoints" / "last.ckpt").intervals is None


def test_weights_of_another_architecture_are_refused(segmoe_run):
    path = segmoe_run / "checkpoints" / "best.ckpt"
    config = load_trained(path).config
    with pytest.raises(UserError, match=r"of another architecture \(.*; use the settings it was trained with"):
        load_trained(path, tree.changed(config, {"model.segmoe.d_ff": 12}))


def test_checkpoints_of_other_apps_are_refused(segmoe_run, tmp_path):
    checkpoint = load_plain(segmoe_run / "checkpoints" / "best.ckpt") | {"app": "vision"}
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"x.ckpt: belongs to apps.vision, not to apps.timeseries"):
        load_trained(tmp_path / "x.ckpt")


def test_what_needs_no_training_needs_no_checkpoint():
    config = tree.changed(TimeseriesConfig(), {"model.name": "seasonal_naive", "data.season": 7})
    trained = load_untrained(config)
    assert isinstance(trained.model, SeasonalNaive)
    assert (trained.path, trained.intervals, trained.spec.season) == (None, None, 7)
    for name in ("segmoe", "timemoe", "dlinear"):
        with pytest.raises(UserError, match=f"^ckpt_path: is required for model.name={name}; train first"):
            load_untrained(tree.changed(config, {"model.name": name}))
