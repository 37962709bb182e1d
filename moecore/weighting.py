"""How much each chosen expert counts: raw scores and assignment -> combine weights."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moecore.routing import Assignment


def softmax(scores: Tensor) -> Tensor:
    """Softmax over experts."""
    return scores.softmax(-1)


def normalized_sigmoid(scores: Tensor) -> Tensor:
    """Sigmoid scores divided by their sum over experts."""
    gates = scores.sigmoid()
    return gates / gates.sum(-1, keepdim=True).clamp(min=1e-20)


def normalized_relu(scores: Tensor) -> Tensor:
    """Positive part divided by its sum over experts; zero where no score is positive."""
    gates = scores.relu()
    return gates / gates.sum(-1, keepdim=True).clamp(min=1e-20)


class Weighting(nn.Module, ABC):
    """Base of all weightings: `scale` times the weights of the subclass, zero in empty slots."""

    activation = staticmethod(softmax)
    """Scores -> probabilities, the meaning that balance losses and metrics give to the scores."""

    def __init__(self, width: int, num_experts: int, top_k: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    @abstractmethod
    def raw(self, scores: Float[Tensor, "T E"], assignment: Assignment, x: Float[Tensor, "T D"]) -> Tensor:
        """Unscaled weights in the shape of `assignment.expert`; what empty slots get does not matter."""

    def forward(self, scores: Float[Tensor, "T E"], assignment: Assignment, x: Float[Tensor, "T D"]) -> Tensor:
        """Combine weights in the shape of `assignment.expert`."""
        weights = self.raw(scores, assignment, x)
        if assignment.valid is not None:
            weights = weights.masked_fill(~assignment.valid, 0.0)
        return weights if self.scale == 1.0 else weights * self.scale

    def extra_repr(self) -> str:
        """The scale, for `print(model)`."""
        return f"scale={self.scale}"


def _share(weights: Tensor, assignment: Assignment) -> Tensor:
    """Divide by the sum over each token's filled slots.

    A token with one slot keeps its raw weight: normalised it would be the constant 1, and the router would learn
    nothing from the task.
    """
    if assignment.token is None and weights.shape[1] == 1:
        return weights
    if assignment.valid is not None:
        weights = weights.masked_fill(~assignment.valid, 0.0)
    return weights / assignment.spread(assignment.total(weights)).clamp(min=1e-20)


class Softmax(Weighting):
    """Softmax over all experts, then the chosen entries; renormalised to sum to one unless told otherwise.

    Renormalised as in Mixtral (arXiv 2401.04088), raw as in Switch (arXiv 2101.03961) and M³ViT.
    """

    def __init__(self, width: int, num_experts: int, top_k: int, scale: float = 1.0, renormalize: bool = True) -> None:
        super().__init__(width, num_experts, top_k, scale)
        self.renormalize = renormalize

    def raw(self, scores: Tensor, assignment: Assignment, x: Tensor) -> Tensor:
        """Chosen probabilities."""
        weights = assignment.gather(scores.softmax(-1))
        return _share(weights, assignment) if self.renormalize else weights


class SoftmaxChosen(Weighting):
    """Softmax over the chosen experts' scores alone (Shazeer et al. 2017). With one slot: over all experts."""

    def raw(self, scores: Tensor, assignment: Assignment, x: Tensor) -> Tensor:
        """Softmax over the filled slots of each token."""
        if assignment.token is not None or assignment.expert.shape[1] == 1:
            return _share(assignment.gather(scores.softmax(-1)), assignment)
        chosen = assignment.gather(scores)
        if assignment.valid is not None:
            chosen = chosen.masked_fill(~assignment.valid, torch.finfo(chosen.dtype).min)
        return chosen.softmax(-1)


class Sigmoid(Weighting):
    """Sigmoid of the chosen scores, normalised to sum to one (DeepSeek-V3, arXiv 2412.19437)."""

    activation = staticmethod(normalized_sigmoid)

    def raw(self, scores: Tensor, assignment: Assignment, x: Tensor) -> Tensor:
        """Chosen sigmoid gates, normalised."""
        return _share(assignment.gather(scores).sigmoid(), assignment)


class ReLU(Weighting):
    """The positive part of the score itself: differentiable everywhere (ReMoE, arXiv 2412.14711)."""

    activation = staticmethod(normalized_relu)

    def raw(self, scores: Tensor, assignment: Assignment, x: Tensor) -> Tensor:
        """Positive part of the chosen scores."""
        return assignment.gather(scores).relu()


class Constant(Weighting):
    """Every chosen expert counts fully, as the parts of a split FFN must (MoEfication, arXiv 2110.01786)."""

    def raw(self, scores: Tensor, assignment: Assignment, x: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(assignment.expert, dtype=scores.dtype)


class DecoupledScale(Softmax):
    """Softmax weights plus a scale of their own linear head, so that weighting need not follow selection.

    The scale adapter of AdaMoE for vision-language-action models, arXiv 2510.14300.
    """

    def __init__(self, width: int, num_experts: int, top_k: int, scale: float = 1.0, renormalize: bool = True) -> None:
        super().__init__(width, num_experts, top_k, scale, renormalize)
        self.adapter = nn.Linear(width, num_experts, bias=False)
        nn.init.zeros_(self.adapter.weight)  # starts as the plain softmax

    def raw(self, scores: Tensor, assignment: Assignment, x: Tensor) -> Tensor:
        """Softmax weights plus the adapter's scales."""
        own = nn.functional.linear(x, self.adapter.weight.to(x.dtype))  # [T, E]
        return super().raw(scores, assignment, x) + assignment.gather(own)


WEIGHTINGS: dict[str, type[Weighting]] = {
    "softmax": Softmax,
    "softmax_chosen": SoftmaxChosen,
    "sigmoid": Sigmoid,
    "relu": ReLU,
    "constant": Constant,
    "decoupled": DecoupledScale,
}
"""Weightings by the name that configurations use; each is built as `cls(width, num_experts, top_k, **options)`."""
