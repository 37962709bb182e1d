"""Data-parallel training: several processes, one run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from apps.curves import read_curves

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_two_processes_train_one_model_and_write_once(tiny, tmp_path, load):
    argv = tiny(tmp_path, run__name="two", trainer__max_epochs=2, data__batch_size=16)
    command = [sys.executable, "-m", "apps.vision", "train", *argv, "--trainer.devices=2"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder: ") == 1
    assert done.stdout.count("\ntest\n") == 1
    (run,) = (tmp_path / "vision").iterdir()
    assert run.name == "two"
    assert len(list((run / "tensorboard").glob("events*"))) == 1
    assert sorted(file.name for file in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    checkpoint = load(run)
    assert checkpoint["global_step"] == 6
    assert [row["step"] for row in read_curves(run / "metrics.csv")] == list(range(6))

    more = subprocess.run(
        [*command, "--trainer.max_epochs=3", "--ckpt_path", "last"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert more.returncode == 0, more.stderr
    assert load(run)["global_step"] == 9
    assert [path.name for path in (tmp_path / "vision").iterdir()] == ["two"]
