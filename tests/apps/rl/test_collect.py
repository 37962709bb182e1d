"""What is collected is what the environments did, and goes on after a kill as if there had been none."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from apps.errors import ConfigError, UserError
from apps.rl.collect import Collector, Episode, episode_seed
from apps.rl.replay import Replay
from apps.rl.spaces import EnvSpec, Transitions
from moecore.files import write_atomic

COUNTING = EnvSpec("test/Counting-v0", (3,), 3, 2, ("even", "odd"))
PENDULUM = EnvSpec("Pendulum-v1", (3,), 2, 1)
SEED = 5


class Counting(gym.Env):
    """Shows (number drawn from the seed, steps, sum of actions); even episodes are truncated, odd ones soon succeed."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.name, self.length = int(self.draw(100_000)), int(self.draw(6)) + 1
        self.steps, self.total = 0, 0.0
        return self.frame(), {"task": self.name % 2, "other": np.zeros(self.length)}

    def draw(self, limit: int) -> int:
        return self.np_random.integers(limit)

    def step(self, action):
        self.steps += 1
        self.total += float(action.sum())
        over = self.steps == self.length
        odd = self.name % 2 == 1
        info = {"task": self.name % 2, "success": odd and self.steps == 1}
        return self.frame(), self.steps + self.total, over and odd, over and not odd, info

    def frame(self) -> np.ndarray:
        return np.array([self.name, self.steps, self.total], np.float32)


class Forgetful(Counting):
    """Draws without the seed; episodes last long."""

    drawn: itertools.count

    def draw(self, limit: int) -> int:
        return limit - 1 - next(self.drawn) % 2


class Endless(Counting):
    """Episodes have no end."""

    def step(self, action):
        frame, reward, _, _, info = super().step(action)
        return frame, reward, False, False, {"task": info["task"]}


def pendulum(steps: int = 30) -> gym.Env:
    return gym.wrappers.RescaleAction(gym.make("Pendulum-v1", max_episode_steps=steps), np.float32(-1), np.float32(1))


def noise(size: int, obs: np.ndarray, step: int) -> np.ndarray:
    """A policy: depends on what it sees and on the step's noise."""
    pull = 0.1 * np.sin(obs.reshape(len(obs), -1).sum(1, keepdims=True))
    return np.clip(np.random.default_rng((SEED, step)).uniform(-0.9, 0.9, (len(obs), size)) + pull, -1, 1)


COUNT = partial(noise, 2)
PULL = partial(noise, 1)


def collector(path: Path, make: Callable = Counting, spec: EnvSpec = COUNTING, num: int = 2, **given) -> Collector:
    replay = Replay(path, spec, given.pop("capacity", 60 * num), 60, num)
    return Collector([make] * num, replay, SEED, **given)


def equal(a: Transitions, b: Transitions) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in Transitions.__dataclass_fields__)


def sample(of: Collector, batch: int = 64) -> Transitions:
    return of.replay.sample(batch, 3, 0.9, np.random.default_rng(of.steps))


def collect(of: Collector, steps: int, act: Callable = COUNT) -> list[Episode]:
    return [episode for _ in range(steps) for episode in of.step(act)]


