"""T2MIR: a transformer that learns in context, with token- and task-wise experts (arXiv 2506.05426).

Every step of a history is three tokens: state, action, and reward with what it was given for. The token of a state
says which action to take there, given all that came before, over the ends of episodes. The last layer's network is two
mixtures side by side: one routes by token, which tells the three kinds apart, one by task, which a contrastive loss on
its gate brings about.

B windows, L steps of each, N numbers of a state, A of an action, D width of a token, E experts, M tasks of a batch.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

import moecore
from apps.rl.incontext.settings import T2MIRConfig
from moecore import MoE
from moecore.context import Context
from moecore.experts import GLUBank
from moecore.routing import Router, Routing
from moecore.scores import LinearScore, NoisyScore
from moecore.selection import TopK
from moecore.weighting import Softmax


@dataclass(frozen=True)
class Windows:
    """Stretches of histories; numbers 2 i and 2 i + 1 are of the same task."""

    obs: Float[Tensor, "B L N"]
    action: Float[Tensor, "B L A"]
    reward: Float[Tensor, "B L"]
    target: Float[Tensor, "B L A"]
    """Actions to imitate."""

    def to(self, device: torch.device) -> Windows:
        """On a device."""
        return Windows(*(part.to(device) for part in (self.obs, self.action, self.reward, self.target)))


class Attention(nn.Module):
    """Causal self-attention behind a norm, added to what came in."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """[B, T, D] -> [B, T, D]."""
        parts = self.inward(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*parts, is_causal=True)  # [B, heads, T, D / heads]
        return x + self.dropout(self.outward(y.transpose(1, 2).flatten(2)))


class Dense(nn.Sequential):
    """The two-layer network of an ordinary layer."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout))


class Layer(nn.Module):
    """Attention, and a network behind a norm, added to what came in."""

    def __init__(self, config: T2MIRConfig, network: nn.Module) -> None:
        super().__init__()
        self.attention = Attention(config.width, config.heads, config.dropout)
        self.norm, self.network = nn.LayerNorm(config.width), network

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """[B, T, D] -> [B, T, D]."""
        x = self.attention(x)
        return x + self.network(self.norm(x))


