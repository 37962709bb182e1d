"""MENTOR: visual reinforcement learning with a mixture of experts in the actor (arXiv 2410.14972).

Its base is DrQ-v2 (arXiv 2107.09645): random shifts, n-step returns, a double critic whose gradient trains the encoder.
On it: experts in the actor, and task-oriented perturbation of weights, as strong as units are dormant (DrM, arXiv
2310.19668). Each part is a switch of `AgentConfig`.

B observations, K frames of C channels, R features of an image, A numbers of an action.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

import moecore
from apps.loading import derive_seed
from apps.rl.agent_settings import AgentConfig, MoEActorConfig
from apps.rl.agents.networks import Actor, Critic, Encoder, Value, draw_weights
from apps.rl.spaces import EnvSpec, Transitions
from moecore.routing import Routing

PARTS = ("critic", "actor", "value")
"""What has an optimiser, in this order; "critic" has the encoder too."""


@dataclass(frozen=True)
class Experience:
    """`Transitions` as tensors, shapes as there."""

    obs: Shaped[Tensor, "B ..."]
    action: Float[Tensor, "B A"]
    reward: Float[Tensor, " B"]
    discount: Float[Tensor, " B"]
    next_obs: Shaped[Tensor, "B ..."]

    @classmethod
    def of(cls, batch: Transitions, device: torch.device | str = "cpu") -> Experience:
        """On a device."""
        parts = (batch.obs, batch.action, batch.reward, batch.discount, batch.next_obs)
        return cls(*(torch.from_numpy(part).to(device) for part in parts))


def random_shift(images: Shaped[Tensor, "B C H W"], pad: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `pad` whole pixels, its edge repeated."""
    if pad == 0:
        return images
    batch, channels, height, width = images.shape
    padded = F.pad(images.float(), (pad, pad, pad, pad), mode="replicate")
    top, left = torch.randint(0, 2 * pad + 1, (2, batch), generator=generator)
    rows = (top[:, None] + torch.arange(height))[:, None, :, None].to(images.device)
    columns = (left[:, None] + torch.arange(width))[:, None, None, :].to(images.device)
    every, channel = torch.arange(batch, device=images.device), torch.arange(channels, device=images.device)
    return padded[every[:, None, None, None], channel[None, :, None, None], rows, columns]


def reference_aux(routing: Routing) -> Float[Tensor, ""]:
    """The published layer's auxiliary loss: unbiased variance of the experts' loads plus the gate's mean entropy."""
    load = routing.assignment.load().to(routing.scores.dtype) / routing.assignment.num_tokens
    return load.var() + moecore.balance.entropy_loss(routing)


def auxiliary_loss(config: MoEActorConfig, routings: moecore.Recording) -> Float[Tensor, ""]:
    """Loss of all recorded mixtures, coefficient included."""
    loss = reference_aux if config.aux == "reference" else moecore.balance.switch_loss
    return config.aux_scale * sum(loss(routing) for routing in routings)


