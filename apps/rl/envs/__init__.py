"""Environments drawn with NumPy, and adapters that make any Gymnasium environment one of pixels or states."""

from __future__ import annotations

import gymnasium

_EPISODE = 60
_SKILLS = {"Reach": "reach", "Push": "push", "Avoid": "avoid", "ReachPush": "reach_push"}


def _register() -> None:
    ours = {"moecore/PixelPendulum-v0": ("apps.rl.envs.pendulum:PixelPendulum", 200, {})}
    ours["moecore/Skills-v0"] = ("apps.rl.envs.skills:Skills", _EPISODE, {})
    for name, skill in _SKILLS.items():
        ours[f"moecore/Skill-{name}-v0"] = ("apps.rl.envs.skills:Skills", _EPISODE, {"skills": (skill,)})
    ours["moecore/PointReach-v0"] = ("apps.rl.envs.point:PointReach", 20, {})
    for name, (entry_point, steps, kwargs) in ours.items():
        if name not in gymnasium.registry:
            gymnasium.register(name, entry_point, max_episode_steps=steps, kwargs=kwargs)


_register()
