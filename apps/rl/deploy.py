"""Export of a policy to ONNX: what the agent sees in, its action out."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from apps.errors import UserError
from apps.rl.agents.mentor import Mentor
from apps.rl.loading import Trained
from apps.rl.rollout import Policy, evaluation_seeds, run_episodes
from export.onnx import ExportError
from export.onnx import export_onnx as write_onnx
from export.verify import TOLERANCE, compare_onnx, open_session
from moecore import __version__
from moecore.files import atomic_path

EPISODES = 3
"""Episodes that a file is compared along."""


class DeployedPolicy(nn.Module):
    """The deterministic policy; bytes are taken as they come from a camera."""

    def __init__(self, agent: Mentor) -> None:
        super().__init__()
        self.encoder, self.actor = agent.encoder, agent.actor

    def forward(self, obs: Shaped[Tensor, "B ..."]) -> Float[Tensor, "B A"]:
        """Stacked observations -> actions in [-1, 1]."""
        return self.actor(self.encoder(obs))


def onnx_policy(path: str | Path) -> Policy:
    """A policy that runs a file in onnxruntime alone, on one thread."""
    session = open_session(path)
    return lambda obs: session.run(None, {"observation": obs})[0]


def export_onnx(trained: Trained, path: Path) -> dict[str, float]:
    """Write the policy and compare it with PyTorch: on what whole episodes show, and by the returns of its own.

    Args:
        trained: the agent.
        path: of the file.

    Returns:
        The comparison's figures.

    Raises:
        UserError: if it has no ONNX form, or its actions differ; a file from before then stays as it is.
    """
    policy, spec, env = DeployedPolicy(copy.deepcopy(trained.agent).cpu()).eval(), trained.spec, trained.config.env
    rollout = trained.episodes(EPISODES, observations=True)
    seen = torch.from_numpy(np.concatenate([np.stack(trace.observations) for trace in rollout.traces]))
    metadata = {
        "task": "policy",
        "environment": spec.id,
        "input": f"[batch, {', '.join(map(str, spec.stacked))}] {spec.dtype}, {spec.frame_stack} frames, oldest first",
        "output": f"[batch, {spec.action_dim}], actions in [-1, 1], for {env.action_repeat} steps each",
        "moecore_version": __version__,
    }
    with atomic_path(path) as temporary:
        try:
            write_onnx(policy, seen[:2], temporary, "observation", "action", metadata)
        except ExportError as error:
            raise UserError(f"export: {error}") from error
        comparison = compare_onnx(policy, temporary, seen.split(64))
        if comparison.max_relative_error > TOLERANCE:
            raise UserError(
                f"export: actions differ from PyTorch by {comparison.max_relative_error:.2g} of their range, more than "
                f"{TOLERANCE}; no file was kept"
            )
        own = run_episodes(env, spec, onnx_policy(temporary), evaluation_seeds(EPISODES))
    figures = comparison.scalars()
    figures.pop("decision_agreement", None)  # the largest number of an action decides nothing
    figures["return_torch"], figures["return_onnx"] = float(np.mean(rollout.returns)), float(np.mean(own.returns))
    return figures
