"""The part of the report on experts: which of them handles which pattern, where in a context, and how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from apps import figures
from apps.report import Page, Section
from apps.timeseries import pictures
from apps.timeseries.models.base import ForecastModel, Windows
from apps.timeseries.pictures import Example
from apps.timeseries.routing import (
    ByLabel,
    ExpertUse,
    affordable,
    contexts,
    expert_use,
    sampled,
    shares,
    trace_macs,
)
from apps.timeseries.series import Series
from apps.timeseries.traits import Traits
from apps.timeseries.windows import WindowSet

ROUTING_MACS = 20e9
"""Multiply-adds to spend on contexts whose routing is counted."""
MOST_LAYERS, MOST_ROWS = 12, 30
"""Layers and series that heat maps show."""
LEAST_UNITS = 10
"""At most phases of a season, to say anything about it."""
LEAST_SHADE = 0.05
"""Deviation of a share that has the darkest shade at least, so that noise stays pale."""


def add_experts(
    page: Page,
    model: ForecastModel,
    windows: WindowSet,
    one: Windows,
    examples: Sequence[Example],
    curves: list[dict[str, float]],
) -> None:
    """Add sections on the MoE layers, if there are any.

    Args:
        page: to add to.
        model: whose layers.
        windows: test windows whose contexts are run through the model, or a sample of them.
        one: a window, to count the cost by.
        examples: windows whose routing may be shown.
        curves: of the training.
    """
    found = contexts(windows)
    rows = sampled(len(found), affordable(trace_macs(model, one), ROUTING_MACS, least=12, most=2000), len(windows))
    use = expert_use(model, found, rows, [example.row for example in examples])
    if not use:
        return
    names = dict(zip(use, _names(list(use)), strict=True))
    shown = dict(list(names.items())[:: -(-len(names) // MOST_LAYERS)])
    _patterns(page, use, names, windows.store.series, _words(rows, len(windows)))
    _maps(page, use, shown, windows.store.series)
    _contexts(page, use, names, examples)
    _load(page, use, names, curves)


def _names(layers: Sequence[str]) -> list[str]:
    """`encoder.blocks.3.ffn` as `block 3`, `patterns.trend.experts` as `trend`; long names where those are not one."""
    short = []
    for layer in layers:
        parts = layer.split(".")
        number = [part for part in parts if part.isdigit()]
        words = [part for part in parts if part not in ("patterns", "experts", "ffn", "moe")]
        short.append(f"block {number[-1]}" if number else " ".join(words))
    patterns = any(layer.startswith("patterns.") for layer in layers)
    short = [name or ("volatility" if patterns else "experts") for name in short]
    return short if len(set(short)) == len(short) else list(layers)


def _patterns(
    page: Page,
    use: Mapping[str, ExpertUse],
    names: Mapping[str, str],
    series: Sequence[Series],
    looked_at: str,
) -> None:
    section = page.section("Which experts handle which patterns")
    section.text(
        f"From the contexts of {looked_at}. Specialisation is the mutual information between a label of a unit (a "
        "point, a patch, a segment or a context: what a layer routes as one) and its expert, as a share of the label's "
        "entropy: 0 when routing ignores the label, 1 when the expert alone gives it away."
    )
    panels = {
        title: {names[layer]: (table.specialisation, table.chance) for layer, table in tables.items()}
        for title, tables in _labels(use, series).items()
    }
    if panels:
        section.figure(
            pictures.specialisation(panels),
            "Share of the label that the expert gives away, per layer. The mark is chance: series shuffled among the "
            "windows, phases turned by a random amount in each window.",
        )
    section.table([{"layer": names[layer]} | _row(one) for layer, one in use.items()])
    for words in _dead(use, names):
        section.text(words)


def _words(rows: Int[np.ndarray, " R"], windows: int) -> str:
    """How many windows were looked at, of how many test windows."""
    tests = int((rows < windows).sum())
    if tests < len(rows):
        return f"{windows:,} test windows and {len(rows) - tests:,} earlier ones"
    return f"{tests:,} of {windows:,} test windows" if tests < windows else f"{windows:,} test windows"


def _labels(use: Mapping[str, ExpertUse], series: Sequence[Series]) -> dict[str, dict[str, ByLabel]]:
    """What is known of units: title -> layer -> counts. Only what tells at least two of them apart."""
    found: dict[str, dict[str, ByLabel]] = {}
    frequencies = sorted({str(one.freq) for one in series})
    groups = [frequencies.index(str(one.freq)) for one in series]
    for layer, one in use.items():
        for title, table in one.phase.items():
            found.setdefault(title, {})[layer] = table if _enough(table) else ByLabel.zeros(*table.counts.shape)
        found.setdefault("series", {})[layer] = one.series
        found.setdefault("frequency", {})[layer] = one.series.grouped(groups, len(frequencies))
    return {
        title: tables
        for title, tables in found.items()
        if all((table.counts.sum(1) > 0).sum() > 1 for table in tables.values())
    }


def _enough(table: ByLabel) -> bool:
    """Whether there are so many units at most phases that their experts mean something."""
    units = table.counts.sum(1)
    return bool(units.any()) and float(np.median(units[units > 0])) >= LEAST_UNITS


def _row(use: ExpertUse) -> dict[str, float | int | str]:
    load, positive = use.load, use.load[use.load > 0]
    entropy = float(-(positive * np.log(positive)).sum() / np.log(len(load))) if len(load) > 1 else 1.0
    return {
        "experts": len(load),
        "units per context": len(use.starts),
        "experts per unit": round(use.metrics.experts_per_token, 2),
        "load entropy": round(entropy, 3),
        "largest load over mean": round(float(load.max() * len(load)), 2),
        "router entropy": round(use.metrics.router_entropy, 3),
        "dead experts": len(use.dead),
    }


def _dead(use: Mapping[str, ExpertUse], names: Mapping[str, str]) -> list[str]:
    """Experts that do nothing, or nearly so, in words."""
    words = []
    for layer, one in use.items():
        load = one.load
        idle = [e for e in np.flatnonzero(load < 0.1 / len(load)).tolist() if e not in one.dead]
        found = [
            f"expert{'s' * (len(experts) > 1)} {', '.join(map(str, experts))} {what}"
            for experts, what in ((one.dead, "got nothing"), (idle, "got less than a tenth of an even share"))
            if experts
        ]
        words += [f"{names[layer]}: {'; '.join(found)}."] if found else []
    if not words:
        return ["No expert is dead: every one got at least a tenth of an even share."]
    return words if len(words) <= 12 else [*words[:12], f"And so on in {len(words) - 12} more layers."]


def _maps(page: Page, use: Mapping[str, ExpertUse], names: Mapping[str, str], series: Sequence[Series]) -> None:
    """Heat maps of expert by phase, by frequency, by series."""
    labels = _labels({layer: use[layer] for layer in names}, series)
    section = page.section("What experts see, and when")
    _traits(section, use, names)
    if not labels:
        return
    section.text(
        "How much more (red) or less (blue) of a row's units go to an expert than of all rows together: 0.1 means 10 "
        "more in 100. Pale rows mean that routing ignores what the rows stand for."
    )
    for title, tables in labels.items():
        if title == "series":
            rows = [pictures.short_name(one.id, 24) for one in series]
        elif title == "frequency":
            rows = sorted({str(one.freq) for one in series})
        else:
            rows = list(next(iter(use.values())).phase_names[title])
        _map(section, title, {names[layer]: table for layer, table in tables.items()}, rows)


def _traits(section: Section, use: Mapping[str, ExpertUse], names: Mapping[str, str]) -> None:
    maps = {name: use[layer].traits.table() for layer, name in names.items()}
    told = [row for row in range(len(Traits.NAMES)) if any(values[row].any() for values in maps.values())]
    if not told:
        return
    maps = {name: values[told] for name, values in maps.items()}
    largest = max(LEAST_SHADE, *(float(np.abs(values).max()) for values in maps.values()))
    section.figure(
        figures.heatmaps(maps, [Traits.NAMES[row] for row in told], "", "expert", vmax=largest, signed=True),
        "How the units of an expert differ from all units of the layer, in deviations: their level in the normalised "
        "context, how much they rise (their second half less the first; single points: the step to them), and their "
        "roughness (mean absolute step).",
    )


def _map(section: Section, title: str, tables: Mapping[str, ByLabel], rows: Sequence[str]) -> None:
    maps = {name: shares(table.counts) - shares(table.counts.sum(0, keepdims=True)) for name, table in tables.items()}
    units = next(iter(tables.values())).counts.sum(1)
    keep = np.flatnonzero(units > 0)
    caption = f"Experts by {title}."
    if title == "series" and len(keep) > MOST_ROWS:
        departs = sum(np.abs(deviation).sum(1) for deviation in maps.values())
        caption = f"Experts by series: the {MOST_ROWS} of {len(keep)} that depart most from the average."
        keep = np.sort(keep[np.argsort(-departs[keep], kind="stable")][:MOST_ROWS])
    maps = {name: deviation[keep] for name, deviation in maps.items()}
    largest = max(LEAST_SHADE, *(float(np.abs(deviation).max()) for deviation in maps.values()))
    section.figure(figures.heatmaps(maps, [rows[i] for i in keep], title, "expert", vmax=largest, signed=True), caption)


def _contexts(page: Page, use: Mapping[str, ExpertUse], names: Mapping[str, str], examples: Sequence[Example]) -> None:
    """Which expert worked where in some contexts; of contexts routed as a whole, the experts' weights."""
    along = {layer: name for layer, name in names.items() if not use[layer].whole}
    whole = {layer: name for layer, name in names.items() if use[layer].whole}
    section = page.section("Experts inside single contexts")
    if along:
        for example in _longest(examples):
            section.figure(
                pictures.context_routing(example, use, along),
                f"{example.label}: the context, coloured by the expert with the largest weight, layer by layer; white "
                "where nothing was observed.",
            )
    if whole:
        maps = {name: np.stack([use[layer].weights[one.row] for one in examples]) for layer, name in whole.items()}
        section.figure(
            figures.heatmaps(maps, [one.label for one in examples], "", "expert", vmax=1.0),
            "Weights of the experts for the windows that are shown above.",
        )


