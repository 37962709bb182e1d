"""Balance losses: functions of a `Routing`, so that they can be mixed per layer.

f_e is the fraction of slots that expert e received (no gradient), P_e its mean router probability.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from moecore.errors import choice
from moecore.routing import Routing

Scalar = Float[Tensor, ""]


def switch_loss(routing: Routing, normalize: bool = True) -> Scalar:
    """E * sum_e f_e P_e: 1 when routing is uniform (Switch, arXiv 2101.03961, equation 4; GShard, arXiv 2006.16668).

    `normalize=False` counts pairs per token instead of per slot, so that uniform routing gives K: the form of
    Time-MoE's code and of transformers.
    """
    fractions = routing.fractions()
    loss = fractions.numel() * (fractions * routing.probs.mean(0)).sum()
    return loss if normalize else loss * _slots_per_token(routing)


def _slots_per_token(routing: Routing) -> float:
    return routing.assignment.expert.numel() / max(routing.assignment.num_tokens, 1)


def cv2(x: Float[Tensor, " E"]) -> Scalar:
    """Squared coefficient of variation: unbiased variance over squared mean; 0 for a single expert."""
    if x.numel() == 1:
        return x.sum() * 0
    return x.var() / (x.mean() ** 2 + 1e-10)


def importance_cv2(routing: Routing) -> Scalar:
    """CV² of the combine weight each expert received in total (Shazeer et al. 2017, equation 7)."""
    return cv2(routing.assignment.dense(routing.weights).sum(0))


def load_cv2(routing: Routing) -> Scalar:
    """CV² of the load, estimated smoothly from the noise of a noisy router (Shazeer et al. 2017, appendix A).

    An expert's load is the sum over tokens of the probability that fresh noise on its score would select it, given
    the others' noisy scores. Without noise this is the hard count, which has no gradient: use `switch_loss` then.
    """
    if routing.noise_std is None:
        return cv2(routing.assignment.load().to(routing.scores.dtype))
    return cv2(_selection_probability(routing).sum(0))


def _selection_probability(routing: Routing) -> Float[Tensor, "T E"]:
    """Probability that each expert is among the token's K best when only its own noise is drawn anew."""
    scores, k = routing.scores, routing.assignment.expert.shape[-1]
    if routing.assignment.token is not None:
        raise ValueError("load_cv2: needs a token-choice router; with expert choice the load is even by construction")
    if k >= scores.shape[1]:
        return torch.ones_like(scores)
    best = scores.topk(k + 1, -1).values  # [T, K+1]
    # What an expert must beat: the K-th best of the others, which is the (K+1)-th of all for those inside the top K.
    inside = scores >= best[:, k - 1 : k]
    bar = torch.where(inside, best[:, k : k + 1], best[:, k - 1 : k])
    return torch.special.ndtr((routing.clean - bar) / routing.noise_std)


def z_loss(routing: Routing) -> Scalar:
    """Mean squared log-partition of the scores, which keeps them small (ST-MoE, arXiv 2202.08906, equation 5)."""
    return routing.scores.logsumexp(-1).square().mean()


def entropy_loss(routing: Routing) -> Scalar:
    """Mean entropy of a token's router distribution, in nats: minimising it sharpens decisions."""
    return entropy(routing.probs).mean()


def mutual_information_loss(routing: Routing) -> Scalar:
    """Minus the mutual information of token and expert: even use overall, sharp choice per token.

    Mod-Squad, arXiv 2212.08066, equation 5, with the batch's tokens for the task variable.
    """
    probs = routing.probs
    return entropy(probs).mean() - entropy(probs.mean(0))


def task_information_loss(routings: Iterable[Routing]) -> Scalar:
    """Minus the mutual information of task and expert, mean over layers: each task few experts, all tasks together all.

    Mod-Squad, arXiv 2212.08066, equation 5: P(E | task) is the mean router probability over the task's tokens, and all
    tasks are equally likely. Balance losses of single tasks, which want each to use all experts, work against it.

    Args:
        routings: of one forward pass per task, as `moecore.record` collects them over all; layers are told by name.

    Returns:
        A scalar between minus log E and 0; zero (without gradient) when nothing was recorded.
    """
    layers: dict[str, list[Tensor]] = {}
    for routing in routings:
        if routing.scores.shape[0]:
            layers.setdefault(routing.name, []).append(routing.probs.mean(0))
    if not layers:
        return torch.zeros(())
    tasks = [torch.stack(probs) for probs in layers.values()]  # [tasks, E] each
    return torch.stack([entropy(probs).mean() - entropy(probs.mean(0)) for probs in tasks]).mean()


def entropy(probs: Float[Tensor, "*T E"]) -> Float[Tensor, "*T"]:
    """Entropy in nats over the last dimension."""
    return -torch.special.xlogy(probs, probs.clamp(min=1e-20)).sum(-1)


def l1_loss(routing: Routing) -> Scalar:
    """Load-weighted mean of the positive scores, the sparsity loss of a ReLU gate (ReMoE, arXiv 2412.14711, eq. 8).

    Scaled by the coefficient of the layer's `SparsityController`, if it has one.
    """
    fractions = routing.fractions()
    loss = fractions.numel() * (fractions * routing.scores.relu()).sum(-1).mean()
    coefficient = getattr(routing.controller, "coefficient", None)
    return loss if coefficient is None else loss * coefficient


LOSSES: dict[str, Callable[[Routing], Tensor]] = {
    "switch": switch_loss,
    "importance_cv2": importance_cv2,
    "load_cv2": load_cv2,
    "z": z_loss,
    "entropy": entropy_loss,
    "mutual_information": mutual_information_loss,
    "l1": l1_loss,
}
"""Balance losses by the name that configurations use."""


def balance_loss(routings: Iterable[Routing], mix: Mapping[str, float] | None = None) -> Scalar:
    """Weighted sum of balance losses over a recording.

    Args:
        routings: what `moecore.record` yields, or any routings.
        mix: loss name -> coefficient for every layer; None uses each layer's own `aux_loss`.

    Returns:
        A scalar; zero (without gradient) when nothing was recorded or no loss is asked for.
    """
    total: Tensor | None = None
    device = None
    for routing in routings:
        device = routing.scores.device
        if routing.scores.shape[0] == 0:
            continue
        for name, coefficient in (routing.aux_loss if mix is None else mix).items():
            choice("aux_loss", name, LOSSES)
            term = coefficient * LOSSES[name](routing)
            total = term if total is None else total + term
    return torch.zeros((), device=device) if total is None else total
