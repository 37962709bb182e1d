"""Environments that go wrong are one line that names them."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box

from apps.errors import UserError
from apps.rl.env_settings import EnvConfig
from apps.rl.envs.guard import as_number
from apps.rl.envs.make import has_time_limit, make_env

NAME = "moecore-test/Odd-v0"
STEP = (np.zeros(2, np.float32), 1.0, False, False, {})


class Odd(gymnasium.Env):
    """Gives what it is told to give; what is an exception is raised."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    observation_space, action_space = Box(-1, 1, (2,)), Box(-1, 1, (1,))
    gives: dict = {}  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def _give(self, what, otherwise):
        value = self.gives.get(what, otherwise)
        if isinstance(value, Exception):
            raise value
        return value

    def reset(self, *, seed=None, options=None):
        return self._give("reset", (STEP[0], {}))

    def step(self, action):
        return self._give("step", STEP)

    def render(self):
        return self._give("render", np.zeros((4, 4, 3), np.uint8))


@pytest.fixture
def odd(monkeypatch):
    gymnasium.register(NAME, Odd)

    def make(obs="state", **gives):
        monkeypatch.setattr(Odd, "gives", gives)
        return make_env(EnvConfig(NAME, obs=obs, size=8, action_repeat=1, gray=False))

    yield make
    del gymnasium.registry[NAME]


def changed(place, value):
    return (*STEP[:place], value, *STEP[place + 1 :])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (ZeroDivisionError("by me"), r"step raised ZeroDivisionError \(test_guard\.py, line \d+\): by me"),
        (STEP[:4], r"step must give \(obs, reward, terminated, truncated, info\), as Gymnasium"),
        (changed(4, None), r"step must give"),
        (changed(1, None), r"a reward is None; it must be one number"),
        (changed(1, "much"), r"a reward is 'much'; it must be one number"),
        (changed(1, np.ones(2)), r"a reward is array\(\[1\., 1\.\]\); it must be one number"),
        (changed(1, float("nan")), r"a reward is nan; it must be finite"),
        (changed(1, 1e40), r"a reward is 1e\+40; it must be finite"),
        (changed(0, np.array([0, np.nan])), r"an observation has NaN or infinite values"),
        (changed(0, np.zeros(3)), r"an observation has 3 numbers, its space has 2"),
        (changed(0, None), r"(reading an observation raised|an observation has)"),
    ],
)
def test_steps_that_go_wrong(odd, given, words):
    env = odd(step=given)
    env.reset()
    with pytest.raises(UserError, match=rf"^env\.id={NAME}: {words}"):
        env.step(np.zeros(1, np.float32))


@pytest.mark.parametrize(
    ("given", "words"),
    [(RuntimeError("no start"), "reset raised RuntimeError"), (STEP[0], r"reset must give \(obs, info\)")],
)
def test_resets_that_go_wrong(odd, given, words):
    with pytest.raises(UserError, match=words):
        odd(reset=given).reset()


def test_pictures_that_cannot_be_drawn(odd):
    with pytest.raises(UserError, match=r"render raised ValueError \(test_guard\.py, line \d+\): no screen"):
        odd("pixels", render=ValueError("no screen")).reset()
    with pytest.raises(UserError, match=r"it renders no images: set env\.obs=state"):
        odd("pixels", render=None).reset()


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 1), (4, 4, 3), (4, 4, 4)])
def test_grey_and_transparent_pictures_are_taken(odd, shape):
    frame, _ = odd("pixels", render=np.full(shape, 200, np.uint8)).reset()
    assert frame.shape == (3, 8, 8)
    assert (frame == 200).all()


@pytest.mark.parametrize("task", [None, "first", 2, -1])
def test_tasks_that_are_no_numbers_of_names(odd, monkeypatch, task):
    monkeypatch.setattr(Odd, "task_names", ("a", "b"), raising=False)
    info = {} if task is None else {"task": task}
    with pytest.raises(UserError, match=r"info\['task'\] is .*; with task_names it must be 0 to 1"):
        odd(reset=(STEP[0], info)).reset()


def test_numbers_of_many_kinds_are_taken():
    for value in (2, 2.0, np.float32(2), np.array(2), np.array([2]), np.array([[2.0]]), True + True):
        assert as_number("x", "a reward", value) == 2


def test_environments_without_a_time_limit_are_known(odd):
    odd()
    assert not has_time_limit(EnvConfig(NAME))
    assert not has_time_limit(EnvConfig(f"some.module:{NAME}"))
    assert has_time_limit(EnvConfig(NAME, max_steps=5))
    assert has_time_limit(EnvConfig("moecore/Skills-v0"))
    assert has_time_limit(EnvConfig("dm_control/cartpole-balance-v0"))
