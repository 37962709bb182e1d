"""Small runs that several files use."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from apps.rl import APP
from tests.apps.conftest import Result, flags_of, run

TINY = {
    "env.size": 12,
    "env.max_steps": 40,
    "agent.channels": 3,
    "agent.strides": "[2,1]",
    "agent.hidden": 8,
    "agent.feature_dim": 4,
    "agent.moe.hidden": 4,
    "agent.moe.gate_hidden": 4,
    "agent.dormant_every": 3,
    "agent.perturb.interval": 7,
    "agent.perturb.max_factor": 0.9,
    "collect.steps": 90,
    "collect.random_steps": 50,
    "collect.batch_size": 4,
    "collect.capacity": 1000,
    "collect.eval_every": 10,
    "collect.eval_episodes": 2,
    "trainer.accelerator": "cpu",
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": "false",
    "run.report": "false",
}
"""A second of training; what the tests rely on is written out, so that other defaults change nothing."""


@pytest.fixture(scope="session")
def rl() -> Callable[..., Result]:
    """Runs a command line of the app in this process."""
    return functools.partial(run, app=APP)


@pytest.fixture(scope="session")
def small() -> Callable[..., list[str]]:
    """Flags of a run that takes a second; keyword arguments change them, `__` for dots."""
    return flags_of(TINY)


@pytest.fixture(scope="session")
def agent_run(rl, small, tmp_path_factory) -> Path:
    """The folder of a trained agent; tests only read it."""
    root = tmp_path_factory.mktemp("agent")
    done = rl("train", *small(root, run__name="agent"))
    assert (done.code, done.err) == (0, "")
    return root / "rl" / "agent"
