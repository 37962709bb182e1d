"""Training of several tasks: killed and resumed, weights of the tasks, labels that are missing."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from apps.curves import read_curves
from tests.apps.processes import start
from tests.apps.vision.conftest import differences
from tests.apps.vision.multitask.drawn_folders import draw_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
EPOCHS = {"trainer__max_epochs": 3, "run__checkpoint_every": 2}
KINDS = {
    "dwa": {"tasks__weighting": "dwa", "optim__ema_decay": 0.9},
    "gradnorm": {"tasks__weighting": "gradnorm", "data__scenes__labels_per_image": "half"},
    "uncertainty": {
        "tasks__weighting": "uncertainty",
        "tasks__specialise": 0.1,
        "data__balance_tasks": True,
        "model__moe__score_options": "{noise_std: 1.0}",
        "model__moe_layers": "all",
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_any_batch_ends_as_if_it_had_not_been(tiny_tasks, cli, tmp_path, load, kind):
    def argv(name: str) -> list[str]:
        return ["train", *tiny_tasks(tmp_path, run__name=name, **EPOCHS, **KINDS[kind])]

    assert cli(*argv("whole")).code == 0
    whole, killed = tmp_path / "vision" / "whole", tmp_path / "vision" / "killed"
    command = argv("killed")
    for batch in (3, 5, 11):  # after a checkpoint within an epoch, at the end of an epoch, within the last
        assert start(command, tmp_path / "log", kill_at_batch=batch).wait() == -signal.SIGKILL
        command = [*argv("killed"), "--ckpt_path", "last"]
    done = cli(*command)
    assert (done.code, done.err) == (0, "")
    a, b = load(whole), load(killed)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "scenes"):
        assert not list(differences(a[part], b[part], part))
    assert (whole / "metrics.csv").read_text() == (killed / "metrics.csv").read_text()
    figures = [json.loads((run / "test.json").read_text()) for run in (whole, killed)]
    for values in figures:
        values.pop("images_per_second")
    assert str(figures[0]) == str(figures[1])


def column(run: Path, name: str) -> list[float]:
    """What was logged of a figure, step by step."""
    return [row[name] for row in read_curves(run / "metrics.csv") if name in row]


@pytest.mark.parametrize("weighting", ["uncertainty", "dwa", "gradnorm"])
def test_weights_move_and_are_logged(tiny_tasks, cli, tmp_path, weighting):
    assert cli("train", *tiny_tasks(tmp_path, tasks__weighting=weighting, trainer__max_epochs=4)).code == 0
    values = column(tmp_path / "vision" / "scenes", "train/depth/weight")
    assert values[0] == pytest.approx(1.0, rel=0.1)
    assert len(set(values)) > 1


def test_one_task_alone_is_trained(tiny_tasks, cli, tmp_path):
    assert cli("train", *tiny_tasks(tmp_path, tasks__names="depth")).code == 0
    figures = json.loads((tmp_path / "vision" / "scenes" / "test.json").read_text())
    assert {name.split("/")[0] for name in figures if "/" in name} == {"depth", "routing"}


def test_specialising_gives_each_task_experts_of_its_own(tiny_tasks, cli, tmp_path):
    """Two tasks, one expert a token: the information that the router's probabilities have of the task nears log 2."""
    given = {"trainer__max_epochs": 12, "optim__lr": 0.03, "model__moe__aux_loss": "{}", "tasks__specialise": 5.0}
    given |= {"model__moe__top_k": 1, "tasks__names": "depth,edges"}
    assert cli("train", *tiny_tasks(tmp_path, **given)).code == 0
    information = column(tmp_path / "vision" / "scenes", "train/task_information")
    assert information[0] < 0.05
    assert information[-1] > 0.6
    figures = json.loads((tmp_path / "vision" / "scenes" / "test.json").read_text())
    assert figures["routing/backbone.blocks.1.mlp/task_specialisation"] > 0.8


def test_labels_of_another_architecture_do_not_resume(tiny_tasks, cli, tmp_path):
    assert cli("train", *tiny_tasks(tmp_path, run__name="a")).code == 0
    line = cli("train", *tiny_tasks(tmp_path, run__name="a", model__embed_dim=24), "--ckpt_path=last").line
    assert "of another architecture" in line


def test_training_on_a_folder_in_the_layout_of_nyud(tiny_tasks, cli, tmp_path):
    root = tmp_path / "nyud"
    draw_folder("nyud", root)
    given = {"data__dataset": "nyud", "data__root": root, "trainer__limit_train_batches": 2}
    done = cli("train", *tiny_tasks(tmp_path, **given))
    assert done.code == 0, done.err
    figures = json.loads((tmp_path / "vision" / "nyud" / "test.json").read_text())
    assert {"semseg/miou", "depth/rmse", "normals/mean_angle", "edges/odsf"} <= figures.keys()
    shutil.rmtree(root / "normals")
    line = cli("train", *tiny_tasks(tmp_path, **given, tasks__names="semseg,normals")).line
    assert line.startswith(f"data.root={root}: no folder normals/ with labels of task normals")


@pytest.mark.slow
def test_the_default_scenes_are_learned(cli, tmp_path):
    """The recipe of the quickstart, start to end."""
    done = cli("train", "-c", "configs/vision/m3vit_scenes.yaml", "--run.root", tmp_path)
    assert done.code == 0, done.err
    figures = json.loads((tmp_path / "vision" / "m3vit_scenes" / "test.json").read_text())
    assert figures["depth/rmse"] < 1.0
    assert figures["normals/mean_angle"] < 25
    assert torch.isfinite(torch.tensor([v for v in figures.values() if isinstance(v, float)])).all()
