"""Multi-task ranking with Mixture-of-Experts models."""

from apps.cli import App
from apps.recsys.arguments import ARGUMENTS
from apps.recsys.settings import RecsysConfig

APP = App(
    name="recsys",
    title="Multi-task ranking on click logs with experts whose gates can be read: MMoE, PLE, HoME, AW-MoE, MoAE.",
    config=RecsysConfig,
    arguments=ARGUMENTS,
)
"""The verbs that every app answers, and the arguments each takes beside the app's settings. Imports no torch."""
