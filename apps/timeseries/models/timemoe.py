"""Time-MoE: a decoder of point tokens with heads for several horizons (arXiv 2409.16040).

Where paper and published code disagree this follows the code, which the published weights were trained with: experts
of width d_ff / top_k, a balance loss that is top_k when routing is even.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

import moecore
from apps.errors import UserError
from apps.timeseries.model_settings import TimeMoEConfig
from apps.timeseries.models.base import Forecast, ForecastModel, Scale, Windows, filled, instance_scale, observed
from apps.timeseries.models.rotary import rotary_table
from apps.timeseries.models.timemoe_checkpoint import read_folder, write_folder
from apps.timeseries.models.timemoe_decoding import Decoder
from apps.timeseries.models.timemoe_layers import EPS, Block, LayerCache, PointEmbedding, causal_mask, initialise

HUBER_DELTA = 2.0
PRESETS: dict[str, dict[str, int]] = {
    "50m": {"hidden_size": 384, "intermediate_size": 1536, "num_layers": 12, "num_heads": 12},
    "200m": {"hidden_size": 768, "intermediate_size": 3072, "num_layers": 12, "num_heads": 12},
    "ultra": {"hidden_size": 1024, "intermediate_size": 4096, "num_layers": 36, "num_heads": 16},
}
"""Sizes of the published models; all have 8 experts, top-2, heads of 1, 8, 32 and 64 points."""


@dataclass(frozen=True)
class Outputs:
    """What the decoder computed."""

    hidden: Float[Tensor, "B N D"]
    """After the final norm."""
    states: tuple[Float[Tensor, "B N D"], ...] = ()
    """Input of every block, and last the final norm's output; only if asked for."""


