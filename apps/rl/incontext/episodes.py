"""Episodes in a row in each of several tasks, in all of which the agent remembers what it did before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float

from apps.loading import derive_seed
from apps.rl.agents.t2mir import T2MIR
from apps.rl.env_settings import EnvConfig
from apps.rl.incontext.tasks import OneTask, make_task_env
from apps.rl.rollout import EVALUATE, Trace

Memory = tuple[Float[np.ndarray, "l N"], Float[np.ndarray, "l_less_1 A"], Float[np.ndarray, " l_less_1"]]
"""States, actions and rewards of the latest steps, the last state without what follows it."""
Act = Callable[[Sequence["Life"]], Float[np.ndarray, "B A"]]
"""Actions in the last state of each of B lives."""


@dataclass
class Life:
    """What an agent has been through in a task."""

    task: int
    action_dim: int
    obs: list[np.ndarray] = field(default_factory=list)
    """One more than there are actions, while an episode runs."""
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    episodes: list[Trace] = field(default_factory=list)

    @property
    def returns(self) -> list[float]:
        """Of its episodes."""
        return [float(sum(trace.rewards)) for trace in self.episodes]

    def begin(self, context: int) -> int:
        """The first step of those that an agent remembers, `context` at most: whole episodes as far as they fit, as
        those windows are that are learned from."""
        starts = np.cumsum([0, *(len(trace.rewards) for trace in self.episodes[:-1])])
        fitting = starts[len(self.obs) - starts <= context]
        return int(fitting[0]) if len(fitting) else len(self.obs) - context

    def memory(self, context: int) -> Memory:
        """What an agent remembers while an episode runs."""
        known = slice(self.begin(context), len(self.obs) - 1)
        actions = np.array(self.actions[known], np.float32).reshape(-1, self.action_dim)
        return np.stack(self.obs[known.start :]), actions, np.array(self.rewards[known], np.float32)


def live(
    config: EnvConfig, tasks: Sequence[int], act: Act, episodes: int, pictures: int = 0, seed: int = 0
) -> list[Life]:
    """Let an agent live through episodes of every task, all tasks at once.

    The episodes of a task begin alike, so that what changes from one to the next is the agent's doing.

    Args:
        config: of the environment.
        tasks: numbers.
        act: acts.
        episodes: in each task.
        pictures: keep pictures of so many tasks, the first ones.
        seed: of the starts, one per task.
    """
    envs = [make_task_env(config, task, render=i < pictures) for i, task in enumerate(tasks)]
    lives = [Life(task, env.action_space.shape[0]) for task, env in zip(tasks, envs, strict=True)]
    try:
        for _ in range(episodes):
            for env, life in zip(envs, lives, strict=True):
                start = derive_seed(EVALUATE, seed, life.task) % 2**31
                life.obs.append(env.reset(seed=start)[0])
                life.episodes.append(Trace(start, life.task))
            running = list(range(len(lives)))
            while running:
                actions = act([lives[i] for i in running])
                running = [
                    i for row, i in enumerate(running) if _step(envs[i], lives[i], actions[row], show=i < pictures)
                ]
    finally:
        for env in envs:
            env.close()
    return lives


def _step(env: OneTask, life: Life, action: np.ndarray, show: bool) -> bool:
    """One step; whether the episode goes on."""
    trace = life.episodes[-1]
    if show:
        trace.frames.append(env.render())
    obs, reward, terminated, truncated, info = env.step(action)
    trace.actions.append(action)
    trace.rewards.append(float(reward))
    life.actions.append(action)
    life.rewards.append(float(reward))
    if "success" in info:
        trace.success = bool(trace.success) or bool(info["success"])
    if not (terminated or truncated):
        life.obs.append(obs)
    return not (terminated or truncated)


def in_context(agent: T2MIR) -> Act:
    """What a trained agent does. Its memory begins empty; once it is full, the oldest episode is forgotten."""

    def act(lives: Sequence[Life]) -> Float[np.ndarray, "B A"]:
        memories = [life.memory(agent.context) for life in lives]
        found = np.empty((len(lives), agent.action_dim), np.float32)
        for length in {len(memory[0]) for memory in memories}:  # one, where all episodes take as long
            some = [i for i, memory in enumerate(memories) if len(memory[0]) == length]
            found[some] = _act(agent, [memories[i] for i in some])
        return found

    return act


@torch.no_grad()
def _act(agent: T2MIR, memories: Sequence[Memory]) -> Float[np.ndarray, "B A"]:
    device, training = next(agent.parameters()).device, agent.training
    parts = [torch.from_numpy(np.stack(part)).to(device) for part in zip(*memories, strict=True)]
    action = agent.eval().next_action(*parts)
    agent.train(training)
    return action.cpu().numpy()


def by_chance(action_dim: int, seed: int) -> Act:
    """Uniform actions."""
    rng = np.random.default_rng(derive_seed(seed, EVALUATE))
    return lambda lives: rng.uniform(-1, 1, (len(lives), action_dim)).astype(np.float32)
