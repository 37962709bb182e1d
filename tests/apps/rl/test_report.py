"""The report has what its agent has, and gradients are compared as by hand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from apps.rl.agent_settings import AgentConfig, MoEActorConfig, PerturbConfig
from apps.rl.agents.mentor import Mentor
from apps.rl.conflict import between, probes, task_gradients
from apps.rl.env_settings import EnvConfig
from apps.rl.envs.make import spec_of
from apps.rl.evaluation import evaluate
from apps.rl.history import History, evaluations, groups
from apps.rl.loading import Trained
from apps.rl.report import verdict, write_report
from apps.rl.rollout import Trace
from apps.rl.settings import RLConfig
from apps.rl.spaces import EnvSpec
from apps.settings import RunConfig
from apps.tree import plain

STATE = EnvSpec("test/State-v0", (3,), 1, 1, ("left", "right", "up"))


def config_of(actor="moe", env="moecore/PixelPendulum-v0", seed=0, kind="task") -> RLConfig:
    moe = MoEActorConfig(num_experts=3, hidden=4, gate_hidden=4)
    agent = AgentConfig(actor, moe=moe, channels=2, feature_dim=6, hidden=8, perturb=PerturbConfig(kind))
    return RLConfig(env=EnvConfig(env, size=20, max_steps=16), agent=agent, run=RunConfig(seed=seed))


def trained_of(folder: Path, **options) -> Trained:
    config = config_of(**options)
    spec = spec_of(config.env)
    events = [{"update": 30, "kept": 0.75, "dormant": 0.1}] if config.agent.perturb.kind == "task" else []
    return Trained(Mentor(config.agent, spec, 0), config, spec, folder / "checkpoints" / "best.ckpt", events)


def write_run(folder: Path, config: RLConfig, last: int = 4, lift: float = 0.0) -> Path:
    """A run folder with evaluations of return 10, 20, ... + lift at agent steps 100, 200, ..."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(config)))
    load = [f"load/middle/{expert}" for expert in range(2)]
    names = [f"train/{name}" for name in ("agent_steps", "return", "length", "dormant", "std")]
    tests = [f"val/{name}" for name in ("agent_steps", "return", "return_std")]
    rows = [",".join(["step", *load, *names, *tests])]
    rows += [
        f"{20 * i - 1},0.25,0.75,{100 * i},{i // 2},16,0.2,{1 / i},{100 * i},{10 * i + lift},1.5"
        for i in range(1, last + 1)
    ]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    return folder


def titles(page: str) -> list[str]:
    return re.findall(r"<h2[^>]*>([^<]*)", page)


@pytest.mark.parametrize("actor", ["moe", "dense"])
@pytest.mark.parametrize("env", ["moecore/PixelPendulum-v0", "moecore/Skills-v0"])
def test_page_of_an_untrained_agent_without_curves(tmp_path, actor, env):
    trained = trained_of(tmp_path / "run", actor=actor, env=env)
    spoilt = write_run(tmp_path / "spoilt", config_of("moe" if actor == "dense" else "dense", env)) / "checkpoints"
    spoilt.mkdir()
    (spoilt / "best.ckpt").write_bytes(b"no checkpoint")
    target = write_report(trained, evaluate(trained, 2, pictures=2), tmp_path / "deep" / "report.html")
    page = target.read_text()
    expected = ["Returns", "What it does"] + ["Experts"] * (actor == "moe") + ["Do tasks agree?"] * ("Skills" in env)
    assert titles(page) == expected
    assert page.count("data:image/gif") == 1
    assert ("Mean weight of the experts by task" in page) == (actor == "moe" and "Skills" in env)
    assert "http" not in re.sub(r"http://www.w3.org\S*", "", re.sub(r'src="[^"]*"', "", page))


def test_page_of_a_run_among_others(tmp_path):
    trained = trained_of(write_run(tmp_path / "own", config_of()))
    write_run(tmp_path / "seed1", config_of(seed=1), lift=8)
    write_run(tmp_path / "drq", config_of("dense", kind="none"))
    write_run(tmp_path / "elsewhere", config_of(env="moecore/Skills-v0"))
    page = write_report(trained, evaluate(trained, 1, pictures=1), tmp_path / "report.html").read_text()
    shown = ["Returns", "What it does", "Learning", "Beside other runs", "Exploration and perturbation", "Experts"]
    assert titles(page) == shown
    row = re.search(r"<tr><td>MENTOR</td>(<td class=number>2</td>.*?)</tr>", page)
    assert re.findall(r">([\d.]+)<", row[1]) == ["2", "400", "44", "40", "48", "44"]
    assert "<td>DrQ-v2</td>" in page
    assert "Weights were drawn once" in page


def test_runs_of_equal_settings_are_one_curve_and_stopped_ones_are_left_out(tmp_path):
    for name, seed, last, lift in (("a", 0, 4, 0), ("b", 1, 4, 6), ("c", 2, 2, 50)):
        write_run(tmp_path / name, config_of(seed=seed), last, lift)
    other = config_of()
    other.agent.gamma = 0.9
    write_run(tmp_path / "d", other)
    (write_run(tmp_path / "e", other) / "config.yaml").write_text("env: {id: [")
    found = groups(tmp_path, "moecore/PixelPendulum-v0")
    assert [group.title for group in found] == ["MENTOR (agent.gamma=0.99)", "MENTOR (agent.gamma=0.9)"]
    steps, values = found[0].spread()
    assert steps.tolist() == [100, 200, 300, 400]
    assert values.tolist() == [[10, 20, 30, 40], [16, 26, 36, 46]]


