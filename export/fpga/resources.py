"""Which part of a device a design takes: DSP slices, block RAM, UltraRAM, LUTs and flip-flops, to first order.

The architecture is the one published for MoE vision transformers (Edge-MoE, arXiv 2305.18691; UbiMoE, arXiv
2502.05602): one array of multipliers with weights, shared by all linear layers, convolutions and experts; one unit that
streams attention; a vector unit behind their outputs; double-buffered weights. DSP and memory counts follow from widths
and depths; LUT and flip-flop counts are rules of thumb (the constants below), never compared with a synthesis report.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from export.fpga.workload import Attention, Conv, Experts, Linear, Matmul, Stage, Workload
from moecore.errors import choice, require

Residency = Literal["activations", "weights", "tiles"]
"""What stays on chip while a layer runs: its activations (weights come tile by tile), its weights (activations come row
by row), or neither (weights come tile by tile, and activations again for each tile)."""

DEVICES = Path(__file__).parent / "devices"

LUT_BASE, FF_BASE = 15_000, 20_000  # control, one memory port of 256 bits
LUT_PER_PORT_BIT = 4  # data movers beyond the first 256 bits
LUT_PER_MAC = 12  # operand routing
LUT_PER_LANE = 300  # interpolated table, rounding, saturation
LUT_DIVIDER_PER_BIT2 = 1.5  # radix-2 divider of n bits: about n * 1.5n
LUT_RAM_DEPTH = 64  # words; below, block RAM would be mostly empty
DSP_PER_LANE = 2  # an interpolated table and a scale: one multiplication each


@dataclass(frozen=True)
class Device:
    """A board: what `devices/*.yaml` holds, each value with its public source.

    `bandwidth_gb_s` is the external memory's peak in 1e9 bytes a second, `port_bits` what the logic can take in one
    cycle.
    """

    name: str
    part: str
    dsp: int
    multiplier: tuple[int, int]
    int8_per_dsp: float
    bram36: int
    uram: int
    lut: int
    ff: int
    bandwidth_gb_s: float
    port_bits: int
    clock_mhz: float

    def budget(self, ceiling: float = 1.0) -> Resources:
        """What a design may take of it: a full chip does not route, so plan for less than all.

        Args:
            ceiling: share of each resource, above 0 and up to 1.

        Raises:
            ConfigError: for another share.
        """
        require(0 < ceiling <= 1, "ceiling", ceiling, "give a share of the device above 0 and up to 1")
        return Resources(*(math.floor(getattr(self, name) * ceiling) for name in Resources._fields))


def load_device(name: str | Path) -> Device:
    """A device by its name in `devices/`, or from a YAML file of one's own.

    Raises:
        ConfigError: for an unknown name, or a file with other fields than `Device`'s.
    """
    import yaml

    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        choice("device", str(name), (path.stem for path in DEVICES.glob("*.yaml")))
        path = DEVICES / f"{name}.yaml"
    require(path.is_file(), "device", str(name), "no such file")
    values = yaml.safe_load(path.read_text())
    require(isinstance(values, dict), "device", str(name), "the file has to hold the fields of a device")
    known = {field.name for field in fields(Device)} - {"name"}
    wrong = sorted(known ^ set(values))
    require(not wrong, path.name, wrong, f"missing or unknown; a device has exactly {', '.join(sorted(known))}")
    return Device(path.stem, **{**values, "multiplier": tuple(values["multiplier"])})


@dataclass(frozen=True)
class Design:
    """Sizes of an accelerator. The first five, and `residency`, are what the search varies.

    Args:
        out_tile: outputs the linear array computes at once.
        in_tile: inputs it sums for each.
        row_units: copies of the array, which work on different rows with the same weights.
        query_tile: queries the attention unit works on at once.
        width_tile: products it sums for each.
        residency: what stays on chip.
        weight_bits: of stored weights.
        activation_bits: of activations.
        pack_int8: two products that share an operand in one slice, where both operands have at most 8 bits and the
            device allows it (WP486); this takes hand-written DSP primitives.
        initiation_interval: cycles between two iterations of the innermost pipelines.
        port_bits: external memory read in one cycle.
        clock_mhz: of the whole design.

    Raises:
        ConfigError: for a size that is not positive.
    """

    out_tile: int = 16
    in_tile: int = 16
    row_units: int = 1
    query_tile: int = 4
    width_tile: int = 8
    residency: Residency = "activations"
    weight_bits: int = 16
    activation_bits: int = 16
    pack_int8: bool = False
    initiation_interval: int = 1
    port_bits: int = 256
    clock_mhz: float = 300.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("residency", "pack_int8"):
                require(value > 0, name, value, "give a positive number")
        choice("residency", self.residency, get_args(Residency))

    @property
    def linear_macs(self) -> int:
        """Multiply-adds a cycle of the linear array."""
        return self.out_tile * self.in_tile * self.row_units

    @property
    def attention_macs(self) -> int:
        """Multiply-adds a cycle of the attention unit."""
        return self.query_tile * self.width_tile


class Resources(NamedTuple):
    """Counts: DSP slices, block RAMs of 36 Kb, UltraRAMs of 288 Kb, LUTs, flip-flops."""

    dsp: float
    bram36: float
    uram: float
    lut: float
    ff: float

    def within(self, budget: Resources) -> bool:
        """Whether no count is above the budget's."""
        return all(used <= limit for used, limit in zip(self, budget, strict=True))

    def share(self, device: Device) -> dict[str, float]:
        """Each count as a share of the device's; a resource it lacks has 0, or infinity when used."""
        totals = device.budget()
        return {
            name: used / total if total else (math.inf if used else 0.0)
            for name, used, total in zip(self._fields, self, totals, strict=True)
        }


