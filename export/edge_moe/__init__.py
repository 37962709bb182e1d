"""Folders for the published accelerator of M³ViT: weights, image and golden activations in the files its kernels read.

The accelerator is Edge-MoE (Sarkar et al., ICCAD 2023, arXiv 2305.18691); its sizes are compiled in, so only models of
exactly its architecture can run on it. Nothing here is taken from its code.
"""

from __future__ import annotations

from export.edge_moe.bundle import Backbone, export_edge_moe
from export.edge_moe.check import Outputs
from export.edge_moe.settings import ACCELERATOR, moe_settings, require_settings

__all__ = ["ACCELERATOR", "Backbone", "Outputs", "export_edge_moe", "moe_settings", "require_settings"]
