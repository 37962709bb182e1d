"""Steps environments and stores what they show, so that everything follows from the seed, also after an interruption.

E environments, A numbers of an action; see `apps.rl.spaces` for frames and stacks.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from jaxtyping import Bool, Float, Shaped

from apps.errors import UserError
from apps.rl.replay import Replay
from apps.rl.restart import digest, restartable
from moecore.errors import require

EPISODES = 0
"""Stream of the seeds of episodes."""

Act = Callable[[Shaped[np.ndarray, "E ..."], int], Float[np.ndarray, "E A"]]


@dataclass(frozen=True)
class Episode:
    """One that has ended."""

    env: int
    """Number of the environment."""
    number: int
    """How many this environment had begun before."""
    ret: float
    """Undiscounted sum of rewards."""
    length: int
    """Agent steps."""
    success: bool | None
    """Whether any step reported it; None if the environment does not say."""
    task: int
    """Number of the task at its beginning."""


class Collector:
    """Takes agent steps in all environments at once and fills a replay.

    An episode's reset is seeded by (seed, environment, number of the episode), and who acts is told the step to draw
    noise by. So a run is repeated exactly, and continued exactly from `state` and the replay's.

    Args:
        make: one function per environment; pickled if asynchronous.
        replay: with as many rings.
        seed: of the run, not negative.
        asynchronous: a process per environment.

    Raises:
        UserError: if observations or actions are not those of the replay.
    """

    def __init__(
        self, make: Sequence[Callable[[], gym.Env]], replay: Replay, seed: int, asynchronous: bool = False
    ) -> None:
        require(len(make) == replay.num_envs, "collect.num_envs", replay.num_envs, f"must be {len(make)}")
        require(seed >= 0, "seed", seed, "must not be negative")
        self.replay, self.seed = replay, seed
        self.steps = 0
        self.episodes = 0
        """Ended so far."""
        self._number = np.zeros(len(make), np.int64)  # episodes begun
        self._return = np.zeros(len(make), np.float64)
        self._success = np.full(len(make), -1, np.int64)
        self._task = np.zeros(len(make), np.int64)
        self._lost = np.zeros(len(make), bool)  # whose running episode could not be taken up again
        self._began = False
        self.envs = _vector([partial(restartable, one, i) for i, one in enumerate(make)], asynchronous)
        try:
            self._check_spaces()
        except UserError:
            self.envs.close()
            raise

    def step(self, act: Act) -> list[Episode]:
        """One agent step in every environment.

        Args:
            act: actions in [-1, 1] for the stacked observations `[E, *stacked]` and the number of agent steps so far.

        Returns:
            The episodes that ended with it.
        """
        self._begin_episodes()
        actions = np.array(act(self.replay.latest(), self.steps), np.float32)
        expected = (len(self._number), self.replay.spec.action_dim)
        if actions.shape != expected:
            raise ValueError(f"actions of shape {list(actions.shape)} instead of {list(expected)}")
        if not np.isfinite(actions).all():
            raise UserError(
                f"actions=NaN or infinite after {self.steps} steps: training diverged: lower learning rates"
            )
        frames, rewards, terminated, truncated, info = self.envs.step(actions.copy())
        for i, frame in enumerate(frames):
            outcome = float(rewards[i]), frame, bool(terminated[i]), bool(truncated[i])
            self.replay.add(i, actions[i], *outcome, int(info["task"][i]))
        self.steps += len(frames)
        self._return += rewards
        self._success = np.maximum(self._success, info["success"])
        return [self._end_episode(int(i)) for i in np.flatnonzero(terminated | truncated)]

    def state(self) -> dict[str, Any]:
        """Counters and running episodes, for `restore`; plain numbers and lists."""
        return {
            "seed": self.seed,
            "steps": self.steps,
            "episodes": self.episodes,
            "number": self._number.tolist(),
            "return": self._return.tolist(),
            "success": self._success.tolist(),
            "task": self._task.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; the replay must have been restored before.

        Environments take the stored actions of their running episodes again. Where this does not lead to the stored
        frames, a new episode begins with the next step, and a line on stdout says so.
        """
        require(state["seed"] == self.seed, "seed", self.seed, f"must be {state['seed']} as before to continue")
        self.steps, self.episodes = state["steps"], state["episodes"]
        self._number = np.array(state["number"], np.int64)
        self._return = np.array(state["return"], np.float64)
        self._success = np.array(state["success"], np.int64)
        self._task = np.array(state["task"], np.int64)
        running = self.replay.running
        actions = {i: self._stored_actions(i) for i in map(int, np.flatnonzero(running))}
        _, info = self._reset(self._number - running, None, {"actions": actions})
        for i, taken in actions.items():
            self._lost[i] = taken is None or info["digest"][i] != digest(*self.replay.frames_of_episode(i))
            if self._lost[i]:
                why = "its beginning is not in the replay any more" if taken is None else "it does not repeat itself"
                print(f"note: environment {i} cannot go on in the middle of its episode ({why}): a new one begins")

    def close(self) -> None:
        """End the environments."""
        self.envs.close()

    def _begin_episodes(self) -> None:
        over = ~self.replay.running | self._lost
        if not over.any():
            return
        frames, info = self._reset(self._number, over, {})
        for i in map(int, np.flatnonzero(over)):
            self.replay.add_first(i, frames[i], int(info["task"][i]))
            self._task[i] = info["task"][i]
        self._number += over
        self._return[over] = 0.0
        self._success[over] = -1
        self._lost[:] = False

    def _reset(
        self, number: np.ndarray, mask: Bool[np.ndarray, " E"] | None, options: dict[str, Any]
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin the episodes of these numbers, in the environments of the mask only, once all have begun one."""
        seeds = [episode_seed(self.seed, i, int(n)) for i, n in enumerate(number)]
        if mask is not None and self._began:
            options = options | {"reset_mask": mask}
        self._began = True
        return self.envs.reset(seed=seeds, options=options)

    def _stored_actions(self, env: int) -> np.ndarray | None:
        try:
            return self.replay.actions_of_episode(env)
        except LookupError:
            return None

    def _end_episode(self, env: int) -> Episode:
        self.episodes += 1
        success = None if self._success[env] < 0 else bool(self._success[env])
        length = self.replay.steps_of_episode(env)
        number, task = int(self._number[env]) - 1, int(self._task[env])
        return Episode(env, number, float(self._return[env]), length, success, task)

    def _check_spaces(self) -> None:
        spec, seen, done = self.replay.spec, self.envs.single_observation_space, self.envs.single_action_space
        if seen.shape != spec.frame or seen.dtype != spec.dtype:
            raise UserError(
                f"env.id={spec.id}: observations are {seen.dtype} {list(seen.shape)}, the replay holds {spec.dtype} "
                f"{list(spec.frame)}: take another replay folder"
            )
        if done.shape != (spec.action_dim,):
            raise UserError(
                f"env.id={spec.id}: actions are {done}, the replay holds vectors of {spec.action_dim}: "
                "take another replay folder"
            )


def episode_seed(seed: int, env: int, number: int) -> int:
    """Seed of an episode's reset; below 2^31, which is what all environments take."""
    return int(np.random.SeedSequence((EPISODES, seed, env, number)).generate_state(1)[0] >> 1)


def _vector(make: list[Callable[[], gym.Env]], asynchronous: bool) -> SyncVectorEnv | AsyncVectorEnv:
    if not asynchronous:
        return SyncVectorEnv(make, copy=False, autoreset_mode=AutoresetMode.DISABLED)
    # neither threads nor GL contexts outlive a fork
    methods = multiprocessing.get_all_start_methods()
    context = "forkserver" if "forkserver" in methods else "spawn"
    return AsyncVectorEnv(make, copy=False, context=context, autoreset_mode=AutoresetMode.DISABLED)