class Buffer(NamedTuple):
    """An on-chip memory that reads one word a cycle: `copies` of `depth` words of `width` bits."""

    name: str
    depth: int
    width: int
    copies: int = 1


def multiplier_dsps(a_bits: int, b_bits: int, device: Device) -> int:
    """DSP slices of one signed a x b multiplication: operands that are too wide are cut into pieces.

    A slice multiplies signed numbers, so a lower piece, which has no sign, has one bit less (UG579, UG479).
    """

    def pieces(bits: int, size: int) -> int:
        return 1 if bits <= size else 1 + math.ceil((bits - size) / (size - 1))

    wide, narrow = device.multiplier
    return min(pieces(a_bits, wide) * pieces(b_bits, narrow), pieces(a_bits, narrow) * pieces(b_bits, wide))


@cache
def block_rams(depth: int, width: int) -> float:
    """Block RAMs of 36 Kb for one memory, in the best of their shapes; halves count as 0.5 (UG573, UG473)."""
    shapes = ((16384, 1), (8192, 2), (4096, 4), (2048, 9), (1024, 18), (512, 36))  # of an 18 Kb half
    halves = (math.ceil(depth / words) * math.ceil(width / bits) for words, bits in shapes)
    # A whole has either twice the words or twice the bits of a half; both are two halves side by side.
    return min(halves) / 2


def ultra_rams(depth: int, width: int) -> int:
    """UltraRAMs of 4096 x 72 bits for one memory (UG573)."""
    return math.ceil(depth / 4096) * math.ceil(width / 72)


def accumulator_bits(workload: Workload, design: Design) -> int:
    """Bits that hold any sum of products of the workload's longest dot product."""
    lengths = [inputs for stage in workload.of(Linear, Conv, Experts) for inputs, _, _ in matrices(stage)]
    return design.weight_bits + design.activation_bits + math.ceil(math.log2(max(lengths, default=1) + 1))


def buffers(workload: Workload, design: Design) -> list[Buffer]:
    """The on-chip memories a workload needs under a design, in no particular order."""
    found = [*_weights(workload, design), *_activations(workload, design)]
    found += [*_attention(workload, design), *_experts(workload, design)]
    return [buffer for buffer in found if buffer.depth > 0]


