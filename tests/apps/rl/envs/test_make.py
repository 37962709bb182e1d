from __future__ import annotations

import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

from apps.errors import UserError
from apps.rl.env_settings import EnvConfig
from apps.rl.envs.make import VIDEO_SIZE, env_spec, make_env


class Counter(gymnasium.Env):
    """Counts its steps; succeeds at the third, ends after `life`."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, render_mode=None, action_space=None, life=100):
        self.render_mode, self.life = render_mode, life
        self.action_space = Box(np.array([0, -4], np.float32), np.array([10, 4], np.float32))
        self.action_space = action_space or self.action_space
        self.observation_space = Dict({"count": Box(0, 1000, (2, 2)), "kind": Discrete(3)})
        self.taken, self.pictures = [], 0

    def seen(self):
        return {"count": np.full((2, 2), self.count, np.float32), "kind": 1}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.seen(), {}

    def step(self, action):
        self.taken.append(action)
        self.count += 1
        reward = np.array([float(self.count)])
        return self.seen(), reward, self.count >= self.life, False, {"success": float(self.count == 3), "task": "x"}

    def render(self):
        self.pictures += 1
        return np.full((30, 50, 3), self.count, dtype=np.uint8)


@pytest.fixture(autouse=True)
def registered():
    gymnasium.register("moecore-test/Counter-v0", Counter, max_episode_steps=50)
    yield
    del gymnasium.registry["moecore-test/Counter-v0"]


def counter(**settings):
    return EnvConfig("moecore-test/Counter-v0", **settings)


def rollout(env, seed, steps=5):
    draw = np.random.default_rng(seed)
    frames = [env.reset(seed=seed)[0]]
    frames += [env.step(draw.uniform(-1, 1, env.action_space.shape))[0] for _ in range(steps)]
    return np.stack(frames)


@pytest.mark.parametrize(
    ("config", "frame", "actions", "tasks"),
    [
        (EnvConfig(), (1, 32, 32), 1, ()),
        (EnvConfig(size=24, gray=False, frame_stack=2), (3, 24, 24), 1, ()),
        (EnvConfig(obs="state"), (3,), 1, ()),
        (EnvConfig("moecore/Skills-v0"), (1, 32, 32), 2, ("reach", "push", "avoid", "reach_push")),
        (EnvConfig("moecore/Skill-Push-v0", obs="state"), (13,), 2, ("push",)),
        (EnvConfig("CartPole-v1", obs="state", discrete=True), (4,), 2, ()),
        (counter(), (1, 32, 32), 2, ()),
        (counter(obs="state"), (7,), 2, ()),
    ],
)
def test_spec_and_frames_agree(config, frame, actions, tasks):
    env = make_env(config)
    spec = env_spec(env, config)
    assert (spec.id, spec.frame, spec.action_dim, spec.tasks) == (config.id, frame, actions, tasks)
    assert spec.frame_stack == config.frame_stack
    obs, info = env.reset(seed=0)
    after = env.step(np.zeros(actions, np.float32))
    for seen in (obs, after[0]):
        assert (seen.shape, seen.dtype) == (frame, spec.dtype)
        assert env.observation_space.contains(seen)
    assert type(after[1]) is float
    assert info["task"] in range(max(len(tasks), 1))
    assert after[4]["task"] == info["task"]


@pytest.mark.parametrize("name", ["moecore/PixelPendulum-v0", "moecore/Skills-v0"])
def test_seeds_repeat_frames(name):
    first, second = make_env(EnvConfig(name)), make_env(EnvConfig(name))
    frames = rollout(first, 3)
    assert (rollout(second, 3) == frames).all()
    assert (rollout(first, 3) == frames).all()
    assert (rollout(first, 4) != frames).any()
    assert len(np.unique(frames, axis=0)) > 3


def test_actions_are_stretched_to_bounds():
    env = make_env(counter(action_repeat=1))
    env.reset()
    for action in ([-1, -1], [1, 0.5], [0, 0], [3, -3]):
        env.step(np.array(action, np.float32))
    taken = env.unwrapped.taken
    assert np.allclose(taken, [[0, -4], [10, 2], [5, 0], [10, -4]])
    assert taken[0].dtype == np.float32


def test_repeats_add_rewards_and_keep_any_success():
    env = make_env(counter(action_repeat=4))
    env.reset()
    obs, reward, terminated, truncated, info = env.step(np.zeros(2))
    assert (reward, terminated, truncated) == (1 + 2 + 3 + 4, False, False)
    assert (info["success"], info["task"]) == (True, 0)
    assert obs.flat[0] == 4
    info = env.step(np.zeros(2))[4]
    assert info["success"] is False


def test_repeats_stop_where_the_episode_ends():
    env = make_env(counter(action_repeat=4, kwargs={"life": 6}))
    env.reset()
    env.step(np.zeros(2))
    _, reward, terminated, truncated, _ = env.step(np.zeros(2))
    assert (reward, terminated, truncated, env.unwrapped.count) == (5 + 6, True, False, 6)


@pytest.mark.parametrize(("max_steps", "length"), [(None, 50), (7, 7), (60, 60)])
def test_max_steps_counts_environment_steps(max_steps, length):
    env = make_env(counter(action_repeat=2, max_steps=max_steps))
    env.reset()
    truncated, agent_steps = False, 0
    while not truncated:
        _, _, terminated, truncated, _ = env.step(np.zeros(2))
        agent_steps += 1
        assert not terminated
    assert (env.unwrapped.count, agent_steps) == (length, -(-length // 2))


def test_choices_are_the_largest_number():
    space = {"action_space": Discrete(3, start=5)}
    env = make_env(counter(discrete=True, action_repeat=1, kwargs=space))
    env.reset()
    for action in ([0.1, -1, 0.3], [0.1, 0.2, 0.0], [0, 0, 0]):
        env.step(np.array(action))
    assert env.unwrapped.taken == [7, 6, 5]
    with pytest.raises(UserError, match=r"Counter-v0: its actions are 3 choices .* set env.discrete=true$"):
        make_env(counter(kwargs=space))


def test_other_actions_are_refused():
    with pytest.raises(UserError, match="MultiDiscrete: only Box and Discrete"):
        make_env(counter(kwargs={"action_space": MultiDiscrete([2, 2])}))
    with pytest.raises(UserError, match="have no bounds"):
        make_env(counter(kwargs={"action_space": Box(-np.inf, np.inf, (2,))}))


def test_pictures_are_drawn_once_per_action_and_not_for_states():
    env = make_env(counter(action_repeat=4))
    env.reset()
    for _ in range(5):
        env.step(np.zeros(2))
    assert env.unwrapped.pictures == 6
    env = make_env(counter(obs="state"), render=True)
    env.reset()
    env.step(np.zeros(2))
    assert env.unwrapped.pictures == 0


def test_environments_run_side_by_side():
    config = EnvConfig("moecore/Skills-v0", size=16)
    many = gymnasium.vector.SyncVectorEnv([lambda: make_env(config)] * 3)
    frames, info = many.reset(seed=[4, 5, 6])
    assert frames.shape == (3, 1, 16, 16)
    alone, told = make_env(config).reset(seed=5)
    assert (frames[1] == alone).all()
    assert info["task"][1] == told["task"]
    many.close()


def test_states_are_flattened_in_order():
    env = make_env(counter(obs="state", action_repeat=1))
    env.reset()
    assert env.step(np.zeros(2))[0].tolist() == [1, 1, 1, 1, 0, 1, 0]


def test_pictures_for_videos_are_larger_and_colourful():
    env = make_env(EnvConfig(size=16))
    env.reset(seed=0)
    assert env.render().shape == (VIDEO_SIZE, VIDEO_SIZE, 3)
    states = make_env(counter(obs="state"), render=True)
    states.reset()
    assert (states.render() == 0).all()


def test_options_reach_the_environment():
    env = make_env(EnvConfig("moecore/Skills-v0"))
    assert [env.reset(options={"task": task})[1]["task"] for task in (2, 0, 3)] == [2, 0, 3]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EnvConfig("moecore/PixelPendulm-v0"), r"no such environment: did you mean moecore/PixelPendulum-v0"),
        (EnvConfig("Pendulum-v9"), r"no such environment: did you mean Pendulum-v1"),
        (EnvConfig("zzzz"), r"env.id=zzzz: no such environment$"),
        (EnvConfig("no_such_module:X-v0"), r"env.id=no_such_module:X-v0: .*no_such_module"),
        (EnvConfig(kwargs={"colour": 3}), r"env.kwargs=\{'colour': 3\}: moecore/PixelPendulum-v0 does not take them"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_line(config, message):
    with pytest.raises(UserError, match=message) as raised:
        make_env(config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "module", "install"),
    [
        ("dm_control/cartpole-balance-v0", "dm_control", 'pip install "mujoco==3.3.0" "dm_control==1.0.28"'),
        ("Meta-World/MT1", "metaworld", 'pip install "mujoco==3.3.0" "metaworld==3.1.1"'),
        ("AdroitHandDoor-v1", "gymnasium_robotics", 'pip install "mujoco==3.3.0" "gymnasium-robotics==1.4.2"'),
        ("ALE/Pong-v5", "ale_py", "pip install ale-py"),
    ],
)
def test_missing_packages_are_named_with_the_command(monkeypatch, name, module, install):
    for absent in ("mujoco", module):
        monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(UserError, match=f"^env.id={name}: {module} is not installed: ") as raised:
        make_env(EnvConfig(name))
    assert install in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_pygame_is_said_when_it_draws(monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    env = make_env(EnvConfig("Pendulum-v1"))
    with pytest.raises(UserError, match=r"env.id=Pendulum-v1: pygame is not installed"):
        env.reset()
