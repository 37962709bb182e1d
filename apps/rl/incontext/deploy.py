"""Export of a transformer that learns in context: a history in, the next action out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from apps.errors import UserError
from apps.rl.agents.t2mir import T2MIR
from apps.rl.incontext.episodes import Act, Life, live
from apps.rl.incontext.evaluation import TrainedInContext
from export.onnx import ExportError
from export.onnx import export_onnx as write_onnx
from export.verify import TOLERANCE, open_session
from moecore import __version__
from moecore.files import atomic_path

TASKS = 3
"""Held-out tasks in which a file is compared."""
INPUTS = ("state", "action", "reward")


class DeployedInContext(nn.Module):
    """The next action; what is given as the last action and reward, which are not known yet, is not seen."""

    def __init__(self, agent: T2MIR) -> None:
        super().__init__()
        self.agent = agent

    def forward(
        self, state: Float[Tensor, "B L N"], action: Float[Tensor, "B L A"], reward: Float[Tensor, "B L"]
    ) -> Float[Tensor, "B A"]:
        """Histories of equal length -> actions in [-1, 1]."""
        return self.agent(state, action, reward)[:, -1]


def onnx_in_context(path: str | Path, context: int) -> Act:
    """What a file does in onnxruntime alone, on one thread."""
    session = open_session(path)

    def act(lives: Sequence[Life]) -> Float[np.ndarray, "B A"]:
        return np.concatenate([session.run(None, _inputs(life, context))[0] for life in lives])

    return act


def _inputs(life: Life, context: int) -> dict[str, np.ndarray]:
    """A history as the file takes it, `[1, l, ...]`."""
    obs, action, reward = life.memory(context)
    action, reward = np.pad(action, ((0, 1), (0, 0))), np.pad(reward, (0, 1))
    return dict(zip(INPUTS, (obs[None], action[None], reward[None]), strict=True))


def export_onnx(trained: TrainedInContext, path: Path) -> dict[str, float]:
    """Write the transformer, and compare it with PyTorch along whole lives in tasks held out.

    Raises:
        UserError: if it has no ONNX form, or its actions differ; a file from before then stays as it is.
    """
    agent, spec, env = copy.deepcopy(trained.agent).cpu().eval(), trained.spec, trained.config.env
    tasks, episodes = trained.split.held_out[:TASKS], trained.config.t2mir.eval_episodes
    policy = DeployedInContext(agent)
    sizes = ((agent.state_dim,), (agent.action_dim,), ())
    example = tuple(torch.zeros(2, 3, *size) for size in sizes)
    batch, steps = torch.export.Dim("batch", min=1), torch.export.Dim("steps", min=1, max=agent.context)
    metadata = {
        "task": "policy that learns in context",
        "environment": spec.id,
        "input": f"state [batch, steps, {agent.state_dim}], action [batch, steps, {agent.action_dim}], reward [batch, "
        f"steps] of the latest 1 to {agent.context} steps; the last action and reward may be anything",
        "output": f"[batch, {agent.action_dim}], actions in [-1, 1], for {env.action_repeat} steps each",
        "moecore_version": __version__,
    }
    differences: list[float] = []
    with atomic_path(path) as temporary:
        try:
            write_onnx(policy, example, temporary, INPUTS, "action_to_take", metadata, ({0: batch, 1: steps},) * 3)
        except ExportError as error:
            raise UserError(f"export: {error}") from error
        onnx, size = onnx_in_context(temporary, agent.context), temporary.stat().st_size

        @torch.no_grad()
        def both(lives: Sequence[Life]) -> Float[np.ndarray, "B A"]:
            ours = [policy(*map(torch.from_numpy, _inputs(life, agent.context).values())) for life in lives]
            found = onnx(lives)
            differences.append(float(np.abs(torch.cat(ours).numpy() - found).max()))
            return found

        own = live(env, tasks, both, episodes)
        if max(differences) > TOLERANCE:
            raise UserError(
                f"export: actions differ from PyTorch by {max(differences):.2g} of their range, more than {TOLERANCE}; "
                "no file was kept"
            )
    torch_lives = trained.live(tasks)
    return {
        "actions": float(len(differences) * len(tasks)),
        "max_error": max(differences),
        "file_bytes": float(size),
        "return_torch": float(np.mean([life.returns for life in torch_lives])),
        "return_onnx": float(np.mean([life.returns for life in own])),
    }
