"""Searching real trainings: finished, resumed, pruned, shared."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import yaml

from apps import tree
from apps.vision.settings import VisionConfig

CONFIGS = Path(__file__).parents[3] / "configs" / "vision"
RATES = "optim.lr: {low: 1.0e-5, high: 1.0e-2, log: true}\n"
SPACE = f"""{RATES}
model.moe.num_experts: {{choices: [2, 4]}}
model.moe.top_k: {{low: 1, high: 3}}
model.moe.unit: {{choices: [token, sequence]}}
"""


@pytest.fixture
def search(cli, tiny, tmp_path):
    """Runs a search with tiny trials; returns its folder."""

    def call(trials: int, *argv: str, space: str = RATES, **changes: object) -> Path:
        (tmp_path / "space.yaml").write_text(space)
        options = ["--space", tmp_path / "space.yaml", f"--num_trials={trials}", *argv]
        done = cli("search", *tiny(tmp_path, **changes), *options)
        assert (done.code, done.err) == (0, "")
        return tmp_path / "vision" / "search-digits"

    return call


def trials(folder: Path) -> list[dict[str, str]]:
    with open(folder / "trials.csv", newline="") as text:
        return list(csv.DictReader(text))


def test_a_search_goes_on_and_its_best_settings_train(search, cli, tmp_path):
    assert len(trials(search(4, space=SPACE))) == 4
    folder = search(7, "--json", str(tmp_path / "best.json"), space=SPACE)
    rows = trials(folder)
    assert [int(row["trial"]) for row in rows] == list(range(7))
    for row in rows:
        # With two experts the space offers three of them: settings that cannot be are pruned, not the end.
        possible = int(row["model.moe.top_k"]) <= int(row["model.moe.num_experts"])
        assert possible or row["state"] == "PRUNED"
        assert (folder / f"trial-{row['trial']}" / "metrics.csv").is_file() == possible
    assert {row["state"] for row in rows} == {"COMPLETE", "PRUNED"}
    best = max((row for row in rows if row["value"]), key=lambda row: float(row["value"]))
    assert json.loads((tmp_path / "best.json").read_text())["best"]["trial"] == int(best["trial"])
    config = tree.build(VisionConfig, yaml.safe_load((folder / "best.yaml").read_text()))
    assert config.model.moe.num_experts == int(best["model.moe.num_experts"])
    assert config.model.moe.unit == best["model.moe.unit"]
    assert math.isclose(config.optim.lr, float(best["optim.lr"]))
    done = cli("train", "-c", folder / "best.yaml", "--run.name", "best")
    assert done.code == 0, done.err
    assert (tmp_path / "vision" / "best" / "test.json").is_file()


def test_the_space_of_the_app_suits_its_tiny_recipe(cli, tmp_path):
    argv = ["-c", CONFIGS / "tiny.yaml", "--space", CONFIGS / "space.yaml", "--run.root", tmp_path, "--num_trials=3"]
    done = cli("search", *argv, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2")
    assert (done.code, done.err) == (0, "")
    rows = trials(tmp_path / "vision" / "search-tiny")
    assert len(rows) == 3
    assert set(rows[0]) >= set(yaml.safe_load((CONFIGS / "space.yaml").read_text()))


def test_the_value_of_a_trial_is_its_best_validation(search):
    folder = search(1, trainer__max_epochs=3)
    (row,) = trials(folder)
    with open(folder / "trial-0" / "metrics.csv", newline="") as text:
        accuracies = [float(r["val/accuracy"]) for r in csv.DictReader(text) if r["val/accuracy"]]
    assert len(accuracies) == 3
    assert float(row["value"]) == pytest.approx(max(accuracies), rel=1e-5)


def test_trials_behind_the_others_are_pruned(search):
    """Several validations per epoch count as several; after five trials somebody is behind the median."""
    folder = search(
        9,
        model__stem="auto",
        optim__warmup=0,
        trainer__max_epochs=2,
        trainer__limit_train_batches=12,
        trainer__val_check_interval=0.5,
    )
    pruned = [row for row in trials(folder) if row["state"] == "PRUNED"]
    stopped = [row for row in pruned if (folder / f"trial-{row['trial']}" / "metrics.csv").is_file()]
    assert stopped
    for row in stopped:
        with open(folder / f"trial-{row['trial']}" / "metrics.csv", newline="") as text:
            assert 2 <= sum(bool(r["val/accuracy"]) for r in csv.DictReader(text)) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["{}/shared/study.log", "sqlite:///{}/study.db"])
def test_workers_share_a_study_of_trainings(search, tmp_path, storage):
    folder = search(4, "--workers=2", "--storage", storage.format(tmp_path))
    assert [row["trial"] for row in trials(folder)] == ["0", "1", "2", "3"]
    assert (folder / "best.yaml").is_file()


def test_a_space_with_mistakes_trains_nothing(cli, tiny, tmp_path):
    (tmp_path / "space.yaml").write_text("optim.rate: {low: 1, high: 2}")
    line = cli("search", *tiny(tmp_path), "--space", tmp_path / "space.yaml").line
    assert line.startswith("--optim.rate=1: unknown setting")
    assert not (tmp_path / "vision").exists()
