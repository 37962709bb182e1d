"""Multi-task ranking with Mixture-of-Experts models."""

from apps.cli import App
from apps.recsys.arguments import ARGUMENTS
from apps.recsys.settings import RecsysConfig
from apps.settings import other_models

APP = App(
    name="recsys",
    title="Multi-task ranking on click logs with experts whose gates can be read: MMoE, PLE, HoME, AW-MoE, MoAE.",
    config=RecsysConfig,
    arguments=ARGUMENTS,
    unused=lambda config: other_models(config.model),
    own=("data.schema",),
)
"""The verbs that every app answers, and the arguments each takes beside the app's settings. Imports no torch."""
