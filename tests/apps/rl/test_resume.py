"""`kill -9`, then the same command with `--ckpt_path last`: what an uninterrupted run would have given, bit for bit."""

from __future__ import annotations

import shutil
import signal

import pytest
import torch

from tests.apps.processes import start
from tests.apps.timeseries.conftest import differences

KINDS = {
    "one": {},
    "value": {"agent__value": "true", "agent__noise__schedule": "max", "collect__num_envs": 2},
}


@pytest.mark.parametrize(("kind", "kills"), [("one", [2, 7, 13]), ("value", [9])])
def test_a_run_killed_at_any_update_ends_as_if_it_had_not_been(rl, small, tmp_path, kind, kills):
    def command(run: str) -> list[str]:
        return ["train", *small(tmp_path, run__name=run, run__checkpoint_every=3, **KINDS[kind])]

    whole, other = tmp_path / "rl" / "whole", tmp_path / "rl" / "killed"
    assert rl(*command("whole")).code == 0
    argv = command("killed")
    for update in kills:
        assert start(argv, tmp_path / "log", kill_at_batch=update, app="rl").wait() == -signal.SIGKILL
        if (other / "checkpoints" / "last.ckpt").is_file():
            argv = [*command("killed"), "--ckpt_path", "last"]
        else:
            shutil.rmtree(other)
    assert "--ckpt_path" in argv
    done = rl(*argv)
    assert (done.code, done.err) == (0, "")
    a, b = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, other))
    for part in ("state_dict", "optimizer_states", "loops", "global_step", "agent", "events"):
        assert not list(differences(a[part], b[part], part)), part
    assert (whole / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
    assert (whole / "test.json").read_text() == (other / "test.json").read_text()
