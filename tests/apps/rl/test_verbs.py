"""Every verb on a small agent, and what is refused in one line."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from apps.errors import UserError
from apps.rl.deploy import exportable, onnx_policy
from apps.rl.env_settings import EnvConfig
from apps.rl.envs.pendulum import PixelPendulum
from apps.rl.evaluation import iqm
from apps.rl.loading import load_trained
from apps.rl.rollout import evaluation_seeds, random_policy, run_episodes
from tests.apps.serving import serve

BEST = "checkpoints/best.ckpt"


def read(file: Path) -> list[dict[str, str]]:
    with file.open() as text:
        return list(csv.DictReader(text))


def test_training_leaves_curves_video_and_figures(agent_run):
    figures = json.loads((agent_run / "test.json").read_text())
    assert figures["episodes"] == 2
    assert figures["return_mean"] < 0
    assert figures["random/return_mean"] < 0
    with Image.open(agent_run / "video.gif") as video:
        assert video.n_frames >= 20
    rows = read(agent_run / "metrics.csv")
    assert [int(row["val/agent_steps"] or 0) for row in rows if row["val/return"]] == [58, 68, 78, 88]
    assert any(row["train/kept"] for row in rows)  # a perturbation
    assert {"train/dormant", "train/std", "train/return", "load/middle/0"} <= set(rows[0])
    assert yaml.safe_load((agent_run / "config.yaml").read_text())["env"]["id"] == "moecore/PixelPendulum-v0"


def test_what_cannot_be_drawn_is_trained_on_states_and_reported_all_the_same(rl, small, tmp_path, monkeypatch):
    def draw_at(self, size):
        raise UserError("no display")

    monkeypatch.setattr(PixelPendulum, "draw_at", draw_at)
    done = rl("train", *small(tmp_path, run__name="blind", env__obs="state", run__report="true"))
    assert (done.code, done.err) == (0, "")
    assert done.out.count("note: no pictures: no display") == 1
    assert "<h2>Experts</h2>" in (tmp_path / "rl" / "blind" / "report.html").read_text()
    assert not (tmp_path / "rl" / "blind" / "video.gif").exists()


def test_conflict_of_tasks_is_measured_where_there_are_several(rl, small, agent_run, tmp_path):
    flags = small(tmp_path, run__name="skills", env__id="moecore/Skills-v0", env__gray="false", env__action_repeat=1)
    assert rl("train", *flags).code == 0
    given = ("evaluate", "--ckpt_path", tmp_path / "rl" / "skills", "--episodes", "4", "--conflict", "true")
    done = rl(*given, "--json", tmp_path / "e.json")
    assert (done.code, done.err) == (0, "")
    figures = json.loads((tmp_path / "e.json").read_text())
    assert -1 <= figures["actor_between_tasks"] < figures["actor_within_task"] <= 1
    assert 0 <= figures["middle_pairs_below_0"] <= 1
    refused = rl("evaluate", "--ckpt_path", agent_run, "--conflict", "true")
    assert refused.err.startswith("error: conflict: moecore/PixelPendulum-v0 has one task")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--env.size", "24"], "env: observations are (1, 24, 24), the agent was trained on (1, 12, 12)"),
        (["--env.id", "moecore/Skills-v0"], "env: numbers of an action are 2, the agent was trained on 1"),
        (["--env.frame_stack", "2"], "env: frame_stack are 2, the agent was trained on 3"),
    ],
)
def test_an_agent_is_not_run_on_what_it_cannot_read(rl, agent_run, flags, words):
    done = rl("evaluate", "--ckpt_path", agent_run, *flags)
    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("flags", [["--env.kwargs", "{g: 5.0}"], ["--run.seed", "3"], ["--env.max_steps", "30"]])
def test_a_resumed_run_keeps_its_environment_and_seed(rl, small, agent_run, tmp_path, flags):
    shutil.copytree(agent_run, tmp_path / "rl" / "agent")
    before = (tmp_path / "rl" / "agent" / "config.yaml").read_text()
    done = rl("train", *small(tmp_path, run__name="agent"), "--ckpt_path", "last", *flags)
    assert done.code == 2
    assert "the run was begun with" in done.err
    assert done.err.count("\n") == 1
    assert (tmp_path / "rl" / "agent" / "config.yaml").read_text() == before


def test_the_report_gives_curves_as_data_too(rl, agent_run, tmp_path):
    done = rl("report", "--ckpt_path", agent_run, "--output", tmp_path / "r.html", "--curves", tmp_path / "c.csv")
    assert (done.code, done.err) == (0, "")
    rows = read(tmp_path / "c.csv")
    assert [int(row["agent_steps"]) for row in rows if row["run"] == "agent"] == [58, 68, 78, 88]
    assert (
        rl("report", "--ckpt_path", agent_run, "--curves", "c.txt").err == "error: curves='c.txt': must end in .csv\n"
    )


def test_loaded_agents_act_as_when_they_were_saved(agent_run):
    trained = load_trained(agent_run / BEST)
    figures = json.loads((agent_run / "test.json").read_text())
    assert np.mean(trained.episodes(2).returns) == pytest.approx(figures["return_mean"])
    assert trained.title == "MENTOR"
    assert trained.events


def test_evaluate(rl, agent_run, tmp_path):
    done = rl(
        "evaluate", f"--ckpt_path={agent_run}", "--episodes=3", f"--video={tmp_path}/v.gif", f"--json={tmp_path}/f"
    )
    assert (done.code, done.err) == (0, "")
    assert "random actions" in done.out
    assert json.loads((tmp_path / "f").read_text())["episodes"] == 3
    assert (tmp_path / "v.gif").stat().st_size > 1000


def test_predict_writes_every_step_with_its_experts(rl, agent_run, tmp_path):
    done = rl("predict", f"--ckpt_path={agent_run}", f"--output={tmp_path}/steps.csv", "--episodes=2")
    assert (done.code, done.err) == (0, "")
    rows = read(tmp_path / "steps.csv")
    assert len(rows) == 2 * 20  # 40 steps, two per action
    weights = np.array([[float(row[f"expert_{e}"]) for e in range(4)] for row in rows])
    assert ((weights > 0).sum(1) == 2).all()
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    trained = load_trained(agent_run / BEST)
    total = sum(float(row["reward"]) for row in rows if row["episode"] == "0")
    assert total == pytest.approx(trained.episodes(1).returns[0])


def test_exported_policy_earns_the_same_in_onnxruntime_alone(rl, agent_run, tmp_path, untyped):
    file = tmp_path / "policy.onnx"
    done = rl("export", f"--ckpt_path={agent_run}", f"--output={file}", f"--json={tmp_path}/f.json")
    assert (done.code, done.err) == (0, "")
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["max_relative_error"] < 1e-5
    assert figures["rows"] == 1000  # 50 episodes of 20 steps
    assert figures["decision_agreement"] == figures["routing_agreement"] == 1
    assert figures["export_ms_p50"] < figures["torch_ms_p50"]
    assert figures["return_onnx"] == pytest.approx(figures["return_torch"], rel=1e-3)
    trained = load_trained(agent_run / BEST)
    seeds = evaluation_seeds(4)
    ours = run_episodes(trained.config.env, trained.spec, trained.agent.policy, seeds)
    theirs = run_episodes(trained.config.env, trained.spec, onnx_policy(file), seeds)
    np.testing.assert_allclose(ours.returns, theirs.returns, rtol=1e-3)
    assert_served(file, trained, tmp_path)


def assert_served(file, trained, folder) -> None:
    """The example gives PyTorch's actions with nothing installed but onnxruntime and NumPy."""
    rollout = trained.episodes(1, observations=True)
    seen = np.stack(rollout.traces[0].observations[:5])
    np.save(folder / "seen.npy", seen)
    served = np.array([json.loads(line) for line in serve("rl", file, folder / "seen.npy").splitlines()])
    np.testing.assert_allclose(served, trained.agent.policy(seen), atol=1e-4)
    drawn = serve("rl", file).splitlines()
    assert np.abs(json.loads(drawn[0])).max() <= 1


