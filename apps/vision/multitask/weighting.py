"""How the losses of several tasks make one: each has a base weight, which fixed, learned or measured factors move.

T tasks. A task that a batch has no labels for is either missing among the losses or has a loss of exactly 0, as those
of `tasks.py` have then; it leaves the state of its weight as it was. All state is in buffers and parameters, so that a
checkpoint continues exactly. In data-parallel training, torch's default is that process 0 hands its buffers to all
before every batch: what is measured is measured there, and all weigh alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from apps.vision.multitask.settings import TasksConfig
from apps.vision.multitask.tasks import TASKS
from moecore.errors import require

Losses = Mapping[str, Float[Tensor, ""]]
"""Task -> its loss."""
GRADNORM_STEP = 0.025
"""Relative size of one step of GradNorm's weights."""


class Weighting(nn.Module):
    """The sum of the losses, each times its base weight: fixed weights, and what the others build on.

    Args:
        weights: task -> base weight.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.tasks = tuple(weights)
        self.register_buffer("base", torch.tensor(list(weights.values()), dtype=torch.float32), persistent=False)

    def forward(self, losses: Losses, shared: Sequence[nn.Parameter] = ()) -> Float[Tensor, ""]:
        """What to minimise, float32; in training mode, what weights move by is noted too.

        Args:
            losses: task -> its loss; tasks may be missing.
            shared: parameters whose gradients GradNorm compares: the last layer that all tasks share.

        Raises:
            ValueError: for a loss of a task that has no weight.
        """
        return self._total(self._values(losses))

    def weights(self) -> dict[str, float]:
        """Present weight of each loss, base weight included."""
        return dict(zip(self.tasks, (self.base * self._factors()).tolist(), strict=True))

    def epoch_end(self) -> None:
        """To be called after every pass over the training data."""

    def _factors(self) -> Float[Tensor, " T"]:
        """What base weights are multiplied by."""
        return torch.ones_like(self.base)

    def _values(self, losses: Losses) -> Float[Tensor, " T"]:
        """The losses in the order of the tasks, 0 for those that are missing."""
        unknown = sorted(losses.keys() - set(self.tasks))
        if unknown:
            raise ValueError(f"losses of {', '.join(unknown)}: there are weights for {', '.join(self.tasks)}")
        absent = self.base.new_zeros(())
        return torch.stack([losses[task].float() if task in losses else absent for task in self.tasks])

    def _total(self, values: Float[Tensor, " T"]) -> Float[Tensor, ""]:
        return (self.base * self._factors() * values).sum()


class Uncertainty(Weighting):
    """Learned log-variances s, parameters for the optimiser of the model: `sum_t exp(-s_t) w_t L_t + s_t / 2`.

    Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", arXiv 1705.07115. This is the
    form published for classification. That for regression has half the first term: its s is smaller by log 2 and all
    else is equal, so that the one form serves both, and training starts from the base weights w. These give no more
    than the start; for a loss that stays L, the weight goes to 1 / (2 L).
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__(weights)
        self.log_variance = nn.Parameter(torch.zeros(len(weights)))

    def forward(self, losses: Losses, shared: Sequence[nn.Parameter] = ()) -> Float[Tensor, ""]:
        """What to minimise; the term of s alone is left out where a task has no loss, as s would fall for ever."""
        values = self._values(losses)
        return self._total(values) + torch.where(_present(values), self.log_variance / 2, 0.0).sum()

    def _factors(self) -> Float[Tensor, " T"]:
        return (-self.log_variance).exp()


class DWA(Weighting):
    """Dynamic weight average: factors `T softmax(r / temperature)`, high for losses that stopped falling.

    Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", arXiv 1803.10704, equation 7: r is a task's
    mean loss of the last epoch over that of the epoch before, 1 in the first two. Epochs without a loss of the task do
    not count for it.

    Args:
        weights: task -> base weight.
        temperature: higher is closer to equal factors.
    """

    def __init__(self, weights: Mapping[str, float], temperature: float = 2.0) -> None:
        super().__init__(weights)
        self.temperature = temperature
        for name in ("total", "batches", "last", "before"):  # of this epoch; means of the two before, 0: none yet
            self.register_buffer(name, torch.zeros(len(weights)))

    def forward(self, losses: Losses, shared: Sequence[nn.Parameter] = ()) -> Float[Tensor, ""]:
        """What to minimise; in training, losses are added to the means of the epoch."""
        values = self._values(losses)
        if self.training:
            self.total += values.detach()
            self.batches += _present(values)
        return self._total(values)

    @torch.no_grad()
    def epoch_end(self) -> None:
        """The means of the epoch become the last ones, and what these were the ones before."""
        seen = self.batches > 0
        self.before.copy_(torch.where(seen, self.last, self.before))
        self.last.copy_(torch.where(seen, self.total / self.batches, self.last))
        self.total.zero_()
        self.batches.zero_()

    def _factors(self) -> Float[Tensor, " T"]:
        ratio = torch.where(self.before > 0, self.last / self.before, 1.0)
        return len(ratio) * (ratio / self.temperature).softmax(0)


