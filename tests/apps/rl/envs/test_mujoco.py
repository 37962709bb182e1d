"""The real packages, each in a process of its own: GL, Triton and MUJOCO_GL are settings of a whole process."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import subprocess
import sys

import pytest

CHECK = """
import sys
import numpy as np
from apps.rl.env_settings import EnvConfig
from apps.rl.envs.make import make_env
config = EnvConfig({name!r}, {kwargs!r}, size=48, gray=False, max_steps=6)
envs = [make_env(config) for _ in range(2)]
runs = []
for env in envs:
    env.reset(seed=1)
    draw = np.random.default_rng(0)
    frames, ends = [env.reset(seed=7)[0]], []
    for _ in range(3):
        obs, reward, terminated, truncated, info = env.step(draw.uniform(-1, 1, env.action_space.shape))
        frames.append(obs)
        ends.append((terminated, truncated))
    runs.append(np.stack(frames))
assert (runs[0] == runs[1]).all(), "frames repeat by seed"
assert runs[0].shape == (4, 3, 48, 48) and runs[0].dtype == np.uint8
assert runs[0].std() > 10 and (runs[0][0] != runs[0][3]).any()
assert ends == [(False, False)] * 2 + [(False, True)]
assert isinstance(reward, float) and ("success" in info) == {success!r}
assert env.render().shape == (192, 192, 3) and env.render().std() > 10
assert (env.painter.draw_at(48).transpose(2, 0, 1) == obs).all(), "pictures of two sizes do not disturb each other"
import torch
torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])  # imports Triton, if it is there, after GL
for env in envs:
    env.close()
print("fine")
"""

META = {"env_name": "reach-v3"}
HAS_GL = any(map(ctypes.util.find_library, ("EGL", "OSMesa")))


def run(code, **environment):
    variables = {**os.environ, "LP_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=False)


def needs(module):
    missing = importlib.util.find_spec(module) is None
    return [pytest.mark.skipif(missing, reason=f"{module} is not installed")]


@pytest.mark.skipif(not HAS_GL, reason="neither libegl1 nor libosmesa6 is installed")
@pytest.mark.parametrize(
    ("name", "kwargs", "success"),
    [
        pytest.param("dm_control/cartpole-balance-v0", {}, False, marks=needs("dm_control")),
        pytest.param("Meta-World/MT1", META, True, marks=needs("metaworld")),
        pytest.param("AdroitHandDoor-v1", {}, True, marks=needs("gymnasium_robotics")),
        pytest.param("HalfCheetah-v5", {}, False, marks=needs("mujoco")),
    ],
)
def test_real_environments_are_drawn_without_a_display(name, kwargs, success):
    done = run(CHECK.format(name=name, kwargs=kwargs, success=success), MUJOCO_GL="", DISPLAY="", WAYLAND_DISPLAY="")
    assert done.stdout.endswith("fine\n"), done.stderr


VIEWS = """
import numpy as np
from apps.errors import UserError
from apps.rl.env_settings import EnvConfig
from apps.rl.envs.make import make_env
def frame(**settings):
    env = make_env(EnvConfig("dm_control/reacher-easy-v0", size=48, gray=False, **settings))
    return env.reset(seed=0)[0].astype(int)
own = frame()
assert (frame(camera="fixed") == own).all() and (frame(camera="0") == own).all()
assert np.abs(frame(camera="hand") - own).mean() > 5
assert (frame(cheap=False) != own).any()
try:
    frame(camera="roof")
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(not HAS_GL, reason="neither libegl1 nor libosmesa6 is installed")
@pytest.mark.skipif(importlib.util.find_spec("dm_control") is None, reason="dm_control is not installed")
def test_cameras_are_chosen_by_name_or_number():
    done = run(VIEWS, MUJOCO_GL="")
    assert done.stdout == "env.camera=roof: choose one of fixed, hand, -1 (free)\n", done.stderr
    assert "Exception ignored" not in done.stderr  # environments that were not closed are freed in time


REFUSED = """
from apps.errors import UserError
from apps.rl.env_settings import EnvConfig
from apps.rl.envs.make import make_env
try:
    make_env(EnvConfig("HalfCheetah-v5")).reset()
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(importlib.util.find_spec("mujoco") is None, reason="mujoco is not installed")
def test_no_way_to_draw_is_said_in_one_line_with_the_packages():
    done = run(REFUSED, MUJOCO_GL="glfw", DISPLAY="", WAYLAND_DISPLAY="")
    assert done.stdout.count("\n") == 1, done.stderr
    assert done.stdout.startswith("MUJOCO_GL=glfw: MuJoCo cannot draw (no display): set MUJOCO_GL=egl (apt-get install")


@pytest.mark.skipif(importlib.util.find_spec("mujoco") is None, reason="mujoco is not installed")
@pytest.mark.skipif(ctypes.util.find_library("OSMesa") is not None, reason="libosmesa6 is installed")
def test_a_missing_library_is_named():
    done = run(REFUSED, MUJOCO_GL="osmesa")
    assert done.stdout.count("\n") == 1, done.stderr
    assert "MUJOCO_GL=osmesa" in done.stdout
    assert done.stdout.endswith("apt-get install libosmesa6 libgl1\n")
