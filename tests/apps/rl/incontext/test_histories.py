"""What agents leave behind, and windows of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from apps import tree
from apps.cli import make_parser
from apps.errors import ConfigError, UserError
from apps.rl import APP
from apps.rl.agents.t2mir import Windows
from apps.rl.envs.make import spec_of
from apps.rl.envs.point import PointReach
from apps.rl.incontext.episodes import Life
from apps.rl.incontext.histories import TaskHistory, histories_folder, learn_task, load_histories
from apps.rl.incontext.settings import T2MIRConfig
from apps.rl.incontext.tasks import make_task_env, split_tasks
from apps.rl.incontext.windows import check_length, draw_windows
from apps.rl.rollout import Trace
from apps.rl.settings import RLConfig


@pytest.fixture
def config(tiny, tmp_path):
    def make(**changes) -> RLConfig:
        values = make_parser(APP, "train").parse_args(tiny(tmp_path, **changes)).as_dict()
        return tree.build(RLConfig, values)

    return make


def test_a_history_is_everything_an_agent_did_in_its_task(config):
    one = config()
    history = learn_task(one, spec_of(one.env), 4)
    assert len(history.reward) == 59  # as many as the last update asks for
    assert np.flatnonzero(history.first).tolist() == list(range(0, 60, 5))
    goal = np.random.default_rng(0).uniform(-1, 1, (6, 2))[4]
    for obs, action, reward, first in zip(history.obs, history.action, history.reward, history.first, strict=True):
        place = obs if first else place
        assert obs == pytest.approx(place, abs=1e-6)
        before, place = np.hypot(*(place - goal)), np.clip(place + 0.1 * action, -1, 1)
        assert reward == pytest.approx(before - np.hypot(*(place - goal)), abs=1e-5)
    assert history.returns() == pytest.approx(np.add.reduceat(history.reward, range(0, 60, 5))[:-1])
    assert np.abs(history.final).max() <= 1
    again = learn_task(one, spec_of(one.env), 4)
    assert all(np.array_equal(value, getattr(again, name)) for name, value in vars(history).items())


def test_a_history_has_random_numbers_of_its_own(config):
    one = config(agent__actor="moe")  # dropout in its gate
    torch.manual_seed(1)
    first = learn_task(one, spec_of(one.env), 0)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after)  # none of the caller's were taken
    assert np.array_equal(learn_task(one, spec_of(one.env), 0).final, first.final)


def test_the_actors_gradient_is_clipped_as_in_training(config):
    one, other = config(), config(agent__actor_clip=1e-9)
    free, held = (learn_task(c, spec_of(c.env), 0) for c in (one, other))
    assert not np.array_equal(free.final, held.final)


def test_only_missing_histories_are_collected_and_a_broken_one_is_named(config, capsys):
    one = config()
    spec, folder = spec_of(one.env), histories_folder(one)
    first = load_histories(one, spec, [0, 1, 2])
    assert capsys.readouterr().out.count("history ") == 3
    (folder / "task-0001.npz").unlink()
    second = load_histories(one, spec, [0, 1, 2])
    assert capsys.readouterr().out.count("history 1 of 1") == 1
    assert all(np.array_equal(first[task].action, second[task].action) for task in (0, 1, 2))
    (folder / "task-0002.npz").write_bytes(b"PK\x03\x04 half of it")
    with pytest.raises(UserError, match=r"task-0002\.npz: not a history .*delete it"):
        load_histories(one, spec, [0, 1, 2])


def test_histories_of_other_agents_are_refused(config):
    one = config()
    load_histories(one, spec_of(one.env), [0])
    for change, words in (
        ({"agent__hidden": 4}, "agent.hidden=8, not 4"),
        ({"t2mir__history_seed": 1}, "seed=0, not 1"),
    ):
        other = config(**change)
        with pytest.raises(UserError, match=f"collected with .*{words}; give another folder"):
            load_histories(other, spec_of(other.env), [0])
    load_histories(config(run__seed=5, t2mir__width=16), spec_of(one.env), [0])  # nothing that histories depend on


def test_folders_that_are_not_of_our_making_are_refused(config):
    one = config()
    spec, folder = spec_of(one.env), histories_folder(one)
    load_histories(one, spec, [0])
    settings = (folder / "settings.json").read_text()
    (folder / "settings.json").write_text(settings[:20])
    with pytest.raises(UserError, match=r"settings\.json: damaged .*; give another t2mir\.histories folder"):
        load_histories(one, spec, [0])
    (folder / "settings.json").unlink()
    with pytest.raises(UserError, match="holds histories of unknown settings"):
        load_histories(one, spec, [0])
    (folder / "settings.json").write_text(settings)
    with pytest.raises(UserError, match=r"task-0000\.npz: of another environment; delete it"):
        load_histories(one, dataclasses.replace(spec, action_dim=3), [0])
    (folder / "task-0000.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"task-0000\.npz: not a history"):
        load_histories(one, spec, [0])


def test_an_environment_must_begin_the_task_that_it_is_asked_for(config, monkeypatch):
    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {"task": 1, "success": False}

    monkeypatch.setattr(PointReach, "reset", reset)
    env = make_task_env(config().env, 3)
    with pytest.raises(
        UserError, match=r"a reset with options=\{'task': 3\} began task 1; it must begin the one asked"
    ):
        env.reset()


def history(task: int, steps: int = 30) -> TaskHistory:
    """Steps numbered 100 task, 100 task + 1, ..., in episodes of 7."""
    number = np.arange(steps, dtype=np.float32) + 100 * task
    columns = np.stack([number, number], 1)
    return TaskHistory(columns, columns / 1000, number, np.arange(steps) % 7 == 0, -columns / 1000)


def drawn(final: bool, tasks: int = 3, seeds: int = 30) -> Iterator[tuple[Windows, np.ndarray]]:
    """Batches, and the numbers of their steps within a task, `[windows, 10]`."""
    held = {task: history(task) for task in (3, 5, 8, 9)}
    for seed in range(seeds):
        batch = draw_windows(held, tasks, 10, final, np.random.default_rng(seed))
        number = batch.reward.numpy().astype(int)
        assert number.shape == (2 * min(tasks, 4), 10)
        task = number // 100
        assert (task == task[:, :1]).all()
        assert (task[::2] == task[1::2]).all()
        assert len(set(task[:, 0])) == min(tasks, 4)
        assert (batch.obs[..., 0].numpy() == number).all()
        assert batch.target.numpy() == pytest.approx((-1 if final else 1) * batch.action.numpy())
        yield batch, number % 100


def test_windows_of_what_was_done_are_stretches_from_the_beginning_of_an_episode():
    starts = set()
    for _, number in drawn(final=False):
        assert (np.diff(number, axis=1) == 1).all()
        starts |= set(number[:, 0].tolist())
    assert starts == {0, 7, 14}
    assert len(list(drawn(final=False, tasks=99, seeds=1))) == 1


def test_windows_of_what_was_learned_are_whole_episodes_in_any_order():
    orders = set()
    for _, numbers in drawn(final=True):
        for number in numbers:
            breaks = np.flatnonzero(np.diff(number) != 1) + 1
            parts = np.split(number, breaks)
            assert all(part[0] % 7 == 0 for part in parts)
            assert all(part[-1] % 7 == 6 or part[-1] == 29 for part in parts[:-1])
            assert len(set(number.tolist())) == 10
            orders.add(tuple(int(part[0]) for part in parts))
    assert len(orders) > 12
    assert any(first > second for first, second, *_ in (order for order in orders if len(order) > 1))


def test_windows_come_from_the_beginning_of_a_history():
    early = {task: history(task).early(0.5) for task in (3, 5)}
    seen = [draw_windows(early, 2, 7, True, np.random.default_rng(seed)).reward.numpy() for seed in range(20)]
    assert set((np.concatenate(seen) % 100).ravel().tolist()) == set(range(15))
    assert T2MIRConfig().share == 0.3
    assert T2MIRConfig(target="history").share == 1
    assert T2MIRConfig(early=0.7).share == 0.7


def test_histories_too_short_for_a_window():
    check_length({0: history(0)}, 30)
    with pytest.raises(ConfigError, match=r"t2mir\.context=31: the history of task 0 has only 30 steps"):
        check_length({0: history(0)}, 31)
    late = dataclasses.replace(history(0), first=np.arange(30) == 25)
    with pytest.raises(UserError, match="no episode of task 0 begins so long before its end"):
        check_length({0: late}, 10)


def test_tasks_are_split_once_and_for_all(config):
    one = config()
    split = split_tasks(spec_of(one.env), one.t2mir)
    assert (split.train, split.val, split.held_out) == ([0, 1, 2], [3], [4, 5])
    few = config(t2mir__held_out=4)
    with pytest.raises(ConfigError, match=r"t2mir\.held_out=4: leaves 1 of 6 tasks"):
        split_tasks(spec_of(few.env), few.t2mir)
    single = config(env__id="moecore/PixelPendulum-v0", env__kwargs="{}")
    with pytest.raises(UserError, match="has one task"):
        split_tasks(spec_of(single.env), single.t2mir)
    stacked = config(env__frame_stack=3)
    with pytest.raises(ConfigError, match=r"env\.frame_stack=3: must be 1"):
        split_tasks(spec_of(stacked.env), stacked.t2mir)
    pixels = config(env__obs="pixels")
    with pytest.raises(UserError, match=r"set env\.obs=state"):
        split_tasks(spec_of(pixels.env), pixels.t2mir)


def test_memory_holds_whole_episodes_as_far_as_they_fit():
    life = Life(0, 1)
    for number in range(3):
        life.episodes.append(Trace(0))
        for step in range(4):
            life.obs.append(np.array([10 * number + step], np.float32))
            if (number, step) == (2, 3):
                break
            life.actions.append(np.array([number], np.float32))
            life.rewards.append(1.0)
            life.episodes[-1].rewards.append(1.0)
    assert len(life.obs) == 12

    def firsts(context):
        obs, action, reward = life.memory(context)
        assert len(action) == len(reward) == len(obs) - 1 <= context - 1
        return int(obs[0, 0])

    assert [firsts(c) for c in (20, 12, 11, 8, 7, 4)] == [0, 0, 10, 10, 20, 20]
    assert firsts(3) == 21  # not even one episode fits
    assert life.memory(8)[1].ravel().tolist() == [1, 1, 1, 1, 2, 2, 2]
