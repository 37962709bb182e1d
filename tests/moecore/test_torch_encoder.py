"""MoE inside `nn.TransformerEncoder`, which has fused paths of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moecore


@pytest.mark.parametrize("layers", ["all", "first-1", "last-1"])
def test_encoders_take_padding_masks_in_eval(layers):
    """torch's fused path for padded batches knows no experts; it must not be taken."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    moecore.replace_ffn(encoder, layers, moecore.MoEConfig(num_experts=4))
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = encoder.train()(x, src_key_padding_mask=padding)
    with torch.no_grad():
        y = encoder.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(y[~padding], expected[~padding])
