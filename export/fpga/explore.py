"""Design-space search: the sizes of an accelerator that make a workload fastest within a device's budget.

The search has two stages, as UbiMoE's (arXiv 2502.05602): each of the two kernels alone, then what is left of the
budget between them. UbiMoE searches a kernel with a genetic algorithm and finds the balance by bisection. Here a kernel
has a grid of a few hundred points and the costs of kernels add up, so stage one evaluates each grid in full, the other
kernel at its smallest, and stage two goes through pairs of the kernels that may be worth it, fastest first, to the
first that fits. Nothing is random.

    python -m export.fpga.explore --manifest bundle/manifest.json --device zcu104
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from export.errors import ExportError
from export.fpga.latency import Estimate, estimate
from export.fpga.resources import Design, Device, Residency, Resources, load_device, memories
from export.fpga.workload import Kernel, Workload, from_manifest, read_manifest
from moecore.errors import ConfigError, choice
from moecore.files import atomic_path, write_atomic

Objective = Literal["latency", "interval"]
"""Time of one inference, or time between two when the attention and the linear unit work on different ones."""

STEPS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class Space:
    """The values each size may take; names are `Design`'s."""

    out_tile: tuple[int, ...] = STEPS
    in_tile: tuple[int, ...] = STEPS
    row_units: tuple[int, ...] = (1, 2, 4, 8)
    query_tile: tuple[int, ...] = STEPS
    width_tile: tuple[int, ...] = STEPS
    residency: tuple[Residency, ...] = get_args(Residency)

    def grid(self, *names: str) -> Iterator[dict[str, Any]]:
        """Every combination of the named sizes."""
        for values in itertools.product(*(getattr(self, name) for name in names)):
            yield dict(zip(names, values, strict=True))

    def smallest(self) -> dict[str, int]:
        """The least of every size but the residency."""
        return {field.name: min(getattr(self, field.name)) for field in fields(self) if field.name != "residency"}


BLOCKS_PER_ULTRA = 8
"""Block RAMs of 36 Kb that one UltraRAM of 288 Kb replaces at most."""
LINEAR, ATTENTION = ("out_tile", "in_tile", "row_units"), ("query_tile", "width_tile")


@dataclass(frozen=True)
class Explored:
    """What a search found.

    `estimate` is of the chosen design. `pareto` has the evaluated designs that no other one beats in both DSP slices
    and time, by DSP slices.
    """

    objective: Objective
    ceiling: float
    estimate: Estimate
    pareto: tuple[Estimate, ...]
    evaluations: int

    @property
    def design(self) -> Design:
        """The chosen design."""
        return self.estimate.design

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a file."""
        points = [
            {"dsp": e.resources.dsp, "latency_ms": e.milliseconds, "inferences_per_second": e.per_second}
            for e in self.pareto
        ]
        chosen = {"objective": self.objective, "ceiling": self.ceiling, "evaluations": self.evaluations}
        return {**chosen, **self.estimate.as_dict(), "pareto": points}


def explore(
    workload: Workload,
    device: Device,
    base: Design | None = None,
    objective: Objective = "latency",
    ceiling: float = 0.8,
    space: Space | None = None,
) -> Explored:
    """Find a fast design within a share of a device, in two stages.

    Args:
        workload: what to compute.
        device: where.
        base: widths, clock and port; None: `Design`'s widths and the device's clock and port.
        objective: what to make small.
        ceiling: share of each resource that may be used; a fuller chip rarely routes at its clock.
        space: values of the sizes.

    Raises:
        ConfigError: for an objective or a ceiling that does not exist.
        ExportError: when nothing fits; names the resource and how much is missing.
    """
    space = space or Space()
    search = _Search(workload, device, base or at_device(device), objective, ceiling, space)
    attends = any(stage.kernel == "attention" for stage in workload.shapes)
    for residency in space.residency:
        linear = search.front(residency, LINEAR, "linear")
        attention = search.front(residency, ATTENTION if attends else (), "attention")
        search.combine(residency, attention, linear)
    return search.result()


def exhaustive(
    workload: Workload,
    device: Device,
    base: Design | None = None,
    objective: Objective = "latency",
    ceiling: float = 0.8,
    space: Space | None = None,
) -> Explored:
    """As `explore`, by evaluating every design of the space; the default space has 175,692.

    Raises:
        ConfigError: as `explore`.
        ExportError: as `explore`.
    """
    space = space or Space()
    search = _Search(workload, device, base or at_device(device), objective, ceiling, space)
    for sizes in space.grid("residency", *LINEAR, *ATTENTION):
        search.evaluate(search.at(**sizes))
    return search.result()


def at_device(device: Device, **values: Any) -> Design:
    """A design with a device's clock and memory port, and `Design`'s fields as given."""
    return Design(**{"clock_mhz": device.clock_mhz, "port_bits": device.port_bits, **values})


def for_bundle(manifest: Mapping[str, Any], device: Device, **values: Any) -> Design:
    """`at_device` with the widths of a bundle's manifest, where `values` does not say otherwise."""
    settings = manifest["settings"]
    widths = {"weight_bits": settings["weight_width"], "activation_bits": settings["activation_width"]}
    return at_device(device, **{**widths, **values})


