"""A family of six tasks, and a transformer trained on the histories of three of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.apps.conftest import flags_of

TINY = {
    "method": "t2mir",
    "env.id": "moecore/PointReach-v0",
    "env.obs": "state",
    "env.frame_stack": 1,
    "env.action_repeat": 1,
    "env.kwargs": "{tasks: 6}",
    "env.max_steps": 5,
    "agent.actor": "dense",
    "agent.hidden": 8,
    "agent.feature_dim": 8,
    "agent.perturb.kind": "none",
    "collect.steps": 60,
    "collect.random_steps": 20,
    "collect.batch_size": 8,
    "collect.update_every": 1,
    "collect.capacity": 1000,
    "t2mir.val_tasks": 1,
    "t2mir.held_out": 2,
    "t2mir.early": 1.0,
    "t2mir.context": 12,
    "t2mir.width": 8,
    "t2mir.heads": 2,
    "t2mir.layers": 2,
    "t2mir.batch_tasks": 3,
    "t2mir.steps": 12,
    "t2mir.eval_every": 4,
    "t2mir.eval_episodes": 3,
    "trainer.accelerator": "cpu",
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": "false",
    "run.report": "false",
}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., list[str]]:
    """Flags of a run that takes a second or two; keyword arguments change them, `__` for dots."""
    return flags_of(TINY)


@pytest.fixture(scope="session")
def context_run(rl, tiny, tmp_path_factory) -> Path:
    """The folder of a trained transformer; tests only read it."""
    root = tmp_path_factory.mktemp("context")
    done = rl("train", *tiny(root, run__name="agent", run__report="true"))
    assert (done.code, done.err) == (0, "")
    return root / "rl" / "agent"