def _longest(examples: Sequence[Example], count: int = 2) -> list[Example]:
    """Those with the most observed points in their context: of different series, if possible."""
    order = sorted(examples, key=lambda one: -int(np.isfinite(one.series.y[one.first : one.origin]).sum()))
    chosen = order[:1]
    others = [one for one in order if one.series is not chosen[0].series] or order[1:]
    return chosen + others[: count - 1]


def _load(page: Page, use: Mapping[str, ExpertUse], names: Mapping[str, str], curves: list[dict[str, float]]) -> None:
    section = page.section("Expert load")
    sizes = {len(one.load) for one in use.values()}
    if len(sizes) == 1:
        table = {"share of units": np.stack([one.load for one in use.values()])}
        section.figure(
            figures.heatmaps(table, list(names.values()), "layer", "expert"),
            "Experts by depth, in the contexts that were looked at.",
        )
    layers = {}
    for layer, one in use.items():
        keys = [f"load/{layer}/{e}" for e in range(len(one.load))]
        rows = [row for row in curves if keys[0] in row]
        if rows:
            layers[names[layer]] = (
                [row["step"] for row in rows],
                np.array([[row.get(key, 0.0) for key in keys] for row in rows]),
            )
    if layers:
        section.figure(
            figures.load_over_time(layers), "Share of training units per expert, over the steps of training."
        )