def test_transitions_are_those_of_the_environments_alone(tmp_path):
    mine = collector(tmp_path)
    episodes = collect(mine, 40)
    sampled = sample(mine, 3000)
    assert mine.steps == 80
    assert mine.episodes == len(episodes) > 10

    # the same actions, taken in one environment after the other, without vectors, replay or stacks
    frames, ends, known = {}, {}, {episode.env: [] for episode in episodes}
    actions = {}
    for env in range(2):
        alone, number, over = Counting(), 0, True
        for step in range(40):
            if over:
                frame, _ = alone.reset(seed=episode_seed(SEED, env, number))
                number, total = number + 1, 0.0
                path = [frame]
            seen = np.concatenate([path[max(0, len(path) - 1 - k)] for k in (2, 1, 0)])
            obs = np.zeros((2, 9), np.float32)
            obs[env] = seen
            action = COUNT(obs, 2 * step)[env].astype(np.float32)
            actions[tuple(frame[:2])] = action
            frame, reward, terminated, truncated, _ = alone.step(action)
            total, over = total + reward, terminated or truncated
            path.append(frame)
            frames[path[0][0]] = path
            if over:
                ends[path[0][0]] = terminated
                odd = int(path[0][0]) % 2
                known[env].append(Episode(env, number - 1, total, len(path) - 1, odd == 1, odd))
    assert {env: [one for one in episodes if one.env == env] for env in range(2)} == known

    steps_seen = set()
    for i in range(3000):
        name, step = sampled.obs[i].reshape(3, 3)[-1, :2]
        path, step = frames[name], int(step)
        last = min(step + 3, len(path) - 1)
        assert np.array_equal(sampled.obs[i], np.concatenate([path[max(0, step - k)] for k in (2, 1, 0)]))
        assert np.array_equal(sampled.next_obs[i], np.concatenate([path[max(0, last - k)] for k in (2, 1, 0)]))
        assert np.array_equal(sampled.action[i], actions[(name, step)])
        rewards = [path[j][1] + float(path[j][2]) for j in range(step + 1, last + 1)]
        assert sampled.reward[i] == pytest.approx(sum(0.9**j * r for j, r in enumerate(rewards)), rel=1e-5)
        terminal = last == len(path) - 1 and ends.get(name, False)
        assert sampled.discount[i] == pytest.approx(0.0 if terminal else 0.9 ** (last - step))
        assert sampled.task[i] == name % 2
        steps_seen.add((name, step))
    assert len(steps_seen) == mine.replay.sampleable(3)
    mine.close()


def test_environments_have_their_own_seeds_and_runs_repeat(tmp_path):
    seeds = {episode_seed(*parts) for parts in itertools.product(range(5), range(5), range(5))}
    assert len(seeds) == 125
    assert max(seeds) < 2**31
    first, again = collector(tmp_path / "a"), collector(tmp_path / "b")
    assert collect(first, 20) == collect(again, 20)
    assert equal(sample(first), sample(again))
    names = sample(first).obs.reshape(64, 3, 3)[:, :, 0]
    assert (names == names[:, :1]).all()
    other = Collector([Counting] * 2, Replay(tmp_path / "c", COUNTING, 120, 60, 2), SEED + 1)
    collect(other, 20)
    assert not set(sample(other).obs[:, 0]) & set(names[:, 0])


@pytest.mark.parametrize(("make", "spec", "act"), [(Counting, COUNTING, COUNT), (pendulum, PENDULUM, PULL)])
def test_processes_of_their_own_change_nothing(tmp_path, make, spec, act):
    both = [collector(tmp_path / str(kind), make, spec, asynchronous=kind) for kind in (False, True)]
    assert collect(both[0], 23, act) == collect(both[1], 23, act)
    assert equal(*map(sample, both))
    state, positions = both[1].state(), both[1].replay.state()
    expected = collect(both[0], 20, act)
    collect(both[1], 7, act)
    both[1].close()
    again = collector(tmp_path / "True", make, spec, asynchronous=True)
    again.replay.restore(positions)
    again.restore(state)
    assert collect(again, 20, act) == expected
    assert equal(sample(again), sample(both[0]))
    for one in (both[0], again):
        one.close()


def checkpointed(folder: Path, kill_at: int | None = None, steps: int = 50) -> None:
    """Collects, samples and writes checkpoints; is killed between the two environments of a step."""

    class Killed(Replay):
        def add(self, env, *given):
            if env == 1 and mine.steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            super().add(env, *given)

    replay = Killed(folder / "replay", PENDULUM, 80, 25, 2)
    mine = Collector([partial(pendulum, 23), partial(pendulum, 31)], replay, SEED)
    seen: list = []
    if (folder / "state.json").is_file():
        state = json.loads((folder / "state.json").read_text())
        mine.replay.restore(state["replay"])
        mine.restore(state["collector"])
        seen = state["seen"]
    while mine.steps < 2 * steps:
        ended = [(one.env, one.number, one.ret, one.length) for one in mine.step(PULL)]
        crc = 0
        if mine.replay.sampleable(3):
            drawn = sample(mine, 32)
            for name in Transitions.__dataclass_fields__:
                crc = zlib.crc32(np.ascontiguousarray(getattr(drawn, name)), crc)
        seen.append([mine.steps, len(mine.replay), crc, ended])
        if mine.steps % 20 == 0:
            state = {"replay": mine.replay.state(), "collector": mine.state(), "seen": seen}
            write_atomic(folder / "state.json", json.dumps(state))
    write_atomic(folder / "seen.json", json.dumps(seen))
    mine.close()
    mine.replay.close()