class Mixtures(nn.Module):
    """Gated experts routed by token and by task, their outputs side by side (section 3.2)."""

    def __init__(self, config: T2MIRConfig) -> None:
        super().__init__()
        width, kinds = config.width, ("token", "task") if config.experts == "both" else (config.experts,)
        out = width // len(kinds)
        hidden = config.hidden or max(8 * width**2 // (len(kinds) * config.top_k * (2 * width + out)), 1)
        parts = {}
        for kind in kinds:
            count = config.token_experts if kind == "token" else config.task_experts
            score = NoisyScore(width, count) if kind == "token" else LinearScore(width, count)
            router = Router(score, TopK(count, config.top_k), Softmax(width, count, config.top_k))
            unit = config.task_unit if kind == "task" else "token"
            parts[kind] = MoE(router, GLUBank(count, width, hidden, out_width=out), unit=unit)
        self.parts = nn.ModuleDict(parts)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """[B, T, D] -> [B, T, D]."""
        return torch.cat([part(x) for part in self.parts.values()], -1)


class T2MIR(nn.Module):
    """The agent.

    Args:
        config: settings.
        state_dim: N.
        action_dim: A; actions lie in [-1, 1].

    Attributes:
        context: steps that it sees at most.
        state_dim: N.
        action_dim: A.
    """

    def __init__(self, config: T2MIRConfig, state_dim: int, action_dim: int) -> None:
        super().__init__()
        self.config, self.context, width = config, config.context, config.width
        self.state_dim, self.action_dim = state_dim, action_dim
        self.register_buffer("scale", torch.tensor([[0.0], [1.0]]).repeat(1, state_dim + 1))
        sizes = (state_dim, action_dim, (state_dim + action_dim if config.whole_steps else 0) + 1)
        self.embed = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.place = nn.Parameter(torch.randn(config.context, width) * 0.02)
        self.kind = nn.Parameter(torch.randn(3, width) * 0.02)
        self.layers = nn.ModuleList(Layer(config, Dense(width, config.dropout)) for _ in range(config.layers - 1))
        self.layers.append(
            Layer(config, Dense(width, config.dropout) if config.experts == "none" else Mixtures(config))
        )
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, action_dim))
        self.keys = TaskKeys(self.layers[-1].network.parts["task"]) if self.has_task_gate else None

    @property
    def has_task_gate(self) -> bool:
        """Whether there is a mixture routed by task."""
        return self.config.experts in ("both", "task")

    def fit_scale(self, obs: Float[Tensor, "S N"], reward: Float[Tensor, " S"]) -> None:
        """Standardise states and rewards as those of S steps require."""
        seen = torch.cat([obs, reward[:, None]], 1)
        self.scale.copy_(torch.stack([seen.mean(0), seen.std(0).clamp(min=1e-6)]))

    def forward(
        self, obs: Float[Tensor, "B L N"], action: Float[Tensor, "B L A"], reward: Float[Tensor, "B L"]
    ) -> Float[Tensor, "B L A"]:
        """Actions in [-1, 1] to take at every state; that of a step depends on no action or reward from it on, unless
        the task-wise mixture routes whole sequences."""
        return self._act(self.last_tokens(obs, action, reward))

    def next_action(
        self, obs: Float[Tensor, "B L N"], action: Float[Tensor, "B L_less_1 A"], reward: Float[Tensor, "B L_less_1"]
    ) -> Float[Tensor, "B A"]:
        """The action to take in the last state."""
        return self(obs, F.pad(action, (0, 0, 0, 1)), F.pad(reward, (0, 1)))[:, -1]  # what comes after is not seen

    def last_tokens(self, obs: Tensor, action: Tensor, reward: Tensor) -> Float[Tensor, "B 3L D"]:
        """What the last layer's network adds to."""
        middle, spread = self.scale
        reward = (reward[..., None] - middle[-1]) / spread[-1]
        obs = (obs - middle[:-1]) / spread[:-1]
        parts = (obs, action, torch.cat([obs, action, reward], -1) if self.config.whole_steps else reward)
        tokens = torch.stack([embed(part) for embed, part in zip(self.embed, parts, strict=True)], 2)  # [B, L, 3, D]
        x = (tokens + self.kind + self.place[: obs.shape[1], None]).flatten(1, 2)
        for layer in self.layers[:-1]:
            x = layer(x)
        return self.layers[-1].attention(x)

    def _act(self, x: Float[Tensor, "B 3L D"]) -> Float[Tensor, "B L A"]:
        last = self.layers[-1]
        x = x + last.network(last.norm(x))
        return self.out(x[:, ::3]).tanh()

    def losses(self, batch: Windows) -> tuple[dict[str, Float[Tensor, ""]], moecore.Recording]:
        """What to minimise, "loss", with its parts by name; and what was routed."""
        config = self.config
        with moecore.record(self) as routings:
            tokens = self.last_tokens(batch.obs, batch.action, batch.reward)
            imitation = F.mse_loss(self._act(tokens), batch.target)
        found, total = {"imitation": imitation}, imitation
        by_name = {routing.name.rsplit(".", 1)[-1]: routing for routing in routings}
        if "token" in by_name and config.balance:
            found["balance"] = token_balance(by_name["token"])
            total = total + config.balance * found["balance"]
        if self.keys is not None and config.contrast:
            queries = task_queries(by_name["task"], len(batch.obs))
            found["contrast"] = self.keys.loss(queries, self.layers[-1].norm(tokens.detach()))
            total = total + config.contrast * found["contrast"]
        return {"loss": total} | found, routings

    def follow(self) -> None:
        """After a step of the optimiser: the gate of the keys follows."""
        if self.keys is not None:
            self.keys.follow(self.layers[-1].network.parts["task"], self.config.momentum)


class TaskKeys(nn.Module):
    """A slow copy of the task-wise gate, and the bilinear form in which its keys meet the gate's queries."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.gate = copy.deepcopy(moe.router.score).requires_grad_(False)
        self.form = nn.Parameter(torch.eye(moe.experts.num_experts))

    @torch.no_grad()
    def follow(self, moe: MoE, share: float) -> None:
        """A step towards the gate."""
        torch._foreach_lerp_(list(self.gate.parameters()), list(moe.router.score.parameters()), share)

    def loss(self, queries: Float[Tensor, "B E"], tokens: Float[Tensor, "B T D"]) -> Float[Tensor, ""]:
        """Cross-entropy, in both directions, of finding a task's second window by its first (section 3.3)."""
        with torch.no_grad():
            keys = self.gate(tokens.mean(1), Context())  # a linear gate: of the mean token, the mean of its scores
        similar = queries[::2] @ self.form @ keys[1::2].T  # [M, M]
        same = torch.arange(len(similar), device=similar.device)
        return (F.cross_entropy(similar, same) + F.cross_entropy(similar.T, same)) / 2


def token_balance(routing: Routing) -> Float[Tensor, ""]:
    """Squared variation of importance plus that of load (arXiv 1701.06538, section 4)."""
    return moecore.balance.importance_cv2(routing) + moecore.balance.load_cv2(routing)


def task_queries(routing: Routing, windows: int) -> Float[Tensor, "B E"]:
    """Mean scores of the task-wise gate over the tokens of each window."""
    return routing.scores.unflatten(0, (windows, -1)).mean(1)
