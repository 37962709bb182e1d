"""A study holds trials that can be compared, and a space varies what matters."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import optuna
import pytest
import yaml

from apps import search, tree
from apps.errors import UserError
from apps.recsys.settings import RecsysConfig
from apps.rl.settings import RLConfig
from apps.search_settings import refuse_idle, remember
from apps.timeseries.settings import TimeseriesConfig
from apps.verbs import Search
from apps.vision.settings import VisionConfig

RATE = {"optim.lr": {"low": 0.001, "high": 0.01}}


def unused(app: str):
    return importlib.import_module(f"apps.{app}").APP.unused


@pytest.fixture
def begin():
    """Begins or continues a study over vision models, by settings and space."""
    study = optuna.create_study(study_name="mine")

    def call(space=RATE, **changes: object) -> optuna.Study:
        config = tree.changed(VisionConfig(), {name.replace("__", "."): value for name, value in changes.items()})
        remember(study, config, space, unused("vision"), "give another --study")
        return study

    return call


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim__lr": 0.5},  # is varied
        {"run__root": "elsewhere", "run__seed": 7, "run__threads": 2, "run__report": False},
        {"trainer__enable_progress_bar": False, "trainer__accelerator": "cpu", "data__num_workers": 3},
    ],
)
def test_a_study_goes_on_with_settings_that_give_the_same(begin, changes):
    kept = dict(begin().user_attrs)
    assert kept["settings"]["varied"] == ["optim.lr"]
    assert begin(**changes).user_attrs == kept


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"optim__betas": (0.8, 0.9)},
            r"optim\.betas=\[0\.8, 0\.9\]: study 'mine' has \[0\.9, 0\.999\]; give another --study",
        ),
        ({"trainer__max_epochs": 3}, r"trainer\.max_epochs=3: study 'mine' has 40; .*"),
        ({"model__moe__num_experts": 4, "data__batch_size": 8}, r"model\.moe\.num_experts=4: study 'mine' has 8; .*"),
        ({"model__moe__aux_loss": {"z": 0.1}}, r"model\.moe\.aux_loss=\{'z': 0\.1\}: study 'mine' has .*"),
        ({"run__early_stop__patience": 1}, r"run\.early_stop\.patience=1: study 'mine' has None; .*"),
        (
            {"space": RATE | {"optim.warmup": {"low": 0.0, "high": 0.1}}},
            r"space: optim\.warmup is varied here and fixed .*",
        ),
        ({"space": {"optim.warmup": {"low": 0.0, "high": 0.1}}}, r"space: optim\.lr is fixed here and varied in .*"),
    ],
)
def test_other_settings_are_another_study(begin, changes, line):
    begin()
    with pytest.raises(UserError) as refused:
        begin(**changes)
    assert re.fullmatch(line, str(refused.value))


def test_an_entry_of_a_dictionary_can_be_what_varies(begin):
    space = {"model.moe.aux_loss.switch": {"low": 0.0, "high": 0.1}}
    begin(space, model__moe__aux_loss={"switch": 0.1, "z": 0.2})
    begin(space, model__moe__aux_loss={"z": 0.2})
    with pytest.raises(UserError, match=r"^model\.moe\.aux_loss="):
        begin(space, model__moe__aux_loss={"z": 0.3})


@pytest.mark.parametrize(
    ("storage", "remedy"), [(None, "give another --study or --run.name"), ("{}/s.log", "give another --study")]
)
def test_a_search_is_not_continued_with_other_settings(tmp_path, storage, remedy):
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(RATE))

    def run(config: VisionConfig) -> None:
        config.run.root = str(tmp_path)
        args = Search(str(tmp_path / "space.yaml"), num_trials=1, storage=storage and storage.format(tmp_path))
        search.run_search("vision", config, args, "tests.apps.objectives:sphere", "rates", "maximize")

    run(VisionConfig())
    with pytest.raises(UserError) as refused:
        run(tree.changed(VisionConfig(), {"model.depth": 3}))
    assert str(refused.value) == f"model.depth=3: study 'search' has None; {remedy}"
    run(VisionConfig())


@pytest.mark.parametrize(
    ("app", "config", "line"),
    [
        ("recsys", RecsysConfig(), "model.home.top_k: does nothing with these settings; give --model.name home, or "),
        (
            "timeseries",
            TimeseriesConfig(),
            "model.timemoe.top_k: does nothing .* give --model.name timemoe, or another",
        ),
    ],
)
def test_what_only_other_models_have_is_no_space(app, config, line):
    name, model = line.split(":")[0], line.split(".")[1]
    space = {name: {"low": 1, "high": 2}}
    with pytest.raises(UserError, match=f"^space: {line}"):
        refuse_idle(space, config, unused(app))
    refuse_idle(space, tree.changed(config, {"model.name": model}), unused(app))
    refuse_idle(space | {"model.name": {"choices": ["no such", model]}}, config, unused(app))


def test_experts_of_a_model_without_any_are_no_space():
    space = {"model.moe.num_experts": {"choices": [4, 8]}}
    refuse_idle(space, VisionConfig(), unused("vision"))
    dense = tree.changed(VisionConfig(), {"model.moe_layers": "none"})
    with pytest.raises(UserError, match=r"give --model\.moe_layers, or another --space$"):
        refuse_idle(space, dense, unused("vision"))


@pytest.mark.parametrize("app", ["recsys", "rl", "timeseries", "vision"])
def test_the_space_of_an_app_suits_its_defaults(app):
    root = Path(__file__).parents[2]
    config = importlib.import_module(f"apps.{app}").APP.config()
    space = search.load_space(root / "configs" / app / "space.yaml", app)
    assert space
    refuse_idle(space, config, unused(app))  # raises where a setting does nothing


def test_parts_of_an_agent_that_are_off_are_no_space():
    space = {"agent.perturb.max_factor": {"low": 0.5, "high": 1.0}}
    with pytest.raises(UserError, match=r"agent\.perturb\.max_factor: does nothing .* --agent\.perturb\.kind"):
        refuse_idle(space, tree.changed(RLConfig(), {"agent.perturb.kind": "none"}), unused("rl"))
    space = {"agent.moe.aux_scale": {"low": 0.01, "high": 0.1}}
    with pytest.raises(UserError, match=r"agent\.moe\.aux_scale: does nothing .* --agent\.actor moe"):
        refuse_idle(space, tree.changed(RLConfig(), {"agent.actor": "dense"}), unused("rl"))
