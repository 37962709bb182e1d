"""Every sampled transition is checked against a list of all that was added; positions are restored after a kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.errors import ConfigError, UserError
from apps.rl.replay import Replay
from apps.rl.replay_files import CHUNK
from apps.rl.spaces import EnvSpec, Transitions

PIXELS = EnvSpec("test/Pixels-v0", (2, 2, 3), 3, 2, ("a", "b"))
STATE = EnvSpec("test/State-v0", (2,), 3, 1)


@dataclass
class Entry:
    """One frame, and what led to it."""

    number: int
    step: int
    task: int
    reward: float = 0.0
    terminated: bool = False
    ended: bool = False


@dataclass
class Truth:
    """A replay, and what it should hold: frames that say which they are, in plain lists."""

    replay: Replay
    entries: list[list[Entry]] = field(default_factory=list)
    made: int = 0

    def __post_init__(self) -> None:
        self.entries = self.entries or [[] for _ in range(self.replay.num_envs)]

    def frame(self, number: int) -> np.ndarray:
        spec = self.replay.spec
        frame = np.zeros(spec.frame, spec.dtype)
        frame.reshape(-1)[:2] = divmod(number, 256)
        return frame

    def first(self, env: int, task: int = 0) -> None:
        self.replay.add_first(env, self.frame(self.made), task)
        self.entries[env].append(Entry(self.made, 0, task))
        self.made += 1

    def add(self, env: int, end: str = "", task: int = 0) -> None:
        """One step, after which the episode goes on ("") or ends."""
        if not self.entries[env] or self.entries[env][-1].ended:
            self.first(env, task)
        reward = np.sin(self.made).astype(np.float32)
        self.replay.add(
            env, self.action(self.made), reward, self.frame(self.made), end == "terminated", end == "truncated", task
        )
        last = self.entries[env][-1]
        self.entries[env].append(Entry(self.made, last.step + 1, task, reward, end == "terminated", bool(end)))
        self.made += 1

    def action(self, number: int) -> np.ndarray:
        return np.full(self.replay.spec.action_dim, np.cos(number), np.float32)

    def expected(self, n_step: int, gamma: float) -> dict[int, tuple]:
        """By the number of its first frame, every transition that may be sampled."""
        replay, found = self.replay, {}
        stack = replay.spec.frame_stack
        for entries in self.entries:
            oldest = max(0, len(entries) - replay.capacity)
            for i in range(oldest, len(entries)):
                own = entries[i]
                episode = [entries[i]]
                for later in entries[i + 1 : i + 1 + n_step]:
                    if later.step == 0:
                        break
                    episode.append(later)
                steps = len(episode) - 1
                cut = i + steps + 1 < len(entries) or entries[-1].ended
                if steps == 0 or i - min(stack - 1, own.step) < oldest or not (steps == n_step or cut):
                    continue
                frames = [
                    [entries[j - min(k, entries[j].step)].number for k in range(stack)[::-1]] for j in (i, i + steps)
                ]
                total = sum(gamma**k * float(e.reward) for k, e in enumerate(episode[1:]))
                discount = 0.0 if episode[-1].terminated else gamma**steps
                found[own.number] = (*frames, episode[1].number, total, discount, own.task)
        return found

    def check(self, n_step: int, gamma: float = 0.9, batch: int = 400) -> None:
        """All that may be sampled is, and nothing else, and rightly."""
        expected = self.expected(n_step, gamma)
        assert self.replay.sampleable(n_step) == len(expected)
        if not expected:
            with pytest.raises(UserError, match="collect more first"):
                self.replay.sample(1, n_step, gamma, np.random.default_rng(0))
            return
        sampled = self.replay.sample(batch, n_step, gamma, np.random.default_rng(0))
        obs, next_obs = (self.numbers(stacked) for stacked in (sampled.obs, sampled.next_obs))
        seen = set()
        for i in range(batch):
            frames, next_frames, action, total, discount, task = expected[obs[i][-1]]
            assert (obs[i], next_obs[i]) == (frames, next_frames)
            assert np.array_equal(sampled.action[i], self.action(action))
            assert sampled.reward[i] == pytest.approx(total, abs=1e-6)
            assert sampled.discount[i] == pytest.approx(discount, abs=1e-6)
            assert sampled.task[i] == task
            seen.add(obs[i][-1])
        if batch >= 10 * len(expected):  # one is missed with a probability of e^-10
            assert len(seen) >= 0.99 * len(expected)

    def numbers(self, stacked: np.ndarray) -> list[list[int]]:
        spec = self.replay.spec
        assert stacked.shape[1:] == spec.stacked
        assert stacked.dtype == spec.dtype
        flat = stacked.reshape(len(stacked), spec.frame_stack, -1)[..., :2].astype(int)
        return (256 * flat[..., 0] + flat[..., 1]).tolist()


@contextmanager
def folder() -> Iterator[Path]:
    """A new one for each example of a property test."""
    path = Path(tempfile.mkdtemp(prefix="replay-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def equal(a: Transitions, b: Transitions) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in Transitions.__dataclass_fields__)


def draw(replay: Replay, seed: int = 3) -> Transitions:
    return replay.sample(64, 3, 0.97, np.random.default_rng(seed))


ACTIONS = st.lists(
    st.tuples(
        st.integers(0, 2), st.sampled_from(["", "", "", "", "terminated", "truncated", "first"]), st.integers(0, 1)
    ),
    max_size=120,
)


@settings(max_examples=60, deadline=None)
@given(
    num_envs=st.integers(1, 3),
    per_env=st.integers(5, 25),
    slack=st.integers(0, 4),
    n_step=st.integers(1, 5),
    spec=st.sampled_from([PIXELS, STATE]),
    actions=ACTIONS,
)
def test_what_is_sampled_is_what_happened(num_envs, per_env, slack, n_step, spec, actions):
    with folder() as path:
        truth = Truth(Replay(path, spec, per_env * num_envs, slack, num_envs))
        for env, kind, task in actions:
            if kind == "first":  # an episode that is given up is as good as truncated
                truth.first(env % num_envs, task)
            else:
                truth.add(env % num_envs, kind, task)
        truth.check(n_step)
        truth.check(1)
        assert len(truth.replay) == len(truth.expected(1, 0.9))


@settings(max_examples=40, deadline=None)
@given(
    before=st.integers(1, 60),
    after=st.integers(0, 8),
    episode=st.integers(1, 30),
    num_envs=st.integers(1, 2),
    spec=st.sampled_from([PIXELS, STATE]),
)
def test_a_checkpoint_finds_all_its_entries_while_there_is_slack(before, after, episode, num_envs, spec):
    def fill(truth: Truth, start: int, stop: int) -> None:
        for i in range(start, stop):
            for env in range(num_envs):
                truth.add(env, "truncated" if i % episode == episode - 1 else "")

    with folder() as path:
        sizes = (spec, 20 * num_envs, 2 * 8, num_envs)  # a step that begins an episode adds two entries
        truth = Truth(Replay(path / "killed", *sizes))
        fill(truth, 0, before)
        state = json.loads(json.dumps(truth.replay.state()))
        entries, made = [list(own) for own in truth.entries], truth.made
        fill(truth, before, before + after)
        del truth.replay
        truth = Truth(Replay(path / "killed", *sizes), entries, made)
        truth.replay.restore(state)
        truth.check(3)
        fill(truth, before, before + 5)
        truth.check(3)

        whole = Truth(Replay(path / "whole", *sizes))
        fill(whole, 0, before + 5)
        assert truth.replay.state() == whole.replay.state()
        assert truth.replay.running.tolist() == whole.replay.running.tolist()
        if len(whole.replay):
            assert equal(*(one.replay.sample(64, 1, 0.97, np.random.default_rng(1)) for one in (truth, whole)))


def test_entries_beyond_the_slack_are_noticed(tmp_path):
    truth = Truth(Replay(tmp_path, PIXELS, 10, 5))
    for _ in range(20):
        truth.add(0)
    state = truth.replay.state()
    for _ in range(5):
        truth.add(0)
    truth.replay.restore(state)
    for _ in range(6):
        truth.add(0)
    with pytest.raises(UserError, match=r"does not hold the checkpoint's entries \(any more\).*or start anew"):
        truth.replay.restore(state)


def test_an_entry_half_written_over_is_noticed(tmp_path):
    truth = Truth(Replay(tmp_path, PIXELS, 10, 0))
    for _ in range(20):
        truth.add(0)
    state = truth.replay.state()
    truth.replay.restore(state)
    with pytest.raises(ValueError, match="broadcast"):
        truth.replay.add(0, truth.action(0), 0.0, np.zeros((7, 7)), False, False)
    with pytest.raises(UserError, match="does not hold the checkpoint's entries"):
        truth.replay.restore(state)


def test_an_empty_folder_is_not_a_checkpoints(tmp_path):
    with pytest.raises(UserError, match="does not hold the checkpoint's entries"):
        Replay(tmp_path, PIXELS, 10, 5).restore({"count": [1]})
    with pytest.raises(UserError, match=r"collect.num_envs=1: the checkpoint has 2"):
        Replay(tmp_path, PIXELS, 10, 5).restore({"count": [1, 1]})


def test_truncation_bootstraps_and_termination_does_not(tmp_path):
    truth = Truth(Replay(tmp_path, STATE, 10, 0))
    for end in ("", "terminated", "", "truncated"):
        truth.add(0, end)
    sampled = truth.replay.sample(200, 2, 0.5, np.random.default_rng(0))
    first = np.array(truth.numbers(sampled.obs))[:, -1]
    discounts = {int(number): set(sampled.discount[first == number].tolist()) for number in np.unique(first)}
    assert discounts == {0: {0.0}, 1: {0.0}, 3: {0.25}, 4: {0.5}}  # 2 and 5 are final observations
    finals = np.array(truth.numbers(sampled.next_obs))[:, -1]
    assert set(finals.tolist()) == {2, 5}


def test_sampling_is_uniform(tmp_path):
    truth = Truth(Replay(tmp_path, STATE, 30, 0, num_envs=2))
    for i in range(9):  # a long ring and a short one, episodes of one and of many steps
        truth.add(0, "terminated" if i in (2, 3) else "")
    truth.add(1, "truncated")
    sampled = truth.replay.sample(20_000, 1, 0.9, np.random.default_rng(0))
    _, counts = np.unique(np.array(truth.numbers(sampled.obs))[:, -1], return_counts=True)
    assert len(counts) == len(truth.replay) == 10
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)


def test_samples_repeat_and_are_copies(tmp_path):
    truth = Truth(Replay(tmp_path, PIXELS, 50, 0))
    for _ in range(40):
        truth.add(0)
    first = draw(truth.replay)
    assert equal(first, draw(truth.replay))
    assert not equal(first, draw(truth.replay, seed=4))
    for name in Transitions.__dataclass_fields__:
        getattr(first, name)[:] = 0
    truth.check(3)


def test_the_latest_stack_and_the_running_episode(tmp_path):
    truth = Truth(Replay(tmp_path, PIXELS, 12, 8, num_envs=2))
    for _ in range(3):
        truth.add(0)
    truth.add(1, "truncated")
    truth.first(1)
    assert truth.numbers(truth.replay.latest()) == [[1, 2, 3], [6, 6, 6]]
    actions = truth.replay.actions_of_episode(0)
    frames, rewards = truth.replay.frames_of_episode(0)
    assert np.array_equal(actions, [truth.action(i) for i in (1, 2, 3)])
    assert np.array_equal(frames, [truth.frame(i) for i in range(4)])
    assert np.array_equal(rewards, np.sin([1, 2, 3]).astype(np.float32))
    assert truth.replay.actions_of_episode(1).shape == (0, 2)
    assert truth.replay.steps_of_episode(0) == 3
    for _ in range(14):  # the ring holds 14 entries of each environment: 6 and 8
        truth.add(0)
    with pytest.raises(LookupError, match="not whole"):
        truth.replay.actions_of_episode(0)
    with pytest.raises(ValueError, match="begin one with add_first"):
        Replay(tmp_path / "other", PIXELS, 12, 8).add(0, truth.action(0), 0.0, truth.frame(0), False, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": EnvSpec("test/Other-v0", (2, 2, 3), 3, 2, ("a", "b"))}, r"^env.id='test/Other-v0': .*Pixels-v0"),
        ({"spec": EnvSpec("test/Pixels-v0", (1, 2, 3), 3, 2, ("a", "b"))}, r"^env.frame=\[1, 2, 3\]: .*\[2, 2, 3\]"),
        ({"spec": EnvSpec("test/Pixels-v0", (2, 2, 3), 3, 4, ("a", "b"))}, r"^env.action_dim=4: .*with 2:"),
        ({"spec": EnvSpec("test/Pixels-v0", (2, 2, 3), 3, 2)}, r"^env.tasks=\[\]: "),
        ({"capacity": 30}, r"^collect.capacity=30: .*with 20: take another folder, or delete this one$"),
        ({"slack": 1}, r"^replay.slack=1: "),
        ({"num_envs": 2}, r"^collect.num_envs=2: "),
    ],
)
def test_a_folder_of_another_replay_is_refused(tmp_path, change, message):
    given = {"spec": PIXELS, "capacity": 20, "slack": 5, "num_envs": 1}
    Replay(tmp_path, **given).close()
    Replay(tmp_path, **given).close()
    with pytest.raises(UserError, match=message) as caught:
        Replay(tmp_path, **(given | change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spoil", ["meta", "group", "missing", "short"])
def test_a_spoilt_folder_is_refused(tmp_path, spoil):
    Replay(tmp_path, PIXELS, 20, 5).close()
    if spoil == "meta":
        (tmp_path / "meta.json").write_text("{")
    elif spoil == "group":
        (tmp_path / "meta.json").write_text("[]")
    elif spoil == "missing":
        (tmp_path / "entries.bin").unlink()
    else:
        os.truncate(tmp_path / "frames.bin", 10)
    with pytest.raises(UserError, match=r"meta.json is not|missing or cut off"):
        Replay(tmp_path, PIXELS, 20, 5)


def test_sizes_that_cannot_work(tmp_path):
    for wrong in ({"capacity": 7}, {"slack": -1}, {"num_envs": 0}):
        with pytest.raises(ConfigError, match=rf"(collect|replay)\.{next(iter(wrong))}"):
            Replay(tmp_path, **({"spec": PIXELS, "capacity": 20, "slack": 5, "num_envs": 2} | wrong))


def test_disk_is_taken_as_it_is_needed_and_ram_is_not(tmp_path):
    spec = EnvSpec("test/Large-v0", (3, 84, 84), 3, 2)
    replay = Replay(tmp_path, spec, 100_000, 100)
    assert replay.nbytes == sum((tmp_path / name).stat().st_size for name in ("frames.bin", "entries.bin")) > 2e9
    for i in range(2):
        replay.add_first(0, np.full(spec.frame, i, np.uint8))
    used = sum((tmp_path / name).stat().st_blocks * 512 for name in ("frames.bin", "entries.bin"))
    assert used <= 2 * CHUNK
    held = [value.nbytes for value in vars(replay).values() if isinstance(value, np.ndarray) and value.base is None]
    assert sum(held) < 1000
    replay.flush()


def try_to_open(path: Path, answers) -> None:
    try:
        Replay(path, PIXELS, 20, 5)
        answers.put("")
    except UserError as error:
        answers.put(str(error))


def test_one_process_at_a_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    replay = Replay(tmp_path, PIXELS, 20, 5)
    for expected in ("another process writes to it", None):
        answers = context.Queue()
        process = context.Process(target=try_to_open, args=(tmp_path, answers))
        process.start()
        answer = answers.get(timeout=100)
        process.join()
        assert (expected in answer) if expected else answer == ""
        replay.close()


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(handle: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    replay = Replay(tmp_path, PIXELS, 20, 5)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"^collect.capacity=20: no room in .*No space left on device.*lower capacity$"):
        replay.add_first(0, np.zeros(PIXELS.frame, np.uint8))
    assert replay.state() == {"count": [0]}
