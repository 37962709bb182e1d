"""Cycles of a design, from loop trip counts and initiation intervals, bounded by external memory.

Stages run one after another; within a stage, computing and moving data overlap (double buffers), so that the longer of
the two counts:

- a linear layer takes `rows * ceil(out / out_tile) * ceil(in / in_tile)` iterations of the array;
- attention takes `2 * ceil((N + query_tile - 1) / query_tile) * N * ceil(D / width_tile)`: its queries enter skewed, so
  that bandwidth does not grow with parallelism (Edge-MoE, arXiv 2305.18691);
- a mixture of experts loads each active expert once, the next one while the current one computes; the first load is
  exposed, since the queues decide which expert it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from export.fpga.resources import Design, Device, Resources, matrices, resources, tiles
from export.fpga.workload import Attention, Conv, Elementwise, Experts, Kernel, Linear, Matmul, Stage, Workload

MEMORY_EFFICIENCY = 0.8
"""Share of the external memory's peak that long bursts reach."""
PIPELINE_DEPTH = 24
"""Cycles to fill and drain a stage's pipeline: operand reads, product, sum, rounding. Its share is small unless a stage
has few iterations."""


class StageEstimate(NamedTuple):
    """Cycles of one stage."""

    name: str
    op: str
    kernel: Kernel
    compute_cycles: int
    memory_cycles: int
    cycles: int

    @property
    def bound(self) -> Literal["compute", "memory"]:
        """What it waits for."""
        return "memory" if self.memory_cycles > self.compute_cycles else "compute"


