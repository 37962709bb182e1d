"""Visual reinforcement learning with a mixture-of-experts backbone."""

from apps.cli import App
from apps.rl.arguments import ARGUMENTS
from apps.rl.settings import RLConfig, idle

APP = App(
    name="rl",
    title="Reinforcement learning with experts on any Gymnasium environment: MENTOR from pixels, T2MIR in context.",
    config=RLConfig,
    arguments=ARGUMENTS,
    unused=idle,
)
"""The verbs that every app answers, and the arguments each takes beside the app's settings. Imports no torch."""
