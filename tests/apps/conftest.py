"""What the tests of all apps share: command lines run in this process, and images to run them on."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apps.cli import App, main
from apps.vision import APP

TINY = {
    "model.backbone": "vit_micro",
    "model.stem": "patch",
    "model.embed_dim": "16",
    "model.depth": "2",
    "model.num_heads": "2",
    "model.moe_layers": "all",
    "model.moe.num_experts": "4",
    "model.moe.top_k": "2",
    "data.batch_size": "32",
    "data.mixup": "0.0",
    "data.cutmix": "0.0",
    "optim.lr": "0.002",
    "optim.ema_decay": "null",
    "trainer.accelerator": "cpu",
    "trainer.max_epochs": "1",
    "trainer.limit_train_batches": "3",
    "trainer.log_every_n_steps": "1",
    "trainer.enable_progress_bar": "false",
    "run.report": "false",
}
"""Half a second of training; what the tests rely on is written out, so that other defaults change nothing."""


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The error, once it is clear that it is one line, without its prefix."""
        assert self.code == 2, f"exit code {self.code}\n{self.out[-2000:]}\n{self.err[-2000:]}"
        assert self.err.startswith("error: "), self.err
        assert self.err.endswith("\n"), self.err
        assert self.err.count("\n") == 1, self.err
        return self.err.removeprefix("error: ").rstrip("\n")


def run(*argv: object, app: App = APP) -> Result:
    """Run `python -m apps.<app> ARGV` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(app, [str(arg) for arg in argv])
    return Result(code, out.getvalue(), err.getvalue())


def flags(settings: Mapping[str, object]) -> list[str]:
    """`--name=value` of each setting."""
    return [f"--{name}={value}" for name, value in settings.items()]


def flags_of(tiny: Mapping[str, object]) -> Callable[..., list[str]]:
    """Makes the flags of a small run below a folder; keyword arguments change its settings, `__` for dots."""

    def make(root: Path, **changes: object) -> list[str]:
        given = {name.replace("__", "."): value for name, value in changes.items()}
        return flags({**tiny, "run.root": root, **given})

    return make


@pytest.fixture(scope="session")
def cli() -> Callable[..., Result]:
    """Runs a command line in this process."""
    return run


@pytest.fixture(scope="session")
def tiny() -> Callable[..., list[str]]:
    """Flags of a run that takes half a second; keyword arguments change them, `__` for dots."""
    return flags_of(TINY)


@pytest.fixture(scope="session")
def train(cli, tiny) -> Callable[..., Path]:
    """Trains a tiny model below a folder and returns the run's folder; keyword arguments are settings."""

    def call(root: Path, *argv: str, **changes: object) -> Path:
        before = set((root / "vision").glob("*"))
        done = cli("train", *tiny(root, **changes), *argv)
        assert done.code == 0, done.err
        (folder,) = set((root / "vision").glob("*")) - before
        return folder

    return call


@pytest.fixture(scope="session")
def draw() -> Callable[..., Path]:
    """Draws images of one class into a folder: bright ones for class number 0, darker ones for the next."""

    def make(
        folder: Path,
        count: int,
        number: int = 0,
        size: tuple[int, int] = (12, 12),
        mode: str = "RGB",
        suffix: str = ".png",
        sizes: Sequence[tuple[int, int]] = (),
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number)
        for i in range(count):
            width, height = sizes[i % len(sizes)] if sizes else size
            pixels = noise.integers(0, 60, (height, width, 3), dtype=np.uint8) + np.uint8(max(0, 190 - 90 * number))
            image = Image.fromarray(pixels).convert(mode)
            image.save(folder / f"{i}{suffix}")
        return folder

    return make