def test_policies_of_choices_agree_in_their_choice(rl, small, tmp_path, untyped):
    flags = {"env__id": "CartPole-v1", "env__obs": "state", "env__discrete": "true", "env__action_repeat": 1}
    assert rl("train", *small(tmp_path, run__name="cart", collect__steps=60, collect__eval_every=60, **flags)).code == 0
    one = exportable(load_trained(tmp_path / "rl" / "cart" / "checkpoints" / "last.ckpt"), calibration=7)
    assert one.metadata["output"] == "[batch, 2], the largest of 2 is the choice, for 1 steps each"
    actions = np.array([[0.1, 0.2], [0.4, 0.3]], np.float32)
    assert one.decide(actions, actions * [[1, 1], [0.5, 1]]).same == 1
    assert one.samples[0].tensors[0].shape[1:] == one.single().tensors[0].shape[1:] == (12,)
    assert 1 < sum(len(sample.tensors[0]) for sample in one.calibration) <= 7
    seen = {row.tobytes() for sample in one.samples for row in sample.tensors[0].numpy()}
    assert not any(row.tobytes() in seen for sample in one.calibration for row in sample.tensors[0].numpy())


def test_several_seeds_are_summed_up(rl, small, tmp_path):
    done = rl("train", *small(tmp_path, run__name="many"), "--seeds=3,5", f"--json={tmp_path}/f.json")
    assert (done.code, done.err) == (0, "")
    figures = json.loads((tmp_path / "f.json").read_text())
    each = [figures[f"seed_{seed}"]["return_mean"] for seed in (3, 5)]
    assert each[0] != each[1]
    assert figures["return_mean"] == pytest.approx(np.mean(each))
    assert (tmp_path / "rl" / "many-seed5" / "test.json").is_file()