def memories(workload: Workload, design: Design) -> tuple[float, int]:
    """What a design's buffers take if all of them are block RAM, and if all are UltraRAM."""
    large = [buffer for buffer in buffers(workload, design) if buffer.depth > LUT_RAM_DEPTH]
    bram = sum(block_rams(b.depth, b.width) * b.copies for b in large)
    return bram, sum(ultra_rams(b.depth, b.width) * b.copies for b in large)


def resources(workload: Workload, design: Design, device: Device, ceiling: float = 1.0) -> Resources:
    """What a design takes of a device, whether or not the device has that much.

    Buffers of up to 64 words are LUT memory. The others go to block RAM; where `ceiling` of it is not enough, the
    largest move to UltraRAM until the rest fits.
    """
    found = buffers(workload, design)
    bram, uram = _place([buffer for buffer in found if buffer.depth > LUT_RAM_DEPTH], device.budget(ceiling))
    lut, ff = _logic(workload, design)
    # RAM64M: three bits of 64 words in four LUTs (UG574)
    lut += sum(math.ceil(b.width * 4 / 3) * b.copies for b in found if b.depth <= LUT_RAM_DEPTH)
    return Resources(_dsps(workload, design, device), bram, uram, lut, ff)


def _dsps(workload: Workload, design: Design, device: Device) -> int:
    activation = multiplier_dsps(design.activation_bits, design.activation_bits, device)
    weight = multiplier_dsps(design.activation_bits, design.weight_bits, device)
    packed = device.int8_per_dsp if design.pack_int8 else 1
    total = design.out_tile * DSP_PER_LANE * activation
    total += math.ceil(design.linear_macs * weight / (packed if _int8(design.weight_bits, design) else 1))
    if _attends(workload):
        macs = design.attention_macs * activation / (packed if _int8(design.activation_bits, design) else 1)
        total += math.ceil(macs) + design.query_tile * DSP_PER_LANE * activation
    return total


def _int8(bits: int, design: Design) -> bool:
    return max(bits, design.activation_bits) <= 8


def _attends(workload: Workload) -> bool:
    return any(stage.kernel == "attention" for stage in workload.shapes)


def _logic(workload: Workload, design: Design) -> tuple[int, int]:
    """LUTs and flip-flops apart from memories."""
    bits, total = design.weight_bits + design.activation_bits, accumulator_bits(workload, design)
    sums, lanes, macs = design.out_tile * design.row_units, design.out_tile, design.linear_macs
    if _attends(workload):
        sums, lanes, macs = sums + design.query_tile, lanes + design.query_tile, macs + design.attention_macs
    dividers = lanes * LUT_DIVIDER_PER_BIT2 * design.activation_bits**2
    lut = LUT_BASE + LUT_PER_PORT_BIT * max(0, design.port_bits - 256) + macs * LUT_PER_MAC
    lut += (macs - sums) * total // 2 + sums * total + lanes * LUT_PER_LANE + int(dividers)  # half the adders in DSPs
    ff = FF_BASE + 2 * LUT_PER_PORT_BIT * max(0, design.port_bits - 256) + macs * bits + sums * 2 * total
    return lut, ff + lanes * 2 * LUT_PER_LANE


def _place(large: list[Buffer], budget: Resources) -> tuple[float, int]:
    """Block RAMs and UltraRAMs of buffers."""
    costs = [(block_rams(b.depth, b.width), ultra_rams(b.depth, b.width)) for b in large for _ in range(b.copies)]
    bram, uram = sum(cost for cost, _ in costs), 0
    for saved, needed in sorted(costs, key=lambda cost: (-cost[0], cost[1])):
        if bram > budget.bram36 and uram + needed <= budget.uram:
            bram, uram = bram - saved, uram + needed
    return bram, uram


