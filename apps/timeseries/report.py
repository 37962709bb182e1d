"""The report of a forecaster: errors beside baselines, forecasts beside the truth, and what its experts handle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import moecore
from apps import figures
from apps.curves import read_curves
from apps.exported import exported_files
from apps.output import short
from apps.report import Page
from apps.runs import run_folder
from apps.timeseries import pictures
from apps.timeseries.cost import forecast_cost
from apps.timeseries.data import SeriesData
from apps.timeseries.evaluation import Evaluation, Horizon
from apps.timeseries.examples import choose_examples
from apps.timeseries.loading import Trained
from apps.timeseries.pictures import Example
from apps.timeseries.report_experts import add_experts
from apps.timeseries.routing import affordable, example, sampled

MOST_SERIES = 30
"""Rows of the table of series."""
FORECAST_MACS = 12e9
"""Multiply-adds to spend on finding windows to show."""
BY_STEP = ("mse", "mae", "crps", "coverage_80")
"""Measures drawn over the steps of the horizon."""
TITLES = {
    "mse": "MSE",
    "mae": "MAE",
    "mase": "MASE",
    "smape": "sMAPE",
    "crps": "CRPS, normalised",
    "coverage_80": "coverage of the 80% interval",
}


def write_report(trained: Trained, evaluation: Evaluation, data: SeriesData, path: Path) -> Path:
    """Write the page.

    Args:
        trained: the model; curves come from the folder it was trained in.
        evaluation: of its test windows.
        data: whose test windows are shown.
        path: of the file.
    """
    first = next(iter(evaluation.horizons.values()))
    cost = forecast_cost(trained.model, example(data, first.windows.horizon), first.windows.horizon)
    curves = read_curves(run_folder(trained.path) / "metrics.csv") if trained.path else []
    page = Page(
        title=f"{run_folder(trained.path).name}: {trained.title}" if trained.path else trained.title,
        subtitle=_subtitle(trained, data, first),
        key_figures=_key_figures(evaluation, first, cost),
    )
    _accuracy(page, evaluation, first)
    _learning(page, curves)
    rows = sampled(len(first.windows), affordable(cost.macs, FORECAST_MACS, least=9, most=400), len(first.windows))
    scales = data.store.naive_errors(data.config.season)
    examples = choose_examples(trained, first.windows, rows, scales)
    _forecasts(page, trained, examples, len(rows), len(first.windows))
    _errors(page, evaluation)
    _series(page, evaluation, first)
    add_experts(page, trained.model, first.windows, example(data, first.windows.horizon), examples, curves)
    _all_figures(page, evaluation, cost)
    if trained.path:
        exported_files(page, run_folder(trained.path))
    return page.write(path)


def _subtitle(trained: Trained, data: SeriesData, first: Horizon) -> str:
    count = len(data.store.series)
    words = f"{count} series, " if count > 1 else "1 series, "
    words += f"{data.config.context} points of context, {len(first.windows):,} test windows"
    return f"{trained.path}, {words}" if trained.path else words


def _key_figures(evaluation: Evaluation, first: Horizon, cost: moecore.Cost) -> dict[str, str]:
    overall = first.sums[evaluation.model].overall()
    horizon = first.windows.horizon
    found = {f"test {_title(name)}, {_steps(horizon)}": _number(overall[name]) for name in ("mse", "mae", "mase")}
    if "crps" in overall:
        found["normalised CRPS"] = _number(overall["crps"])
        found["of the truth inside the 80% interval"] = f"{overall['coverage_80']:.0%}"
    return found | {
        "parameters held": short(cost.total_params),
        "parameters a token uses": short(cost.active_params),
        "multiply-adds per forecast": short(cost.macs),
        "windows per second": short(evaluation.windows_per_second),
    }


def _title(measure: str) -> str:
    return TITLES.get(measure, measure)


def _steps(horizon: int) -> str:
    return "1 step" if horizon == 1 else f"{horizon} steps"


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "n/a"


def _accuracy(page: Page, evaluation: Evaluation, first: Horizon) -> None:
    section = page.section("Accuracy")
    section.text(_comparison(evaluation.model, first))
    section.text(
        "Errors are in deviations of each series' training points unless data.scale=none. MASE: in units of the "
        "seasonal naive forecast's error within the training points; CRPS: mean weighted quantile loss; coverage: "
        "share of the truth inside the interval that should hold 80%."
    )
    section.table([{_title(k): _cell(v) for k, v in row.items()} for row in evaluation.rows()])


def _comparison(model: str, first: Horizon) -> str:
    """The model beside each baseline, in words."""
    errors = {name: sums.overall()["mae"] for name, sums in first.sums.items()}
    own = errors.pop(model)
    phrases = []
    for name, other in errors.items():
        if math.isfinite(other) and other > 0 and math.isfinite(own):
            change = own / other - 1
            size = f"{abs(change):.1%}"
            how = "the same as" if size == "0.0%" else f"{size} {'above' if change > 0 else 'below'} that"
            phrases.append(f"{how} of {name} ({other:.3g})")
    words = f"At {_steps(first.windows.horizon)} the mean absolute error is {_number(own)}"
    return words + (": " + ", and ".join(phrases) if phrases else "") + "."


def _cell(value: float | str) -> float | str:
    return "n/a" if isinstance(value, float) and not math.isfinite(value) else value


def _learning(page: Page, curves: list[dict[str, float]]) -> None:
    def line(metric: str):
        points = [(row["step"], row[metric]) for row in curves if metric in row]
        return tuple(zip(*points, strict=True)) if any(value for _, value in points) else None

    wanted = {
        "training loss": {"loss": "train/loss"},
        "balance loss": {"balance loss": "train/balance_loss"},
        "validation error": {"MSE": "val/mse", "MAE": "val/mae"},
        "learning rate": {"learning rate": "train/lr"},
    }
    panels = {title: {n: line(m) for n, m in names.items() if line(m)} for title, names in wanted.items()}
    panels = {title: lines for title, lines in panels.items() if lines}
    section = page.section("Learning curves")
    if panels:
        section.figure(
            figures.curves(panels),
            "Training is logged per step, in the model's own loss; validation, per epoch or oftener, at the horizon.",
        )
    else:
        section.text("No curves: metrics.csv is not beside the checkpoint.")


def _forecasts(page: Page, trained: Trained, examples: list[Example], looked_at: int, windows: int) -> None:
    section = page.section("Forecasts beside the truth")
    of = f"{looked_at:,} of {windows:,} test windows" if looked_at < windows else f"{windows:,} test windows"
    intervals = " Shaded: the 40% and 80% intervals." if examples and examples[0].quantiles is not None else ""
    section.figure(
        pictures.forecasts(examples, trained.title),
        f"The best, the median and the worst of {of}, by MASE, of different series where there are several; in each "
        f"series' own units, behind a part of the context.{intervals}",
    )
    parts = [one for one in examples if one.components][:3]
    if parts:
        section.figure(
            pictures.components(parts, trained.title),
            "What the forecast above is the sum of; the level of the series is in "
            f"{'trend' if 'trend' in parts[0].components else next(iter(parts[0].components))}.",
        )


def _errors(page: Page, evaluation: Evaluation) -> None:
    last = evaluation.horizons[max(evaluation.horizons)]
    steps = {name: sums.per_step() for name, sums in last.sums.items()}
    measures = {
        _title(key): {n: values[key] for n, values in steps.items() if key in values and np.isfinite(values[key]).any()}
        for key in BY_STEP
    }
    over = f"Over {len(last.windows):,} test windows of {_steps(last.windows.horizon)}."
    if last.windows.horizon > 1:
        shown = {title: lines for title, lines in measures.items() if lines}
        page.section("Error by step of the horizon").figure(pictures.by_step(shown), over)
    sums = {name: one for name, one in last.sums.items() if one.levels}
    if sums:
        section = page.section("Calibration")
        section.figure(
            pictures.calibration({n: one.calibration() for n, one in sums.items()}, next(iter(sums.values())).levels),
            f"{over} How much of the truth lies below each quantile. Above the diagonal: quantiles are too high; "
            "steeper than the diagonal in the middle: intervals are too wide.",
        )


def _series(page: Page, evaluation: Evaluation, first: Horizon) -> None:
    windows = first.windows
    if len(windows.store.series) == 1:
        return
    counts = np.bincount(windows.index[:, 0], minlength=len(windows.store.series))
    per_series = {name: sums.per_series() for name, sums in first.sums.items()}
    own = per_series[evaluation.model]
    key = own["mase"] if np.isfinite(own["mase"]).any() else own["mae"]
    order = [int(i) for i in np.argsort(-np.nan_to_num(key, nan=-1)) if counts[i]]
    section = page.section("Error per series")
    if len(order) > MOST_SERIES:
        section.text(f"The {MOST_SERIES} series with the largest errors, of {len(order)}.")
    rows = []
    for i in order[:MOST_SERIES]:
        row: dict[str, object] = {
            "series": pictures.short_name(windows.store.series[i].id, 40),
            "windows": int(counts[i]),
        }
        row |= {_title(m): _cell(float(own[m][i])) for m in ("mse", "mae", "crps", "mase") if m in own}
        row |= {f"{n} MASE": _cell(float(v["mase"][i])) for n, v in per_series.items() if n != evaluation.model}
        rows.append(row)
    section.table(rows)


def _all_figures(page: Page, evaluation: Evaluation, cost: moecore.Cost) -> None:
    values: Mapping[str, float] = {k: v for k, v in evaluation.scalars().items() if k.count("/") < 2} | cost.scalars()
    page.section("All figures").table([{"figure": name, "value": _cell(value)} for name, value in values.items()])
