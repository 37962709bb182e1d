"""Every verb with `method=t2mir`, and resuming."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from apps.errors import UserError
from apps.rl.incontext.deploy import INPUTS, exportable, onnx_in_context
from apps.rl.incontext.episodes import by_chance, in_context, live
from apps.rl.incontext.evaluation import load_in_context
from export.exportable import samples_of
from tests.apps.processes import start
from tests.apps.serving import serve
from tests.apps.timeseries.conftest import differences

BEST = "checkpoints/best.ckpt"


def test_training_leaves_curves_video_figures_and_a_report(context_run):
    figures = json.loads((context_run / "test.json").read_text())
    assert {"return_mean", "return_first", "return_seen_tasks", "return_random", "return_trained", "way"} <= set(
        figures
    )
    with Image.open(context_run / "video.gif") as video:
        assert video.n_frames == 5
    with (context_run / "metrics.csv").open() as text:
        rows = list(csv.DictReader(text))
    assert [int(row["step"]) for row in rows if row["val/return"]] == [3, 7, 11]
    assert {"train/imitation", "train/balance", "train/contrast", "val/first_return"} <= set(rows[0])
    page = (context_run / "report.html").read_text()
    for words in ("Learning in context", "Token-wise mixture", "Task-wise mixture", "Training"):
        assert words in page


def test_weights_stay_as_they_are_while_it_lives(context_run):
    trained = load_in_context(context_run / BEST)
    before = {name: value.clone() for name, value in trained.agent.state_dict().items()}
    first, second = trained.live([4, 5]), trained.live([4, 5])
    assert [life.returns for life in first] == [life.returns for life in second]
    assert all(torch.equal(value, before[name]) for name, value in trained.agent.state_dict().items())
    assert [len(life.episodes) for life in first] == [3, 3]
    assert [len(trace.rewards) for trace in first[0].episodes] == [5, 5, 5]
    figures = json.loads((context_run / "test.json").read_text())
    assert np.mean([life.returns[-1] for life in first]) == pytest.approx(figures["return_mean"])


def test_tasks_lived_through_together_do_not_know_of_each_other(context_run):
    trained = load_in_context(context_run / BEST)
    together, alone = trained.live([0, 5]), trained.live([5])
    assert together[1].returns == pytest.approx(alone[0].returns, abs=1e-5)


def test_evaluate_predict_and_other_numbers_of_episodes(rl, context_run, tmp_path):
    done = rl("evaluate", "--ckpt_path", context_run, "--episodes", "2", "--json", tmp_path / "e.json")
    assert (done.code, done.err) == (0, "")
    assert "episode_2" in done.out
    assert "episode_3" not in done.out
    table = tmp_path / "steps.parquet"
    done = rl("predict", "--ckpt_path", context_run, "--output", table, "--video", tmp_path / "v.gif")
    assert (done.code, done.err) == (0, "")
    steps = pd.read_parquet(table)
    assert len(steps) == 2 * 3 * 5
    assert steps.groupby(["task", "episode"]).size().eq(5).all()
    returns = steps[steps.episode == 2].groupby("task").reward.sum()
    assert returns.mean() == pytest.approx(json.loads((context_run / "test.json").read_text())["return_mean"])


def test_the_exported_file_acts_alone_and_earns_the_same(rl, context_run, tmp_path, untyped):
    file = tmp_path / "policy.onnx"
    done = rl("export", "--ckpt_path", context_run, "--output", file, "--json", tmp_path / "x.json")
    assert (done.code, done.err) == (0, "")
    figures = json.loads((tmp_path / "x.json").read_text())
    assert figures["return_onnx"] == pytest.approx(figures["return_torch"], abs=1e-4)
    assert figures["rows"] == 2 * 3 * 5  # tasks held out, episodes, steps
    assert figures["max_relative_error"] < 1e-5
    assert figures["routing_agreement"] == 1
    trained = load_in_context(context_run / BEST)
    tasks = [1, 4]
    ours = live(trained.config.env, tasks, in_context(trained.agent), 3)
    theirs = live(trained.config.env, tasks, onnx_in_context(file, trained.agent.context), 3)
    for a, b in zip(ours, theirs, strict=True):
        assert a.returns == pytest.approx(b.returns, abs=1e-4)
    one = exportable(trained, calibration=6)
    (history,) = samples_of(INPUTS, tuple(t[:1] for t in one.samples[7].tensors))
    np.savez(tmp_path / "history.npz", **history.feed)
    served = json.loads(serve("rl", file, tmp_path / "history.npz"))
    np.testing.assert_allclose(served, one.module(*history.tensors)[0].detach().numpy(), atol=1e-4)
    assert len(json.loads(serve("rl", file))) == trained.agent.action_dim


def test_devices_get_padded_histories_and_give_the_same_actions(context_run):
    trained = load_in_context(context_run / BEST)
    fixed, free = (exportable(trained, calibration=10, fixed=one) for one in (True, False))
    shapes = {tuple(tensor.shape[1:]) for one in (*fixed.samples, *fixed.calibration) for tensor in one.tensors}
    assert shapes == {(12, trained.agent.state_dim), (12, trained.agent.action_dim), (12,)}
    assert [len(tensor) for tensor in fixed.single().tensors] == [1, 1, 1]
    assert 10 <= sum(len(sample.tensors[0]) for sample in fixed.calibration) < 10 + 3
    with torch.no_grad():
        for padded, own in zip(fixed.samples, free.samples, strict=True):
            last = own.tensors[0].shape[1] - 1
            ours = fixed.module(*padded.tensors)[:, last]
            torch.testing.assert_close(ours, free.module(*own.tensors), atol=1e-6, rtol=1e-5)
    trained.agent.config.task_unit = "sequence"
    with pytest.raises(UserError, match=r"^export: t2mir\.task_unit=sequence routes whole windows"):
        exportable(trained, fixed=True)


def test_search_and_benchmark(rl, tiny, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text("t2mir.lr: {low: 1.0e-4, high: 1.0e-2, log: true}\n")
    done = rl("search", *tiny(tmp_path, run__name="s"), "--space", space, "--num_trials", "2")
    assert (done.code, done.err) == (0, "")
    done = rl("benchmark", *tiny(tmp_path), "--rounds", "1", "--json", tmp_path / "b.json")
    assert (done.code, done.err) == (0, "")
    rows = json.loads((tmp_path / "b.json").read_text())
    assert [(row["part"], row["experts"]) for row in rows] == [
        (part, experts) for part in ("action", "training step") for experts in ("none", "both")
    ]


def test_several_seeds_share_their_histories(rl, tiny, tmp_path):
    done = rl("train", *tiny(tmp_path, run__name="r"), "--seeds", "0,1", "--json", tmp_path / "r.json")
    assert (done.code, done.err) == (0, "")
    assert done.out.count("history ") == 6
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["seed_0"]["return_mean"] != found["seed_1"]["return_mean"]


@pytest.mark.parametrize("experts", ["none", "task"])
def test_other_kinds_of_layers_train_and_are_reported(rl, tiny, tmp_path, experts):
    flags = tiny(tmp_path, run__name="r", run__report="true", t2mir__experts=experts, t2mir__target="history")
    done = rl("train", *flags)
    assert (done.code, done.err) == (0, "")
    page = (tmp_path / "rl" / "r" / "report.html").read_text()
    assert ("Task-wise mixture" in page) == (experts == "task")
    assert "Token-wise mixture" not in page


def test_a_run_killed_at_any_step_ends_as_if_it_had_not_been(rl, tiny, tmp_path):
    def command(run: str) -> list[str]:
        return ["train", *tiny(tmp_path, run__name=run, run__checkpoint_every=3)]

    whole, other = tmp_path / "rl" / "whole", tmp_path / "rl" / "killed"
    assert rl(*command("whole")).code == 0
    argv = command("killed")
    for step in (5, 9):
        assert start(argv, tmp_path / "log", kill_at_batch=step, app="rl").wait() == -signal.SIGKILL
        argv = [*command("killed"), "--ckpt_path", "last"]
    done = rl(*argv)
    assert (done.code, done.err) == (0, "")
    a, b = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, other))
    for part in ("state_dict", "optimizer_states", "loops", "global_step", "learned"):
        assert not list(differences(a[part], b[part], part)), part
    for file in ("metrics.csv", "test.json"):
        assert (whole / file).read_text() == (other / file).read_text()


def test_each_method_refuses_the_others_agents_in_one_line(rl, context_run, agent_run):
    for run, method, words in ((context_run, "mentor", "method=t2mir"), (agent_run, "t2mir", "method=mentor")):
        done = rl("evaluate", "--ckpt_path", run, "--method", method)
        assert done.code == 2
        assert f"trained with {words}; leave out method" in done.err
        assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--t2mir.held_out", "3"], "t2mir.held_out=3: the agent was trained with 2; keep it"),
        (["--env.kwargs", "{tasks: 4}"], "env: tasks are 4 others, the agent was trained on 6 others"),
    ],
)
def test_tasks_that_were_learned_from_do_not_pass_for_others(rl, context_run, flags, words):
    done = rl("evaluate", "--ckpt_path", context_run, *flags)
    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1


def test_chance_earns_what_random_actions_earn(context_run):
    trained = load_in_context(Path(context_run / BEST))
    lives = live(trained.config.env, [4, 5], by_chance(2, 0), 3)
    assert np.ptp([action for life in lives for action in life.actions]) > 1.5
    figures = json.loads((context_run / "test.json").read_text())
    assert np.mean([life.returns for life in lives]) == pytest.approx(figures["return_random"])