def test_history_counts_in_agent_steps(tmp_path):
    history = History(write_run(tmp_path / "run", config_of()))
    steps, values = history.returns()
    assert (steps.tolist(), values.tolist()) == ([100, 200, 400], [0, 1, 2])  # the third row repeats an episode
    assert history.steps_at([20, 50]).tolist() == [100, 250]
    steps, shares = history.loads()["middle"]
    assert (steps.tolist(), shares.tolist()) == ([100, 200, 300, 400], [[0.25, 0.75]] * 4)
    empty = History(tmp_path / "nowhere")
    assert len(empty.returns()[0]) == len(empty.steps_at([1.0])) == len(empty.loads()) == 0


class Direct(nn.Module):
    """An actor of two parameters: a linear map, and a bias that stands for the middle layer."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.middle = nn.Linear(3, 1, bias=False), nn.ParameterDict({"bias": torch.tensor([0.2])})

    def forward(self, features):
        return self.map(features) + self.middle["bias"]


class Signed(nn.Module):
    """Critics that want larger actions where the first feature is positive, smaller ones where it is negative."""

    def forward(self, features, action):
        score = features[:, 0] * action[:, 0]
        return torch.stack([score, score + 1])


def by_hand_agent() -> Mentor:
    agent = Mentor(AgentConfig("dense", feature_dim=2, hidden=2), STATE)
    agent.actor, agent.critic = Direct(), Signed()
    return agent


def test_cosines_are_those_of_gradients_by_hand():
    a, b, c = np.array([1, 0, 0]), np.array([-1, 0, 0]), np.array([1, 2, 2])
    batches = {n: [np.stack([x, x]).astype(np.float32)] for n, x in zip(STATE.tasks, (a, b, c), strict=True)}
    found = task_gradients(by_hand_agent(), batches)
    # The gradient of -s0 (w s + m) is -s0 s by w and -s0 by m: (-1, 0, 0, -1), (-1, 0, 0, 1), (-1, -2, -2, -1).
    ac, bc = 2 / np.sqrt(2 * 10), 0.0
    np.testing.assert_allclose(found.actor, [[1, 0, ac], [0, 1, bc], [ac, bc, 1]], atol=1e-6)
    np.testing.assert_allclose(found.middle, [[1, -1, 1], [-1, 1, -1], [1, -1, 1]], atol=1e-6)
    assert found.tasks == STATE.tasks
    np.testing.assert_allclose(between(found.middle), [-1, 1, -1], atol=1e-6)


def test_batches_of_a_task_are_compared_with_each_other():
    here, there = (np.array([[x, 0, 0]], np.float32) for x in (1, -1))
    found = task_gradients(by_hand_agent(), {"mixed": [here, there], "plain": [here, here]})
    np.testing.assert_allclose(found.middle, [[-1, 0], [0, 1]], atol=1e-6)
    assert "No pair of tasks conflicts" in verdict(found)
    assert "hardly agree" not in verdict(found)  # (0 + 1) / 2 within a task
    assert "hardly agree" in verdict(task_gradients(by_hand_agent(), {"mixed": [here, there], "again": [here, there]}))


def test_gradients_leave_the_agent_as_it_was():
    agent = Mentor(config_of().agent, STATE).train()
    obs = [np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)]
    first = task_gradients(agent, {"left": obs, "right": obs})
    assert agent.training
    assert all(p.grad is None for p in agent.parameters())
    np.testing.assert_allclose(first.actor, 1, atol=1e-6)  # dropout in the gate would tell the same batch apart


def test_opposed_tasks_are_said_to_conflict():
    agent = by_hand_agent()
    batches = {n: [np.full((2, 3), x, np.float32)] for n, x in (("left", 0.1), ("right", -0.1))}
    words = verdict(task_gradients(agent, batches))  # (-0.01, -0.01, -0.01, -0.1) against (-0.01, -0.01, -0.01, 0.1)
    assert words.startswith("1 of 1 pairs of tasks conflict, most of all left and right (-0.94)")


def test_probes_are_of_different_episodes_and_need_enough_steps():
    traces = [
        Trace(0, task, observations=[np.full(3, 10 * i, np.float32)] * 3) for i, task in enumerate((0, 0, 0, 0, 1))
    ]
    found = probes(traces, STATE.tasks)
    assert list(found) == ["left"]
    assert [sorted(set(batch[:, 0].tolist())) for batch in found["left"]] == [[0.0], [10.0], [20.0], [30.0]]


def test_evaluations_of_all_runs_are_rows(tmp_path):
    write_run(tmp_path / "a", config_of(), last=2)
    write_run(tmp_path / "b", config_of(actor="dense", seed=7), last=1, lift=5.0)
    write_run(tmp_path / "other", config_of(env="moecore/Skills-v0"))
    rows = evaluations(tmp_path, "moecore/PixelPendulum-v0")
    kept = {(row["run"], row["seed"], row["agent_steps"], row["return"], row["return_std"]) for row in rows}
    assert kept == {("a", 0, 100, "10", "1.5"), ("a", 0, 200, "20", "1.5"), ("b", 7, 100, "15", "1.5")}
    assert {row["agent"] for row in rows} == {"MENTOR", "dense actor, perturbation task"}
    assert all("success" not in row for row in rows)