class GradNorm(Weighting):
    """Factors under which tasks that learn at the same pace pull equally hard on what they share.

    Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing", arXiv 1711.02257. With the norm
    `G_i = f_i |grad w_i L_i|` of a task's gradient on the shared parameters, factors f are to lower
    `sum_i |G_i - target_i|`; the target is the mean norm times `r_i^alpha`, where r_i is the loss over its first value,
    relative to the mean of that over tasks, and is taken as constant. The gradient on f_i needs no second backward
    pass: it is `|grad w_i L_i|` times the sign of the difference. Here factors take steps of one relative size against
    that sign, where the published ones take them against the gradient: so they stay positive, and their pace does not
    depend on the scale of the losses, which differ by much. Their sum stays T.

    As published, a batch is weighed with the factors from before its step.

    Args:
        weights: task -> base weight.
        alpha: how strongly tasks that learn slowly are favoured; 0 for equal norms.
        step: relative size of a step.
    """

    def __init__(self, weights: Mapping[str, float], alpha: float = 1.5, step: float = GRADNORM_STEP) -> None:
        super().__init__(weights)
        self.alpha, self.step = alpha, step
        self.register_buffer("factors", torch.ones(len(weights)))
        self.register_buffer("first", torch.zeros(len(weights)))
        """Each task's first loss, 0: none yet."""

    def forward(self, losses: Losses, shared: Sequence[nn.Parameter] = ()) -> Float[Tensor, ""]:
        """What to minimise; in training, factors then take a step. Losses keep their graph.

        Raises:
            ValueError: in training without shared parameters.
        """
        values = self._values(losses)
        total = self._total(values)
        if self.training and torch.is_grad_enabled():
            if not shared:
                raise ValueError("shared=(): gradnorm compares gradients of the parameters that all tasks share")
            norms = torch.stack([self._norm(losses.get(task), shared) for task in self.tasks])
            self._move(values.detach(), self.base * norms)
        return total

    def _factors(self) -> Float[Tensor, " T"]:
        return self.factors

    def _norm(self, loss: Float[Tensor, ""] | None, shared: Sequence[nn.Parameter]) -> Float[Tensor, ""]:
        """Of the gradient on all shared parameters together, float32 also where activations are not."""
        if loss is None or not loss.requires_grad:
            return self.base.new_zeros(())
        grads = torch.autograd.grad(loss, list(shared), retain_graph=True, allow_unused=True)
        norms = [grad.float().norm() for grad in grads if grad is not None]
        return torch.stack(norms).norm() if norms else self.base.new_zeros(())

    @torch.no_grad()
    def _move(self, losses: Float[Tensor, " T"], norms: Float[Tensor, " T"]) -> None:
        """One step, of the tasks with a gradient; others keep their factors. Waits for no device."""
        learns = (norms > 0) & norms.isfinite()  # float16 may overflow in single batches
        self.first.copy_(torch.where(learns & (self.first == 0), losses, self.first))
        ratio = losses / self.first
        pace = ratio / _mean(ratio, learns)
        pulls = self.factors * norms
        difference = pulls - _mean(pulls, learns) * pace**self.alpha
        moved = self.factors * (-self.step * difference.sign()).exp()
        moved = moved * _mean(self.factors, learns) / _mean(moved, learns)
        self.factors.copy_(torch.where(learns, moved, self.factors))


def _present(values: Float[Tensor, " T"]) -> Bool[Tensor, " T"]:
    """Tasks that the batch has labels for."""
    return values.detach() != 0


def _mean(values: Float[Tensor, " T"], chosen: Bool[Tensor, " T"]) -> Float[Tensor, ""]:
    return torch.where(chosen, values, 0.0).sum() / chosen.sum()


WEIGHTINGS: dict[str, Callable[[Mapping[str, float], TasksConfig], Weighting]] = {
    "fixed": lambda weights, config: Weighting(weights),
    "uncertainty": lambda weights, config: Uncertainty(weights),
    "dwa": lambda weights, config: DWA(weights, config.dwa_temperature),
    "gradnorm": lambda weights, config: GradNorm(weights, config.gradnorm_alpha),
}
"""Weightings by the names of `settings.TasksConfig.weighting`; each is made from base weights and the settings."""


def make_weighting(config: TasksConfig, tasks: Sequence[str]) -> Weighting:
    """The weighting that settings ask for.

    Args:
        config: base weights, if they are not to be the published ones, and how they move.
        tasks: that are trained.

    Raises:
        ConfigError: if some tasks have no weight while others do, or if there is a weight for something that is no
            task; weights of tasks that are not trained do nothing.
    """
    return WEIGHTINGS[config.weighting](_base_weights(config, tasks), config)


def _base_weights(config: TasksConfig, tasks: Sequence[str]) -> dict[str, float]:
    given = config.weights
    if not given:
        return {task: TASKS[task].weight for task in tasks}
    unknown = ", ".join(name for name in given if name not in TASKS)
    require(not unknown, "tasks.weights", given, f"{unknown}: no such task; there are {', '.join(TASKS)}")
    missing = ", ".join(task for task in tasks if task not in given)
    remedy = f"no weight for {missing}; give one for every task, or none for the published ones"
    require(not missing, "tasks.weights", given, remedy)
    return {task: float(given[task]) for task in tasks}
