"""Trained agents out of checkpoints."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from apps.errors import UserError
from apps.rl.agents.mentor import Mentor
from apps.rl.rollout import Rollout, evaluation_seeds, run_episodes
from apps.rl.settings import RLConfig
from apps.rl.spaces import EnvSpec
from apps.runs import load_checkpoint
from apps.training import load_weights
from apps.tree import restore


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
        UserError: if the weights are of another architecture.
    """
    checkpoint = load_checkpoint(path, "rl")
    config = config or restore(RLConfig, checkpoint["config"])
    if "agent" not in checkpoint:
        raise UserError(f"{path}: an agent trained with method=t2mir; leave out method")
    spec = EnvSpec.from_plain(checkpoint["spec"])
    agent = load_weights(Mentor(config.agent, spec, config.run.seed), checkpoint, path, config.trainer)
    agent.load_extra_state(checkpoint["agent"])
    return Trained(agent, config, spec, path, list(checkpoint["events"]))
