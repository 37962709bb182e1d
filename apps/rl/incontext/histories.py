"""Histories: everything that an agent of ours did in a task from its first step until it had learned it.

S steps of a history, N numbers of a state, A of an action.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apps.errors import UserError
from apps.loading import derive_seed
from apps.rl.agents.mentor import Experience, Mentor
from apps.rl.data import RLData
from apps.rl.incontext.tasks import make_task_env
from apps.rl.settings import RLConfig
from apps.rl.spaces import EnvSpec
from apps.tree import flatten, plain
from moecore.files import atomic_path, write_atomic

SETTINGS = "settings.json"


@dataclass(frozen=True)
class TaskHistory:
    """One task's, in the order of time."""

    obs: Float[np.ndarray, "S N"]
    action: Float[np.ndarray, "S A"]
    reward: Float[np.ndarray, " S"]
    first: Bool[np.ndarray, " S"]
    """Whether an episode begins with the step."""
    final: Float[np.ndarray, "S A"]
    """Actions that the agent takes in these states once it has learned."""

    def early(self, share: float) -> TaskHistory:
        """Its beginning."""
        end = max(round(share * len(self.reward)), 1)
        return TaskHistory(**{name: value[:end] for name, value in vars(self).items()})

    def returns(self) -> Float[np.ndarray, " episodes"]:
        """Sums of rewards of all episodes but the last, which need not be over."""
        starts = np.flatnonzero(self.first)
        return np.add.reduceat(self.reward, starts)[:-1]


def histories_folder(config: RLConfig) -> Path:
    """Where the histories of a configuration lie."""
    name = config.env.id.replace("/", "-").replace(":", "-")
    return Path(config.t2mir.histories or Path(config.run.root, "rl-histories", name))


def load_histories(config: RLConfig, spec: EnvSpec, tasks: Sequence[int]) -> dict[int, TaskHistory]:
    """The histories of some tasks; those that the folder lacks are collected first, which shows progress.

    Every task is written whole when its agent has learned, so that an interrupted collection goes on with the next.

    Raises:
        UserError: if the folder holds histories of another environment or of other agents.
    """
    folder = histories_folder(config)
    _check_settings(folder, config)
    missing = [task for task in tasks if not _file(folder, task).is_file()]
    for number, task in enumerate(missing):
        history = learn_task(config, spec, task)
        with atomic_path(_file(folder, task)) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **vars(history))
        words = f"{spec.tasks[task]}: return {history.returns()[:5].mean():.4g} to {history.returns()[-5:].mean():.4g}"
        print(f"history {number + 1} of {len(missing)}, {words}", flush=True)
    return {task: _read(_file(folder, task), spec) for task in tasks}


def _file(folder: Path, task: int) -> Path:
    return folder / f"task-{task:04}.npz"


def _read(file: Path, spec: EnvSpec) -> TaskHistory:
    try:
        with open(file, "rb") as opened, np.load(opened) as held:
            history = TaskHistory(**{field.name: held[field.name] for field in dataclasses.fields(TaskHistory)})
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"{file}: not a history ({error}); delete it, and it is collected again") from error
    steps = len(history.reward)
    if history.obs.shape != (steps, *spec.stacked) or history.action.shape != (steps, spec.action_dim):
        raise UserError(f"{file}: of another environment; delete it, and it is collected again")
    return history


def _check_settings(folder: Path, config: RLConfig) -> None:
    """Write down what the histories are of, or compare with what was written."""
    settings: dict[str, Any] = {name: plain(getattr(config, name)) for name in ("env", "agent", "collect")}
    settings["history_seed"] = config.t2mir.history_seed
    file = folder / SETTINGS
    if not file.is_file():
        if any(folder.glob("task-*.npz")):
            raise UserError(f"t2mir.histories={folder}: holds histories of unknown settings; give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(settings, indent=1))
        return
    try:
        held, wanted = flatten(json.loads(file.read_text())), flatten(json.loads(json.dumps(settings)))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({error}); give another t2mir.histories folder") from error
    for name in sorted(held.keys() | wanted.keys()):
        if held.get(name) != wanted.get(name):
            raise UserError(
                f"t2mir.histories={folder}: collected with {name}={held.get(name)}, not {wanted.get(name)}; give "
                "another folder"
            )


def learn_task(config: RLConfig, spec: EnvSpec, task: int) -> TaskHistory:
    """Train an agent in one task, as `train` does but without evaluations, and keep all that it did."""
    seed = derive_seed(config.t2mir.history_seed, task) % 2**31
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed))
    # its own random numbers, whatever was collected before; and what comes after does not depend on what is missing
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng([]):
        torch.manual_seed(seed)
        agent = Mentor(config.agent, spec, seed)
        optimizers = agent.optimizers()
        data = RLData(config, spec, agent, Path(folder), partial(make_task_env, config.env, task))
        try:
            for update in range(config.collect.updates):
                _update(data, agent, optimizers, update)
            return _history(data)
        finally:
            data.collector.close()


def _update(data: RLData, agent: Mentor, optimizers: dict[str, torch.optim.Optimizer], update: int) -> None:
    batch, clip = data.experience(update), agent.config.actor_clip
    for episode in data.take_ended():
        agent.remember(episode.ret)

    def step(name: str, loss: Tensor) -> None:
        optimizers[name].zero_grad()
        loss.backward()
        if name == "actor" and clip is not None:
            torch.nn.utils.clip_grad_norm_(agent.actor.parameters(), clip)
        optimizers[name].step()

    steps = {name: partial(step, name) for name in optimizers}
    agent.update(Experience.of(batch), agent.noise(data.collector.steps), steps)
    if agent.perturb_due():
        agent.perturb()
        for optimizer in optimizers.values():
            optimizer.state.clear()


def _history(data: RLData) -> TaskHistory:
    steps = [data.replay.steps_in_order(env) for env in range(data.replay.num_envs)]
    obs, action, reward, first = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    return TaskHistory(obs, action, reward, first, data.agent.policy(obs))
