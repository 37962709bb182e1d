"""Image classification with ViMoE: vision transformers whose FFNs are Mixtures of Experts."""

from apps.cli import App
from apps.vision.settings import VisionConfig

APP = App(
    name="vision",
    title="ViMoE: train, inspect, search and ship Mixture-of-Experts image classifiers.",
    config=VisionConfig,
    unused=lambda config: {"model.moe.": "give --model.moe_layers"} if config.model.moe_layers == "none" else {},
)
