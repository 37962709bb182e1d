"""Balance without a loss: controllers that shift selection scores or a coefficient, a little after every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moecore.errors import choice, require
from moecore.routing import Routing


class Controller(nn.Module):
    """Base of controllers: keeps their state in float32 when the model is cast to half precision.

    Rounded to 8 or 11 bits the state would stall: a step is far smaller than the number it is added to.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Controller:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer.dtype.itemsize < torch.float32.itemsize:
                self._buffers[name] = before[name].to(buffer.device, torch.float32)
        return self


class LossFreeBias(Controller):
    """A bias per expert, added for selection only and moved against the load (arXiv 2408.15664, algorithm 1).

    Args:
        num_experts: E.
        rate: size of a step, in units of `space`.
        space: "probs" adds the bias to router probabilities as published; "logits" to raw scores, for selections
            that take a softmax themselves.
    """

    bias: Tensor

    def __init__(self, num_experts: int, rate: float = 1e-3, space: str = "probs") -> None:
        super().__init__()
        require(rate > 0, "rate", rate, "must be positive")
        choice("space", space, ("probs", "logits"))
        self.rate, self.space = rate, space
        self.register_buffer("bias", torch.zeros(num_experts))

    def adjust(self, scores: Float[Tensor, "T E"], activation: Callable[[Tensor], Tensor]) -> Float[Tensor, "T E"]:
        """Scores for selection."""
        return (activation(scores) if self.space == "probs" else scores) + self.bias

    @torch.no_grad()
    def update(self, routings: list[Routing]) -> None:
        """One step towards even load, from what the layer routed since the last one."""
        load = torch.stack([r.fractions() for r in routings]).mean(0)
        load = _mean_over_ranks(load)
        self.bias.add_(self.rate * torch.sign(load.mean() - load))


class SparsityController(Controller):
    """Steers the L1 coefficient of a ReLU gate until `top_k` experts are active on average.

    ReMoE, arXiv 2412.14711, equation 7: the coefficient is multiplied by `rate` while too many experts are active
    and divided by it while too few are.
    """

    coefficient: Tensor

    def __init__(self, num_experts: int, top_k: int, start: float = 1e-8, rate: float = 1.2) -> None:
        super().__init__()
        require(rate > 1, "rate", rate, "must exceed 1")
        self.target = top_k / num_experts
        self.rate = rate
        self.register_buffer("coefficient", torch.tensor(start))

    def adjust(self, scores: Float[Tensor, "T E"], activation: Callable[[Tensor], Tensor]) -> Float[Tensor, "T E"]:
        """Leaves the scores alone."""
        return scores

    @torch.no_grad()
    def update(self, routings: list[Routing]) -> None:
        """One step towards the target share of active experts."""
        active = torch.stack([r.assignment.chosen().float().mean() for r in routings]).mean()
        direction = torch.sign(_mean_over_ranks(active) - self.target)
        self.coefficient.mul_(self.rate**direction).clamp_(min=1e-12)


def _mean_over_ranks(value: Tensor) -> Tensor:
    """Average over data-parallel processes, so that every replica takes the same step."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value


def update_controllers(routings: Iterable[Routing]) -> None:
    """Let every controller among the recorded layers take its step; call it once after each optimiser step."""
    by_controller: dict[nn.Module, list[Routing]] = {}
    for routing in routings:
        if routing.controller is not None and routing.scores.shape[0]:
            by_controller.setdefault(routing.controller, []).append(routing)
    for controller, own in by_controller.items():
        controller.update(own)
