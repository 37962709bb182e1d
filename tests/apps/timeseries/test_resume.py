"""`kill -9`, then the same command with `--ckpt_path last`: what an uninterrupted run would have given, bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.apps.processes import start
from tests.apps.timeseries.conftest import differences

KINDS = {
    "segmoe": {
        "model__segmoe__dropout": 0.2,
        "model__segmoe__drop_path": 0.3,
        "model__segmoe__router_dropout": 0.3,
        "optim__ema_decay": 0.9,
    },
    "moirai_moe": {"model__moirai_moe__dropout": 0.2, "optim__ema_decay": 0.9},
    "corpora": {
        "model__name": "timemoe",
        "data__corpora": "{synthetic: 2, train: 1}",
        "data__corpus_length": 32,
        "data__synthetic_series": 6,
        "data__corpus_size": 200,
        "trainer__accumulate_grad_batches": 2,
    },
}


@pytest.fixture
def command(small, tmp_path):
    """The command of a run of 2 epochs of 5 batches with a checkpoint every 2 steps."""

    def make(run: str, kind: str) -> list[str]:
        given = {"trainer__max_epochs": 2, "trainer__limit_train_batches": 5, "run__checkpoint_every": 2}
        name = {} if "model__name" in KINDS[kind] else {"model__name": kind}
        return ["train", *small(tmp_path, run__name=run, **given | name | KINDS[kind])]

    return make


def killed(argv: list[str], log: Path, batch: int) -> None:
    assert start(argv, log, kill_at_batch=batch, app="timeseries").wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("segmoe", [1, 3, 7]),  # before there is a checkpoint, after one within an epoch, within the next epoch
        ("moirai_moe", [5]),  # right after the end of an epoch
        ("corpora", [7]),
    ],
)
def test_a_run_killed_at_any_batch_ends_as_if_it_had_not_been(command, ts, tmp_path, load, kind, kills):
    whole, other = tmp_path / "timeseries" / "whole", tmp_path / "timeseries" / "killed"
    assert ts(*command("whole", kind)).code == 0
    argv = command("killed", kind)
    for batch in kills:
        killed(argv, tmp_path / "log", batch)
        if (other / "checkpoints" / "last.ckpt").is_file():
            argv = [*command("killed", kind), "--ckpt_path", "last"]
        else:
            shutil.rmtree(other)
    assert "--ckpt_path" in argv
    done = ts(*argv)
    assert (done.code, done.err) == (0, "")
    assert [path.name for path in sorted((tmp_path / "timeseries").iterdir())] == ["killed", "whole"]
    a, b = load(whole), load(other)
    assert a.keys() == b.keys()
    parts = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "epoch", "global_step", "spec"}
    parts |= {"current_model_state", "averaging_state"} & a.keys()
    assert ("averaging_state" in parts) == ("optim__ema_decay" in KINDS[kind])
    for part in parts:
        assert not list(differences(a[part], b[part], part))
    assert a["global_step"] == (6 if kind == "corpora" else 10)
    best = [load(run, "best.ckpt") for run in (whole, other)]
    for part in ("state_dict", "intervals"):
        assert not list(differences(best[0].get(part), best[1].get(part), part))
    assert (whole / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
    figures = [json.loads((run / "test.json").read_text()) for run in (whole, other)]
    assert all(values.pop("windows_per_second") > 0 for values in figures)
    assert not list(differences(*(json.loads(json.dumps(values), parse_constant=str) for values in figures)))


def test_a_finished_run_stays_as_it_is_or_goes_on_with_more_epochs(ts, small, load, tmp_path):
    argv = ["train", *small(tmp_path, run__name="done", trainer__limit_train_batches=2)]
    run = tmp_path / "timeseries" / "done"
    assert ts(*argv).code == 0
    before = load(run)
    done = ts(*argv, "--ckpt_path", "last")
    assert (done.code, done.err) == (0, "")
    assert load(run)["global_step"] == before["global_step"] == 2
    done = ts(*argv, "--ckpt_path", run, "--trainer.max_epochs=2")
    assert (done.code, done.err) == (0, "")
    assert "resumed with another setting: trainer.max_epochs=2 (was 1)" in done.out
    assert load(run)["global_step"] == 4
    assert not torch.equal(load(run)["state_dict"]["model.head.weight"], before["state_dict"]["model.head.weight"])
    assert "of another architecture" in ts(*argv, "--ckpt_path", "last", "--model.segmoe.d_ff=12").line
