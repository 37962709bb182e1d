"""A policy ready for export: what the agent sees in, its action out."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from apps.loading import derive_seed
from apps.rl.agents.mentor import Mentor
from apps.rl.loading import Trained
from apps.rl.rollout import Policy, evaluation_seeds, run_episodes
from export.decisions import Agreement, largest
from export.exportable import Exportable, Sample, samples_of
from export.measure import session_of
from moecore import __version__

EPISODES = 3
"""Evaluation episodes whose returns are compared; observations of more are compared where these are short."""
COMPARED, MOST = 1000, 64
"""Observations that files are compared on at least, as far as so many episodes have them."""
CALIBRATE = 5
"""Stream of the seeds of the episodes that ranges are taken from."""
TOGETHER = 64
"""Observations of a call."""
NEAR = 2e-3
"""Difference of two numbers in [-1, 1] up to which they are the same action."""


class DeployedPolicy(nn.Module):
    """The deterministic policy; bytes are taken as they come from a camera."""

    def __init__(self, agent: Mentor) -> None:
        super().__init__()
        self.encoder, self.actor = agent.encoder, agent.actor

    def forward(self, obs: Shaped[Tensor, "B ..."]) -> Float[Tensor, "B A"]:
        """Stacked observations -> actions in [-1, 1]."""
        return self.actor(self.encoder(obs))


def exportable(trained: Trained, calibration: int = 256) -> Exportable:
    """The policy, compared on what it sees in evaluation episodes.

    Args:
        trained: the agent.
        calibration: observations that ranges are taken from, of episodes with other starts.
    """
    spec, env = trained.spec, trained.config.env
    choices = f"the largest of {spec.action_dim} is the choice" if env.discrete else "actions in [-1, 1]"
    samples = _samples(_evaluated(trained))
    return Exportable(
        module=DeployedPolicy(copy.deepcopy(trained.agent).cpu()).eval(),
        inputs=("observation",),
        outputs=("action",),
        example=tuple(t[[0, -1]] for t in samples[0].tensors),
        samples=samples,
        calibration=_samples(_seen(trained, calibration)),
        metadata={
            "task": "policy",
            "environment": spec.id,
            "input": f"[batch, {', '.join(map(str, spec.stacked))}] {spec.dtype}, {spec.frame_stack} frames, oldest "
            "first",
            "output": f"[batch, {spec.action_dim}], {choices}, for {env.action_repeat} steps each",
            "moecore_version": __version__,
        },
        decide=largest() if env.discrete else same_action,
        further=lambda path, exact: returns(trained, path),
    )


def same_action(expected: np.ndarray, found: np.ndarray) -> Agreement:
    """Actions `[..., A]` in [-1, 1] are the same if all of their numbers nearly are."""
    same = (np.abs(expected - found) <= NEAR).all(-1)
    return Agreement(same.size, int(same.sum()))


def _samples(observations: Shaped[np.ndarray, "N ..."]) -> list[Sample]:
    return samples_of(("observation",), *((batch,) for batch in torch.from_numpy(observations).split(TOGETHER)))


def _evaluated(trained: Trained) -> Shaped[np.ndarray, "N ..."]:
    """What it sees in evaluation episodes, evenly spaced."""
    rollout = trained.episodes(EPISODES, observations=True)
    needed = min(math.ceil(COMPARED / np.mean(rollout.lengths)), MOST)
    if needed > EPISODES:
        rollout = trained.episodes(needed, observations=True)
    found = [obs for trace in rollout.traces for obs in trace.observations]
    return np.stack(found[:: max(len(found) // COMPARED, 1)])


def _seen(trained: Trained, count: int) -> Shaped[np.ndarray, "N ..."]:
    """What it sees in episodes from other starts than those of evaluations, evenly spaced."""
    seeds = [derive_seed(CALIBRATE, number) % 2**31 for number in range(EPISODES)]
    rollout = run_episodes(trained.config.env, trained.spec, trained.agent.policy, seeds, observations=True)
    found = [obs for trace in rollout.traces for obs in trace.observations]
    return np.stack(found[:: math.ceil(len(found) / count)])


def onnx_policy(path: str | Path) -> Policy:
    """A policy that runs a file in onnxruntime alone, on one thread."""
    session = session_of(path)
    return lambda obs: session.run(None, {"observation": obs})[0]


def returns(trained: Trained, path: Path) -> dict[str, float]:
    """Mean returns of PyTorch's and of a file's own evaluation episodes, from the same starts."""
    own = run_episodes(trained.config.env, trained.spec, onnx_policy(path), evaluation_seeds(EPISODES))
    found = {"return_torch": trained.episodes(EPISODES), "return_onnx": own}
    return {name: float(np.mean(rollout.returns)) for name, rollout in found.items()}
