"""MoAE on the inputs that were published with it: attention from the ad, and histograms of how alike pictures are.

PyMAL (Alimama, github.com/alimama-tech/PyMAL), for the MAC data: ids of user and ad, ids of what the user did, and the
cosines of the ad's pictures and texts with those of what the user did.

B rows, L behaviours, d width of an embedding, N bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apps.recsys.batch import TaskSpec
from apps.recsys.model_settings import MoAEConfig
from apps.recsys.models.base import Fields, Output, Slot
from apps.recsys.models.moae import MoAE


class CosineHistogram(nn.Module):
    """How many cosines lie in each of N equal bins of [-1, 1]: `log2(count + 1)` times a weight per bin."""

    def __init__(self, bins: int = 32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(bins))

    def forward(self, cosines: Float[Tensor, "B L"]) -> Float[Tensor, "B N"]:
        """[B, L] -> [B, N]."""
        bins = self.weight.shape[0]
        place = ((cosines + 1) * (bins / 2)).floor().long().clamp(0, bins - 1)
        counts = nn.functional.one_hot(place, bins).sum(1)
        return (counts + 1).to(self.weight.dtype).log2() * self.weight


class PublishedInput(nn.Module):
    """Ids of user, ad and behaviours, and cosines, as one row: 336 wide with the published sizes.

    Each sequence is read by an attention of several heads whose query is a linear map of the whole ad; padding is a
    value like any other, as published. Histograms are summed.

    Args:
        rows: of every table.
        users: features of the user.
        ads: features of ad and context; sequence i holds values of the i-th of them.
        sequences: sequences.
        histograms: kinds of cosines.
        dim: d.
        heads: of the attentions.
        bins: N; a multiple of d.
    """

    def __init__(
        self,
        rows: int,
        users: int = 6,
        ads: int = 10,
        sequences: int = 3,
        histograms: int = 2,
        dim: int = 16,
        heads: int = 4,
        bins: int = 32,
    ) -> None:
        super().__init__()
        self.rows, self.users, self.ads = rows, users, ads
        self.table = nn.Embedding(rows * (users + ads), dim)
        self.queries = nn.Linear(ads * dim, sequences * dim)
        self.attention = nn.ModuleList(nn.MultiheadAttention(dim, heads, batch_first=True) for _ in range(sequences))
        self.histograms = nn.ModuleList(CosineHistogram(bins) for _ in range(histograms))
        count = users + ads + sequences + bins // dim
        self.slots = [Slot(f"field{i}", i * dim, (i + 1) * dim) for i in range(count)]

    def forward(
        self,
        user: Int[Tensor, "B U"],
        ad: Int[Tensor, "B A"],
        sequences: Int[Tensor, "B S L"],
        cosines: Float[Tensor, "B M L"],
    ) -> Fields:
        """Everything side by side: user, ad, sequences, histogram."""
        first = torch.arange(self.users + self.ads, device=ad.device) * self.rows  # row of each table
        single = self.table(torch.cat([user, ad], 1) + first).flatten(1)
        queries = self.queries(single[:, -self.queries.in_features :]).chunk(len(self.attention), 1)
        own = first[self.users : self.users + len(self.attention), None]
        values = self.table(sequences + own).unbind(1)
        read = [
            attention(query[:, None], value, value, need_weights=False)[0].squeeze(1)
            for attention, query, value in zip(self.attention, queries, values, strict=True)
        ]
        alike = sum(part(cosines[:, i]) for i, part in enumerate(self.histograms))
        return Fields(torch.cat([single, *read, alike], 1))


class PyMAL(nn.Module):
    """MoAE on its published inputs.

    Args:
        config: of MoAE; `squeeze` dims, `input_norm` and `outputs` 2 as published.
        tasks: the attributions.
        inputs: what reads the log.
    """

    def __init__(self, config: MoAEConfig, tasks: Sequence[TaskSpec], inputs: PublishedInput) -> None:
        super().__init__()
        self.inputs, self.moae = inputs, MoAE(config, tasks, inputs.slots)

    def forward(
        self,
        user: Int[Tensor, "B U"],
        ad: Int[Tensor, "B A"],
        sequences: Int[Tensor, "B S L"],
        cosines: Float[Tensor, "B M L"],
    ) -> Output:
        """Logits of all attributions."""
        return self.moae(self.inputs(user, ad, sequences, cosines))
