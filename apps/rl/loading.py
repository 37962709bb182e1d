"""Trained agents out of checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.errors import UserError
from apps.rl.agents.mentor import Mentor
from apps.rl.envs.make import spec_of
from apps.rl.rollout import Rollout, evaluation_seeds, run_episodes
from apps.rl.settings import RLConfig
from apps.rl.spaces import EnvSpec
from apps.runs import load_checkpoint
from apps.training import load_weights
from apps.tree import flatten, plain, restore


@dataclass(frozen=True)
class Trained:
    """An agent with its weights, and the environment that it knows."""

    agent: Mentor
    config: RLConfig
    spec: EnvSpec
    path: Path
    events: list[dict[str, float]]
    """Perturbations of its training."""

    @property
    def title(self) -> str:
        """The agent's name in tables."""
        return agent_title(self.config)

    def episodes(self, number: int, observations: bool = False, pictures: int = 0) -> Rollout:
        """Episodes of the deterministic policy from the starts that evaluations use; see `run_episodes`.

        Where states are seen and the environment cannot be drawn, pictures are left out, and a line says so.
        """
        config, policy, seeds = self.config.env, self.agent.policy, evaluation_seeds(number)
        try:
            return run_episodes(config, self.spec, policy, seeds, observations, pictures)
        except UserError as error:
            if not pictures or config.obs == "pixels":
                raise
            _say_once(f"note: no pictures: {error}")
            return run_episodes(config, self.spec, policy, seeds, observations)


@functools.cache
def _say_once(words: str) -> None:
    print(words, flush=True)


def agent_title(config: RLConfig) -> str:
    """What an agent of these settings is called."""
    one = config.agent
    if one.actor == "moe":
        return "MENTOR" if one.perturb.kind == "task" else f"MoE actor, perturbation {one.perturb.kind}"
    if one.perturb.kind == "none" and not one.value:
        return "DrQ-v2"
    return "DrM" if one.perturb.kind == "random" else f"dense actor, perturbation {one.perturb.kind}"


def load_trained(path: Path, config: RLConfig | None = None) -> Trained:
    """The agent of a checkpoint, on the GPU if there is one.

    Args:
        path: of the checkpoint.
        config: settings to build it by; None: those it was trained with.

    Raises:
        UserError: if the weights are of another architecture, or the environment looks different.
    """
    checkpoint = load_checkpoint(path, "rl")
    if "agent" not in checkpoint:
        raise UserError(f"{path}: an agent trained with method=t2mir; leave out method")
    config, spec = known_environment(checkpoint, config)
    agent = load_weights(Mentor(config.agent, spec, config.run.seed), checkpoint, path, config.trainer)
    agent.load_extra_state(checkpoint["agent"])
    return Trained(agent, config, spec, path, list(checkpoint["events"]))


def known_environment(checkpoint: Mapping[str, Any], config: RLConfig | None) -> tuple[RLConfig, EnvSpec]:
    """Settings to go on with, and what their environment looks like: as in training, or like it.

    Raises:
        UserError: if the environment of `config` has other observations, actions or tasks.
    """
    stored, spec = restore(RLConfig, checkpoint["config"]), EnvSpec.from_plain(checkpoint["spec"])
    if config is None or plain(config.env) == plain(stored.env):
        return config or stored, spec
    found = spec_of(config.env)
    for words in ("frame", "frame_stack", "action_dim", "tasks"):
        now, then = getattr(found, words), getattr(spec, words)
        if now != then:
            name = {"frame": "observations", "action_dim": "numbers of an action"}.get(words, words)
            shown = [value if len(str(value)) < 60 else f"{len(value)} others" for value in (now, then)]
            raise UserError(f"env: {name} are {shown[0]}, the agent was trained on {shown[1]}; leave out env settings")
    return config, found


def refuse_other_run(checkpoint: Mapping[str, Any], config: RLConfig) -> None:
    """Raise for what a resumed run may not change: its environment and its seed."""
    stored = flatten(plain(restore(RLConfig, checkpoint["config"])))
    for name, value in flatten(plain(config)).items():
        if (name.startswith("env.") or name == "run.seed") and stored[name] != value:
            raise UserError(f"{name}={value}: the run was begun with {stored[name]}; keep it, or give another run.name")