@dataclass(frozen=True)
class Estimate:
    """A design's latency and resources for one workload on one device; `shapes` in the order of the workload's."""

    workload: Workload
    device: Device
    design: Design
    resources: Resources
    shapes: tuple[StageEstimate, ...]

    @cached_property
    def stages(self) -> tuple[StageEstimate, ...]:
        """Of each stage, in order."""
        found: dict[int, StageEstimate] = {}
        for shape, places in zip(self.shapes, self.workload.shapes.values(), strict=True):
            found.update(dict.fromkeys(places, shape))
        return tuple(found[i]._replace(name=stage.name) for i, stage in enumerate(self.workload.stages))

    def _counted(self) -> Iterator[tuple[StageEstimate, int]]:
        return zip(self.shapes, map(len, self.workload.shapes.values()), strict=True)

    @property
    def cycles(self) -> int:
        """From the first input to the last output of one inference."""
        return sum(shape.cycles * count for shape, count in self._counted())

    def kernel_cycles(self, kernel: Kernel) -> int:
        """Cycles one unit is busy in an inference."""
        return sum(shape.cycles * count for shape, count in self._counted() if shape.kernel == kernel)

    @property
    def memory_cycles(self) -> int:
        """Cycles the memory port is busy in an inference."""
        return sum(shape.memory_cycles * count for shape, count in self._counted())

    @property
    def interval_cycles(self) -> int:
        """Between two inferences when the units work on different ones: the busier unit, or the shared memory port."""
        return max(self.kernel_cycles("linear"), self.kernel_cycles("attention"), self.memory_cycles)

    @property
    def milliseconds(self) -> float:
        """Latency of one inference."""
        return self.cycles / self.design.clock_mhz / 1e3

    @property
    def per_second(self) -> float:
        """Inferences a second, with one in each unit."""
        return self.design.clock_mhz * 1e6 / self.interval_cycles

    @property
    def efficiency(self) -> float:
        """Share of the multipliers' cycles that do work of the model."""
        used = self.design.linear_macs
        if any(shape.kernel == "attention" for shape in self.shapes):
            used += self.design.attention_macs
        return self.workload.macs / (used * self.cycles)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a file: what `estimate.json` in a bundle holds."""
        return {
            "workload": self.workload.name,
            "device": self.device.name,
            "macs": self.workload.macs,
            "cycles": self.cycles,
            "latency_ms": self.milliseconds,
            "interval_cycles": self.interval_cycles,
            "inferences_per_second": self.per_second,
            "efficiency": self.efficiency,
            "resources": self.resources._asdict(),
            "utilisation": self.resources.share(self.device),
            "design": asdict(self.design),
            "stages": [{**stage._asdict(), "bound": stage.bound} for stage in self.stages],
        }


def estimate(workload: Workload, device: Device, design: Design, ceiling: float = 1.0) -> Estimate:
    """Latency and resources of a design, whether or not the device has that much.

    Args:
        workload: what to compute.
        device: where.
        design: with which sizes.
        ceiling: share of the device's block RAM that may be used before buffers move to UltraRAM.
    """
    used = resources(workload, design, device, ceiling)
    return Estimate(workload, device, design, used, tuple(_stage(shape, design, device) for shape in workload.shapes))


def _stage(stage: Stage, design: Design, device: Device) -> StageEstimate:
    compute = design.initiation_interval * COMPUTE[type(stage)](stage, design)
    memory = math.ceil(_traffic(stage, design) / _bytes_per_cycle(design, device))
    cycles = max(compute, memory)
    if isinstance(stage, Experts):
        # the first load, then loads beside computing, then the last expert's computing
        awaited = stage.expert_weights if design.residency == "weights" else design.out_tile * stage.inputs
        first = math.ceil(awaited * _bytes(design.weight_bits) / _bytes_per_cycle(design, device))
        cycles = first + ((stage.active - 1) * cycles + compute) // stage.active
    return StageEstimate(stage.name, stage.op, stage.kernel, compute, memory, cycles + PIPELINE_DEPTH)


def _linear(stage: Linear | Conv, design: Design) -> int:
    return math.ceil(stage.rows / design.row_units) * sum(tiles(design, *matrix) for matrix in matrices(stage))


def _experts(stage: Experts, design: Design) -> int:
    shortest, longer = divmod(stage.pairs, stage.active)  # tokens of an expert under even load
    rows = longer * math.ceil((shortest + 1) / design.row_units)
    rows += (stage.active - longer) * math.ceil(shortest / design.row_units)
    return rows * sum(tiles(design, *matrix) for matrix in matrices(stage))


def _groups(rows: int, design: Design) -> int:
    return math.ceil((rows + design.query_tile - 1) / design.query_tile)


def _attention(stage: Attention, design: Design) -> int:
    products = 2 * _groups(stage.tokens, design) * stage.tokens * math.ceil(stage.width / design.width_tile)
    exponentials = math.ceil(stage.heads * stage.tokens**2 / design.query_tile)
    return max(products, exponentials)


def _matmul(stage: Matmul, design: Design) -> int:
    # The unit's width serves sums or outputs, whichever leaves fewer multipliers idle.
    products = min(
        stage.columns * math.ceil(stage.inner / design.width_tile),
        stage.inner * math.ceil(stage.columns / design.width_tile),
    )
    return stage.batch * _groups(stage.rows, design) * products


def _elementwise(stage: Elementwise, design: Design) -> int:
    lanes = design.query_tile if stage.kernel == "attention" else design.out_tile
    return stage.passes * math.ceil(stage.elements / lanes)


COMPUTE: dict[type, Callable[[Any, Design], int]] = {
    Linear: _linear,
    Conv: _linear,
    Experts: _experts,
    Attention: _attention,
    Matmul: _matmul,
    Elementwise: _elementwise,
}


def _traffic(stage: Stage, design: Design) -> int:
    """Bytes between external memory and the chip."""
    weights = stage.weights * _bytes(design.weight_bits)
    if design.residency == "activations":
        return weights
    moved = stage.reads + stage.writes
    if design.residency == "tiles":
        moved += _again(stage, design)
    return weights + moved * _bytes(design.activation_bits)


def _again(stage: Stage, design: Design) -> int:
    """Activations moved a further time when neither operand stays on chip."""
    match stage:
        case Linear() | Conv():
            ((_, outputs, _),) = matrices(stage)
            return stage.reads * (math.ceil(outputs / design.out_tile) - 1)
        case Experts():
            again = stage.reads * (math.ceil(stage.hidden / design.out_tile) * (len(stage.matrices) - 1) - 1)
            return again + stage.pairs * stage.hidden * (1 + math.ceil(stage.outputs / design.out_tile))
    return 0


def _bytes(bits: int) -> int:
    return math.ceil(bits / 8)


def _bytes_per_cycle(design: Design, device: Device) -> float:
    memory = device.bandwidth_gb_s * 1e3 * MEMORY_EFFICIENCY / design.clock_mhz
    return min(design.port_bits / 8, memory)
