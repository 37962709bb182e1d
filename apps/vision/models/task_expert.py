"""TaskExpert: experts decompose what the backbone sees, gates of the tasks assemble it, a memory joins the blocks.

Ye & Xu, "TaskExpert: Dynamically Assembling Multi-Task Representations with Memorial Mixture-of-Experts", ICCV 2023,
arXiv 2307.15324. Built from the paper's description; sizes and the networks within are our own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

NORM_EPS = 1e-6
"""Of layer norms, as everywhere in the backbone."""

Views = tuple[Float[Tensor, "B D R S"], Float[Tensor, "B E C R S"]]
"""A block's normalised features, and what each expert makes of them, on R rows and S columns of patches."""


def as_map(tokens: Float[Tensor, "B N D"], grid: tuple[int, int]) -> Float[Tensor, "B D R S"]:
    """Tokens, row by row of a grid, as a picture with a channel for each of their dimensions."""
    return tokens.transpose(1, 2).unflatten(2, grid)


class BlockExperts(nn.Module):
    """Several views of one block's features that all tasks share: a small network each, run side by side.

    An expert is a linear map from D to C channels, a 3x3 depthwise convolution, GELU, and a linear map from C to C.

    Args:
        width: D.
        hidden: C.
        experts: E.
        grid: rows and columns of patches.
    """

    def __init__(self, width: int, hidden: int, experts: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid, self.experts = grid, experts
        channels = experts * hidden
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.networks = nn.Sequential(
            nn.Conv2d(width, channels, 1),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 1, groups=experts),
        )

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Views:
        """[B, N, D] -> [B, D, R, S] and [B, E, C, R, S]."""
        features = as_map(self.norm(tokens), self.grid)
        return features, self.networks(features).unflatten(1, (self.experts, -1))


class TaskMemory(nn.Module):
    """All that is one task's: gates, the memory that passes from block to block, and the head that reads it in the end.

    At every block a gate looks at the features and the memory of a patch and weighs the experts, and the memory itself
    as one more expert. The weighted sum is written into the memory by a 3x3 convolution.

    Args:
        width: D.
        hidden: C.
        experts: E.
        layers: L, blocks read.
        head: from the memory as tokens [B, N, C] to the prediction.
    """

    def __init__(self, width: int, hidden: int, experts: int, layers: int, head: nn.Module) -> None:
        super().__init__()
        self.start = nn.Parameter(0.02 * torch.randn(hidden, 1, 1))
        self.gates = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width + hidden, hidden, 1), nn.GELU(), nn.Conv2d(hidden, experts + 1, 1))
            for _ in range(layers)
        )
        self.writes = nn.ModuleList(nn.Conv2d(hidden, hidden, 3, padding=1) for _ in range(layers))
        self.head = head

    def assemble(self, views: Sequence[Views]) -> tuple[Float[Tensor, "B C R S"], list[Float[Tensor, "B F R S"]]]:
        """Go through the blocks: the memory after the last, and the weights given at each to F = E + 1 experts."""
        first, _ = views[0]
        memory = self.start.expand(first.shape[0], -1, *first.shape[2:])  # [B, C, R, S]
        weights = []
        for (features, experts), gate, write in zip(views, self.gates, self.writes, strict=True):
            weights.append(gate(torch.cat([features, memory], 1)).softmax(1))
            candidates = torch.cat([experts, memory[:, None]], 1)  # [B, E + 1, C, R, S]
            memory = memory + write((weights[-1][:, :, None] * candidates).sum(1))
        return memory, weights

    def forward(self, views: Sequence[Views]) -> Tensor:
        """What each expert makes of each block -> prediction."""
        memory, _ = self.assemble(views)
        return self.head(memory.flatten(2).transpose(1, 2))


class TaskExpert(nn.Module):
    """Decoder that reads several blocks; experts are shared by the tasks, gates and memories are their own.

    Args:
        heads: by task, from tokens [B, N, C] to the prediction.
        width: D of the backbone.
        hidden: C of experts and memory.
        experts: E, beside the memory.
        blocks: numbers of the blocks read, ascending.
        grid: rows and columns of patches.
    """

    def __init__(
        self,
        heads: Mapping[str, nn.Module],
        width: int,
        hidden: int,
        experts: int,
        blocks: tuple[int, ...],
        grid: tuple[int, int],
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.experts = nn.ModuleList(BlockExperts(width, hidden, experts, grid) for _ in blocks)
        self.heads = nn.ModuleDict(
            {task: TaskMemory(width, hidden, experts, len(blocks), head) for task, head in heads.items()}
        )

    def forward(self, features: Sequence[Float[Tensor, "B N D"]], task: str) -> Tensor:
        """Patch tokens of the blocks read -> prediction of a task, [B, channels, H, W] or [B, classes]."""
        return self.heads[task](self._views(features))

    def forward_all(self, features: Sequence[Float[Tensor, "B N D"]], tasks: Iterable[str]) -> dict[str, Tensor]:
        """Predictions of several tasks from the same tokens; the experts run once."""
        views = self._views(features)
        return {task: self.heads[task](views) for task in tasks}

    def gate_weights(self, features: Sequence[Float[Tensor, "B N D"]], task: str) -> Float[Tensor, "L B R S F"]:
        """How a task weighs the F = E + 1 experts, of which the last is its memory, at every patch of every block read.

        Weights of a patch sum to 1.
        """
        _, weights = self.heads[task].assemble(self._views(features))
        return torch.stack(weights).movedim(2, -1)  # [L, B, R, S, E + 1]

    def only(self, task: str) -> TaskExpert:
        """A copy for one task, with the same predictions: without the gates, memories and heads of the others."""
        decoder = copy.deepcopy(self)
        decoder.heads = nn.ModuleDict({task: decoder.heads[task]})
        return decoder

    def _views(self, features: Sequence[Float[Tensor, "B N D"]]) -> list[Views]:
        return [experts(tokens) for experts, tokens in zip(self.experts, features, strict=True)]
