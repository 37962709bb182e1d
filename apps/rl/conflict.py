"""Whether tasks pull an actor in different directions: cosines of the gradients that they ask for.

T tasks, B observations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from apps.errors import UserError
from apps.rl.agents.mentor import Mentor
from apps.rl.loading import Trained
from apps.rl.rollout import Rollout, Trace

PER_TASK, MOST_EPISODES = 6, 48
"""Episodes that are looked at, per task and together."""
PROBES, MOST = 4, 256
"""Batches per task, and observations of each at most."""


@dataclass(frozen=True)
class Conflict:
    """Mean cosines between tasks; on the diagonal those of a task's batches with each other, which tells how much of a
    low cosine is noise."""

    tasks: tuple[str, ...]
    actor: Float[np.ndarray, "T T"]
    """Of all parameters of the actor."""
    middle: Float[np.ndarray, "T T"]
    """Of its middle layer alone: the experts and their gate, or the dense layer in their place."""

    def scalars(self) -> dict[str, float]:
        """Mean cosine between tasks, share of pairs below 0, and mean cosine within a task, of both parts."""
        found: dict[str, float] = {}
        for part, values in {"actor": self.actor, "middle": self.middle}.items():
            pairs = between(values)
            found |= {
                f"{part}_between_tasks": float(pairs.mean()),
                f"{part}_pairs_below_0": float((pairs < 0).mean()),
                f"{part}_within_task": float(np.diag(values).mean()),
            }
        return found


def between(cosines: Float[np.ndarray, "T T"]) -> Float[np.ndarray, " P"]:
    """Those of the P pairs of different tasks."""
    return cosines[np.triu_indices(len(cosines), 1)]


def task_gradients(agent: Mentor, batches: Mapping[str, Sequence[Shaped[np.ndarray, "B ..."]]]) -> Conflict:
    """Cosines of the gradients of `-min Q(s, pi(s))`, without noise and dropout, averaged over pairs of batches.

    Args:
        agent: whose actor and critics.
        batches: task -> batches of stacked observations; with one alone, the diagonal is 1.
    """
    training = agent.training
    agent.eval()
    found = [[_gradients(agent, obs) for obs in some] for some in batches.values()]
    agent.train(training)
    actor, middle = ([torch.stack([pair[part] for pair in some]) for some in found] for part in (0, 1))
    return Conflict(tuple(batches), _cosines(actor), _cosines(middle))


def _gradients(agent: Mentor, obs: Shaped[np.ndarray, "B ..."]) -> tuple[Float[Tensor, " W"], Float[Tensor, " M"]]:
    """Of the actor's W weights, and of the M of its middle layer."""
    actor = agent.actor
    with torch.no_grad():
        features = agent.encoder(torch.from_numpy(obs).to(next(agent.parameters()).device))
    loss = -agent.critic(features, actor(features)).amin(0).mean()
    names, parameters = zip(*actor.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = {
        name: (torch.zeros_like(p) if grad is None else grad).flatten()
        for name, p, grad in zip(names, parameters, grads, strict=True)
    }
    inside = [grad for name, grad in flat.items() if name.startswith("middle.")]
    return torch.cat(list(flat.values())), torch.cat(inside)


def _cosines(vectors: Sequence[Float[Tensor, "P W"]]) -> Float[np.ndarray, "T T"]:
    """Means over the pairs of P vectors each; a vector is not compared with itself, if there is another."""
    unit = [torch.nn.functional.normalize(some.double(), dim=1) for some in vectors]
    table = np.ones((len(unit), len(unit)))
    for i, ours in enumerate(unit):
        for j, theirs in enumerate(unit):
            products = ours @ theirs.T
            if i != j:
                table[i, j] = float(products.mean())
            elif len(ours) > 1:
                table[i, j] = float(products[~torch.eye(len(ours), dtype=torch.bool, device=ours.device)].mean())
    return table


def episodes_of_every_task(trained: Trained, pictures: bool = False) -> Rollout:
    """Of the deterministic policy, with observations: so many that every task is likely among them; pictures of all,
    or of the first where there is one task."""
    count = max(len(trained.spec.tasks), 1)
    number = min(PER_TASK * count, MOST_EPISODES) if count > 1 else 2
    shown = (number if count > 1 else 1) if pictures else 0
    return trained.episodes(number, observations=True, pictures=shown)


def measure_conflict(trained: Trained) -> Conflict:
    """Between the tasks of an environment, on the agent's own episodes.

    Raises:
        UserError: if the environment has one task, or too little of two was seen.
    """
    if len(trained.spec.tasks) < 2:
        raise UserError(f"conflict: {trained.spec.id} has one task; it takes an environment with several")
    batches = probes(episodes_of_every_task(trained).traces, trained.spec.tasks)
    if len(batches) < 2:
        raise UserError("conflict: too few steps of two tasks were seen to compare their gradients")
    return task_gradients(trained.agent, batches)


def probes(traces: Sequence[Trace], tasks: Sequence[str]) -> dict[str, list[Shaped[np.ndarray, "B ..."]]]:
    """Batches of each task's observations, of different episodes as far as there are enough.

    Args:
        traces: episodes with observations.
        tasks: names by number; those of which too little was seen are left out.
    """
    found = {}
    for number, name in enumerate(tasks):
        seen = [obs for trace in traces if trace.task == number for obs in trace.observations]
        if len(seen) >= 2 * PROBES:
            parts = np.array_split(np.arange(len(seen)), PROBES)
            found[name] = [np.stack([seen[i] for i in _thinned(part)]) for part in parts]
    return found


def _thinned(indices: np.ndarray) -> np.ndarray:
    if len(indices) <= MOST:
        return indices
    return indices[np.linspace(0, len(indices) - 1, MOST).round().astype(int)]
