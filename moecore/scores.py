"""What a router scores tokens with: tokens `[T, D]` -> scores `[T, E]`.

Scores that need more than the token (a task, the layer before) are in `moecore.scores_conditioned`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moecore.context import Context
from moecore.errors import choice, require
from moecore.routing import Scores


def linear(x: Float[Tensor, "*T D"], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in the dtype of `x`, for routers inside a model that was cast to half precision."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def gate_weight(num_experts: int, width: int, std: float = 0.02) -> nn.Parameter:
    """A gate matrix `[E, D]`: small, so that training starts near even routing."""
    return nn.Parameter(torch.empty(num_experts, width).normal_(std=std))


class LinearScore(nn.Module):
    """One linear map, bias-free as in most sparse models (Switch, arXiv 2101.03961).

    Args:
        width: D.
        num_experts: E.
        bias: whether the map has a bias.
        temperature: divides the scores: below 1 decisions are sharper.
        dropout: probability that an expert cannot be chosen for a token, in training; nothing is
            dropped where all would go (Seg-MoE, arXiv 2601.21641).
    """

    def __init__(
        self, width: int, num_experts: int, bias: bool = False, temperature: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        require(temperature > 0, "temperature", temperature, "must be positive")
        require(0 <= dropout < 1, "dropout", dropout, "must lie in [0, 1)")
        self.temperature, self.dropout = temperature, dropout
        self.weight = gate_weight(num_experts, width)
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Float[Tensor, "T E"]:
        """[T, D] -> [T, E]."""
        scores = linear(x, self.weight, self.bias)
        if self.temperature != 1.0:
            scores = scores / self.temperature
        return self._drop(scores) if self.training and self.dropout > 0 else scores

    def _drop(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        gone = torch.rand_like(scores) < self.dropout
        gone = gone & ~gone.all(-1, keepdim=True)
        return scores.masked_fill(gone, torch.finfo(scores.dtype).min / 2)


class MLPScore(nn.Module):
    """Two layers with a ReLU and dropout between them, as in MENTOR's actor (arXiv 2410.14972)."""

    def __init__(self, width: int, num_experts: int, hidden: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = hidden or width
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, num_experts)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Float[Tensor, "T E"]:
        """[T, D] -> [T, E]."""
        hidden = linear(x, self.fc1.weight, self.fc1.bias).relu()
        return linear(self.dropout(hidden), self.fc2.weight, self.fc2.bias)


def with_fixed_noise(clean: Float[Tensor, "T E"], noise_std: float, training: bool) -> Scores | Tensor:
    """Clean scores plus Gaussian noise of width `noise_std / E` in training (V-MoE, arXiv 2106.05974)."""
    if not training or noise_std == 0:
        return clean
    std = torch.full_like(clean, noise_std / clean.shape[1])
    return Scores(clean + torch.randn_like(clean) * std, clean=clean, noise_std=std)


class NoisyScore(nn.Module):
    """Linear scores plus Gaussian noise in training.

    `noise_std=None` learns the noise per token and expert (Shazeer et al. 2017, arXiv 1701.06538, equation 4);
    a number fixes it at `noise_std / E` (V-MoE, arXiv 2106.05974). The record carries clean scores and noise
    width, from which `moecore.load_cv2` estimates a differentiable load.
    """

    def __init__(self, width: int, num_experts: int, noise_std: float | None = None) -> None:
        super().__init__()
        require(noise_std is None or noise_std >= 0, "noise_std", noise_std, "must not be negative")
        self.weight = gate_weight(num_experts, width)
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, width)) if noise_std is None else None
        self.noise_std = noise_std

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Scores | Float[Tensor, "T E"]:
        """[T, D] -> noisy [T, E] with its clean part in training, clean [T, E] in eval."""
        clean = linear(x, self.weight)
        if self.noise_weight is None:
            return with_fixed_noise(clean, self.noise_std, self.training)
        if not self.training:
            return clean
        std = F.softplus(linear(x, self.noise_weight)) + 1e-2
        return Scores(clean + torch.randn_like(clean) * std, clean=clean, noise_std=std)


class CosineScore(nn.Module):
    """Cosine between a projection of the token and a learned direction per expert, over a learned temperature.

    X-MoE, arXiv 2204.09179: scores on a sphere resist representation collapse.
    """

    def __init__(self, width: int, num_experts: int, hidden: int = 256, temperature: float = 0.5) -> None:
        super().__init__()
        require(temperature > 0, "temperature", temperature, "must be positive")
        hidden = min(hidden, width)
        self.project = nn.Linear(width, hidden, bias=False)
        self.directions = nn.Parameter(torch.empty(num_experts, hidden).normal_(std=0.01))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1.0 / temperature)))

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Float[Tensor, "T E"]:
        """[T, D] -> [T, E], within plus and minus 1 / temperature."""
        projected = F.normalize(linear(x, self.project.weight), dim=-1)
        directions = F.normalize(self.directions.to(x.dtype), dim=-1)
        scale = self.log_scale.to(x.dtype).clamp(max=math.log(100.0)).exp()
        return linear(projected, directions) * scale


class CentroidScore(nn.Module):
    """Distance to frozen centroids, no router parameters (Moirai-MoE, arXiv 2410.10469).

    `prefer="nearest"` scores minus the Euclidean distance, which is what clustering means. The published
    checkpoints were trained with the *largest* distances chosen; load those with `prefer="farthest"`.
    """

    def __init__(self, width: int, num_experts: int, prefer: str = "nearest") -> None:
        super().__init__()
        choice("prefer", prefer, ("nearest", "farthest"))
        self.prefer = prefer
        self.register_buffer("centroids", torch.randn(num_experts, width))

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Float[Tensor, "T E"]:
        """[T, D] -> [T, E]."""
        centroids = self.centroids.to(x.dtype)
        if torch.compiler.is_exporting():  # ONNX has no cdist
            distance = (x[:, None] - centroids).square().sum(-1).sqrt()
        else:
            distance = torch.cdist(x, centroids, compute_mode="donot_use_mm_for_euclid_dist")  # exact, however many
        return -distance if self.prefer == "nearest" else distance


class HashScore(nn.Module):
    """A fixed pseudo-random expert per token: nothing to learn, nothing to balance.

    Hash layers, arXiv 2106.04426. With `context.ids` tokens hash by id; without, by the signs of `num_bits` random
    projections, so that similar tokens share experts. Expert number r in a token's ranking scores `-r`.
    """

    def __init__(self, width: int, num_experts: int, num_bits: int = 12, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("planes", torch.randn(num_bits, width, generator=generator))
        buckets = torch.rand(2**num_bits, num_experts, generator=generator)
        self.register_buffer("ranking", buckets.argsort(-1).to(torch.int16))  # [buckets, E]

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Float[Tensor, "T E"]:
        """[T, D] -> [T, E]."""
        if context.ids is not None:
            # Multiplicative hashing spreads neighbouring ids over the table.
            bucket = (context.ids.long() * 2654435761 >> 8) % self.ranking.shape[0]
        else:
            bits = (linear(x, self.planes) > 0).long()
            bucket = (bits * 2 ** torch.arange(bits.shape[1], device=x.device)).sum(-1)
        return -self.ranking[bucket].to(x.dtype)
