"""Episodes of a policy, several at once.

B environments, A numbers of an action.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Shaped

from apps.loading import derive_seed
from apps.rl.env_settings import EnvConfig
from apps.rl.envs.make import make_env
from apps.rl.spaces import EnvSpec

Policy = Callable[[Shaped[np.ndarray, "B ..."]], Float[np.ndarray, "B A"]]
"""Stacked observations -> actions."""
EVALUATE = 4
"""Stream of the seeds of evaluation episodes."""


def evaluation_seeds(episodes: int) -> list[int]:
    """Seeds of the starts of evaluation episodes: the same for every agent and run, those of no episode of training."""
    return [derive_seed(EVALUATE, number) % 2**31 for number in range(episodes)]


@dataclass
class Trace:
    """One episode."""

    seed: int
    task: int = 0
    rewards: list[float] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    observations: list[np.ndarray] = field(default_factory=list)
    """Stacked, one before every action; kept if asked for."""
    frames: list[np.ndarray] = field(default_factory=list)
    """Pictures, [H, W, 3], one before every action; kept if asked for."""
    success: bool | None = None


@dataclass(frozen=True)
class Rollout:
    """Several episodes."""

    traces: list[Trace]

    @property
    def returns(self) -> list[float]:
        """Sums of rewards."""
        return [float(sum(trace.rewards)) for trace in self.traces]

    @property
    def lengths(self) -> list[int]:
        """Agent steps."""
        return [len(trace.rewards) for trace in self.traces]

    @property
    def has_success(self) -> bool:
        """Whether the environment says what a success is."""
        return any(trace.success is not None for trace in self.traces)

    @property
    def successes(self) -> list[bool]:
        """Whether each episode was one."""
        return [bool(trace.success) for trace in self.traces]


def run_episodes(
    config: EnvConfig,
    spec: EnvSpec,
    policy: Policy,
    seeds: Sequence[int],
    observations: bool = False,
    pictures: int = 0,
    at_once: int = 16,
) -> Rollout:
    """An episode from each seed.

    Args:
        config: of the environment.
        spec: likewise.
        policy: acts.
        seeds: of the starts.
        observations: keep what the policy saw.
        pictures: keep pictures of so many episodes, the first ones.
        at_once: environments stepped together.
    """
    traces = []
    for start in range(0, len(seeds), at_once):
        some = seeds[start : start + at_once]
        show = [start + i < pictures for i in range(len(some))]
        traces += _together(config, spec, policy, some, observations, show)
    return Rollout(traces)


def _together(
    config: EnvConfig, spec: EnvSpec, policy: Policy, seeds: Sequence[int], observations: bool, show: Sequence[bool]
) -> list[Trace]:
    envs = [make_env(config, render=one) for one in show]
    traces = [Trace(seed) for seed in seeds]
    stacks: list[deque[np.ndarray]] = []
    try:
        for env, trace in zip(envs, traces, strict=True):
            frame, info = env.reset(seed=trace.seed)
            trace.task = int(info.get("task", 0))
            stacks.append(deque([frame] * spec.frame_stack, spec.frame_stack))
        running = list(range(len(envs)))
        while running:
            obs = np.stack([np.concatenate(stacks[i]) for i in running])
            actions = policy(obs)
            running = [
                i
                for row, i in enumerate(running)
                if _step(envs[i], traces[i], stacks[i], obs[row] if observations else None, actions[row], show[i])
            ]
    finally:
        for env in envs:
            env.close()
    return traces


def _step(
    env: object, trace: Trace, stack: deque[np.ndarray], obs: np.ndarray | None, action: np.ndarray, show: bool
) -> bool:
    """One step; whether the episode goes on."""
    if obs is not None:
        trace.observations.append(obs)
    if show:
        trace.frames.append(env.render())
    frame, reward, terminated, truncated, info = env.step(action)
    stack.append(frame)
    trace.rewards.append(float(reward))
    trace.actions.append(action)
    if "success" in info:
        trace.success = bool(trace.success) or bool(info["success"])
    return not (terminated or truncated)


def random_policy(spec: EnvSpec, seed: int) -> Policy:
    """Uniform actions."""
    rng = np.random.default_rng(derive_seed(seed, EVALUATE))
    return lambda obs: rng.uniform(-1, 1, (len(obs), spec.action_dim)).astype(np.float32)
