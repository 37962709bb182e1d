"""Search spaces, and the study in which several processes meet; real trainings are in vision/test_search.py."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import optuna
import pytest
import yaml

from apps import search, tree
from apps.errors import ConfigError, UserError
from apps.verbs import Search
from apps.vision.settings import VisionConfig

SPACE = """
model.moe.unit: {choices: [token, sequence]}
optim.lr: {low: 1.0e-4, high: 1.0e-2, log: true}
model.moe.top_k: {low: 1, high: 3}
data.batch_size: {low: 16, high: 64, step: 16}
model.moe_layers: {choices: [last-1, all]}
model.moe.select_options: {choices: [{}, {num_groups: 2}]}
optim.betas: {choices: [[0.9, 0.99], [0.8, 0.9]]}
optim.ema_decay: {choices: [null, 0.99]}
model.moe.aux_loss.switch: {low: 0.0, high: 0.1}
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "space.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", r"space=.*: must map settings .*"),
        ("- optim.lr", r"space=.*: must map settings .*"),
        ("optim.lr: [", r"space=.*: cannot be read \(.*"),
        ("optim.lr: 3", r"space: optim\.lr: give choices, or low and high .*"),
        ("optim.lr: {low: 1}", r"space: optim\.lr: give choices, or low and high .*"),
        ("optim.lr: {low: 1, high: 2, logarithmic: true}", r"space: optim\.lr: give choices, .*"),
        ("optim.rate: {low: 1, high: 2}", r"--optim\.rate=1: unknown setting.*"),
        ("optim.l: {low: 1, high: 2}", r"--optim\.l=1: unknown setting; did you mean --optim\.lr\?"),
        ("model.moe.num_experts: {choices: [4, many]}", r"model\.moe\.num_experts=many: expected a int"),
        ("model.moe.num_experts: {low: 0.5, high: 4}", r"model\.moe\.num_experts=0\.5: expected a int"),
        ("model.moe: {choices: [4]}", r"model\.moe: .*"),
        ("model.moe.select: {choices: [top_k, best]}", r"model\.moe\.select=best: expected one of 'top_k', .*"),
    ],
)
def test_mistakes_in_a_space_are_one_line(tmp_path, text, line):
    with pytest.raises((UserError, ConfigError)) as refused:
        search.load_space(write(tmp_path, text), "vision")
    assert re.fullmatch(line, str(refused.value))


def test_a_missing_space_is_said(tmp_path):
    with pytest.raises(UserError, match=r"^space=.*none\.yaml: cannot be read \(.*No such file"):
        search.load_space(tmp_path / "none.yaml", "vision")


def test_values_come_in_the_types_that_settings_have(tmp_path):
    space = search.load_space(write(tmp_path, SPACE), "vision")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [search.suggest(study.ask(), space) for _ in range(40)]
    assert {type(values["model.moe.top_k"]) for values in drawn} == {int}
    assert {values["model.moe.top_k"] for values in drawn} == {1, 2, 3}
    assert {values["data.batch_size"] for values in drawn} == {16, 32, 48, 64}
    assert {values["optim.ema_decay"] for values in drawn} == {None, 0.99}
    assert {str(values["model.moe.select_options"]) for values in drawn} == {"{}", "{'num_groups': 2}"}
    assert {type(values["optim.betas"]) for values in drawn} == {list}
    assert all(1e-4 <= values["optim.lr"] <= 1e-2 for values in drawn)
    assert sum(values["optim.lr"] < 1e-3 for values in drawn) in range(10, 31)  # half of them, on a logarithmic scale


@pytest.mark.parametrize(
    "spec",
    [{"low": 3, "high": 1}, {"low": 0.0, "high": 1.0, "log": True}, {"low": 1, "high": 8, "log": True, "step": 2}],
)
def test_a_range_that_is_none_is_named(spec):
    with pytest.raises(UserError, match=r"^space: optim\.lr: .*--study\)$"):
        search.suggest(optuna.create_study().ask(), {"optim.lr": spec})


def test_choices_that_differ_from_those_of_the_study_are_named():
    study = optuna.create_study()
    study.tell(study.ask({"a": optuna.distributions.CategoricalDistribution([1, 2])}), 0.0)
    search.suggest(study.ask(), {"a": {"choices": [1, 2]}})
    with pytest.raises(UserError, match=r"^space: a: .*may need another --study"):
        search.suggest(study.ask(), {"a": {"choices": [1, 2, 3]}})


