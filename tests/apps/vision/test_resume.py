"""`kill -9`, then the same command with `--ckpt_path last`: what an uninterrupted run would have given, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.apps.processes import start

# Loader processes are forked from a process with threads, of pytest's too, which newer versions of Python warn about.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
ALL_THAT_DRAWS = {
    "model__drop_rate": 0.1,
    "model__drop_path_rate": 0.1,
    "model__moe__score": "noisy",
    "model__moe__controller": "loss_free",
    "data__mixup": 0.5,
    "data__rand_augment": 1,
    "data__num_workers": 1,
    "optim__ema_decay": 0.9,
}
KINDS = {
    "plain": {},
    "everything": ALL_THAT_DRAWS,
    "accumulating": {"trainer__accumulate_grad_batches": 2, "optim__ema_decay": 0.9},
    "validating-within": {"trainer__val_check_interval": 2},
}


@pytest.fixture
def command(tiny, tmp_path):
    """The command of a run of 3 epochs of 5 batches with a checkpoint every 2 steps."""

    def make(name: str, kind: str) -> list[str]:
        given = {"trainer__max_epochs": 3, "trainer__limit_train_batches": 5, "run__checkpoint_every": 2}
        return ["train", *tiny(tmp_path, run__name=name, **given | KINDS[kind])]

    return make


def same_files(first: Path, second: Path) -> None:
    assert (first / "metrics.csv").read_text() == (second / "metrics.csv").read_text()
    figures = [json.loads((run / "test.json").read_text()) for run in (first, second)]
    for values in figures:
        values.pop("images_per_second")
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("plain", [3]),  # a batch after a checkpoint within an epoch
        ("plain", [5, 5]),  # right after the end of an epoch, twice
        ("everything", [4, 9]),  # right after a checkpoint within an epoch, then within the next
        ("accumulating", [1, 6, 7]),  # before there is a checkpoint, then in the middle of a step, twice
        ("validating-within", [4, 8]),
    ],
)
def test_a_run_killed_at_any_batch_ends_as_if_it_had_not_been(command, cli, tmp_path, same_state, load, kind, kills):
    whole, killed = tmp_path / "vision" / "whole", tmp_path / "vision" / "killed"
    assert cli(*command("whole", kind)).code == 0
    argv = command("killed", kind)
    for batch in kills:
        assert start(argv, tmp_path / "log", kill_at_batch=batch).wait() == -signal.SIGKILL
        if (killed / "checkpoints" / "last.ckpt").is_file():
            argv = [*command("killed", kind), "--ckpt_path", "last"]
        else:
            shutil.rmtree(killed)
    done = cli(*argv)
    assert (done.code, done.err) == (0, "")
    assert [path.name for path in sorted((tmp_path / "vision").iterdir())] == ["killed", "whole"]
    same_state(whole, killed)
    same_files(whole, killed)
    best = [load(run, "best.ckpt")["state_dict"] for run in (whole, killed)]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])


def test_a_run_killed_from_outside_ends_as_if_it_had_not_been(command, cli, tmp_path, same_state):
    """Whenever the signal comes: here some time after the first checkpoint has appeared."""
    argv = command("killed", "everything")
    victim = start(argv, tmp_path / "log")
    last = tmp_path / "vision" / "killed" / "checkpoints" / "last.ckpt"
    limit = time.monotonic() + 400
    while not last.is_file():
        assert time.monotonic() < limit
        assert victim.process.is_alive(), victim.err
        time.sleep(0.005)
    os.kill(victim.process.pid, signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert not (last.parents[1] / "test.json").exists()
    assert cli(*argv, "--ckpt_path", "last").code == 0
    assert cli(*command("whole", "everything")).code == 0
    same_state(tmp_path / "vision" / "whole", tmp_path / "vision" / "killed")
    same_files(tmp_path / "vision" / "whole", tmp_path / "vision" / "killed")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_an_interrupted_run_says_how_to_go_on(command, tmp_path, sent, code):
    argv = [*command("stopped", "plain"), "--trainer.max_epochs", "10000"]
    running = start(argv, tmp_path / "log")
    last = tmp_path / "vision" / "stopped" / "checkpoints" / "last.ckpt"
    limit = time.monotonic() + 400
    while not last.is_file():
        assert time.monotonic() < limit
        time.sleep(0.01)
    os.kill(running.process.pid, sent)
    assert running.wait() == code
    assert running.err.strip().splitlines()[-1] == "interrupted; `--ckpt_path last` continues a training run"


def test_a_finished_run_resumed_is_finished(command, cli, tmp_path, load):
    argv = command("done", "plain")
    assert cli(*argv).code == 0
    before = load(tmp_path / "vision" / "done")["global_step"]
    assert cli(*argv, "--ckpt_path", "last").code == 0
    assert load(tmp_path / "vision" / "done")["global_step"] == before


def test_a_finished_run_goes_on_with_more_epochs(command, cli, tmp_path, load):
    argv = command("more", "plain")
    assert cli(*argv).code == 0
    folder = tmp_path / "vision" / "more"
    assert cli(*argv, "--ckpt_path", folder, "--trainer.max_epochs", "4").code == 0
    assert load(folder)["global_step"] == 20
    assert (folder / "config.yaml").read_text().count("max_epochs: 4") == 1


def test_resuming_takes_the_settings_of_a_run_that_is_named(command, cli, tmp_path, load):
    argv = command("named", "plain")
    start(argv, tmp_path / "log", kill_at_batch=7).wait()
    done = cli("train", "--ckpt_path", tmp_path / "vision" / "named")
    assert done.code == 0, done.err
    assert load(tmp_path / "vision" / "named")["global_step"] == 15


def test_what_is_resumed_must_be_of_the_same_architecture(command, cli, tmp_path):
    argv = command("other", "plain")
    start(argv, tmp_path / "log", kill_at_batch=3).wait()
    line = cli(*argv, "--ckpt_path", "last", "--model.embed_dim=32").line
    assert "of another architecture" in line
    assert "[4, 16, 8] there" in line or "there," in line
    assert cli(*command("nothing", "plain"), "--ckpt_path", "last").line.startswith(
        "ckpt_path=last: no run named nothing"
    )
