"""Visual reinforcement learning with a mixture-of-experts backbone."""

from apps.cli import App
from apps.rl.arguments import ARGUMENTS
from apps.rl.settings import RLConfig, idle

APP = App(
    name="rl",
    title="Reinforcement learning from pixels with experts in the actor: MENTOR on any Gymnasium environment.",
    config=RLConfig,
    arguments=ARGUMENTS,
    unused=idle,
)
"""The verbs that every app answers, and the arguments each takes beside the app's settings. Imports no torch."""
