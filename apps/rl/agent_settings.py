"""Settings of the agent. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moecore.config import MoEConfig
from moecore.errors import require


@dataclass
class MoEActorConfig:
    """The mixture of experts in the actor, between its hidden layers."""

    num_experts: int = 4
    """Experts."""
    top_k: int = 2
    """Experts that each observation uses."""
    hidden: int = 64
    """Hidden units per expert."""
    gate_hidden: int = 64
    """Hidden units of the gate."""
    gate_dropout: float = 0.1
    """Dropout in the gate, in updates."""
    aux: Literal["balance", "reference"] = "balance"
    """balance: the Switch loss, which evens out the experts' use; reference: the published layer's, variance of the
    loads plus mean entropy of the gate, of which only the entropy has a gradient: it sharpens and does not balance."""
    aux_scale: float = 0.01
    """Coefficient of that loss beside the actor's; the published code has 1 with `reference`."""

    def __post_init__(self) -> None:
        MoEConfig(num_experts=self.num_experts, top_k=self.top_k)
        for name in ("hidden", "gate_hidden"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(0 <= self.gate_dropout < 1, "gate_dropout", self.gate_dropout, "must lie in [0, 1)")
        require(self.aux_scale >= 0, "aux_scale", self.aux_scale, "must not be negative")


@dataclass
class NoiseConfig:
    """Standard deviation of the exploration noise."""

    schedule: Literal["linear", "dormant", "max"] = "linear"
    """linear: from `start` to `end` (DrQ-v2); dormant: by the actor's dormant ratio (MENTOR); max: the larger one."""
    start: float = 1.0
    """linear: at the first agent step."""
    end: float = 0.1
    """linear: at the end."""
    steps: int = 8000
    """linear: agent steps from start to end."""
    scale: float = 0.8
    """dormant: `scale * sigmoid(10 (ratio - target))`."""
    clip: float = 0.3
    """Largest noise of actions in the losses."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "must be at least 1")
        for name in ("start", "end", "scale", "clip"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")


@dataclass
class PerturbConfig:
    """Task-oriented perturbation: weights drawn towards those of the best episodes."""

    kind: Literal["none", "task", "random"] = "task"
    """task: samples of a Gaussian fitted to the pool of best weights; random: fresh weights (DrM)."""
    interval: int = 1000
    """Updates between perturbations; published: 10,000 to 50,000 of far longer runs."""
    pool: int = 10
    """Episodes, the best by return, whose weights are kept."""
    max_factor: float = 0.9
    """Largest share that weights keep."""
    min_factor: float = 0.2
    """Smallest; between them it is `1 - 2 ratio` of dormant units."""

    def __post_init__(self) -> None:
        require(self.interval >= 1, "interval", self.interval, "must be at least 1")
        require(self.pool >= 2, "pool", self.pool, "must be at least 2, for a spread")
        good = 0 <= self.min_factor <= self.max_factor <= 1
        require(good, "max_factor", self.max_factor, "0 <= min_factor <= max_factor <= 1 must hold")


@dataclass
class AgentConfig:
    """MENTOR (arXiv 2410.14972); with `actor=dense`, `perturb.kind=none`, `value=false`, `noise=linear` DrQ-v2."""

    actor: Literal["moe", "dense"] = "moe"
    """moe: experts between the actor's layers; dense: a layer of as many active multiply-adds."""
    critic: Literal["dense", "moe"] = "dense"
    """moe: experts in the critic too, an option beside the published form."""
    moe: MoEActorConfig = field(default_factory=MoEActorConfig)
    """Experts."""
    channels: int = 16
    """Channels of the four convolutions; published 32."""
    strides: list[int] = field(default_factory=lambda: [2, 1, 1, 1])
    """Stride of each convolution."""
    feature_dim: int = 50
    """Width of the bottleneck that actor and critic put before their layers."""
    hidden: int = 128
    """Width of their layers; published 1024."""
    shift: int = 2
    """Pixels by which images are shifted at random; published 4 of 84."""
    n_step: int = 3
    """Steps of rewards before the critic's estimate."""
    gamma: float = 0.99
    """Discount per agent step."""
    tau: float = 0.01
    """Share by which target networks follow."""
    lr: float = 1e-3
    """Learning rate of encoder, critic and value."""
    actor_lr: float = 1e-4
    """Learning rate of the actor."""
    actor_clip: float | None = None
    """Largest norm of the actor's gradient; the published code has 0.001."""
    value: bool = False
    """Mix a value network of the best actions seen (expectile regression) into the critic's target, as DrM does."""
    expectile: float = 0.9
    """value: of the regression."""
    value_share: float = 0.6
    """value: largest weight in the target; it falls where many units are dormant."""
    dormant_bar: float = 0.025
    """Units below this share of their layer's mean activation are dormant."""
    dormant_target: float = 0.2
    """Dormant ratio at which schedules by it are in their middle."""
    dormant_every: int = 50
    """Updates between measurements of the dormant ratio."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    """Exploration."""
    perturb: PerturbConfig = field(default_factory=PerturbConfig)
    """Perturbation of weights."""

    def __post_init__(self) -> None:
        for name in ("channels", "feature_dim", "hidden", "n_step", "dormant_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(len(self.strides) >= 1 and min(self.strides) >= 1, "strides", self.strides, "at least 1 each")
        require(0 < self.gamma <= 1, "gamma", self.gamma, "must lie in (0, 1]")
        require(0 < self.tau <= 1, "tau", self.tau, "must lie in (0, 1]")
        for name in ("lr", "actor_lr"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        require(0 < self.expectile < 1, "expectile", self.expectile, "must lie in (0, 1)")
        require(0 <= self.value_share <= 1, "value_share", self.value_share, "must lie in [0, 1]")
        require(self.shift >= 0, "shift", self.shift, "must not be negative")


def idle_settings(agent: AgentConfig) -> dict[str, str]:
    """Prefixes of settings that do nothing beside the others, with what would change that."""
    idle: dict[str, str] = {}
    if "moe" not in (agent.actor, agent.critic):  # sizes count: the dense layer has their multiply-adds
        idle |= dict.fromkeys(("agent.moe.aux", "agent.moe.gate_dropout"), "give --agent.actor moe")
    if agent.perturb.kind == "none":
        names = ("interval", "pool", "max_factor", "min_factor")
        idle |= {f"agent.perturb.{name}": "give --agent.perturb.kind" for name in names}
    if not agent.value:
        idle |= dict.fromkeys(("agent.expectile", "agent.value_share"), "give --agent.value true")
    return idle