class Mentor(nn.Module):
    """The agent: networks, what they learn from a batch, and how it explores.

    Args:
        config: settings.
        spec: of the environment.
        seed: of shifts, target noise and perturbations; each update draws from its own stream, so that a resumed run
            repeats.

    Attributes:
        dormant: share of the actor's units that hardly react, last measured.
        updates: done so far.
    """

    def __init__(self, config: AgentConfig, spec: EnvSpec, seed: int = 0) -> None:
        super().__init__()
        self.config, self.spec, self.seed = config, spec, seed
        self.encoder = Encoder(config, spec)
        self.actor = Actor(config, self.encoder.width, spec.action_dim)
        self.critic = Critic(config, self.encoder.width, spec.action_dim)
        self.value = Value(config, self.encoder.width) if config.value else None
        self.apply(draw_weights)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self._dropouts = [layer for layer in self.actor.modules() if isinstance(layer, nn.Dropout)]
        self.dormant, self.updates = 0.0, 0
        self.pool: list[tuple[float, dict[str, Tensor]]] = []
        """Best returns and the weights that were trained to them, the worst first."""

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Fresh Adam of each part; "critic" has the encoder too."""
        one = self.config
        found = {
            "critic": torch.optim.Adam([*self.encoder.parameters(), *self.critic.parameters()], one.lr, fused=True)
        }
        found["actor"] = torch.optim.Adam(self.actor.parameters(), one.actor_lr, fused=True)
        if self.value is not None:
            found["value"] = torch.optim.Adam(self.value.parameters(), one.lr, fused=True)
        return found

    # Acting

    def forward(self, obs: Shaped[Tensor, "B ..."]) -> Float[Tensor, "B A"]:
        """Best actions that it knows."""
        return self.actor(self.encoder(obs))

    @torch.no_grad()
    def policy(self, obs: Shaped[np.ndarray, "B ..."]) -> Float[np.ndarray, "B A"]:
        """The same for environments, without dropout."""
        modes = [layer.training for layer in self._dropouts]
        for layer in self._dropouts:  # nothing else has a mode; `eval()` of every module costs as much as a layer
            layer.training = False
        action = self(torch.from_numpy(obs).to(next(self.parameters()).device)).float().cpu().numpy()
        for layer, mode in zip(self._dropouts, modes, strict=True):
            layer.training = mode
        return action

    def noise(self, step: int) -> float:
        """Standard deviation of exploration at an agent step."""
        one = self.config.noise
        linear = one.start + (one.end - one.start) * min(step / one.steps, 1.0)
        dormant = one.scale / (1 + math.exp(-10 * (self.dormant - self.config.dormant_target)))
        return {"linear": linear, "dormant": dormant, "max": max(linear, dormant)}[one.schedule]

    # Learning

    def update(self, batch: Experience, std: float, step: Mapping[str, Callable[[Tensor], None]]) -> dict[str, Tensor]:
        """One update of all networks.

        Args:
            batch: what to learn from.
            std: of noise in target actions.
            step: "critic", "actor", "value" -> clears gradients, differentiates a loss and steps.

        Returns:
            Figures to log.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.seed, 0, self.updates))
        obs, next_obs = (self._shifted(one, generator) for one in (batch.obs, batch.next_obs))
        with torch.no_grad():
            after = self.encoder(next_obs)
            goal = batch.reward + batch.discount * self._worth(after, std, generator)
        features = self.encoder(obs)
        scores = self.critic(features, batch.action)  # [2, B]
        critic_loss = F.mse_loss(scores, goal.expand_as(scores), reduction="sum") / len(goal)
        step["critic"](critic_loss)
        features = features.detach()
        figures = {"critic_loss": critic_loss.detach(), "q": scores.detach().mean(), "reward": batch.reward.mean()}
        if self.value is not None:
            figures["value_loss"] = self._update_value(features, batch.action, step["value"])
        figures |= self._update_actor(features, std, generator, step["actor"])
        self._follow()
        if self.updates % self.config.dormant_every == 0:
            self.dormant = dormant_ratio(self.actor, features, self.config.dormant_bar)
        self.updates += 1
        return figures

    def _shifted(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        return random_shift(obs, self.config.shift, generator) if self.spec.pixels else obs

    def _worth(self, features: Float[Tensor, "B R"], std: float, generator: torch.Generator) -> Float[Tensor, " B"]:
        """Of a state: the smaller of two critics at a noisy action, mixed with the value network's."""
        worth = self.target(features, self._noisy(self.actor(features), std, generator)).amin(0)
        if self.value is None:
            return worth
        share = self.config.value_share / (1 + math.exp(50 * (self.dormant - self.config.dormant_target)))
        return share * self.value(features) + (1 - share) * worth

    def _noisy(self, mean: Float[Tensor, "B A"], std: float, generator: torch.Generator) -> Float[Tensor, "B A"]:
        """Actions with clipped noise; kept inside the bounds without stopping the gradient."""
        clip = self.config.noise.clip
        noise = torch.randn(mean.shape, generator=generator).to(mean.device) * std
        action = mean + noise.clamp(-clip, clip)
        return action + (action.clamp(-1 + 1e-6, 1 - 1e-6) - action).detach()

    def _update_value(self, features: Tensor, action: Tensor, step: Callable[[Tensor], None]) -> Tensor:
        """Expectile regression towards the critics (IQL, arXiv 2110.06169, equation 5)."""
        with torch.no_grad():
            goal = self.target(features, action).amin(0)
        error = goal - self.value(features)
        share = self.config.expectile
        loss = (torch.where(error > 0, share, 1 - share) * error.square()).mean()
        step(loss)
        return loss.detach()

    def _update_actor(
        self, features: Tensor, std: float, generator: torch.Generator, step: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        with moecore.record(self.actor) as routings:
            action = self._noisy(self.actor(features), std, generator)
        self.critic.requires_grad_(False)
        loss = -self.critic(features, action).amin(0).mean()
        self.critic.requires_grad_(True)
        figures = {"actor_loss": loss.detach()}
        if routings:
            aux = auxiliary_loss(self.config.moe, routings)
            figures["aux_loss"] = aux.detach()
            loss = loss + aux
        step(loss)
        return figures

    @torch.no_grad()
    def _follow(self) -> None:
        ours, theirs = list(self.critic.parameters()), list(self.target.parameters())
        torch._foreach_lerp_(theirs, ours, self.config.tau)

    # Task-oriented perturbation

    def perturbed(self) -> dict[str, nn.Module]:
        """Networks that perturbations change; images are still read as before."""
        parts = {"actor": self.actor, "critic": self.critic, "target": self.target, "value": self.value}
        return {name: part for name, part in parts.items() if part is not None}

    def remember(self, episode_return: float) -> bool:
        """Keep the present weights if an episode of training was among the best; says whether it was."""
        if self.config.perturb.kind != "task":
            return False
        full = len(self.pool) >= self.config.perturb.pool
        if full and episode_return <= self.pool[0][0]:
            return False
        weights = {name: p.detach().clone() for name, p in self._weights()}
        self.pool = sorted([*self.pool[1 if full else 0 :], (episode_return, weights)], key=lambda pair: pair[0])
        return True

    def perturb_due(self) -> bool:
        """Whether it is time, and there is something to draw from."""
        one = self.config.perturb
        ready = one.kind == "random" or (one.kind == "task" and len(self.pool) >= 2)
        return ready and self.updates > 0 and self.updates % one.interval == 0

    @torch.no_grad()
    def perturb(self) -> float:
        """Draw all weights towards a sample; returns the share that they keep. Optimisers must start anew."""
        one = self.config.perturb
        keep = min(max(1 - 2 * self.dormant, one.min_factor), one.max_factor)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, 1, self.updates))
        fresh = self._fresh(generator) if one.kind == "random" else None
        for name, weight in self._weights():
            weight.lerp_(self._sample(name, weight, generator) if fresh is None else fresh[name], 1 - keep)
        return keep

    def _sample(self, name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
        """From the Gaussian that fits a weight over the pool, element by element."""
        kept = torch.stack([weights[name] for _, weights in self.pool])
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
        return kept.mean(0) + kept.std(0).clamp(min=1e-7) * noise

    def _fresh(self, generator: torch.Generator) -> dict[str, Tensor]:
        """New weights of every network; the target gets the critic's."""
        with torch.random.fork_rng([]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            parts = {name: copy.deepcopy(part).apply(draw_weights) for name, part in self.perturbed().items()}
        parts["target"] = parts["critic"]
        return {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for part, module in self.perturbed().items():
            for name, parameter in module.named_parameters():
                yield f"{part}.{name}", parameter

    def extra_state(self) -> dict[str, object]:
        """Beside weights, what a resumed run needs."""
        return {"dormant": self.dormant, "updates": self.updates, "pool": self.pool}

    def load_extra_state(self, state: Mapping[str, object]) -> None:
        """Go on from it."""
        self.dormant, self.updates, self.pool = state["dormant"], state["updates"], list(state["pool"])


@torch.no_grad()
def dormant_ratio(actor: Actor, features: Float[Tensor, "B R"], bar: float) -> float:
    """Share of units whose mean magnitude over a batch is below `bar` times their layer's (arXiv 2302.12902).

    Units of every linear layer of the actor, each expert's included, after its ReLU where it has one. An expert is
    measured on all observations, those that did not choose it too.
    """
    sizes = [layer.abs().mean(0) for layer in actor.unit_outputs(features)]  # [units]
    silent = sum(int((size <= bar * size.mean()).sum()) for size in sizes)
    return silent / sum(size.numel() for size in sizes)