def _weights(workload: Workload, design: Design) -> list[Buffer]:
    """Two buffers, one of which is filled while the other is read; a word has the weights of one cycle."""
    layers = [matrices(stage) for stage in workload.of(Linear, Conv, Experts)]
    if design.residency == "weights":
        depths = [sum(tiles(design, *matrix) for matrix in layer) for layer in layers]
    else:  # one row of tiles: the weights of `out_tile` outputs
        depths = [math.ceil(inputs / design.in_tile) for layer in layers for inputs, _, _ in layer]
    return [Buffer("weights", max(depths, default=0), design.out_tile * design.in_tile * design.weight_bits, copies=2)]


def _activations(workload: Workload, design: Design) -> list[Buffer]:
    lanes = max(design.in_tile * design.row_units, design.out_tile)
    word = lanes * design.activation_bits
    if design.residency == "activations":  # what a layer reads, what it writes, and a residual
        return [Buffer("activations", math.ceil(max(map(_largest, workload.shapes)) / lanes), word, copies=3)]
    layers = [matrix for stage in workload.of(Linear, Conv, Experts) for matrix in matrices(stage)]
    longest = max((max(inputs, outputs) for inputs, outputs, _ in layers), default=0)
    lines = max((conv.line_buffer for conv in workload.of(Conv)), default=0)
    rows = Buffer("rows", math.ceil(design.row_units * longest / lanes), word, copies=2)
    return [rows, Buffer("lines", math.ceil(lines / lanes), word)]


def _attention(workload: Workload, design: Design) -> list[Buffer]:
    """What every query needs, of one head, double-buffered: keys and values; and the scores of the current queries."""
    word, streams = design.width_tile * design.activation_bits, workload.of(Attention)
    right = max((stage.right for stage in streams), default=0)
    scores = max((stage.tokens for stage in streams), default=0)
    products = max((stage.right for stage in workload.of(Matmul)), default=0)
    return [
        Buffer("keys and values", math.ceil(right / design.width_tile), word, copies=4),
        Buffer("scores", scores, design.query_tile * design.activation_bits),
        Buffer("right operand", math.ceil(products / design.width_tile), word, copies=2),
    ]


def _experts(workload: Workload, design: Design) -> list[Buffer]:
    """Queues that hold every token in the worst case, hidden values, and sums of the experts' outputs."""
    found, bits = [], design.activation_bits
    for stage in workload.of(Experts):
        token = math.ceil(math.log2(stage.tokens + 1))
        found.append(Buffer("queues", stage.num_experts * stage.tokens, token + bits))
        rows = {"activations": stage.tokens, "weights": design.row_units, "tiles": 0}[design.residency]
        found.append(Buffer("hidden", math.ceil(rows * stage.hidden / design.out_tile), design.out_tile * bits))
        if design.residency == "activations":
            total = design.out_tile * accumulator_bits(workload, design)
            found.append(Buffer("outputs", stage.tokens * math.ceil(stage.outputs / design.out_tile), total))
    names = {buffer.name for buffer in found}  # layers run one after another: the largest of each serves all
    return [max((b for b in found if b.name == name), key=lambda b: b.depth * b.width) for name in sorted(names)]


def _largest(stage: Stage) -> int:
    """Activations of the largest tensor a stage reads or writes."""
    match stage:
        case Experts():
            return stage.tokens * max(stage.inputs, stage.outputs)
        case Matmul():
            return stage.batch * max(stage.rows * stage.inner, stage.right, stage.rows * stage.columns)
    return max(stage.reads, stage.writes)


def matrices(stage: Linear | Conv | Experts) -> list[tuple[int, int, int]]:
    """(inputs, outputs, groups) of each matrix product with weights in a stage, of one expert."""
    match stage:
        case Experts():
            return [(inputs, outputs, 1) for inputs, outputs in stage.matrices]
        case Conv():
            return [(stage.inputs, stage.outputs // stage.groups, stage.groups)]
    return [(stage.inputs, stage.outputs, 1)]


def tiles(design: Design, inputs: int, outputs: int, groups: int) -> int:
    """Iterations of the linear array over a matrix, for one row."""
    return groups * math.ceil(outputs / design.out_tile) * math.ceil(inputs / design.in_tile)
