"""Settings of the rl app. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from apps.rl.agent_settings import AgentConfig, idle_settings
from apps.rl.env_settings import EnvConfig
from apps.rl.incontext.settings import T2MIRConfig
from apps.settings import RunConfig, TrainerConfig
from moecore.errors import require


@dataclass
class CollectConfig:
    """What the agent does in its environment, and what it learns from that. A step is one action of one environment."""

    steps: int = 12_000
    """Agent steps of the whole run; `env.action_repeat` times as many frames."""
    num_envs: int = 1
    """Environments that are stepped together."""
    asynchronous: bool = False
    """Each environment in a process of its own."""
    random_steps: int = 1000
    """First steps, of random actions and without learning."""
    update_every: int = 2
    """Steps between updates."""
    batch_size: int = 64
    """Transitions per update."""
    capacity: int = 100_000
    """Steps that the replay on disk holds."""
    eval_every: int = 1000
    """Steps between evaluations."""
    eval_episodes: int = 10
    """Episodes of an evaluation, the same starts every time."""

    def __post_init__(self) -> None:
        for name in ("steps", "num_envs", "update_every", "batch_size", "eval_every", "eval_episodes"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        good = self.batch_size <= self.random_steps < self.steps
        ask = f"must lie between batch_size={self.batch_size} and steps={self.steps}"
        require(good, "random_steps", self.random_steps, ask)
        good = self.capacity >= self.random_steps
        require(good, "capacity", self.capacity, f"must hold random_steps={self.random_steps}")
        require(self.eval_every >= self.update_every, "eval_every", self.eval_every, "at least update_every")

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        return max((self.steps - self.random_steps) // self.update_every, 1)


@dataclass
class RLConfig:
    """Everything that defines a run."""

    method: Literal["mentor", "t2mir"] = "mentor"
    """mentor: an agent learns in the environment; t2mir: a transformer learns offline, from what such agents did in
    many tasks, to learn in context."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """Environment."""
    agent: AgentConfig = field(default_factory=AgentConfig)
    """Agent."""
    collect: CollectConfig = field(default_factory=CollectConfig)
    """Collection, replay, evaluation."""
    t2mir: T2MIRConfig = field(default_factory=T2MIRConfig)
    """In-context learning; with `method=t2mir`."""
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(max_epochs=1, gradient_clip_val=None))
    """Training loop."""
    run: RunConfig = field(default_factory=lambda: RunConfig(checkpoint_every=500))
    """Run folder and repeatability."""

    @property
    def loop(self) -> TrainerConfig:
        """The training loop, with evaluations where `collect.eval_every` or `t2mir.eval_every` has them."""
        if self.method == "t2mir":
            return dataclasses.replace(self.trainer, val_check_interval=min(self.t2mir.eval_every, self.t2mir.steps))
        every = min(self.collect.eval_every // self.collect.update_every, self.collect.updates)
        return dataclasses.replace(self.trainer, val_check_interval=every)

    def __post_init__(self) -> None:
        one, length = self.trainer, "t2mir.steps" if self.method == "t2mir" else "collect.steps"
        for name in ("max_epochs", "accumulate_grad_batches"):
            value = getattr(one, name)
            require(value == 1, f"trainer.{name}", value, f"leave it at 1; {length} is the length of a run")
        clip = one.gradient_clip_val
        ask = "leave it at null; agent.actor_clip limits the actor's gradient"
        require(clip is None or self.method == "t2mir", "trainer.gradient_clip_val", clip, ask)
        good = one.precision in ("auto", "32", "32-true", "bf16-mixed")
        require(good, "trainer.precision", one.precision, "losses are not scaled here; take 32-true or bf16-mixed")
        require(str(one.devices) in ("1", "auto"), "trainer.devices", one.devices, "an agent trains on one device")


def idle(config: RLConfig) -> dict[str, str]:
    """Prefixes of settings that do nothing beside the others, with what would change that."""
    others = {"t2mir.": "give --method t2mir"} if config.method == "mentor" else {}
    return idle_settings(config.agent) | others
