"""How the losses of several tasks become one step: fixed, learned or measured weights, or gradients made to agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from apps.recsys.train_settings import LossConfig


class TaskBalance(nn.Module):
    """Fixed weights.

    Args:
        weights: of the tasks.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("static", torch.tensor(list(weights), dtype=torch.float32), persistent=False)

    def forward(self, losses: Float[Tensor, " T"]) -> Float[Tensor, ""]:
        """What to minimise."""
        return (self.static * losses).sum()

    def end_epoch(self) -> None:
        """Called after every pass over the training data."""

    def backward(self, losses: Float[Tensor, " T"], rest: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """Add gradients of the weighted losses and of what else is minimised."""
        (self(losses) + rest).backward()


class Uncertainty(TaskBalance):
    """`sum_t exp(-s_t) L_t + s_t / 2` with learned s (Kendall et al. 2018, arXiv 1705.07115, for likelihoods)."""

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__(weights)
        self.log_variance = nn.Parameter(torch.zeros(len(weights)))

    def forward(self, losses: Float[Tensor, " T"]) -> Float[Tensor, ""]:
        """What to minimise."""
        return (self.static * ((-self.log_variance).exp() * losses + self.log_variance / 2)).sum()


class DWA(TaskBalance):
    """`w = T softmax(r / temperature)`, r the mean loss of the last epoch over that of the one before (1803.10704)."""

    def __init__(self, weights: Sequence[float], temperature: float = 2.0) -> None:
        super().__init__(weights)
        self.temperature = temperature
        for name in ("total", "last", "before"):
            self.register_buffer(name, torch.zeros(len(weights)))
        for name in ("steps", "epochs"):
            self.register_buffer(name, torch.tensor(0))

    def weights(self) -> Float[Tensor, " T"]:
        """Of the present epoch: ones in the first two."""
        if int(self.epochs) < 2:
            return torch.ones_like(self.last)
        pace = torch.where(self.before > 0, self.last / self.before, 1.0)  # of a task without rows: as it was
        return len(pace) * (pace / self.temperature).softmax(0)

    def forward(self, losses: Float[Tensor, " T"]) -> Float[Tensor, ""]:
        """What to minimise."""
        self.total += losses.detach()
        self.steps += 1
        return (self.static * self.weights() * losses).sum()

    def end_epoch(self) -> None:
        """The epoch's mean losses become the last ones."""
        self.before.copy_(self.last)
        self.last.copy_(self.total / self.steps.clamp(min=1))
        self.total.zero_()
        self.steps.zero_()
        self.epochs += 1


class GradNorm(TaskBalance):
    """Weights under which tasks that learn at the same pace have the same gradient norm (Chen et al. 2018, 1711.02257).

    Norms are of the gradient on all parameters that several tasks share. Weights move by `lr` times the sign of the
    difference of norm and target (the gradient of equation 2), and sum to T.
    """

    def __init__(self, weights: Sequence[float], alpha: float = 1.5, lr: float = 0.01) -> None:
        super().__init__(weights)
        self.alpha, self.lr = alpha, lr
        self.register_buffer("weights", torch.ones(len(weights)))
        self.register_buffer("first", torch.zeros(len(weights)))

    def forward(self, losses: Float[Tensor, " T"]) -> Float[Tensor, ""]:
        """What to minimise."""
        return (self.static * self.weights * losses).sum()

    def backward(self, losses: Float[Tensor, " T"], rest: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """Gradients under the present weights, which then move: those of tasks with a gradient on what is shared."""
        grads = _task_gradients(losses, parameters)
        shared = _shared(grads)
        norms = torch.stack([_norm([task[i] for i in shared], losses) for task in grads])
        super().backward(losses, rest, parameters)
        learns = norms > 0
        if learns.sum() > 1:
            self._move(losses.detach(), norms, learns)

    def _move(self, losses: Float[Tensor, " T"], norms: Float[Tensor, " T"], learns: Bool[Tensor, " T"]) -> None:
        self.first.copy_(torch.where(learns & (self.first == 0), losses, self.first))
        ratio = losses / self.first.clamp(min=1e-12)
        pace = ratio / ratio[learns].mean().clamp(min=1e-12)
        weighted = self.weights * norms
        step = (weighted - weighted[learns].mean() * pace**self.alpha).sign() * norms / norms[learns].mean()
        moved = torch.where(learns, (self.weights - self.lr * step).clamp(min=1e-3), self.weights)
        self.weights.copy_(len(moved) * moved / moved.sum())


class PCGrad(TaskBalance):
    """On shared parameters, gradients that point against another task's lose that part (Yu et al. 2020, 2001.06782)."""

    def backward(self, losses: Float[Tensor, " T"], rest: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """Add the projected gradients."""
        grads = _task_gradients(self.static * losses, parameters)
        shared = _shared(grads)
        joint: dict[int, Tensor] = {}
        if shared:
            vectors = [torch.cat([_filled(task[i], parameters[i]).flatten() for i in shared]) for task in grads]
            pieces = sum(projected(vectors)).split([parameters[i].numel() for i in shared])
            joint = dict(zip(shared, pieces, strict=True))
        if rest.requires_grad:
            rest.backward()
        for i, parameter in enumerate(parameters):
            own = [task[i] for task in grads if task[i] is not None]
            grad = joint[i].view_as(parameter) if i in joint else (own[0] if own else None)
            if grad is not None:
                parameter.grad = grad.clone() if parameter.grad is None else parameter.grad + grad


def projected(vectors: Sequence[Float[Tensor, " P"]]) -> list[Float[Tensor, " P"]]:
    """Each vector without its components against the others, which are taken in random order."""
    found = []
    for i, vector in enumerate(vectors):
        for j in torch.randperm(len(vectors)).tolist():
            other = vectors[j]
            dot = vector @ other
            if j != i and dot < 0:
                vector = vector - dot / (other @ other).clamp(min=1e-20) * other
        found.append(vector)
    return found


def gradient_cosines(losses: Float[Tensor, " T"], parameters: Sequence[nn.Parameter]) -> Float[Tensor, "T T"]:
    """Cosine of every two tasks' gradients on the parameters that they share: below 0 they conflict."""
    grads = _task_gradients(losses, parameters)
    shared = _shared(grads)
    if not shared:
        return torch.eye(len(grads), device=losses.device)
    vectors = torch.stack([torch.cat([_filled(task[i], parameters[i]).flatten() for i in shared]) for task in grads])
    vectors = nn.functional.normalize(vectors, dim=1)
    return vectors @ vectors.T


def _task_gradients(losses: Tensor, parameters: Sequence[nn.Parameter]) -> list[tuple[Tensor | None, ...]]:
    """Of each task on each parameter; None where it has none, which a stack of losses gives as zeros."""
    every = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    return [tuple(None if grad is None or not bool(grad.any()) else grad for grad in task) for task in every]


def _shared(grads: Sequence[Sequence[Tensor | None]]) -> list[int]:
    """Numbers of the parameters that more than one task has a gradient on."""
    return [i for i, column in enumerate(zip(*grads, strict=True)) if sum(grad is not None for grad in column) > 1]


def _norm(grads: Sequence[Tensor | None], like: Tensor) -> Float[Tensor, ""]:
    """Of all gradients together; 0 without any."""
    norms = [grad.norm() for grad in grads if grad is not None]
    return torch.stack(norms).norm() if norms else like.new_zeros(())


def _filled(grad: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if grad is None else grad


def make_balance(config: LossConfig, weights: Sequence[float]) -> TaskBalance:
    """The balance that settings ask for."""
    if config.balancing == "dwa":
        return DWA(weights, config.temperature)
    if config.balancing == "gradnorm":
        return GradNorm(weights, config.alpha)
    return {"static": TaskBalance, "uncertainty": Uncertainty, "pcgrad": PCGrad}[config.balancing](weights)
