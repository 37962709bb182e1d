"""Settings of exports. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from moecore.errors import choice, require


@dataclass
class OnnxSettings:
    """ONNX files."""

    experts: Literal["sparse", "dense", "loop", "ort_moe", "qmoe", "qmoe4", "auto"] = "sparse"
    """Form of the mixtures in format=onnx. sparse: each expert multiplies its own tokens, standard operators; dense:
    every expert on every token, static shapes; loop: sparse with one body for very many experts; ort_moe: onnxruntime's
    own operator; qmoe, qmoe4: its quantised one, weights of 8 or 4 bits; auto: the exact form that is fastest here."""
    max_score_change: float = 0.01
    """Largest change of the task's figure that a quantised file may show: absolute for shares (accuracy, AUC), relative
    for errors with units."""
    min_routing_agreement: float = 0.9
    """Smallest share of tokens that a quantised file must send to the very experts that PyTorch does."""

    def __post_init__(self) -> None:
        require(self.max_score_change >= 0, "max_score_change", self.max_score_change, "must not be negative")
        agreement = self.min_routing_agreement
        require(0 <= agreement <= 1, "min_routing_agreement", agreement, "is a share, in [0, 1]")


@dataclass(frozen=True)
class FixedSettings:
    """Widths and tiles of a fixed-point accelerator."""

    weight_width: int = 16
    """Bits of weights and embedding tables."""
    activation_width: int = 24
    """Bits of activations, biases and scales."""
    margin: int = 2
    """Integer bits of activations beyond the range that calibration saw."""
    overflow: Literal["saturate", "wrap"] = "saturate"
    """What becomes of results that do not fit; they are counted either way."""
    table_bits: int = 11
    """Tables of functions have at most 2^table_bits segments."""
    tile_in: int = 8
    """Products per output and clock."""
    tile_out: int = 8
    """Outputs at a time."""

    def __post_init__(self) -> None:
        for name in ("weight_width", "activation_width"):
            width = getattr(self, name)
            require(4 <= width <= 32, name, width, "choose 4 to 32 bits; 8 to 24 are usual")
        require(0 <= self.margin <= 8, "margin", self.margin, "choose 0 to 8 bits")
        choice("overflow", self.overflow, ("saturate", "wrap"))
        require(4 <= self.table_bits <= 16, "table_bits", self.table_bits, "choose 4 to 16")
        for name in ("tile_in", "tile_out"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")

    @property
    def wrap(self) -> bool:
        """Whether what does not fit wraps around."""
        return self.overflow == "wrap"


DEVICES = ("u280", "z7020", "zcu102", "zcu104")
"""Devices that are described here."""


@dataclass(frozen=True)
class FpgaSettings(FixedSettings):
    """Fixed-point accelerators, and what is measured of them."""

    device: str = "zcu104"
    """Device that latency and resources are estimated for: zcu102, zcu104, u280, z7020, or a YAML file of one's own."""
    calibrated: int = 128
    """Training inputs that formats are chosen from."""
    compared: int = 100
    """Test inputs that the simulator is compared with PyTorch on."""
    max_score_change: float = 0.01
    """Largest change of the task's figure that a bundle may show: absolute for shares, relative for errors with
    units."""
    sweep: int = 0
    """Test inputs on which all widths from 8 to 24 bits are compared with float (table and picture); 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("calibrated", "compared"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.sweep >= 0, "sweep", self.sweep, "must not be negative")
        known = self.device in DEVICES or Path(self.device).is_file()
        require(known, "device", self.device, f"choose one of {', '.join(DEVICES)}, or give a YAML file")

    def fixed(self) -> FixedSettings:
        """Widths and tiles alone."""
        return FixedSettings(**{one.name: getattr(self, one.name) for one in fields(FixedSettings)})