class Candidate(NamedTuple):
    """Sizes of one kernel and what they cost, the other kernel at its smallest.

    `counts`: DSP slices, LUTs, flip-flops, block RAMs if no buffer is in UltraRAM, UltraRAMs if all are.
    """

    sizes: dict[str, int]
    cycles: int
    memory_cycles: int
    counts: tuple[float, ...]


class _Search:
    """Evaluated designs; each is counted once."""

    def __init__(
        self, workload: Workload, device: Device, base: Design, objective: Objective, ceiling: float, space: Space
    ) -> None:
        choice("objective", objective, get_args(Objective))
        self.workload, self.device, self.objective, self.space = workload, device, objective, space
        self.ceiling, self.budget = ceiling, device.budget(ceiling)
        self.base = replace(base, **space.smallest())
        self.done: dict[Design, Estimate] = {}

    def at(self, **sizes: Any) -> Design:
        """The smallest design with some sizes changed."""
        return replace(self.base, **sizes)

    def evaluate(self, design: Design) -> Estimate:
        if design not in self.done:
            self.done[design] = estimate(self.workload, self.device, design, self.ceiling)
        return self.done[design]

    def fits(self, design: Design) -> bool:
        return self.evaluate(design).resources.within(self.budget)

    def cost(self, found: Estimate) -> tuple[float, ...]:
        """What is made small; among equals, lower latency wins, then fewer DSP slices, and so on."""
        return (_cycles(found, self.objective), found.cycles, *found.resources)

    def front(self, residency: Residency, names: Sequence[str], kernel: Kernel) -> list[Candidate]:
        """Stage one: designs of one kernel, the other at its smallest, none of which is beaten by another in its
        kernel's cycles and in every count."""
        found = []
        for sizes in self.space.grid(*names):
            one = self.evaluate(self.at(residency=residency, **sizes))
            counts = (one.resources.dsp, one.resources.lut, one.resources.ff)
            memory = memories(self.workload, one.design)
            found.append(Candidate(sizes, one.kernel_cycles(kernel), one.memory_cycles, (*counts, *memory)))
        found.sort(key=lambda one: (one.cycles, one.memory_cycles, one.counts))  # none is beaten by a later one
        costs = np.array([(one.cycles, one.memory_cycles, *one.counts) for one in found])  # [n, costs]
        return [one for i, one in enumerate(found) if not (costs[:i] <= costs[i]).all(1).any()]

    def combine(self, residency: Residency, attention: list[Candidate], linear: list[Candidate]) -> None:
        """Stage two: the fastest pair that fits, and the fastest of each size.

        Cycles and counts of kernels add up, so that pairs are put in order without an evaluation, and those that cannot
        fit are passed by; where UltraRAM may take some of the buffers, only an evaluation tells.
        """
        shared = self.evaluate(self.at(residency=residency))
        smallest = (shared.resources.dsp, shared.resources.lut, shared.resources.ff)
        base = np.array((*smallest, *memories(self.workload, shared.design)))
        one, other = (np.array([c.counts for c in kernels]) for kernels in (attention, linear))
        counts = one[:, None] + other[None] - base  # [A, L, counts]
        first, second = (np.array([c.cycles for c in kernels]) for kernels in (attention, linear))
        total = first[:, None] + second  # [A, L]
        busiest = np.maximum(np.maximum(first[:, None], second), [c.memory_cycles for c in linear])  # [A, L]
        relief = BLOCKS_PER_ULTRA * self.budget.uram
        limits = (self.budget.dsp, self.budget.lut, self.budget.ff, self.budget.bram36 + relief)
        pairs = np.argwhere((counts[..., :4] <= limits).all(-1))  # [n, 2]
        chosen = tuple(pairs.T)
        total, dsp = total[chosen], counts[..., 0][chosen]
        time = total if self.objective == "latency" else busiest[chosen]

        def fits(i: int) -> bool:
            a, b = pairs[i]
            return self.fits(self.at(residency=residency, **attention[a].sizes, **linear[b].sizes))

        for i in np.lexsort((dsp, total, time)):
            if fits(i):
                break
        order = np.lexsort((time, dsp))
        before = np.minimum.accumulate(np.concatenate(([np.inf], time[order])))[:-1]
        for i in order[time[order] < before]:
            fits(i)

    def result(self) -> Explored:
        fitting = [e for e in self.done.values() if e.resources.within(self.budget)]
        if not fitting:
            self.refuse()
        best = min(fitting, key=self.cost)
        pareto, fastest = [], math.inf
        for e in sorted(fitting, key=lambda e: (e.resources.dsp, *self.cost(e))):
            if self.cost(e)[0] < fastest:
                pareto.append(e)
                fastest = self.cost(e)[0]
        return Explored(self.objective, self.ceiling, best, tuple(pareto), len(self.done))

    def refuse(self) -> None:
        """Raise for the resource that the least demanding of the evaluated designs lacks most."""

        def excess(used: Resources) -> list[tuple[float, str, float, float]]:
            pairs = zip(used._fields, used, self.budget, strict=True)
            return [(have / max(limit, 1), name, have, limit) for name, have, limit in pairs if have > limit]

        _, name, needed, limit = max(min((excess(e.resources) for e in self.done.values()), key=max))
        raise ExportError(
            f"{self.workload.name} does not fit {self.device.name}: its least design needs {needed:g} {name} of the "
            f"{limit:g} that may be used ({self.ceiling:.0%} of the device), {needed - limit:g} too many; use a larger "
            "device, narrower activations, or fewer tokens"
        )


