"""Shared experts: dense experts that every token passes, beside the routed ones."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moecore.executors import execute
from moecore.executors.layouts import SingleLayout
from moecore.experts import ExpertBank, MLPBank, SegmentBank
from moecore.routing import Assignment


class SharedExpert(nn.Module):
    """One always-active expert, optionally scaled per token by a sigmoid gate.

    Ungated as in DeepSeekMoE (arXiv 2401.06066); gated as in Qwen2-MoE and Time-MoE (arXiv 2409.16040).

    Args:
        bank: a bank of one expert.
        gated: whether to scale its output by `sigmoid(w x)`, x being the token, or the whole segment where the bank
            is a `SegmentBank` (Seg-MoE, arXiv 2601.21641).
    """

    def __init__(self, bank: ExpertBank, gated: bool = False) -> None:
        super().__init__()
        self.bank = bank
        self.whole = isinstance(bank, SegmentBank)
        seen = bank.length * bank.width if isinstance(bank, SegmentBank) else bank.width
        self.gate = nn.Linear(seen, 1, bias=False) if gated else None

    def forward(self, x: Float[Tensor, "*T D"], onto: Float[Tensor, "*T O"]) -> Float[Tensor, "*T O"]:
        """The expert's output added to the routed output `onto`, in place.

        Without a gate the last product accumulates straight into `onto`, which saves a pass over it. With one, a plain
        FFN is what routed experts are, its share being the combine weight: their fast path keeps less for backward.
        """
        layout = SingleLayout(0)
        if self.gate is not None and _fast(x, self.bank):
            rows = x.reshape(-1, x.shape[-1])
            first = torch.zeros(len(rows), 1, dtype=torch.long)
            every = Assignment(first, num_tokens=len(rows), num_experts=1, complete=True)
            return onto.add_(execute(rows, self.bank, every, self._share(rows)).view(onto.shape))
        if self.gate is not None or not isinstance(self.bank, MLPBank):
            y = self.bank(x, layout)
            return onto.add_(y if self.gate is None else self._share(x) * y)
        hidden = self.bank.hidden_units(x, layout).to(onto.dtype)
        down = self.bank.down[0].to(onto.dtype)
        if onto.dim() == 2:
            onto.addmm_(hidden, down.t())
        else:
            onto.add_(hidden @ down.t())
        return onto if self.bank.down_bias is None else onto.add_(self.bank.down_bias[0])

    def _share(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*S 1"]:
        """How much of the expert's output counts: one number per token, or per segment."""
        return self.gate(x.flatten(-2)).sigmoid()[..., None] if self.whole else self.gate(x).sigmoid()


def _fast(x: Tensor, bank: ExpertBank) -> bool:
    """Whether the experts' fast path serves; compilers fuse better by themselves."""
    return x.is_cpu and not torch.compiler.is_compiling() and bank.ffn() is not None
