"""Images: classification with ViMoE, and several tasks at once with M³ViT."""

from apps.cli import App
from apps.vision.arguments import ARGUMENTS
from apps.vision.settings import VisionConfig, idle

APP = App(
    name="vision",
    title="ViMoE and M³ViT: train, inspect, search and ship Mixture-of-Experts models of images.",
    config=VisionConfig,
    arguments=ARGUMENTS,
    unused=idle,
)
"""`python -m apps.vision`."""