def _cycles(found: Estimate, objective: Objective) -> int:
    return found.cycles if objective == "latency" else found.interval_cycles


def table(explored: Explored, slowest: int = 5) -> str:
    """A search's result as text: sizes, latency, utilisation, time by operation, and the slowest stages."""
    e, d = explored.estimate, explored.design
    lines = [
        f"{e.workload.name} on {e.device.name} ({e.device.part}), {d.clock_mhz:g} MHz: "
        f"{e.milliseconds:.3f} ms, {e.per_second:.1f} inferences/s with one in each unit",
        f"linear {d.out_tile} x {d.in_tile} x {d.row_units}, attention {d.query_tile} x {d.width_tile}, "
        f"{d.residency} on chip, {d.weight_bits}-bit weights, {d.activation_bits}-bit activations",
        f"multipliers busy {e.efficiency:.0%}; {explored.evaluations} designs evaluated",
        "",
        f"{'resource':<10}{'used':>10}{'of':>10}{'share':>8}",
    ]
    for (name, share), used, total in zip(
        e.resources.share(e.device).items(), e.resources, e.device.budget(), strict=True
    ):
        lines.append(f"{name:<10}{used:>10g}{total:>10g}{share:>8.0%}")
    lines += ["", f"{'stage':<40}{'ms':>10}{'share':>8}  waits for"]
    rows = [*_by_operation(e), *(("", 0, ""),), *_slowest(e, slowest)]
    lines += [
        f"{name:<40}{cycles / d.clock_mhz / 1e3:>10.3f}{cycles / e.cycles:>8.0%}  {bound}" if name else ""
        for name, cycles, bound in rows
    ]
    return "\n".join(lines)


