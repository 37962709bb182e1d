"""`kill -9`, then the same command with `--ckpt_path last`: what an uninterrupted run would have given, bit for bit."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch

from tests.apps.processes import start
from tests.apps.timeseries.conftest import differences

KINDS = {
    "home": {"model__name": "home", "model__home__experts__dropout": 0.2, "optim__ema_decay": 0.9},
    "tables": {"model__name": "aw_moe", "optim__tables": "adagrad", "optim__dense_rows": 0, "loss__balancing": "dwa"},
}


@pytest.mark.parametrize(("kind", "kills"), [("home", [1, 3, 7]), ("tables", [6])])
def test_a_run_killed_at_any_batch_ends_as_if_it_had_not_been(rec, small, tmp_path, kind, kills):
    def command(run: str) -> list[str]:
        given = {"trainer__max_epochs": 2, "trainer__limit_train_batches": 5, "run__checkpoint_every": 2}
        return ["train", *small(tmp_path, run__name=run, data__rows=1500, **given, **KINDS[kind])]

    whole, other = tmp_path / "recsys" / "whole", tmp_path / "recsys" / "killed"
    assert rec(*command("whole")).code == 0
    argv = command("killed")
    for batch in kills:
        assert start(argv, tmp_path / "log", kill_at_batch=batch, app="recsys").wait() == -signal.SIGKILL
        if (other / "checkpoints" / "last.ckpt").is_file():
            argv = [*command("killed"), "--ckpt_path", "last"]
        else:
            shutil.rmtree(other)
    assert "--ckpt_path" in argv
    done = rec(*argv)
    assert (done.code, done.err) == (0, "")
    a, b = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, other))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "transform"):
        assert not list(differences(a[part], b[part], part))
    assert (whole / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
    figures = [json.loads((run / "test.json").read_text()) for run in (whole, other)]
    assert all(values.pop("rows_per_second") > 0 for values in figures)
    assert figures[0] == figures[1]
