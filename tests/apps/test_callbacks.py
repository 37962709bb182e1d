"""What training does besides training, on a model of one weight."""

from __future__ import annotations

import errno
import math
import resource

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from apps.callbacks import AveragedWeights, BestCheckpoint, CheckpointFiles, ResumePoints, StepSeeds, StopOnNaN
from apps.curves import CurveLogger, read_curves
from apps.errors import UserError
from apps.runs import LAST, load_plain
from apps.settings import RunConfig
from apps.training import prepare_process


class Toy(LightningModule):
    """Learns to output zero; `losses` replaces the loss of single batches."""

    def __init__(self, losses=None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.losses = losses or {}
        self.seen: list[torch.Tensor] = []
        self.weights: list[float] = []
        self.draws: list[float] = []

    def training_step(self, batch, index):
        self.draws.append(float(torch.rand(())))
        self.seen.append(batch)
        loss = self.layer(batch).square().mean()
        return self.losses.get(len(self.seen) - 1, lambda x: x)(loss)

    def on_train_batch_end(self, *args):
        self.weights.append(self.layer.weight.item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Scored(Toy):
    """Validates to the given score of each epoch."""

    def __init__(self, scores) -> None:
        super().__init__()
        self.scores = scores

    def validation_step(self, batch, index):
        self.log("score", self.scores[self.trainer.current_epoch], batch_size=1)


def train(module: Toy, folder, *callbacks: Callback, batches=6, plugins=(), **options) -> Trainer:
    prepare_process(RunConfig())
    data = DataLoader(torch.linspace(1, 2, batches)[:, None], batch_size=1)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=options.pop("max_epochs", 1),
        default_root_dir=folder,
        callbacks=list(callbacks),
        plugins=[CheckpointFiles(), *plugins],
        logger=options.pop("logger", False),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        **options,
    )
    trainer.fit(module, data, data if isinstance(module, Scored) else None)
    return trainer


@pytest.mark.parametrize("decay", [0.2, 0.9])
def test_average_warms_up_and_ends_in_the_model(tmp_path, decay):
    module = Toy()
    train(module, tmp_path, AveragedWeights(decay), batches=8)
    average = module.weights[0]
    for updates, weight in enumerate(module.weights[1:], 1):
        kept = min(decay, (1 + updates) / (10 + updates))
        average = kept * average + (1 - kept) * weight
    assert module.layer.weight.item() == pytest.approx(average, rel=1e-5)
    assert average != pytest.approx(module.weights[-1], rel=1e-3)


@pytest.mark.parametrize(
    ("broken", "word"),
    [
        (lambda loss: loss * math.nan, "NaN"),
        (lambda loss: loss * math.inf, "infinite|NaN"),
        (lambda loss: (loss - loss.detach()).sqrt(), "infinite|NaN"),  # a finite loss with an infinite gradient
    ],
)
def test_nan_stops_before_the_weights_are_touched_and_names_the_step(tmp_path, broken, word):
    module = Toy({4: broken})
    with pytest.raises(UserError) as stopped:
        train(module, tmp_path, StopOnNaN(tmp_path), ResumePoints(tmp_path, 3))
    line = str(stopped.value)
    assert line.startswith("step 4: loss or gradients are ")
    assert any(name in line for name in word.split("|"))
    assert str(tmp_path / LAST) in line
    assert "try a lower learning rate" in line
    assert math.isfinite(module.layer.weight.item())
    assert load_plain(tmp_path / LAST)["global_step"] == 3


def test_nan_before_any_checkpoint_says_so(tmp_path):
    with pytest.raises(UserError, match=r"step 0: .* no checkpoint had been written yet"):
        train(Toy({0: lambda loss: loss * math.nan}), tmp_path, StopOnNaN(tmp_path))


@pytest.mark.parametrize("losses", [{}, {2: lambda loss: loss * math.nan}])
def test_fp16_may_overflow_but_not_lose_its_loss(tmp_path, losses):
    """The scaler starts far too high, so that the first gradients overflow: it skips those steps and goes lower."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    module = Toy(losses)
    if losses:
        with pytest.raises(UserError, match="step 2: loss or gradients are NaN"):
            train(module, tmp_path, StopOnNaN(tmp_path), plugins=[precision])
    else:
        train(module, tmp_path, StopOnNaN(tmp_path), plugins=[precision])
        assert scaler.get_scale() < 2.0**127
        assert len(module.seen) == 6
        assert module.weights[-1] != module.weights[0]


@pytest.mark.parametrize(
    ("every", "accumulate", "steps"),
    [(2, 1, [2, 4, 5, 6, 8, 10]), (3, 1, [3, 5, 6, 9, 10]), (100, 1, [5, 10]), (1, 2, [1, 2, 3, 4, 5, 6])],
)
def test_resume_points_are_every_so_many_steps_and_each_epoch_end(tmp_path, monkeypatch, every, accumulate, steps):
    saved = []
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda self, path: saved.append((self.global_step, path)))
    points = ResumePoints(tmp_path, every)
    train(Toy(), tmp_path, points, batches=5, max_epochs=2, accumulate_grad_batches=accumulate)
    assert saved == [(step, tmp_path / LAST) for step in steps]


@pytest.mark.parametrize("validate", [1, 2, 5])
def test_what_a_resumed_run_will_not_log_again_is_on_disk_before_its_checkpoint(tmp_path, monkeypatch, validate):
    class Logging(Scored):
        def training_step(self, batch, index):
            self.log("loss", loss := super().training_step(batch, index), batch_size=1)
            return loss

    def save(trainer, path):
        rows = {row["step"]: row for row in read_curves(tmp_path / "metrics.csv")}
        kept.append(
            (trainer.global_step, "loss" in rows[trainer.global_step - 1], sum("score" in r for r in rows.values()))
        )

    kept: list[tuple[int, bool, int]] = []
    monkeypatch.setattr(Trainer, "save_checkpoint", save)
    options = {"max_epochs": 2, "val_check_interval": validate, "log_every_n_steps": 1, "logger": CurveLogger(tmp_path)}
    train(Logging([1.0, 2.0]), tmp_path, ResumePoints(tmp_path, 2), batches=5, **options)
    assert [(step, logged) for step, logged, _ in kept] == [(step, True) for step in (2, 4, 5, 6, 8, 10)]
    assert [scores for *_, scores in kept] == [step // 5 * (5 // validate) + step % 5 // validate for step, *_ in kept]


@pytest.mark.parametrize(
    ("mode", "scores", "best"),
    [("max", [0.1, 0.5, 0.5, 0.4], 2), ("min", [0.5, 0.1, 0.2, 0.1], 3), ("max", [0.5, 0.4, 0.3, 0.2], 0)],
)
def test_of_equally_good_checkpoints_the_later_is_kept(tmp_path, mode, scores, best):
    train(Scored(scores), tmp_path, BestCheckpoint(tmp_path / "kept", "score", mode), max_epochs=4)
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["best.ckpt"]
    assert load_plain(tmp_path / "kept" / "best.ckpt")["epoch"] == best


def test_every_batch_draws_its_own_numbers_whatever_was_drawn_before(tmp_path):
    class Disturb(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            torch.rand(index * 7)

    first, second, other = Toy(), Toy(), Toy()
    train(first, tmp_path, StepSeeds(5), max_epochs=2)
    train(second, tmp_path, Disturb(), StepSeeds(5), max_epochs=2)
    train(other, tmp_path, StepSeeds(6), max_epochs=2)
    assert first.draws == second.draws
    assert len(set(first.draws + other.draws)) == 24


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    files, path = CheckpointFiles(), tmp_path / "deep" / "last.ckpt"
    files.save_checkpoint({"a": torch.ones(3)}, path)
    with pytest.raises(AttributeError, match="pickle"):
        files.save_checkpoint({"a": torch.zeros(3), "b": lambda: None}, path)
    assert torch.equal(files.load_checkpoint(path)["a"], torch.ones(3))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


@pytest.fixture
def quota():
    """Sets a size beyond which no file can grow, until the test ends."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1_000, 70_000, 200_000, 390_000])
def test_a_full_disk_is_an_error_that_says_so_and_names_the_file(tmp_path, quota, size):
    """Wherever in the file it comes; torch itself speaks of unexpected positions."""
    files, path = CheckpointFiles(), tmp_path / "last.ckpt"
    files.save_checkpoint({"a": torch.ones(3)}, path)
    quota(size)
    for tensors in ({"a": torch.zeros(100_000)}, {str(i): torch.zeros(100) for i in range(1000)}):
        with pytest.raises(OSError, match="File too large") as full:
            files.save_checkpoint(tensors, path)
        assert full.value.errno == errno.EFBIG
    assert torch.equal(files.load_checkpoint(path)["a"], torch.ones(3))
