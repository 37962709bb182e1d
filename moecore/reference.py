"""Slow and obvious: what a routed bank means. Every executor must match this, outputs and gradients."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from moecore.executors.layouts import SingleLayout
from moecore.experts import ExpertBank
from moecore.routing import Assignment


def run_reference(
    x: Float[Tensor, " T *unit"], bank: ExpertBank, assignment: Assignment, weights: Float[Tensor, "*pairs"]
) -> Float[Tensor, " T *out"]:
    """For every (token, expert, weight): `y[token] += weight * expert(x[token])`."""
    y = [torch.zeros(*x.shape[1:-1], bank.out_width, dtype=x.dtype, device=x.device) for _ in range(x.shape[0])]
    for token, expert, weight in zip(*assignment.pairs(weights), strict=True):
        row = x[token : token + 1]
        y[token] = y[token] + weight.to(x.dtype) * bank(row, SingleLayout(int(expert)))[0]
    return torch.stack(y) if y else x.new_zeros(*x.shape[:-1], bank.out_width)
