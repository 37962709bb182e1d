"""A small Moirai-MoE in double precision, and windows for it."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from apps.timeseries.model_settings import MoiraiMoEConfig
from apps.timeseries.models.base import Windows
from apps.timeseries.models.moirai_moe import MoiraiMoE
from apps.timeseries.models.moirai_tokens import make_grid

P = 4
TINY = MoiraiMoEConfig(
    patch_size=P, d_model=16, d_ff=16, num_layers=2, num_heads=2, num_experts=4, num_samples=5, dropout=0.0
)
NAN = math.nan


def model(**changes) -> MoiraiMoE:
    """In double precision, with biases that tell variates apart."""
    made = MoiraiMoE(dataclasses.replace(TINY, **changes)).double().eval()
    for block in made.encoder.blocks:
        torch.nn.init.normal_(block.attention.variate_bias)
    return made


def windows(length: int = 20, horizon: int = 12, futr: int = 0, hist: int = 0, batch: int = 3) -> Windows:
    n = length + horizon
    return Windows(
        past=torch.randn(batch, length).double(),
        future=torch.randn(batch, horizon).double() if horizon else None,
        futr=torch.randn(batch, n, futr).double() if futr else None,
        hist=torch.randn(batch, length, hist).double() if hist else None,
    )


def forecast(made: MoiraiMoE, given: Windows, horizon: int = 10) -> Tensor:
    torch.manual_seed(7)
    return made.sample(given, horizon)


def hidden(made: MoiraiMoE, given: Windows) -> tuple[Tensor, Tensor]:
    """Hidden states of all tokens, and when each is known."""
    tokens = make_grid(given, P, ahead=made.config.known_ahead).tokens
    with torch.no_grad():
        return made.encoder(tokens), tokens.clock
