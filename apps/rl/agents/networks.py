"""Networks of visual agents: an encoder of images, and heads that share its features.

B observations, R features, D width of layers, A numbers of an action, E experts.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from apps.rl.agent_settings import AgentConfig, MoEActorConfig
from apps.rl.spaces import EnvSpec
from moecore import MoE
from moecore.errors import ConfigError
from moecore.experts import MLPBank
from moecore.routing import Router
from moecore.scores import MLPScore
from moecore.selection import TopK
from moecore.weighting import Softmax


class Encoder(nn.Module):
    """DrQ-v2's: 3x3 convolutions with ReLUs, flattened. States pass as they are.

    Attributes:
        width: R.
    """

    def __init__(self, config: AgentConfig, spec: EnvSpec) -> None:
        super().__init__()
        self.pixels = spec.pixels
        self.layers = nn.Sequential()
        if not spec.pixels:
            self.width = spec.stacked[0]
            return
        channels = spec.stacked[0]
        for stride in config.strides:
            self.layers += nn.Sequential(nn.Conv2d(channels, config.channels, 3, stride), nn.ReLU())
            channels = config.channels
        self.layers.to(memory_format=torch.channels_last)
        try:
            with torch.no_grad():
                self.width = self.layers(torch.zeros(1, *spec.stacked)).numel()
        except RuntimeError:
            ask = f"too many for images of {spec.frame[1]} pixels; give smaller or fewer, or a larger env.size"
            raise ConfigError("agent.strides", config.strides, ask) from None

    def forward(self, obs: Shaped[Tensor, "B ..."]) -> Float[Tensor, "B R"]:
        """Bytes or states -> features."""
        if not self.pixels:
            return obs.float()
        images = (obs.float() / 255 - 0.5).contiguous(memory_format=torch.channels_last)  # quicker convolutions
        return self.layers(images).flatten(1)


class MoELayer(MoE):
    """MENTOR's: two-layer experts, a gate with a hidden layer and dropout, softmax, top-k, weights that sum to 1.

    Only chosen experts are computed.
    """

    def __init__(self, config: MoEActorConfig, width: int, out_width: int | None = None) -> None:
        count = config.num_experts
        score = MLPScore(width, count, config.gate_hidden, config.gate_dropout)
        router = Router(score, TopK(count, config.top_k), Softmax(width, count, config.top_k))
        super().__init__(router, MLPBank(count, width, config.hidden, "relu", out_width=out_width))

    def unit_outputs(self, x: Float[Tensor, "B D"]) -> list[Float[Tensor, "B _"]]:
        """Of every layer of the gate and of every expert, on all observations, after its ReLU where it has one."""
        bank, gate = self.experts, self.router.score
        seen = gate.fc1(x).relu()
        hidden = torch.baddbmm(bank.up_bias[:, None], x.expand(len(bank.up), *x.shape), bank.up.transpose(1, 2)).relu()
        out = torch.baddbmm(bank.down_bias[:, None], hidden, bank.down.transpose(1, 2))
        return [seen, gate.fc2(seen), *hidden.unbind(0), *out.unbind(0)]


class DenseLayer(nn.Sequential):
    """A two-layer network in place of `MoELayer`, of as many multiply-adds as it spends on one observation."""

    def __init__(self, config: MoEActorConfig, width: int) -> None:
        gate = config.gate_hidden * (width + config.num_experts)
        hidden = config.top_k * config.hidden + round(gate / (2 * width))
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def unit_outputs(self, x: Float[Tensor, "B D"]) -> list[Float[Tensor, "B _"]]:
        """Of both layers."""
        hidden = self[1](self[0](x))
        return [hidden, self[2](hidden)]


def _trunk(width: int, feature_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, feature_dim), nn.LayerNorm(feature_dim), nn.Tanh())


class Actor(nn.Module):
    """Bottleneck, a layer, the experts, and the action's mean."""

    def __init__(self, config: AgentConfig, features: int, action_dim: int) -> None:
        super().__init__()
        self.trunk = _trunk(features, config.feature_dim)
        self.up = nn.Sequential(nn.Linear(config.feature_dim, config.hidden), nn.ReLU())
        self.middle = (MoELayer if config.actor == "moe" else DenseLayer)(config.moe, config.hidden)
        self.out = nn.Linear(config.hidden, action_dim)

    def forward(self, features: Float[Tensor, "B R"]) -> Float[Tensor, "B A"]:
        """Means in (-1, 1)."""
        return self.out(self.middle(self.up(self.trunk(features))).relu()).tanh()

    def unit_outputs(self, features: Float[Tensor, "B R"]) -> list[Float[Tensor, "B _"]]:
        """Of every linear layer, after its ReLU where it has one."""
        up = self.up(self.trunk(features))
        return [self.trunk[0](features), up, *self.middle.unit_outputs(up), self.out(self.middle(up).relu())]


class _Score(nn.Module):
    def __init__(self, config: AgentConfig, width: int, kind: str) -> None:
        super().__init__()
        self.up = nn.Linear(width, config.hidden)
        self.middle = MoELayer(config.moe, config.hidden) if kind == "moe" else nn.Linear(config.hidden, config.hidden)
        self.out = nn.Linear(config.hidden, 1)

    def forward(self, x: Float[Tensor, "B _"]) -> Float[Tensor, " B"]:
        return self.out(self.middle(self.up(x).relu()).relu()).squeeze(1)


class Critic(nn.Module):
    """Two estimates of what an action is worth, behind one bottleneck."""

    def __init__(self, config: AgentConfig, features: int, action_dim: int) -> None:
        super().__init__()
        self.trunk = _trunk(features, config.feature_dim)
        self.scores = nn.ModuleList(_Score(config, config.feature_dim + action_dim, config.critic) for _ in range(2))

    def forward(self, features: Float[Tensor, "B R"], action: Float[Tensor, "B A"]) -> Float[Tensor, "2 B"]:
        """Both estimates."""
        x = torch.cat([self.trunk(features), action], 1)
        return torch.stack([score(x) for score in self.scores])


class Value(nn.Module):
    """What a state is worth."""

    def __init__(self, config: AgentConfig, features: int) -> None:
        super().__init__()
        self.trunk, self.score = _trunk(features, config.feature_dim), _Score(config, config.feature_dim, "dense")

    def forward(self, features: Float[Tensor, "B R"]) -> Float[Tensor, " B"]:
        """[B, R] -> [B]."""
        return self.score(self.trunk(features))


def draw_weights(module: nn.Module) -> None:
    """Orthogonal weights, zero biases, as DrQ-v2 draws them; of each expert too."""
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        weight = torch.empty(module.weight.shape)  # not channels last, which torch cannot draw into
        module.weight.data.copy_(nn.init.orthogonal_(weight, nn.init.calculate_gain("relu")))
        nn.init.zeros_(module.bias)
    elif isinstance(module, MLPBank):
        for weight in (*module.up, *module.down):
            nn.init.orthogonal_(weight)
        nn.init.zeros_(module.up_bias)
        nn.init.zeros_(module.down_bias)
