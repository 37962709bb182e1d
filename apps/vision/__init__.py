"""Image classification with ViMoE: vision transformers whose FFNs are Mixtures of Experts."""

from apps.cli import App
from apps.vision.settings import VisionConfig

APP = App(
    name="vision",
    title="ViMoE: train, inspect, search and ship Mixture-of-Experts image classifiers.",
    config=VisionConfig,
)
