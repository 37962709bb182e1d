"""Moirai-MoE as a function of tensors alone, for exporters: contexts -> what it predicts of every point of the horizon.

Which tokens there are, in which order and who sees whom depends on lengths and covariates alone; it is worked out once,
so that a graph has no choice left to make.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apps.timeseries.models.base import Windows, filled, observed
from apps.timeseries.models.moirai_moe import MoiraiMoE
from apps.timeseries.models.moirai_tokens import Patches, Tokens, constant_patches, make_grid, make_patches
from apps.timeseries.models.spec import SeriesSpec

COVARIATES = ("futr", "hist", "stat")


class NextPatches(nn.Module):
    """Contexts, and what is known or drawn of the horizon -> the distribution of each of its points.

    A point's distribution is that given the patches before its own: those of the first patch follow from the context
    alone. For a whole path draw the first patch, write it into `future`, run again, and so on, patch by patch; what
    stands there of later patches changes nothing. Sizes are those of the spec.

    Args:
        model: whose weights it shares.
        spec: context L, horizon H, covariates.
    """

    def __init__(self, model: MoiraiMoE, spec: SeriesSpec) -> None:
        super().__init__()
        self.model, self.patch_size = model, model.config.patch_size
        self.covariates = tuple(kind for kind in COVARIATES if getattr(spec, kind))
        length, horizon = spec.context, spec.horizon
        shapes = {
            "futr": (1, length + horizon, len(spec.futr)),
            "hist": (1, length, len(spec.hist)),
            "stat": (1, len(spec.stat)),
        }
        blank = [torch.zeros(shapes[kind]) for kind in self.covariates]
        windows = self._windows(torch.zeros(1, length), torch.zeros(1, horizon), blank)
        grid = make_grid(windows, self.patch_size, ahead=model.config.known_ahead)
        tokens = grid.tokens.select(grid.tokens.clock < grid.length - 1)  # the last patch is predicted, not seen
        series = 1 + len(spec.futr) + len(spec.hist)
        place = tokens.variate * grid.length + tokens.time
        constant = series * grid.length + tokens.variate - series
        self.first, self.last = grid.context - 1, grid.length - 1
        for name, value in (("variate", tokens.variate), ("time", tokens.time), ("clock", tokens.clock)):
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("place", torch.where(tokens.variate < series, place, constant), persistent=False)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what `forward` takes."""
        return ("context", "future", *self.covariates)

    def given(self, windows: Windows) -> tuple[Tensor, ...]:
        """What `forward` takes of windows."""
        return (windows.past, windows.future, *(getattr(windows, kind) for kind in self.covariates))

    def forward(
        self, context: Float[Tensor, "B L"], future: Float[Tensor, "B H"], *covariates: Tensor
    ) -> tuple[Float[Tensor, "B H 12"], Float[Tensor, "B 1"], Float[Tensor, "B 1"]]:
        """NaN where nothing is known.

        Args:
            context: ends with a value.
            future: the horizon as far as it is known.
            covariates: futr `[B, L + H, Cf]`, hist `[B, L, Ch]`, stat `[B, Cs]`, those that the spec has.

        Returns:
            `Mixture.bounded` of each point, in deviations from the mean; mean and deviation of each context.
        """
        windows = self._windows(context, future, covariates)
        patches = make_patches(windows, self.patch_size)
        hidden = self.model.encoder(self._tokens(patches, windows.stat))[:, self.first : self.last]  # [B, patches, D]
        bounded = self.model.head(hidden).bounded.flatten(1, 2)[:, : future.shape[1]]
        return bounded, patches.scale.mean, patches.scale.std

    def _windows(self, context: Tensor, future: Tensor, covariates: Sequence[Tensor]) -> Windows:
        return Windows(context, future, **dict(zip(self.covariates, covariates, strict=True)))

    def _tokens(self, patches: Patches, stat: Tensor | None) -> Tokens:
        values = patches.values.flatten(1, 2)  # [B, V T, P]
        if stat is not None:
            values = torch.cat([values, constant_patches(stat, self.patch_size)], 1)
        values = values[:, self.place]  # [B, N, P]
        return Tokens(filled(values), observed(values), self.variate, self.time, self.clock)
