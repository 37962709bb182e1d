"""A tiny trained run that every verb is tried on, and what it takes to compare runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

RECIPE = Path(__file__).parents[3] / "configs" / "vision" / "tiny.yaml"


@pytest.fixture(scope="session")
def tiny_run(cli, tmp_path_factory) -> Path:
    """The folder of `train -c configs/vision/tiny.yaml`, with its report; tests only read it."""
    root = tmp_path_factory.mktemp("runs")
    done = cli("train", "-c", RECIPE, "--run.root", root, "--trainer.accelerator", "cpu", "--json", root / "t.json")
    assert (done.code, done.err) == (0, "")
    assert json.loads((root / "t.json").read_text()) == json.loads((root / "vision/tiny/test.json").read_text())
    return root / "vision" / "tiny"


@pytest.fixture(scope="session")
def load() -> Callable[[Path, str], dict[str, Any]]:
    """A checkpoint of a run as plain data."""

    def read(run: Path, name: str = "last.ckpt") -> dict[str, Any]:
        return torch.load(run / "checkpoints" / name, weights_only=True)

    return read


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Where two trees of plain data and tensors differ, bit for bit."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)):
            yield path
    elif isinstance(a, dict) and isinstance(b, dict):
        yield from (f"{path}/{key}" for key in a.keys() ^ b.keys())
        for key in a.keys() & b.keys():
            yield from differences(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{path}/{i}")
    elif a != b:
        yield path


@pytest.fixture(scope="session")
def same_state(load) -> Callable[[Path, Path], None]:
    """Asserts that the last checkpoints of two runs hold the same training state, bit for bit."""

    def check(first: Path, second: Path) -> None:
        a, b = load(first), load(second)
        assert a.keys() == b.keys()
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "epoch", "global_step", "images"):
            assert not list(differences(a[part], b[part], part))
        for part in ("current_model_state", "averaging_state"):
            assert not list(differences(a.get(part), b.get(part), part))

    return check
