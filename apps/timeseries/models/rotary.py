"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split form of most published weights."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def apply_rotary(
    query: Float[Tensor, "B H N D"],
    key: Float[Tensor, "B G N D"],
    positions: Int[Tensor, "*B N"] | None = None,
    theta: float = 10000.0,
) -> tuple[Float[Tensor, "B H N D"], Float[Tensor, "B G N D"]]:
    """Turn queries and keys by angles that grow with their position, so that products tell distances.

    Args:
        query: of H heads of even width D.
        key: of G heads.
        positions: of the N tokens, for all rows or one list per row; None: 0 to N - 1.
        theta: base of the angles.
    """
    if positions is None:
        positions = torch.arange(query.shape[-2], device=query.device)
    cos, sin = rotary_table(positions, query.shape[-1], theta)
    if positions.dim() == 2:
        cos, sin = cos[:, None], sin[:, None]  # over heads
    return rotate(query, cos, sin), rotate(key, cos, sin)


def rotary_table(
    positions: Int[Tensor, "*B N"], width: int, theta: float = 10000.0
) -> tuple[Float[Tensor, "*B N D"], Float[Tensor, "*B N D"]]:
    """Cosines and sines of the angles of each position, float32."""
    # Rounded as in published code: a last bit of the frequency is 1e-5 of a cosine 4096 positions away.
    frequency = 1.0 / theta ** (torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    angle = positions[..., None].float() * frequency  # [*B, N, D / 2]
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x: Float[Tensor, "*B N D"], cos: Float[Tensor, "*B N D"], sin: Float[Tensor, "*B N D"]) -> Tensor:
    """Channel i and channel i + D / 2 turned together; computed in float32, given back in the dtype of `x`."""
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]  # the other half is the same
    low, high = x.float().chunk(2, -1)
    if torch.is_grad_enabled() or torch.compiler.is_exporting():
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)
    turned = torch.empty(x.shape, dtype=low.dtype, device=x.device)  # one pass and no temporary per product
    first, second = turned.chunk(2, -1)
    torch.mul(low, cos, out=first).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=second).addcmul_(low, sin)
    return turned.to(x.dtype)
