"""A transformer that learns in context, ready for export: a history in, the next action out."""

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
from apps.rl.deploy import same_action
from apps.rl.incontext.episodes import Act, Life, in_context, live
from apps.rl.incontext.evaluation import TrainedInContext
from export.exportable import Exportable, Sample, samples_of
from export.measure import session_of
from moecore import __version__

TASKS = 3
"""Held-out tasks in which returns are compared, and tasks learned from that ranges are taken in."""
COMPARED = 1000
"""Actions that files are compared on at least, where lives have so many."""
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


class EveryAction(DeployedInContext):
    """The action after every step: no step sees those behind it, so that histories may be padded to a fixed length."""

    def forward(
        self, state: Float[Tensor, "B L N"], action: Float[Tensor, "B L A"], reward: Float[Tensor, "B L"]
    ) -> Float[Tensor, "B L A"]:
        """Histories padded with zeros at the end -> actions in [-1, 1], of which that of the last known step counts."""
        return self.agent(state, action, reward)


def exportable(trained: TrainedInContext, calibration: int = 256, fixed: bool = False) -> Exportable:
    """The transformer, compared along whole lives in tasks held out.

    Args:
        trained: the agent.
        calibration: histories that ranges are taken from, in tasks learned from.
        fixed: whether shapes are, as on devices: histories as long as the context, padded at the end, and an action
            for every step.

    Raises:
        UserError: if shapes are fixed and a mixture routes whole windows, which padding would change.
    """
    agent, spec = copy.deepcopy(trained.agent).cpu().eval(), trained.spec
    if fixed and agent.has_task_gate and agent.config.task_unit == "sequence":
        raise UserError("export: t2mir.task_unit=sequence routes whole windows, of any length; use an onnx format")
    samples = _thinned(_along(trained, trained.split.held_out), COMPARED)
    ranges = _thinned(_along(trained, trained.split.train[:TASKS]), calibration)
    if fixed:
        samples, ranges = ([_padded(one, agent.context) for one in some] for some in (samples, ranges))
    sizes = ((agent.state_dim,), (agent.action_dim,), ())
    batch, steps = torch.export.Dim("batch", min=1), torch.export.Dim("steps", min=1, max=agent.context)
    longest = max(samples, key=lambda one: one.tensors[0].shape[1])
    return Exportable(
        module=EveryAction(agent) if fixed else DeployedInContext(agent),
        inputs=INPUTS,
        outputs=("action_to_take",),
        example=tuple(torch.zeros(2, 3, *size) for size in sizes),
        samples=samples,
        calibration=ranges,
        metadata={
            "task": "policy that learns in context",
            "environment": spec.id,
            "context": agent.context,
            **_shapes(agent, trained.config.env.action_repeat, fixed),
            "moecore_version": __version__,
        },
        decide=same_action,
        further=lambda path, exact: returns(trained, path),
        dynamic_shapes=({0: batch, 1: steps},) * 3,
        timed=samples_of(INPUTS, tuple(t[:1] for t in longest.tensors))[0],
    )


def _shapes(agent: T2MIR, repeat: int, fixed: bool) -> dict[str, str]:
    """What goes in and out, in words."""
    rows, steps = ("1", str(agent.context)) if fixed else ("batch", "steps")
    of = f"the latest 1 to {agent.context} steps{', zeros behind them' if fixed else ''}"
    given = (
        f"state [{rows}, {steps}, {agent.state_dim}], action [{rows}, {steps}, {agent.action_dim}], reward [{rows}, "
    )
    made = f"[1, {steps}, {agent.action_dim}], at the last known step" if fixed else f"[batch, {agent.action_dim}]"
    return {
        "input": f"{given}[{rows}, {steps}] of {of}; the last action and reward may be anything",
        "output": f"{made}, actions in [-1, 1], for {repeat} steps each",
    }


def _padded(sample: Sample, steps: int) -> Sample:
    """Zeros behind a history."""
    made = []
    for tensor in sample.tensors:
        rows, known = tensor.shape[:2]
        made.append(torch.cat([tensor, tensor.new_zeros(rows, steps - known, *tensor.shape[2:])], 1))
    return samples_of(INPUTS, tuple(made))[0]


def _thinned(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Evenly spaced ones, the last among them, of at least `count` rows where there are so many."""
    every = max(sum(len(one.tensors[0]) for one in samples) // count, 1)
    return list(reversed(samples[::-every]))


def _along(trained: TrainedInContext, tasks: Sequence[int]) -> list[Sample]:
    """Histories of lives in some tasks, a sample per step and length."""
    seen: list[Sample] = []
    act = in_context(trained.agent)

    def noted(lives: Sequence[Life]) -> Float[np.ndarray, "B A"]:
        by_length: dict[int, list[tuple[np.ndarray, ...]]] = {}
        for given in (_inputs(life, trained.agent.context) for life in lives):
            by_length.setdefault(given["reward"].shape[1], []).append(tuple(given.values()))
        for some in by_length.values():
            rows = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*some, strict=True))
            seen.extend(samples_of(INPUTS, tuple(rows)))
        return act(lives)

    live(trained.config.env, tasks, noted, trained.config.t2mir.eval_episodes)
    return seen


def onnx_in_context(path: str | Path, context: int) -> Act:
    """What a file does in onnxruntime alone, on one thread."""
    session = session_of(path)

    def act(lives: Sequence[Life]) -> Float[np.ndarray, "B A"]:
        return np.concatenate([session.run(None, _inputs(life, context))[0] for life in lives])

    return act


def _inputs(life: Life, context: int) -> dict[str, np.ndarray]:
    """A history as the file takes it, `[1, l, ...]`."""
    obs, action, reward = life.memory(context)
    action, reward = np.pad(action, ((0, 1), (0, 0))), np.pad(reward, (0, 1))
    return dict(zip(INPUTS, (obs[None], action[None], reward[None]), strict=True))


def returns(trained: TrainedInContext, path: Path) -> dict[str, float]:
    """Mean returns of PyTorch's and of a file's own episodes in tasks held out."""
    tasks, episodes = trained.split.held_out[:TASKS], trained.config.t2mir.eval_episodes
    own = live(trained.config.env, tasks, onnx_in_context(path, trained.agent.context), episodes)
    found = {"return_torch": trained.live(tasks), "return_onnx": own}
    return {name: float(np.mean([life.returns for life in lives])) for name, lives in found.items()}
