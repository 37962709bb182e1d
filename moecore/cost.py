"""What a model holds and what one input uses of it: parameters and multiply-adds, total and active."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from moecore.inspect import Recording, record
from moecore.layer import MoE


@dataclass(frozen=True)
class Cost:
    """Parameters and multiply-adds of one forward pass."""

    total_params: int
    """Everything the model holds."""
    active_params: int
    """What one token uses: of every bank only the share of its experts that a token has on average."""
    macs: int
    """Multiply-adds of the whole input, active experts only; matmuls of attention included."""
    all_experts_macs: int
    """The same if every expert ran on every token."""

    def scalars(self) -> dict[str, int]:
        """Flat names for tables and JSON."""
        return {
            "params_total": self.total_params,
            "params_active": self.active_params,
            "multiply_adds": self.macs,
            "multiply_adds_all_experts": self.all_experts_macs,
        }


@torch.no_grad()
def count_cost(model: nn.Module, *inputs: object) -> Cost:
    """Count a model on real inputs, in eval mode, by what its modules multiply.

    Args:
        model: any module; the mode of each of its parts is restored.
        inputs: arguments of one forward pass. Multiply-adds are those of this input.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with record(model) as recording:
            macs = _macs(model, "sorted", inputs)
        all_experts = _macs(model, "dense", inputs)
    finally:
        for module, mode in training.items():
            module.training = mode
    total = sum(p.numel() for p in model.parameters())
    return Cost(total, total - _idle_params(model, recording), macs, all_experts)


def _macs(model: nn.Module, executor: str, inputs: tuple) -> int:
    with _executor(model, executor), FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
        model(*inputs)
    return counter.get_total_flops() // 2


def _addmm_flops(onto_shape, a_shape, b_shape, **_) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


def _attention_flops(q_shape, k_shape, v_shape, *_, **__) -> int:
    return sdpa_flop_count(q_shape, k_shape, v_shape)


_UNCOUNTED = {
    torch.ops.aten.addmm_: _addmm_flops,  # shared experts multiply in place; torch counts the other form only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,  # not in every version's own table
}


def _idle_params(model: nn.Module, recording: Recording) -> int:
    """Parameters that a token leaves unused on average."""
    modules = dict(model.named_modules())
    idle = 0
    for name, calls in recording.by_layer().items():
        bank = modules[name].experts
        tokens = sum(r.assignment.num_tokens for r in calls)
        pairs = sum(int(r.assignment.load().sum()) for r in calls)
        per_token = pairs / max(tokens, 1)
        idle += round(sum(p.numel() for p in bank.parameters()) * (1 - per_token / bank.num_experts))
    return idle


@contextmanager
def _executor(model: nn.Module, executor: str) -> Iterator[None]:
    """Run every MoE layer by the named executor."""
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    before = [m.executor for m in layers]
    for m in layers:
        m.executor = executor
    try:
        yield
    finally:
        for m, name in zip(layers, before, strict=True):
            m.executor = name