def test_benchmark_and_search(rl, small, tmp_path):
    done = rl("benchmark", *small(tmp_path), "--rounds=1", f"--json={tmp_path}/f.json")
    assert (done.code, done.err) == (0, "")
    parts = {row["part"]: row for row in json.loads((tmp_path / "f.json").read_text())}
    assert parts["update"]["ratio"] == 1
    assert parts["experts, all experts"]["milliseconds"] > 0
    between = 2 * parts["agent step"]["milliseconds"]  # agent steps, as collect.update_every has it
    assert parts["update, its collection"]["milliseconds"] == pytest.approx(between)
    share = between / parts["update"]["milliseconds"]
    assert parts["update, its collection"]["ratio"] == pytest.approx(share)
    (tmp_path / "space.yaml").write_text("agent.lr: {low: 1.0e-4, high: 1.0e-2, log: true}\n")
    found = rl("search", *small(tmp_path), f"--space={tmp_path}/space.yaml", "--num_trials=2")
    assert found.code == 0, found.err


@pytest.mark.parametrize(
    "changes",
    [
        {"agent__actor": "dense", "agent__perturb__kind": "none"},
        {"agent__perturb__kind": "random", "agent__value": "true", "agent__noise__schedule": "max"},
        {"agent__critic": "moe", "agent__moe__aux": "reference", "agent__actor_clip": 0.001},
        {"env__obs": "state", "env__frame_stack": 1, "collect__num_envs": 2},
        {"trainer__precision": "bf16-mixed"},
        {"env__id": "CartPole-v1", "env__obs": "state", "env__discrete": "true"},
    ],
    ids=["drqv2", "drm", "options", "states", "bf16", "discrete"],
)
def test_every_kind_of_agent_trains(rl, small, tmp_path, changes):
    render = {} if "env__id" not in changes else {"trainer__limit_val_batches": 0}
    done = rl("train", *small(tmp_path, run__name="run", **changes, **render), "--agent.perturb.interval=9")
    assert done.code == 0, done.err


def test_several_skills_are_told_apart(rl, small, tmp_path):
    argv = small(tmp_path, run__name="run", env__id="moecore/Skills-v0", env__size=16, collect__eval_episodes=6)
    done = rl("train", *argv, "--collect.random_steps=80", "--collect.steps=100")
    assert (done.code, done.err) == (0, "")
    figures = json.loads((tmp_path / "rl" / "run" / "test.json").read_text())
    assert "success" in figures
    assert {name.split("/")[0] for name in figures if "/" in name} >= {"random"}
    assert any(name.startswith("reach") for name in figures)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--env.id=moecore/PixelPendulm-v0"], ["env.id", "PixelPendulum"]),
        (["--env.id=CartPole-v1", "--env.obs=state"], ["env.discrete"]),
        (["--env.id=dm_control/nothing-v0"], ["env.id"]),
        (["--agent.moe.top_k=9"], ["top_k=9"]),
        (["--collect.random_steps=1"], ["collect.random_steps=1"]),
        (["--trainer.max_epochs=3"], ["trainer.max_epochs=3", "collect.steps"]),
        (["--agent.strides=[2,2,2,2,2]"], ["agent.strides"]),
        (["--agent.perturb.pool=1"], ["pool=1"]),
        (["--seeds=1,1"], ["seeds"]),
    ],
)
def test_mistakes_are_one_line(rl, small, tmp_path, argv, parts):
    line = rl("train", *small(tmp_path), *argv).line
    assert all(part in line for part in parts), line
    assert not (tmp_path / "rl").exists()


def test_a_replay_of_another_environment_is_refused(rl, agent_run, small, tmp_path):
    shutil.copytree(agent_run, tmp_path / "rl" / "agent")
    argv = small(tmp_path, run__name="agent", env__id="moecore/Skill-Reach-v0")
    line = rl("train", *argv, "--ckpt_path=last").line
    assert "moecore/PixelPendulum-v0" in line or "architecture" in line


def test_interquartile_mean():
    assert iqm([1, 2, 3, 4]) == 2.5
    assert iqm([0, 1, 2, 3, 100, -100, 5, 4]) == pytest.approx(2.5)
    assert iqm([7.0]) == 7.0
    assert iqm([0, 10]) == 5


def test_random_actions_repeat():
    config = EnvConfig(size=12, max_steps=10)
    from apps.rl.envs.make import env_spec, make_env

    spec = env_spec(make_env(config), config)
    first, second = (run_episodes(config, spec, random_policy(spec, 3), evaluation_seeds(2)) for _ in range(2))
    assert first.returns == second.returns
    assert first.lengths == [5, 5]