def test_killed_and_continued_it_samples_as_if_nothing_had_happened(tmp_path, capsys):
    whole, other = tmp_path / "whole", tmp_path / "killed"
    checkpointed(whole)
    other.mkdir()
    context = multiprocessing.get_context("spawn")
    for kill_at in (8, 38, 62, 64, 98):  # before the first checkpoint, and after it, also twice after the same
        process = context.Process(target=checkpointed, args=(other, kill_at))
        process.start()
        process.join(100)
        assert process.exitcode == -signal.SIGKILL
        if not (other / "state.json").is_file():
            assert kill_at < 20
    checkpointed(other)
    expected, seen = (json.loads((folder / "seen.json").read_text()) for folder in (whole, other))
    assert seen == expected
    assert len(seen) == 50
    assert sum(len(ended) for *_, ended in seen) == 3
    assert capsys.readouterr().out == ""


def test_an_environment_that_does_not_repeat_itself_begins_anew(tmp_path, capsys):
    Forgetful.drawn = itertools.count()
    mine = collector(tmp_path, Forgetful, num=1)
    assert collect(mine, 3) == []
    state, positions = mine.state(), mine.replay.state()
    again = collector(tmp_path, Forgetful, num=1)
    again.replay.restore(positions)
    next(Forgetful.drawn)  # what it draws now is something else
    again.restore(state)
    assert capsys.readouterr().out == (
        "note: environment 0 cannot go on in the middle of its episode (it does not repeat itself): a new one begins\n"
    )
    (ended,) = collect(again, 6)
    assert (ended.number, ended.length) == (1, 6)
    sampled = sample(again)
    assert len(again.replay) == 3 + 6
    names = sampled.obs.reshape(64, 3, 3)[:, :, 0]
    assert (names == names[:, :1]).all()
    assert (sampled.next_obs.reshape(64, 3, 3)[:, :, 0] == names).all()


def test_an_episode_longer_than_the_ring_begins_anew(tmp_path, capsys):
    mine = collector(tmp_path, Endless, num=2, capacity=20)
    collect(mine, 80)
    collect(mine, 1)
    state, positions = mine.state(), mine.replay.state()
    mine.restore(state)
    assert capsys.readouterr().out.count("its beginning is not in the replay any more): a new one begins\n") == 2
    collect(mine, 1)
    assert mine.replay.steps_of_episode(1) == 1
    assert mine.replay.state()["count"] == [count + 2 for count in positions["count"]]


def test_success_is_unknown_where_nothing_is_said_of_it(tmp_path):
    mine = collector(tmp_path, pendulum, PENDULUM, num=1)
    (episode,) = collect(mine, 30, PULL)
    assert (episode.success, episode.task, episode.length, episode.number) == (None, 0, 30, 0)


def test_what_cannot_be_collected_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^env.id=Pendulum-v1: observations are float32 \[3\], .* float32 \[4\]"):
        collector(tmp_path / "a", pendulum, EnvSpec("Pendulum-v1", (4,), 2, 1))
    with pytest.raises(UserError, match=r"^env.id=Pendulum-v1: actions are Box.*vectors of 2"):
        collector(tmp_path / "b", pendulum, EnvSpec("Pendulum-v1", (3,), 2, 2))
    with pytest.raises(ConfigError, match=r"^collect.num_envs=2: must be 1"):
        Collector([Counting], Replay(tmp_path / "c", COUNTING, 120, 0, 2), SEED)
    mine = collector(tmp_path / "d")
    with pytest.raises(UserError, match="training diverged"):
        mine.step(lambda obs, step: np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match=r"\[2\] instead of \[2, 2\]"):
        mine.step(lambda obs, step: np.zeros(2))
    collect(mine, 1)
    with pytest.raises(ConfigError, match=r"^seed=5: must be 6 as before to continue$"):
        mine.restore(mine.state() | {"seed": 6})
    shutil.rmtree(tmp_path / "d")