class TimeMoE(ForecastModel):
    """Points in, the next points out: greedily by the largest head that still fits.

    Missing values are the zero token, are attended to by nobody and learned from by nobody; a context padded on the
    left with NaN gives what the context alone would.

    Args:
        config: sizes.
    """

    def __init__(self, config: TimeMoEConfig) -> None:
        super().__init__()
        if config.preset != "none":
            config = dataclasses.replace(config, preset="none", num_kv_heads=None, **PRESETS[config.preset])
        self.config, self.max_context = config, config.max_positions
        width = config.hidden_size
        self.embed = PointEmbedding(width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(width, eps=EPS)
        self.heads = nn.ModuleList(nn.Linear(width, p, bias=False) for p in config.horizons)
        initialise(self)

    @classmethod
    def from_config(cls, config: TimeMoEConfig, dense: bool = False) -> TimeMoE:
        """Fresh or published weights by the settings.

        Args:
            config: with `pretrained`, sizes are those of that folder.
            dense: the twin with plain FFNs of equal active multiply-adds, always with fresh weights.
        """
        if config.pretrained is not None and not dense:
            return cls.from_pretrained(config.pretrained, normalize=config.normalize)
        if config.preset != "none":
            config = dataclasses.replace(config, preset="none", num_kv_heads=None, **PRESETS[config.preset])
        if dense and config.num_experts:  # what a token uses: the shared expert and top_k of size 1 / top_k
            hidden = config.intermediate_size + config.intermediate_size // config.top_k * config.top_k
            config = dataclasses.replace(config, num_experts=0, intermediate_size=hidden)
        return cls(config)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, normalize: str = "none", dtype: torch.dtype | None = torch.float32
    ) -> TimeMoE:
        """From a folder in the published format: config.json with safetensors (sharded or not) or bin.

        Args:
            folder: on this machine.
            normalize: whether `forecast` brings contexts to mean 0 and deviation 1 by itself.
            dtype: of the weights; None: as stored.

        Raises:
            UserError: if something of it is missing, damaged or of another architecture.
        """
        config, state = read_folder(Path(folder))
        model = cls(dataclasses.replace(config, normalize=normalize))
        model.load_state_dict({k: v.to(dtype) for k, v in state.items()} if dtype else state, assign=True)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the published format, config.json and model.safetensors, which `from_pretrained` reads."""
        return write_folder(Path(folder), self.config, self.state_dict())

    def decode(
        self,
        x: Float[Tensor, "B N"],
        segments: Int[Tensor, "B N"] | None = None,
        caches: Sequence[LayerCache] | None = None,
        seen: Tensor | None = None,
        first: Tensor | None = None,
        keep_states: bool = False,
    ) -> Outputs:
        """Run points through the decoder.

        Args:
            x: values, NaN where missing.
            segments: of packed series: attention and positions stay within each.
            caches: of the points before; x comes after them.
            seen: with caches, which of all points so far were observed, `[B, M]`; None: all.
            first: with caches, where each row's first observed point is, `[B, 1]`; None: at 0.
            keep_states: keep the input of every block.

        Raises:
            UserError: for more points than the model was made for.
        """
        past = caches[0].length if caches else 0
        total = past + x.shape[1]
        if total > self.config.max_positions:
            raise UserError(f"context={total} points: this model takes {self.config.max_positions}; give a shorter one")
        if not caches:
            seen = _unless_all(observed(x))
            first = None if seen is None else seen.long().argmax(1, keepdim=True)
        rotation = self._rotation(x, past, first, segments)
        mask = None
        if seen is not None or segments is not None or (past and x.shape[1] > 1):
            allowed = torch.ones(x.shape[0], total, dtype=torch.bool, device=x.device) if seen is None else seen
            mask = causal_mask(allowed, x.shape[1], segments)
        hidden = self.embed(filled(x).to(self.norm.weight.dtype))
        states = []
        for i, block in enumerate(self.blocks):
            states.append(hidden)
            hidden = block(hidden, rotation, mask, caches[i] if caches else None)
        hidden = self.norm(hidden)
        return Outputs(hidden, (*states, hidden) if keep_states else ())

    def _rotation(self, x: Tensor, past: int, first: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines: positions count from the first observed point, and anew in every packed series."""
        positions = torch.arange(past, past + x.shape[1], device=x.device)
        if segments is not None:
            starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
            begin = torch.where(starts, positions, 0).cummax(1).values
            positions = positions - begin
        elif first is not None:
            positions = (positions - first).clamp(min=0)
        cos, sin = rotary_table(positions, self.config.hidden_size // self.config.num_heads, self.config.rope_theta)
        return (cos[:, None], sin[:, None]) if positions.dim() == 2 else (cos, sin)

    def head_outputs(self, x: Float[Tensor, "B N"]) -> dict[int, Float[Tensor, "B N p"]]:
        """What every head says at every position, by its number of points."""
        hidden = self.decode(x).hidden
        return {head.out_features: head(hidden) for head in self.heads}

    def head_for(self, horizon: int) -> nn.Linear:
        """The largest head that predicts no more than `horizon` points."""
        return max((head for head in self.heads if head.out_features <= horizon), key=lambda head: head.out_features)

    def loss(self, windows: Windows) -> Float[Tensor, ""]:
        """Huber loss (delta 2) of every head at every observed position, and the balance loss over all layers."""
        scale = instance_scale(windows.past) if self.config.normalize == "instance" else None
        sequence = windows.sequence if scale is None else scale.normalize(windows.sequence)
        segments = None if windows.segments is None else windows.segments[:, :-1]
        with moecore.record(self) as recording:
            hidden = self.decode(sequence[:, :-1], segments).hidden
        weight = observed(sequence[:, 1:])
        losses = [_horizon_loss(head(hidden), sequence, weight, windows.segments) for head in self.heads]
        loss = sum(losses) / len(losses)
        return loss + self.config.aux_loss * aux_loss(recording) if recording else loss

    @overload
    def forecast(
        self, windows: Windows, horizon: int, quantiles: Sequence[float] = (), use_cache: bool = True
    ) -> Forecast: ...
    @overload
    def forecast(
        self, windows: Float[Tensor, "B L"], horizon: int, quantiles: Sequence[float] = (), use_cache: bool = True
    ) -> Tensor: ...
    @torch.no_grad()
    def forecast(self, windows, horizon, quantiles=(), use_cache=True):
        """The next points, as many at a time as the largest head that fits: 96 = 64 + 32.

        Args:
            windows: a batch of windows, or just contexts `[B, L]` with NaN on the left of shorter ones.
            horizon: H, any number of points.
            quantiles: not looked at: the model gives points.
            use_cache: keep keys and values of what was decoded; without, everything is decoded anew (for tests).

        Returns:
            A `Forecast`, or the points `[B, H]` for bare contexts.

        Raises:
            UserError: if context and horizon together are longer than the model's positions.
        """
        past = windows if isinstance(windows, Tensor) else windows.past
        if self.config.normalize == "instance":
            scale = instance_scale(past)
        else:
            scale = Scale(past.new_zeros(len(past), 1), past.new_ones(len(past), 1))
        mean = scale.restore(Decoder(self, use_cache)(scale.normalize(past), horizon))
        return mean if isinstance(windows, Tensor) else Forecast(mean)

    def trace(self, windows: Windows) -> Int[Tensor, " P"]:
        """One pass; positions are points."""
        scale = instance_scale(windows.past) if self.config.normalize == "instance" else None
        self.decode(windows.past if scale is None else scale.normalize(windows.past))
        return torch.arange(windows.past.shape[1])


def _unless_all(seen: Tensor) -> Tensor | None:
    return seen if torch.compiler.is_exporting() or not bool(seen.all()) else None


def _horizon_loss(
    predicted: Float[Tensor, "B N p"], sequence: Float[Tensor, "B M"], weight: Tensor, segments: Tensor | None
) -> Float[Tensor, ""]:
    """Mean Huber loss of one head over targets that were observed, from positions that were, within one series."""
    target = targets(filled(sequence[:, 1:]), predicted.shape[2])
    mask = targets(weight, predicted.shape[2]) & observed(sequence[:, :-1])[..., None]
    if segments is not None:
        mask = mask & (targets(segments[:, 1:], predicted.shape[2], -1) == segments[:, :-1, None])
    return huber(predicted, target, mask)


def targets(labels: Tensor, points: int, fill: float = 0) -> Tensor:
    """The next `points` labels at every position, `[B, N] -> [B, N, p]`; what lies past the end is `fill`."""
    return F.pad(labels, (0, points - 1), value=fill).unfold(1, points, 1)


def huber(predicted: Tensor, target: Tensor, mask: Tensor | None = None) -> Float[Tensor, ""]:
    """Mean Huber loss; without a mask over everything, zeros past the end included, as the published code has it."""
    losses = F.huber_loss(predicted, target, reduction="none", delta=HUBER_DELTA)
    if mask is None:
        return losses.mean()
    return torch.where(mask, losses, 0.0).sum() / mask.sum().clamp(min=1)


def aux_loss(recording: Sequence[moecore.Routing]) -> Float[Tensor, ""]:
    """Balance loss over the tokens of all layers taken together: top_k when routing is even.

    E * sum_e (pairs of e per token) * (mean probability of e); the paper's equation divides by top_k, the code that
    the published weights were trained with does not.
    """
    probs = torch.cat([routing.probs for routing in recording])  # [layers T, E]
    load = sum(routing.assignment.load() for routing in recording).to(probs.dtype)
    return probs.shape[1] * (load / len(probs) * probs.mean(0)).sum()
