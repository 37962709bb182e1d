"""From settings to an optimiser and a trainer."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from apps import tree
from apps.callbacks import AveragedWeights, BestCheckpoint, ResumePoints
from apps.errors import ConfigError, UserError
from apps.runs import Runs
from apps.settings import EarlyStopConfig, OptimConfig, RunConfig, TrainerConfig
from apps.training import check_fits, count_steps, make_optimizer, make_trainer, new_folder, save_settings
from apps.vision.settings import VisionConfig


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embed, self.cls_token = nn.Parameter(torch.zeros(1, 4, 8)), nn.Parameter(torch.zeros(1, 1, 8))
        self.norm, self.linear, self.experts = nn.LayerNorm(8), nn.Linear(8, 8), nn.ParameterDict()
        self.experts["weight"], self.experts["bias"] = (
            nn.Parameter(torch.zeros(4, 8, 8)),
            nn.Parameter(torch.zeros(4, 8)),
        )
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)


def rates(optim: OptimConfig, steps: int, default_lr: float = 1.0) -> list[float]:
    """The learning rate that each step uses."""
    made = make_optimizer(Model(), optim, steps, default_lr)
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def test_only_matrices_decay():
    model = Model()
    optimizer = make_optimizer(model, OptimConfig(lr=0.5, weight_decay=0.3, betas=(0.8, 0.9)), 10, 1.0)["optimizer"]
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert decayed == {"linear.weight", "experts.weight"}
    assert plain == {"pos_embed", "cls_token", "norm.weight", "norm.bias", "linear.bias", "experts.bias"}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}
    assert isinstance(optimizer, torch.optim.AdamW)


def test_the_rate_warms_up_linearly_and_falls_as_a_cosine():
    used = rates(OptimConfig(lr=2.0, warmup=4, min_lr=0.1), 20)
    assert used[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    cosine = [2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 4) / 16))) for step in range(4, 20)]
    assert used[4:] == pytest.approx(cosine)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.floats(0, 100), st.floats(0, 1))
def test_the_rate_stays_between_zero_and_its_peak(steps, warmup, min_lr):
    used = rates(OptimConfig(lr=1.0, warmup=warmup, min_lr=min_lr), steps)
    assert all(0 <= rate <= 1 + 1e-9 for rate in used)
    peak = max(range(steps), key=used.__getitem__)
    assert used[: peak + 1] == sorted(used[: peak + 1])
    assert used[peak:] == sorted(used[peak:], reverse=True)
    assert used[0] > 0


def test_warmup_below_one_is_a_share_and_a_rate_left_open_is_the_models():
    assert rates(OptimConfig(lr=1.0, warmup=0.5), 8) == rates(OptimConfig(lr=1.0, warmup=4), 8)
    assert rates(OptimConfig(lr=None), 8, default_lr=0.5) == rates(OptimConfig(lr=0.5), 8)


def limits(**changes: object) -> SimpleNamespace:
    given = {"accumulate_grad_batches": 1, "max_epochs": 1, "max_steps": -1}
    return SimpleNamespace(**given | {"val_check_interval": None, "check_val_every_n_epoch": 1} | changes)


@pytest.mark.parametrize(
    ("changes", "batches", "steps"),
    [
        ({}, 10, 10),
        ({"max_epochs": 3}, 10, 30),
        ({"max_epochs": 3, "max_steps": 7}, 10, 7),
        ({"max_epochs": 3, "max_steps": 99}, 10, 30),
        ({"max_epochs": -1, "max_steps": 99}, 10, 99),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, 10, 6),
        ({"val_check_interval": 10}, 10, 10),
        ({"val_check_interval": 0.5}, 10, 10),
        ({"val_check_interval": 11, "check_val_every_n_epoch": None}, 10, 10),
    ],
)
def test_steps_of_the_whole_training(changes, batches, steps):
    assert count_steps(limits(**changes), batches) == steps


@pytest.mark.parametrize(
    ("changes", "batches", "line"),
    [
        ({}, 0, "data: not one training batch per epoch and process; .*"),
        ({"max_epochs": -1}, 10, r"trainer\.max_epochs=-1: give trainer\.max_steps, .*"),
        ({"val_check_interval": 11}, 10, r"trainer\.val_check_interval=11: an epoch has only 10 batches"),
    ],
)
def test_training_without_steps_or_end_is_refused(changes, batches, line):
    with pytest.raises(UserError, match=f"^{line}$"):
        count_steps(limits(**changes), batches)


def trainer(folder, optim: OptimConfig | None = None, stop: EarlyStopConfig | None = None, **changes: object):
    run = RunConfig(early_stop=stop or EarlyStopConfig())
    config = TrainerConfig(**{"accelerator": "cpu"} | changes)
    return make_trainer(config, run, (optim or OptimConfig(ema_decay=None)).ema_decay, folder, "val/accuracy", "max")


def kinds(made) -> set[type]:
    return {type(callback) for callback in made.callbacks}


def test_callbacks_follow_the_settings(tmp_path):
    assert not kinds(trainer(tmp_path)) & {AveragedWeights, EarlyStopping}
    full = trainer(tmp_path, OptimConfig(ema_decay=0.9), EarlyStopConfig(3, 0.01))
    assert kinds(full) >= {AveragedWeights, EarlyStopping, ResumePoints, BestCheckpoint}
    order = [type(callback) for callback in full.callbacks]
    assert order.index(AveragedWeights) < order.index(ResumePoints)  # or what is saved lacks a step of the average
    assert BestCheckpoint not in kinds(trainer(tmp_path, limit_val_batches=0))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"accelerator": "abacus"}, "trainer: .*accelerator='abacus'.*"),
        ({"devices": 0}, r"trainer: `Trainer\(devices=0\)`.*"),
        ({"precision": "12-mixed"}, "trainer: Precision '12-mixed' is invalid.*"),
        ({"max_time": "soon"}, r"trainer: `Timer\(duration='soon'\)` is not a valid duration.*"),
        ({"limit_train_batches": 1.5}, r"trainer: .*1\.5.*limit_train_batches.*"),
    ],
)
def test_what_lightning_refuses_is_one_line(tmp_path, changes, line):
    with pytest.raises(UserError) as refused:
        trainer(tmp_path, **changes)
    assert re.fullmatch(line, str(refused.value))


def test_early_stopping_needs_validation(tmp_path):
    with pytest.raises(ConfigError, match=r"^run\.early_stop\.patience=1: needs trainer\.limit_val_batches above 0$"):
        trainer(tmp_path, stop=EarlyStopConfig(1), limit_val_batches=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_epochs", 0), ("max_epochs", -2), ("max_steps", 0), ("limit_train_batches", 0), ("val_check_interval", 0.0),
     ("accumulate_grad_batches", 0), ("gradient_clip_val", 0.0), ("log_every_n_steps", 0)],
)  # fmt: skip
def test_settings_that_would_train_nothing_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"^{field}="):
        TrainerConfig(**{field: value})


def test_only_the_first_process_makes_a_folder(tmp_path, monkeypatch):
    runs = Runs(str(tmp_path), "vision")
    assert new_folder(runs, "a").is_dir()
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert new_folder(runs, "b") == runs.folder / "b"
    assert [path.name for path in runs.folder.iterdir()] == ["a"]


def test_settings_are_kept_as_a_file_that_reads_back(tmp_path):
    config = VisionConfig()
    config.run.name = "größe: 3"
    save_settings(config, tmp_path)
    assert tree.build(VisionConfig, yaml.safe_load((tmp_path / "config.yaml").read_text())) == config


def test_weights_of_another_architecture_are_named(tmp_path):
    state = Model().state_dict()
    check_fits(state, Model(), tmp_path)
    with pytest.raises(UserError, match=r"1 tensors differ; linear\.weight is \[9, 8\] there, \[8, 8\] here"):
        check_fits(state | {"linear.weight": torch.zeros(9, 8)}, Model(), tmp_path)
    with pytest.raises(UserError, match=r"extra is \[2\] there, absent here"):
        check_fits(state | {"extra": torch.zeros(2)}, Model(), tmp_path)
    del state["norm.bias"]
    with pytest.raises(UserError, match=r"norm\.bias is absent there, \[8\] here"):
        check_fits(state, Model(), tmp_path)
