"""hls4ml projects of models that hls4ml can take whole: gates that mix all their experts, and MLPs.

hls4ml: Fahim et al. 2021, arXiv 2103.05579. It has no layers that choose experts per sample; mixtures of all experts it
can compute, once reshapes and slices are gone: see `plan`.
"""

from __future__ import annotations

from export.hls4ml.bundle import write_hls4ml
from export.hls4ml.formats import Settings
from export.hls4ml.project import simulate

__all__ = ["Settings", "simulate", "write_hls4ml"]
