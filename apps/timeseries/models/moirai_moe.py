"""Moirai-MoE: patches of any number of variates, experts by clusters of tokens, a mixture of distributions as output.

Liu et al., "Moirai-MoE: Empowering Time Series Foundation Models with Sparse Mixture of Experts", arXiv 2410.10469.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import moecore
from apps.timeseries.model_settings import MoiraiMoEConfig
from apps.timeseries.models.base import Forecast, ForecastModel, Windows, masked_mean
from apps.timeseries.models.distributions import MixtureHead
from apps.timeseries.models.moirai_encoder import Encoder, PathEncoder, visible
from apps.timeseries.models.moirai_tokens import Grid, make_grid

MAX_PATHS = 8192
"""Sample paths that are rolled out at once, to bound memory."""


class MoiraiMoE(ForecastModel):
    """Decoder of patches: the token of a patch gives the distribution of every point of the next.

    Covariates are further variates in the sequence, constants of the series a token each. `prefer="nearest"` sends a
    token to the experts of the clusters it is closest to; published checkpoints send it to the farthest. There is no
    shared expert, no router parameter and no balance loss.

    Args:
        config: sizes.
        dense: the twin whose FFNs are plain, of equal active multiply-adds, as `num_experts=1` makes too: centroids are
            fitted on it.
    """

    probabilistic = True
    covariates = True

    def __init__(self, config: MoiraiMoEConfig, dense: bool = False) -> None:
        super().__init__()
        config = dataclasses.replace(config, num_experts=1) if dense else config
        self.config, self.max_context = config, config.max_context
        self.encoder = Encoder(config)
        self.head = MixtureHead(config.d_model, config.patch_size)

    @property
    def moe_layers(self) -> list[moecore.MoE]:
        """In the order of blocks; none in a dense model."""
        return [block.ffn for block in self.encoder.blocks if isinstance(block.ffn, moecore.MoE)]

    @property
    def ffns(self) -> list[nn.Module]:
        """MoE layers, or the FFNs of a dense model, in the order of blocks."""
        return [block.ffn for block in self.encoder.blocks]

    def loss(self, windows: Windows) -> Float[Tensor, ""]:
        """Mean negative log-likelihood per observed point of the target, scaled, in context and horizon alike.

        A patch counts if something of its series was observed before it.
        """
        grid = make_grid(windows, self.config.patch_size, ahead=self.config.known_ahead)
        target, steps = grid.target, grid.length - 1
        inputs = grid.tokens.select(grid.tokens.clock < steps)
        hidden = self.encoder(inputs)[:, :steps]  # the target comes first
        seen = (visible(target) & target.valid[:, None])[:, :steps, :steps].any(-1)  # [B, T - 1]
        if target.segments is not None:
            seen = seen & (target.segments[:, 1:] == target.segments[:, :-1])
        likelihood = self.head(hidden).log_prob(target.values[:, 1:].to(hidden.dtype))
        return masked_mean(-likelihood, target.observed[:, 1:] & seen[..., None])

    def forecast(self, windows: Windows, horizon: int, quantiles: Sequence[float] = ()) -> Forecast:
        """Median of the sample paths as the point forecast, and their quantiles.

        The median rather than the mean: components have heavy tails, and a mean of `num_samples` draws follows the
        largest. Draws come from torch's global generator.
        """
        paths = self.sample(windows, horizon)
        median, *rows = sample_quantiles(paths, (0.5, *quantiles)).unbind(1)
        return Forecast(median, torch.stack(rows, 1) if rows else None)

    @torch.no_grad()
    def trace(self, windows: Windows) -> Int[Tensor, " N"]:
        """One pass over the contexts: patches of the target, then of each covariate."""
        past = dataclasses.replace(windows, future=None, segments=None)
        grid = make_grid(past, self.config.patch_size, ahead=self.config.known_ahead)
        tokens = grid.tokens.select(grid.tokens.time < grid.context)
        self.encoder(tokens)
        padding = grid.context * self.config.patch_size - windows.past.shape[1]
        return (tokens.time * self.config.patch_size - padding).clamp(min=0)

    @torch.no_grad()
    def sample(self, windows: Windows, horizon: int, num_samples: int | None = None) -> Float[Tensor, "B S H"]:
        """Sample paths of the future, in the units of the windows.

        Args:
            windows: contexts and covariates; `future` and `segments` are not looked at.
            horizon: H, points.
            num_samples: S; None: as configured.
        """
        count = num_samples or self.config.num_samples
        windows = dataclasses.replace(windows, future=None, segments=None)
        size = max(1, MAX_PATHS // count)
        parts = [windows[i : i + size] for i in range(0, len(windows), size)]
        return torch.cat([self._paths(part, horizon, count) for part in parts])

    def _paths(self, windows: Windows, horizon: int, count: int) -> Float[Tensor, "B S H"]:
        grid = make_grid(windows, self.config.patch_size, horizon, self.config.known_ahead)
        tokens, last = grid.tokens, grid.context - 1
        encoder = PathEncoder(self.encoder, tokens.select(tokens.clock <= last))
        patch = self.head(encoder.context[:, last]).sample((count,)).transpose(0, 1)  # [B, S, P]
        patches = [patch]
        for step in range(grid.context, grid.length - 1):
            patch = self._next_patch(encoder, grid, step, patch)
            patches.append(patch)
        paths = torch.cat(patches, -1)[..., :horizon].to(windows.past.dtype)
        return grid.scale.restore(paths)

    def _next_patch(self, encoder: PathEncoder, grid: Grid, step: int, patch: Tensor) -> Float[Tensor, "B S P"]:
        """Feed the sampled patch number `step`, and what else becomes known with it; sample the patch after."""
        known = grid.tokens.select(grid.tokens.clock == step)
        values = known.values[:, None].expand(-1, patch.shape[1], -1, -1).clone()  # [B, S, M, P]
        values[:, :, 0] = patch
        sampled = known.variate == 0
        known = dataclasses.replace(known, observed=known.observed | sampled[:, None])
        return self.head(encoder.extend(values, known)[:, :, 0]).sample()


def sample_quantiles(paths: Float[Tensor, "B S H"], levels: Sequence[float]) -> Float[Tensor, "B Q H"]:
    """Quantiles over samples, interpolated linearly; `torch.quantile` without its limit on the input's size."""
    ordered = paths.sort(1).values
    place = torch.tensor(levels, device=paths.device, dtype=paths.dtype) * (paths.shape[1] - 1)
    low, high = place.floor().long(), place.ceil().long()
    return ordered[:, low].lerp(ordered[:, high], (place - low)[:, None])
