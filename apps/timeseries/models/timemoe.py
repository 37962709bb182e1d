"""Time-MoE: a decoder of point tokens with heads for several horizons (arXiv 2409.16040).

Where paper and published code disagree this follows the code, which the published weights were trained with: experts
of width d_ff / top_k, a balance loss that is top_k when routing is even.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import overload

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import moecore
from apps.errors import UserError
from apps.timeseries.model_settings import TimeMoEConfig
from apps.timeseries.models.base import Forecast, ForecastModel, Scale, Windows, filled, instance_scale, observed
from apps.timeseries.models.rotary import rotary_table
from apps.timeseries.models.timemoe_checkpoint import read_config, read_folder, write_folder
from apps.timeseries.models.timemoe_decoding import Decoder
from apps.timeseries.models.timemoe_export import step_module
from apps.timeseries.models.timemoe_layers import (
    EPS,
    Block,
    Head,
    LayerCache,
    PointEmbedding,
    RMSNorm,
    as_added,
    blockwise,
    causal_mask,
    full_precision,
    initialise,
)
from apps.timeseries.models.timemoe_loss import aux_loss, horizon_losses, normalize_packed
from moecore.errors import require

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
        self.norm = RMSNorm(width, eps=EPS)
        self.heads = nn.ModuleList(Head(width, p, bias=False) for p in config.horizons)
        initialise(self)

    @classmethod
    def from_config(cls, config: TimeMoEConfig, dense: bool = False) -> TimeMoE:
        """Fresh or published weights by the settings.

        Args:
            config: with `pretrained`, sizes are those of that folder; how to normalise and regularise is free.
            dense: the twin with plain FFNs of equal active multiply-adds, always with fresh weights.
        """
        if config.pretrained is not None and not dense:
            model = cls.from_pretrained(config.pretrained)
            model.config = _with_free(model.config, config)
            for block in model.blocks:
                block.attention.dropout = config.attention_dropout
            return model.to(getattr(torch, config.precision))
        if config.pretrained is not None:
            config = _with_free(read_config(Path(config.pretrained)), config)
        elif config.preset != "none":
            config = dataclasses.replace(config, preset="none", num_kv_heads=None, **PRESETS[config.preset])
        if dense and config.num_experts:  # what a token uses: the shared expert and top_k of size 1 / top_k
            hidden = config.intermediate_size + config.intermediate_size // config.top_k * config.top_k
            config = dataclasses.replace(config, num_experts=0, intermediate_size=hidden)
        return cls(config).to(getattr(torch, config.precision))

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
        with torch.device("meta"):  # weights come from the folder
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
        last: bool = False,
    ) -> Outputs:
        """Run points through the decoder.

        Args:
            x: values, NaN where missing.
            segments: of packed series: attention and positions stay within each.
            caches: of the points before; x comes after them.
            seen: with caches, which of all points so far were observed, `[B, M]`; None: all.
            first: with caches, where each row's first observed point is, `[B, 1]`; None: at 0.
            keep_states: keep the input of every block.
            last: hidden state of the last point only, `[B, 1, D]`.

        Raises:
            UserError: for more points than the model was made for.
        """
        past = caches[0].length if caches else 0
        total = past + x.shape[1]
        if total > self.config.max_positions:
            raise UserError(f"context={total} points: this model takes {self.config.max_positions}; give a shorter one")
        if not past:
            seen = _unless_all(observed(x))
            first = None if seen is None else seen.long().argmax(1, keepdim=True)
        rotation, mask = self._rotation(x, past, first, segments), self._mask(x, past, seen, segments)
        hidden = self.embed(filled(x).to(full_precision(self.norm.weight.dtype)))
        again = self.config.checkpoint_blocks and self.training and torch.is_grad_enabled()
        states = []
        for i, block in enumerate(self.blocks):
            if keep_states:
                states.append(hidden.clone())  # without gradients blocks work in place
            run = partial(checkpoint, block, use_reentrant=False) if again else block
            hidden = run(hidden, rotation, mask, caches[i] if caches else None, last and i + 1 == len(self.blocks))
        hidden = self.norm.full(hidden)
        return Outputs(hidden, (*states, hidden) if keep_states else ())

    def _mask(self, x: Tensor, past: int, seen: Tensor | None, segments: Tensor | None) -> Tensor | None:
        """Who attends to whom; None where everyone does to all before."""
        new, total, blocks = x.shape[1], past + x.shape[1], blockwise(x)
        if seen is None and segments is None and not blocks and (past == 0 or new == 1):
            return None
        every = 1 if segments is None else len(x)
        allowed = torch.ones(every, total, dtype=torch.bool, device=x.device) if seen is None else seen
        mask = causal_mask(allowed, new, segments)
        return as_added(mask, self.norm.weight.dtype) if blocks else mask

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
        """Huber loss of every head at every observed position, and the balance loss over all layers.

        Normalised by what the context shows; packed series each by all of their points.
        """
        half = self.norm.weight.dtype == torch.bfloat16
        require(not half, "precision", "bfloat16", "is for forecasts; train with float32")
        sequence, segments = windows.sequence, windows.segments
        if self.config.normalize == "instance":
            packed = segments is not None
            scaled = normalize_packed(sequence, segments) if packed else self._scale(windows.past).normalize(sequence)
            sequence = scaled
        if sequence.shape[1] < 2:
            return self.norm.weight.sum() * 0  # nothing to predict
        with moecore.record(self) as recording:
            hidden = self.decode(sequence[:, :-1], None if segments is None else segments[:, :-1]).hidden
        losses = horizon_losses(self.heads, hidden, sequence, segments, self.config.huber_delta)
        loss = sum(losses) / len(losses)
        if not recording:
            return loss
        return loss + self.config.aux_loss * aux_loss(recording, observed(sequence[:, :-1]))

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
            UserError: if context and horizon together are longer than the model's positions, or a context ends with
                a missing value.
        """
        past = windows if isinstance(windows, Tensor) else windows.past
        _check_ends(past, horizon)
        scale = self._scale(past)
        mean = scale.restore(Decoder(self, use_cache)(scale.normalize(past), horizon))
        return mean if isinstance(windows, Tensor) else Forecast(mean)

    def trace(self, windows: Windows) -> Int[Tensor, " P"]:
        """One pass; positions are points."""
        self.decode(self._scale(windows.past).normalize(windows.past))
        return torch.arange(windows.past.shape[1])

    def _scale(self, past: Float[Tensor, "B L"]) -> Scale:
        if self.config.normalize == "instance":
            return instance_scale(past)
        return Scale(past.new_zeros(len(past), 1), past.new_ones(len(past), 1))

    def step_module(self, cached: bool = False) -> nn.Module:
        """For exporters: the pass over a context, or with `cached` the step over keys and values given as tensors."""
        return step_module(self, cached)


def _with_free(sizes: TimeMoEConfig, config: TimeMoEConfig) -> TimeMoEConfig:
    """A published model's sizes, with what may be chosen beside them."""
    free = ("normalize", "aux_loss", "attention_dropout", "precision", "checkpoint_blocks")
    return dataclasses.replace(sizes, **{name: getattr(config, name) for name in free})


def _check_ends(past: Float[Tensor, "B L"], horizon: int) -> None:
    require(horizon >= 1, "horizon", horizon, "must be at least 1")
    gap = observed(past).any(1) & ~observed(past)[:, -1:].all(1)
    if bool(gap.any()):
        row = int(gap.long().argmax())
        raise UserError(f"context: row {row} ends with a missing value; move it to the right, with NaN on the left")


def _unless_all(seen: Tensor) -> Tensor | None:
    return seen if torch.compiler.is_exporting() or not bool(seen.all()) else None
