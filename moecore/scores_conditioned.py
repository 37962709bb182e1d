"""Scores that read more than the token: the task, or what the router of the layer before saw."""

from __future__ import annotations

import uuid

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moecore.context import Context
from moecore.errors import require
from moecore.routing import Scores
from moecore.scores import gate_weight, linear, with_fixed_noise


def _task(context: Context, num_tasks: int) -> int | Tensor:
    """The context's task, checked."""
    task = context.task
    if task is None:
        raise ValueError("context.task=None: this router has one gate per task; use `routing_context(task=...)`")
    wrong = None
    if isinstance(task, int):
        wrong = None if 0 <= task < num_tasks else task
    elif task.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere a look would wait for the device
        outside = task[(task < 0) | (task >= num_tasks)]
        wrong = int(outside[0]) if outside.numel() else None
    if wrong is not None:
        raise ValueError(f"context.task={wrong}: must lie between 0 and {num_tasks - 1}")
    return task


class PerTaskScore(nn.Module):
    """One bias-free gate per task over shared experts (M³ViT's multi-gate, arXiv 2210.14793)."""

    def __init__(self, width: int, num_experts: int, num_tasks: int = 2, noise_std: float = 0.0) -> None:
        super().__init__()
        require(num_tasks >= 1, "num_tasks", num_tasks, "must be at least 1")
        self.weight = nn.Parameter(torch.empty(num_tasks, num_experts, width).normal_(std=0.02))
        self.noise_std = noise_std

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Scores | Float[Tensor, "T E"]:
        """[T, D] -> [T, E] by the gate of `context.task`, an int or one per token."""
        task = _task(context, self.weight.shape[0])
        if isinstance(task, int):
            clean = linear(x, self.weight[task])
        else:
            every = linear(x, self.weight.flatten(0, 1)).unflatten(-1, self.weight.shape[:2])  # [T, tasks, E]
            clean = every.gather(1, task[:, None, None].expand(-1, 1, every.shape[2])).squeeze(1)
        return with_fixed_noise(clean, self.noise_std, self.training)


class TaskConditionedScore(nn.Module):
    """A linear gate on the token with a task embedding appended (M³ViT's task-conditioned gate).

    The embedding is `LayerNorm(fc2(gelu(fc1(one_hot(task)))))`. One such module may serve every layer.
    """

    def __init__(
        self, width: int, num_experts: int, num_tasks: int = 2, task_width: int = 16, noise_std: float = 0.0
    ) -> None:
        super().__init__()
        require(num_tasks >= 1, "num_tasks", num_tasks, "must be at least 1")
        self.num_tasks, self.noise_std = num_tasks, noise_std
        self.embed = TaskEmbedding(num_tasks, task_width)
        self.weight = gate_weight(num_experts, width + task_width)

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Scores | Float[Tensor, "T E"]:
        """[T, D] -> [T, E]."""
        task = _task(context, self.num_tasks)
        table = self.embed().to(x.dtype)  # [tasks, G]
        rows = table[task].expand(x.shape[0], -1)
        clean = linear(torch.cat([x, rows], -1), self.weight)
        return with_fixed_noise(clean, self.noise_std, self.training)


class TaskEmbedding(nn.Module):
    """Two-layer embedding of a one-hot task, normalised: `[tasks, G]`."""

    def __init__(self, num_tasks: int, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(num_tasks, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self) -> Float[Tensor, "tasks G"]:
        """Embeddings of all tasks."""
        one_hot = torch.eye(self.fc1.in_features, device=self.fc1.weight.device, dtype=self.fc1.weight.dtype)
        return self.norm(self.fc2(F.gelu(self.fc1(one_hot))))


class RecurrentScore(nn.Module):
    """A GRU over depth: each layer's router continues from the state of the router before it.

    Layerwise recurrent router, arXiv 2408.06793. All layers share `cell`; projections are per layer. The state
    travels in the `Context`; open one with `routing_context()` around the model, or once with `carry_across_layers`
    (`replace_ffn` does so).

    Args:
        width: D.
        num_experts: E.
        cell: the shared GRU cell; None makes a new one, for the first layer.
        hidden: size of the recurrent state, when a new cell is made.
        first: True for the layer that starts from zeros.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        cell: nn.GRUCell | None = None,
        hidden: int = 64,
        first: bool = True,
    ) -> None:
        super().__init__()
        self.cell = cell if cell is not None else nn.GRUCell(hidden, hidden)
        self.project = nn.Linear(width, self.cell.input_size)
        self.weight = gate_weight(num_experts, self.cell.hidden_size)
        self.first = first
        if not hasattr(self.cell, "carry_key"):
            self.cell.carry_key = uuid.uuid4().hex
        self.carry_key = self.cell.carry_key
        """What the state goes by in a context: a name, as export makes new objects of modules."""

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Float[Tensor, "T E"]:
        """[T, D] -> [T, E]; reads and replaces the state in `context.carry`."""
        state = None if self.first else context.carry.get(self.carry_key)
        if state is None and not self.first:
            raise RuntimeError(
                "recurrent router: no state from the layer before; run the model inside `moecore.routing_context()` "
                "or call `moecore.carry_across_layers(model)` once"
            )
        projected = linear(x, self.project.weight, self.project.bias).to(self.cell.weight_ih.dtype)
        state = self.cell(projected, state)  # [T, H]
        context.carry[self.carry_key] = state
        return linear(state.to(x.dtype), self.weight)
