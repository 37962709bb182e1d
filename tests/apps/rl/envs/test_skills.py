from __future__ import annotations

import gymnasium
import numpy as np
import pytest

from apps.rl.envs.skills import AGENT, CHASE, DISC, SKILLS, SPEED, SQUARE, Skills
from moecore.errors import ConfigError

IDS = {
    "reach": "moecore/Skill-Reach-v0",
    "push": "moecore/Skill-Push-v0",
    "avoid": "moecore/Skill-Avoid-v0",
    "reach_push": "moecore/Skill-ReachPush-v0",
}


def unit(vector):
    return vector / max(np.hypot(*vector), 1e-9)


def towards(agent, goal, obstacle=None, room=0.0):
    """An action to the goal, around an obstacle on the way."""
    way = goal - agent
    if obstacle is not None and np.hypot(*(obstacle - agent)) < room:
        away = unit(agent - obstacle)
        side = np.array([-away[1], away[0]])
        side = side if side @ way > 0 else -side
        if unit(way) @ away < 0.3:
            return side + 0.5 * away
    return np.clip(way / SPEED, -1, 1)


def push(agent, disc, square):
    """Get behind the disc, seen from the square, then push."""
    line = unit(square - disc)
    behind = disc - line * (AGENT + DISC + 0.03)
    if unit(disc - agent) @ line > 0.95:
        return np.clip((disc - line * 0.1 - agent) / SPEED, -1, 1)
    return towards(agent, behind, disc, AGENT + DISC + 0.12)


def script(state):
    agent, disc, square, button = state[:8].reshape(4, 2)
    skill = SKILLS[int(state[9:].argmax())]
    if skill == "reach":
        return towards(agent, disc, square, SQUARE * 1.5 + 0.1)
    if skill == "avoid":
        return towards(agent, square, disc, AGENT + DISC + 0.25)
    if skill == "reach_push" and not state[8]:
        return towards(agent, button)
    return push(agent, disc, square)


def successes(name, policy, episodes, seed=0):
    env = gymnasium.make(name)
    done = 0
    for episode in range(episodes):
        state, info = env.reset(seed=seed + episode)
        ended = False
        while not ended:
            state, _, terminated, truncated, info = env.step(np.clip(policy(state), -1, 1).astype(np.float32))
            ended = terminated or truncated
        done += info["success"]
    return done / episodes


@pytest.mark.parametrize("skill", SKILLS)
def test_a_script_solves_each_skill_and_chance_does_not(skill):
    draw = np.random.default_rng(0)
    assert successes(IDS[skill], script, 50) >= 0.9
    assert successes(IDS[skill], lambda state: draw.uniform(-1, 1, 2), 50) <= 0.3
