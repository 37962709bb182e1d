"""Experience on disk: a ring of entries per environment, sampled as stacked n-step transitions.

E environments, B transitions, A numbers of an action; see `apps.rl.spaces` for the others.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from apps.errors import UserError
from apps.rl.replay_files import ReplayFiles
from apps.rl.spaces import EnvSpec, Transitions
from moecore.errors import require


class Replay:
    """Memory-mapped ring buffers that outlive the process.

    An entry is a frame and the step that led to it; an episode of T steps has T + 1 entries. Only the newest
    `capacity` entries are sampled, counted by positions held in memory. So a process that continues from an older
    checkpoint restores the positions of that time, and finds all they speak of: what was added since lies in the
    slack, or over what could not be sampled any more.

    Args:
        folder: of the files; made, or opened if it holds a replay of the same environment and sizes.
        spec: of the environment.
        capacity: entries that can be sampled, shared equally by the environments.
        slack: entries per environment that may be added after a checkpoint before it is lost.
        num_envs: rings, one per environment.

    Raises:
        UserError: if the folder holds another environment's replay or one of other sizes, or another process has it.
    """

    def __init__(self, folder: Path, spec: EnvSpec, capacity: int, slack: int, num_envs: int = 1) -> None:
        require(num_envs >= 1, "collect.num_envs", num_envs, "must be at least 1")
        least = num_envs * (spec.frame_stack + 1)
        require(capacity >= least, "collect.capacity", capacity, f"must be at least {least}")
        require(slack >= 0, "replay.slack", slack, "must not be negative")
        self.spec, self.num_envs, self.slack = spec, num_envs, slack
        self.capacity = capacity // num_envs
        self.size = self.capacity + slack
        self._files = ReplayFiles(Path(folder), spec, capacity, slack, num_envs)
        self._frames, self._entries = self._files.frames, self._files.entries
        self._count = np.zeros(num_envs, np.int64)
        self._start = np.zeros(num_envs, np.int64)
        self._episodes = np.zeros(num_envs, np.int64)
        self._running = np.zeros(num_envs, bool)

    @property
    def nbytes(self) -> int:
        """Bytes on disk once all rings are full; they are taken as they are needed."""
        return self._files.nbytes

    @property
    def running(self) -> Bool[np.ndarray, " E"]:
        """Which environments are in the middle of an episode."""
        return self._running.copy()

    def __len__(self) -> int:
        """Entries that can be sampled, as transitions of one step."""
        return self.sampleable(1)

    def sampleable(self, n_step: int) -> int:
        """Entries that can be sampled as transitions of `n_step` steps."""
        low, high = self._bounds(n_step)
        some = high > low
        env, low, high, count = np.arange(self.num_envs)[some], low[some], high[some], self._count[some]
        begun = self._entries["episode"]
        borders = begun[self._rows(env, np.minimum(high, count - 1))] - begun[self._rows(env, low)]
        return int((high - low - borders - (high == count)).sum())

    def add_first(self, env: int, frame: Shaped[np.ndarray, "*frame"], task: int = 0) -> None:
        """Begin an episode. One that still runs there ends as if truncated."""
        self._start[env] = self._count[env]
        self._episodes[env] += 1
        self._write(env, frame, task, 0.0, False, False, 0.0)

    def add(
        self,
        env: int,
        action: Float[np.ndarray, " A"],
        reward: float,
        frame_after: Shaped[np.ndarray, "*frame"],
        terminated: bool,
        truncated: bool,
        task: int = 0,
    ) -> None:
        """Add one step.

        Args:
            env: number of the environment.
            action: taken at the latest frame.
            reward: for it.
            frame_after: what was seen then; the final observation, if the episode ends.
            terminated: the environment has reached a terminal state.
            truncated: the episode is cut off here.
            task: number of the task after the step.
        """
        if not self._running[env]:
            raise ValueError(f"env={env}: no episode runs there; begin one with add_first")
        self._write(env, frame_after, task, reward, terminated, terminated or truncated, action)

    def sample(self, batch: int, n_step: int, gamma: float, rng: np.random.Generator) -> Transitions:
        """Draw transitions uniformly, with replacement.

        Args:
            batch: how many.
            n_step: steps of each, fewer where the episode ends earlier; entries of a running episode that have fewer
                steps after them are not drawn yet.
            gamma: discount per step.
            rng: source of randomness.

        Returns:
            B transitions; the arrays are copies.

        Raises:
            UserError: if nothing can be sampled.
        """
        if self.sampleable(n_step) == 0:
            raise UserError(f"replay={self._files.folder}: holds no {n_step}-step transition yet: collect more first")
        env, position = self._draw(batch, n_step, rng)
        ahead = np.minimum(position[:, None] + np.arange(n_step + 1), self._count[env, None] - 1)
        entries = self._entries[self._rows(env[:, None], ahead)]
        step = entries["step"]
        # a new episode counts from 0 again, and an entry repeated at the ring's head has too low a number
        inside = step[:, 1:] == step[:, :1] + np.arange(1, n_step + 1)
        length = inside.sum(1)
        reward = np.where(inside, entries["reward"][:, 1:], 0.0) * gamma ** np.arange(n_step)
        terminal = entries["terminated"][np.arange(batch), length]
        return Transitions(
            obs=self._stack(env, position, step[:, 0]),
            action=entries["action"][:, 1].copy(),
            reward=reward.sum(1).astype(np.float32),
            discount=np.where(terminal, 0.0, gamma**length).astype(np.float32),
            next_obs=self._stack(env, position + length, step[:, 0] + length),
            task=entries["task"][:, 0].astype(np.int64),
        )

    def latest(self) -> Shaped[np.ndarray, "E ..."]:
        """What an agent sees in each environment now; every one must have begun an episode."""
        newest = self._count - 1
        return self._stack(np.arange(self.num_envs), newest, newest - self._start)

    def steps_of_episode(self, env: int) -> int:
        """Length so far of the latest episode."""
        return int(self._count[env] - 1 - self._start[env])

    def actions_of_episode(self, env: int) -> Float[np.ndarray, "steps A"]:
        """Actions of the running episode, to bring an environment back to where it was.

        Raises:
            LookupError: if the episode's beginning has been overwritten.
        """
        return self._entries["action"][self._episode_rows(env)[1:]]

    def frames_of_episode(self, env: int) -> tuple[Shaped[np.ndarray, "steps_and_1 ..."], Float[np.ndarray, " steps"]]:
        """Frames and rewards of the running episode; raises as `actions_of_episode`."""
        rows = self._episode_rows(env)
        return self._frames[rows], self._entries["reward"][rows[1:]]

    def steps_in_order(
        self, env: int
    ) -> tuple[Shaped[np.ndarray, "S ..."], Float[np.ndarray, "S A"], Float[np.ndarray, " S"], Bool[np.ndarray, " S"]]:
        """All S steps that can be sampled: stacked observations, actions, rewards, and where episodes begin."""
        low, high = (int(bound[env]) for bound in self._bounds(1))
        position = np.arange(low, min(high, self._count[env] - 1))
        after = self._entries[self._rows(env, position + 1)]
        position, after = position[after["step"] > 0], after[after["step"] > 0]  # ends of episodes lead nowhere
        obs = self._stack(np.full(len(position), env), position, after["step"] - 1)
        return obs, after["action"].copy(), after["reward"].copy(), after["step"] == 1

    def state(self) -> dict[str, list[int]]:
        """Positions, for `restore`."""
        return {"count": self._count.tolist()}

    def restore(self, state: dict[str, list[int]]) -> None:
        """Go back to the positions of a checkpoint.

        Raises:
            UserError: if the files do not hold its entries, or not any more.
        """
        count = np.array(state["count"], np.int64)
        if count.shape != self._count.shape:
            raise UserError(f"collect.num_envs={self.num_envs}: the checkpoint has {len(count)}: keep that number")
        for env in range(self.num_envs):
            position = np.arange(max(0, count[env] - self.capacity), count[env])
            if not np.array_equal(self._entries["position"][self._rows(env, position)], position + 1):
                raise UserError(
                    f"replay={self._files.folder}: does not hold the checkpoint's entries (any more): resume from a "
                    "newer checkpoint, put back the folder saved with it, or start anew"
                )
        newest = self._entries[self._rows(np.arange(self.num_envs), np.maximum(count - 1, 0))]
        some = count > 0
        self._count = count
        self._start = np.where(some, count - 1 - newest["step"], 0)
        self._episodes = np.where(some, newest["episode"], 0)
        self._running = some & ~newest["ended"]

    def flush(self) -> None:
        """Everything written is on disk; needed against loss of power only, not against the end of the process."""
        self._files.flush()

    def close(self) -> None:
        """Let another process open the folder."""
        self._files.close()

    def _write(self, env: int, frame: np.ndarray, task: int, reward: float, terminated: bool, ended: bool, action):
        position = self._count[env]
        row = int(self._rows(env, position))
        self._files.claim(row)
        self._entries["position"][row] = 0  # what is half written must not pass for the entry it replaces
        self._frames[row] = frame
        step = position - self._start[env]
        self._entries[row] = (position + 1, self._episodes[env], step, task, reward, terminated, ended, action)
        self._count[env] += 1
        self._running[env] = not ended

    def _rows(self, env: int | np.ndarray, position: int | np.ndarray) -> np.ndarray:
        return env * self.size + position % self.size

    def _bounds(self, n_step: int) -> tuple[Int[np.ndarray, " E"], Int[np.ndarray, " E"]]:
        """First and one past the last position that can be sampled; in between, ends of episodes cannot."""
        stack = self.spec.frame_stack
        low = np.maximum(self._count - self.capacity, 0)
        window = low[:, None] + np.arange(stack)
        step = self._entries["step"][self._rows(np.arange(self.num_envs)[:, None], window)]
        whole = window - np.minimum(step, stack - 1) >= low[:, None]  # all frames of the stack may still be read
        low = low + whole.argmax(1)
        high = np.where(self._running, np.maximum(self._start, self._count - n_step), self._count)
        return low, np.maximum(low, high)

    def _draw(self, batch: int, n_step: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Environments and positions; ends of episodes, from which no action leads on, are drawn again."""
        low, high = self._bounds(n_step)
        ends = np.cumsum(high - low)
        found, missing = [], batch
        while missing:
            drawn = rng.integers(ends[-1], size=missing)
            env = np.searchsorted(ends, drawn, side="right")
            position = high[env] - ends[env] + drawn
            after = np.minimum(position + 1, self._count[env] - 1)
            good = (after > position) & (self._entries["step"][self._rows(env, after)] > 0)
            found.append((env[good], position[good]))
            missing -= int(good.sum())
        env, position = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return env, position

    def _stack(self, env: np.ndarray, position: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Frames up to a position, the first of the episode repeated where there are too few."""
        back = np.minimum(np.arange(self.spec.frame_stack)[::-1], step[:, None])
        rows = self._rows(env[:, None], position[:, None] - back)
        return np.take(self._frames, rows, axis=0).reshape(len(position), *self.spec.stacked)

    def _episode_rows(self, env: int) -> Int[np.ndarray, " steps_and_1"]:
        position = np.arange(self._start[env], self._count[env])
        rows = self._rows(env, position)
        if not self._running[env] or not np.array_equal(self._entries["position"][rows], position + 1):
            raise LookupError(f"env={env}: its running episode is not whole in the replay")
        return rows
