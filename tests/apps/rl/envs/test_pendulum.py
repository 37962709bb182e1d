from __future__ import annotations

import gymnasium
import numpy as np
import pytest

import apps.rl.envs  # noqa: F401 (registers)
from apps.rl.envs.pendulum import PixelPendulum


def test_it_steps_as_pendulum_does():
    ours, theirs = gymnasium.make("moecore/PixelPendulum-v0"), gymnasium.make("Pendulum-v1")
    assert ours.action_space == theirs.action_space
    assert ours.observation_space == theirs.observation_space
    draw = np.random.default_rng(0)
    for seed in (0, 1, None):  # None: goes on with the random numbers of seed 1
        a, b = ours.reset(seed=seed)[0], theirs.reset(seed=seed)[0]
        assert (a == b).all()
        for step in range(1, 201):
            action = draw.uniform(-2.5, 2.5, 1).astype(np.float32)
            a, b = ours.step(action), theirs.step(action)
            assert (a[0] == b[0]).all()
            assert a[1:4] == b[1:4] == (b[1], False, step == 200)


@pytest.mark.parametrize(
    ("angle", "row", "column"), [(0.0, -1, 0), (np.pi, 1, 0), (np.pi / 2, 0, -1), (-np.pi / 2, 0, 1)]
)
def test_angle_zero_is_up_and_positive_angles_lean_left(angle, row, column):
    env = PixelPendulum("rgb_array", render_size=64)
    env.state = np.array([angle, 0.0])
    rows, columns = np.nonzero((env.render() != 255).any(-1))
    assert np.sign(np.round([rows.mean() - 31.5, columns.mean() - 31.5])).tolist() == [row, column]
    assert np.hypot(rows.mean() - 31.5, columns.mean() - 31.5) == pytest.approx(0.5 * 64 / 2.5, abs=1)


def test_pictures_differ_by_angle_only_and_have_the_size_asked_for():
    env = PixelPendulum("rgb_array", render_size=24)
    env.state = np.array([0.3, 1.0])
    first = env.render()
    assert first.shape == (24, 24, 3)
    assert first.dtype == np.uint8
    env.state = np.array([0.3, -5.0])
    assert (env.render() == first).all()
    env.state = np.array([0.33, 1.0])
    assert (env.render() != first).any()
    assert env.draw_at(100).shape == (100, 100, 3)