def _by_operation(found: Estimate) -> Iterable[tuple[str, int, str]]:
    for op in dict.fromkeys(stage.op for stage in found.stages):
        stages = [stage for stage in found.stages if stage.op == op]
        memory = sum(stage.bound == "memory" for stage in stages)
        bound = f"memory in {memory}" if memory else "compute"
        yield f"{len(stages)} x {op}", sum(stage.cycles for stage in stages), bound


def _slowest(found: Estimate, count: int) -> Iterable[tuple[str, int, str]]:
    for stage in sorted(found.stages, key=lambda stage: -stage.cycles)[:count]:
        yield stage.name, stage.cycles, stage.bound


def plot(explored: Explored, path: Path) -> Path:
    """Time against DSP slices: the front, the chosen design, and the budget; in the format of `path`'s suffix."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    clock = explored.design.clock_mhz * 1e3
    points = [(e.resources.dsp, _cycles(e, explored.objective) / clock) for e in explored.pareto]
    axes.step(*zip(*points, strict=True), where="post", marker=".", label="best design of each size")
    chosen = explored.estimate
    time = _cycles(chosen, explored.objective) / clock
    axes.plot(chosen.resources.dsp, time, "o", markersize=10, fillstyle="none", label="chosen")
    limit = chosen.device.budget(explored.ceiling).dsp
    axes.axvline(limit, color="gray", linestyle=":", label=f"{explored.ceiling:.0%} of {chosen.device.name}")
    axes.set(xlabel="DSP slices", ylabel=f"{explored.objective} in ms", xscale="log", yscale="log")
    axes.set_title(chosen.workload.name)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Search for the accelerator of a bundle and print what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m export.fpga.explore",
        description="Find tile sizes that make a bundle's model fastest within a device, and print latency, resources "
        "and what each stage waits for. Figures are a model's, to first order: no synthesis tool is run.",
        allow_abbrev=False,
    )
    parser.add_argument("--manifest", type=Path, required=True, help="manifest.json of an FPGA bundle")
    parser.add_argument("--device", default="zcu104", help="zcu102, zcu104, u280, z7020, or a YAML file of one's own")
    parser.add_argument(
        "--objective",
        choices=get_args(Objective),
        default="latency",
        help="time of one inference, or between two that share the units (default: %(default)s)",
    )
    parser.add_argument("--ceiling", type=float, default=0.8, help="share of the device to use (default: %(default)s)")
    parser.add_argument("--weight-bits", type=int, help="of stored weights (default: the bundle's)")
    parser.add_argument("--activation-bits", type=int, help="of activations (default: the bundle's)")
    parser.add_argument("--clock-mhz", type=float, help="default: the device's")
    parser.add_argument("--pack-int8", action="store_true", help="two products a DSP slice, up to 8 bits each")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--plot", type=Path, help="also draw latency against DSP slices: .png, .svg, .pdf")
    options = parser.parse_args(arguments)
    try:
        explored = _run(options)
        sys.stdout.write(table(explored) + "\n")
        if options.json:
            write_atomic(options.json, json.dumps(explored.as_dict(), indent=2) + "\n")
        if options.plot:
            plot(explored, options.plot)
    except (ConfigError, ExportError, OSError, ValueError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    except KeyError as error:
        sys.stderr.write(f"error: manifest={options.manifest}: has no {error}; give manifest.json of an fpga bundle\n")
        return 2
    return 0


def _run(options: argparse.Namespace) -> Explored:
    manifest, device = read_manifest(options.manifest), load_device(options.device)
    given = {name: getattr(options, name) for name in ("weight_bits", "activation_bits", "clock_mhz")}
    given = {name: value for name, value in given.items() if value is not None}
    base = for_bundle(manifest, device, pack_int8=options.pack_int8, **given)
    workload = from_manifest(manifest, options.manifest.resolve().parent.name)
    return explore(workload, device, base, options.objective, options.ceiling)


if __name__ == "__main__":
    sys.exit(main())
