"""Visual reinforcement learning with a mixture-of-experts backbone."""

from apps.cli import App
from apps.rl.agent_settings import idle_settings
from apps.rl.arguments import ARGUMENTS
from apps.rl.settings import RLConfig

APP = App(
    name="rl",
    title="Reinforcement learning from pixels with experts in the actor: MENTOR on any Gymnasium environment.",
    config=RLConfig,
    arguments=ARGUMENTS,
    unused=lambda config: idle_settings(config.agent),
)
"""The verbs that every app answers, and the arguments each takes beside the app's settings. Imports no torch."""
