"""The encoding of numbers, taken out of a model: it belongs to the features, in front of what a device computes.

Missing values, logarithms and bins are nothing for narrow integers; what comes out of them is.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apps.recsys.models.features import FeatureEncoder


class NumberEncoding(nn.Module):
    """Numbers as logs have them -> as networks read them.

    Args:
        encoder: of a model; numbers are encoded as it does.
    """

    def __init__(self, encoder: FeatureEncoder) -> None:
        super().__init__()
        self.kinds = nn.ModuleDict(encoder.dense.items())
        for kind in self.kinds:
            self.register_buffer(f"columns_{kind}", getattr(encoder, f"dense_{kind}"))

    def forward(self, dense: Float[Tensor, "B N"]) -> Float[Tensor, "B K"]:
        """Missing ones NaN or infinite, as columns of a log are read."""
        dense = torch.where(dense.abs() == math.inf, math.nan, dense)
        parts = [one(dense.index_select(1, getattr(self, f"columns_{kind}"))) for kind, one in self.kinds.items()]
        return torch.cat(parts, 1) if parts else dense[:, :0]


def take_numbers(encoder: FeatureEncoder) -> NumberEncoding:
    """Take the encoding out of an encoder, in place: from then on it wants `Batch.dense` encoded, `[B, K]`."""
    taken, start = NumberEncoding(encoder), 0
    for kind, one in list(encoder.dense.items()):
        width = sum(wide for _, wide in one.names)
        setattr(encoder, f"dense_{kind}", torch.arange(start, start + width))
        encoder.dense[kind] = nn.Identity()
        start += width
    return taken
