from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from apps.rl.env_settings import EnvConfig
from apps.rl.envs.make import env_spec, make_env
from apps.rl.envs.point import NEAR, SPEED, PointReach
from moecore.errors import ConfigError

ID = "moecore/PointReach-v0"


def test_it_is_a_gymnasium_environment():
    check_env(gymnasium.make(ID).unwrapped, skip_render_check=True)


def test_only_rewards_tell_the_goal():
    env, starts = PointReach(), []
    for task in range(5):
        obs, info = env.reset(seed=0, options={"task": task})
        starts.append(obs)
        assert np.array_equal(obs, starts[0])
        assert info["task"] == task
        left = np.hypot(*(obs - env.goals[task]))
        for _ in range(20):
            obs, reward, terminated, truncated, info = env.step(np.clip((env.goals[task] - obs) / SPEED, -1, 1))
            before, left = left, np.hypot(*(obs - env.goals[task]))
            assert reward == pytest.approx(before - left, abs=1e-6)
            assert not terminated
            assert not truncated
        assert info["success"]
        assert left < NEAR


def test_rewards_may_be_minus_the_distance():
    env = PointReach(reward="distance")
    env.reset(seed=0, options={"task": 1})
    obs, reward, *_ = env.step(np.ones(2))
    assert reward == pytest.approx(-np.hypot(*(obs - env.goals[1])), abs=1e-6)


def test_goals_are_the_same_in_every_environment_and_fill_the_arena():
    one, other = PointReach(), PointReach(tasks=20)
    assert np.array_equal(one.goals[:20], other.goals)
    assert len(one.task_names) == len(set(one.task_names)) == 60
    assert (np.abs(one.goals).max(0) > 0.9).all()
    tasks = {other.reset(seed=seed)[1]["task"] for seed in range(200)}
    assert tasks == set(range(20))


def test_sparse_rewards_are_given_near_the_goal_only():
    env = PointReach(reward="sparse")
    env.reset(options={"task": 0})
    env.place = env.goals[0] + np.array([NEAR - 1e-3, 0])
    assert env.step(np.zeros(2))[1] == 1
    env.place = env.goals[0] + np.array([NEAR + 1e-3, 0])
    assert env.step(np.zeros(2))[1] == 0


def test_episodes_end_after_twenty_steps_and_pictures_show_point_and_goal():
    config = EnvConfig(id=ID, obs="state", frame_stack=1, action_repeat=1)
    env = make_env(config, render=True)
    spec = env_spec(env, config)
    assert (spec.frame, spec.action_dim, len(spec.tasks)) == ((2,), 2, 60)
    env.reset(seed=0)
    ends = [env.step(np.ones(2, np.float32))[2:4] for _ in range(20)]
    assert ends == [(False, False)] * 19 + [(False, True)]
    picture = env.render()
    assert picture.shape == (192, 192, 3)
    white, red = (np.abs(picture.astype(int) - colour).sum(2) < 60 for colour in ((245, 245, 245), (210, 50, 50)))
    assert white[:40, -40:].any()  # the corner that it went to
    assert red.any()


@pytest.mark.parametrize(
    ("options", "field"), [({"tasks": 0}, "env.kwargs.tasks"), ({"reward": "none"}, "env.kwargs.reward")]
)
def test_wrong_options(options, field):
    with pytest.raises(ConfigError, match=field):
        PointReach(**options)


def test_an_unknown_task_is_refused():
    with pytest.raises(ConfigError, match="task=7: must be one of 0 to 4"):
        PointReach(tasks=5).reset(options={"task": 7})
