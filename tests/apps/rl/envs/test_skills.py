from __future__ import annotations

import gymnasium
import numpy as np
import pytest

from apps.rl.envs.pictures import as_frame
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


def test_a_skill_played_as_another_one_fails():
    """Same scene, opposite aims: the conflict that the benchmark is for."""

    def as_if(other):
        def policy(state):
            return script(np.concatenate([state[:9], np.eye(len(SKILLS))[SKILLS.index(other)]]))

        return policy

    for skill, other in (("avoid", "reach"), ("reach", "avoid"), ("avoid", "push"), ("push", "reach")):
        assert successes(IDS[skill], as_if(other), 20) <= 0.1


def test_scenes_differ_in_the_frame_alone():
    frames = {}
    for gray in (False, True):
        images = []
        for skill in SKILLS:
            env = Skills((skill,), render_size=64)
            env.reset(seed=3)
            images.append(as_frame(env.draw_at(64), gray).astype(int))
        frames[gray] = images
        for image in images[1:]:
            assert (image[:, 4:-4, 4:-4] == images[0][:, 4:-4, 4:-4]).all()
    brightness = sorted(image[0, 0, 0] for image in frames[True])
    assert np.diff(brightness).min() >= 20


def test_skills_are_drawn_taken_in_turn_or_chosen():
    env = Skills(order="cyclic")
    assert [env.reset(seed=6)[1]["task"], *(env.reset()[1]["task"] for _ in range(4))] == [2, 3, 0, 1, 2]
    env = Skills()
    env.reset(seed=0)
    drawn = np.bincount([env.reset()[1]["task"] for _ in range(200)], minlength=4)
    assert drawn.min() > 25
    state, info = env.reset(options={"task": 1})
    assert info == {"task": 1, "success": False}
    assert state[9:].tolist() == [0, 1, 0, 0]
    assert env.step(np.zeros(2))[4]["task"] == 1


def placed(skill, agent, disc, square=(0.6, 0.6), button=(-0.6, 0.6)):
    env = Skills((skill,))
    env.reset(seed=0)
    env.agent, env.disc, env.square, env.button = (np.array(p, dtype=float) for p in (agent, disc, square, button))
    return env


def test_what_ends_an_episode_and_what_it_is_worth():
    right = np.array([1.0, 0.0])
    _, reward, terminated, truncated, info = placed("reach", (0, 0), (0.3, 0)).step(right)
    assert (reward, terminated, truncated, info["success"]) == (pytest.approx(1 + SPEED), True, False, True)
    _, reward, terminated, _, info = placed("reach", (0.32, 0.6), (-0.6, -0.6)).step(right)
    assert (reward < -1, terminated, info["success"]) == (True, True, False)
    _, reward, terminated, _, info = placed("avoid", (0.32, 0.6), (-0.6, -0.6)).step(right)
    assert (reward, terminated, info["success"]) == (pytest.approx(1 + SPEED), True, True)
    _, reward, terminated, _, info = placed("avoid", (0, 0), (0.3, 0)).step(right)
    assert (reward < -0.9, terminated, info["success"]) == (True, True, False)
    _, _, terminated, _, info = placed("push", (0.1, 0.6), (0.35, 0.6)).step(right)
    assert (terminated, info["success"]) == (True, True)


def test_the_button_comes_first():
    env = placed("reach_push", (-0.6, 0.35), (0.35, -0.6), square=(0.4, -0.6))
    _, _, terminated, _, info = env.step(np.zeros(2))
    assert (terminated, info["success"]) == (False, False)  # the disc is in the square, the button not pressed
    unpressed = env.draw_at(32)
    state, reward, _, _, info = env.step(np.array([0.0, 1.0]))
    assert (state[8], reward, info["success"]) == (1, pytest.approx(1 + 0.5 + SPEED), True)
    assert (env.draw_at(32) != unpressed).any()


def test_the_disc_chases_in_avoid_and_stays_in_the_arena_when_pushed():
    env = placed("avoid", (0.6, -0.6), (-0.6, -0.6))
    env.step(np.zeros(2))
    assert env.disc == pytest.approx([-0.6 + CHASE, -0.6])
    env = placed("push", (0.5, 0), (0.75, 0.0))
    for _ in range(10):
        state = env.step(np.array([1.0, 0.0]))[0]
        assert np.hypot(*(env.disc - env.agent)) >= AGENT + DISC - 1e-9
    assert env.disc[0] == pytest.approx(1 - DISC)
    assert env.observation_space.contains(state)


def test_episodes_are_truncated_and_repeat_by_seed():
    runs = []
    for _ in range(2):
        env = gymnasium.make("moecore/Skills-v0", render_mode="rgb_array", render_size=32)
        state, _ = env.reset(seed=5, options={"task": 1})
        trace = [state]
        for step in range(1, 61):
            state, _, terminated, truncated, _ = env.step(np.zeros(2, dtype=np.float32))
            trace += [state, env.render().ravel()]
            assert (terminated, truncated) == (False, step == 60)
        runs.append(np.concatenate(trace))
    assert (runs[0] == runs[1]).all()


def test_unknown_skills_are_refused():
    with pytest.raises(ConfigError, match=r"env.kwargs.skills='fly': choose one of avoid, push, reach, reach_push"):
        Skills(("fly",))
    with pytest.raises(ConfigError, match=r"env.kwargs.skills=\(\): name at least one"):
        Skills(())
    with pytest.raises(ConfigError, match=r"task=4: must be a number of reach, push, avoid, reach_push"):
        Skills().reset(options={"task": 4})