@pytest.mark.parametrize("storage", ["{}/deep/study.log", "sqlite:///{}/study.db"])
def test_a_study_is_continued_by_its_storage_and_name(tmp_path, storage):
    job = search.Job("", None, {}, storage.format(tmp_path), "mine", str(tmp_path), "maximize", 5)
    first = search._study(job, seed=0)
    first.tell(first.ask(), 0.25)
    second = search._study(job, seed=1)
    assert second.best_value == 0.25
    assert second.direction == optuna.study.StudyDirection.MAXIMIZE


@pytest.mark.parametrize("storage", ["sqlite:////nowhere/at/all/study.db", "nosuch://host/db"])
def test_a_storage_that_cannot_be_opened_is_one_line(tmp_path, storage):
    job = search.Job("", None, {}, storage, "mine", str(tmp_path), "maximize", 5)
    with pytest.raises(UserError, match=rf"^storage={re.escape(storage)}: cannot be opened \(.*\)$"):
        search._study(job, seed=0)


@pytest.fixture
def run(tmp_path):
    """Runs a search over learning rates without training; returns its folder."""

    def call(trials: int, objective: str = "sphere", root: Path = tmp_path, **changes: object) -> Path:
        config = VisionConfig()
        config.run.root = str(root)
        space = write(tmp_path, "optim.lr: {low: 0.001, high: 0.01}")
        args = Search(**{"space": str(space), "num_trials": trials} | changes)
        search.run_search("vision", config, args, f"tests.apps.objectives:{objective}", "rates", "maximize")
        return root / "vision" / "search-rates"

    return call


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "trials.csv", newline="") as text:
        return list(csv.DictReader(text))


def test_a_study_ends_with_its_trials_as_a_table_and_its_best_as_settings(run, tmp_path, capsys):
    folder = run(12, json=str(tmp_path / "best.json"))
    trials = rows(folder)
    assert [row["trial"] for row in trials] == [str(i) for i in range(12)]
    complete = [row for row in trials if row["state"] == "COMPLETE"]
    best = max(complete, key=lambda row: float(row["value"]))
    figures = json.loads((tmp_path / "best.json").read_text())
    assert (figures["trials"], figures["complete"]) == (12, len(complete))
    assert figures["best"] == {"trial": int(best["trial"])} | {
        "value": pytest.approx(float(best["value"])),
        "optim.lr": pytest.approx(float(best["optim.lr"])),
    }
    config = tree.build(VisionConfig, yaml.safe_load((folder / "best.yaml").read_text()))
    assert config.optim.lr == pytest.approx(float(best["optim.lr"]))
    assert "best of 12 trials" in capsys.readouterr().out


def test_what_does_not_work_is_pruned_and_the_search_goes_on(run, capsys):
    trials = rows(run(25))
    assert len(trials) == 25
    states = {row["state"] for row in trials}
    assert states == {"COMPLETE", "PRUNED"}
    assert all(float(row["optim.lr"]) <= 0.008 for row in trials if row["state"] == "COMPLETE")
    out = capsys.readouterr().out
    assert re.search(r"trial \d+: pruned, \{'optim\.lr': 0\.00", out)


def test_a_search_is_resumed_until_it_has_its_trials(run, capsys):
    assert len(rows(run(2))) == 2
    assert len(rows(run(5))) == 5
    assert "2 trials finished, 3 to go" in capsys.readouterr().out
    folder = run(4)  # has them already
    assert "5 trials finished, 0 to go" in capsys.readouterr().out
    assert len(rows(folder)) == len(list(folder.glob("trial-*"))) == 5


@pytest.mark.parametrize("storage", [None, "{}/shared.log"])
def test_another_study_starts_anew_in_a_folder_of_its_own(run, tmp_path, storage):
    storage = storage and storage.format(tmp_path)
    first, other = run(2, storage=storage), tmp_path / "vision" / "search-rates-other"
    run(1, study="other", storage=storage)
    assert (len(rows(first)), len(rows(other))) == (2, 1)


def test_a_study_repeats_with_the_seed_of_the_run(run, tmp_path):
    rates = [[row["optim.lr"] for row in rows(run(3, root=tmp_path / name))] for name in ("a", "b")]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) == 3


def test_when_nothing_works_it_is_said(run):
    with pytest.raises(UserError, match=r"^no trial of study 'search' ended well; .* has their folders$"):
        run(2, objective="broken")


@pytest.mark.slow
@pytest.mark.parametrize("storage", [None, "sqlite:///{}/study.db"])
def test_workers_share_a_study(run, tmp_path, storage):
    folder = run(8, workers=2, storage=storage and storage.format(tmp_path))
    trials = rows(folder)
    assert sorted(int(row["trial"]) for row in trials) == list(range(8))
    assert len({(folder / f"trial-{i}" / "process").read_text() for i in range(8)}) == 2
