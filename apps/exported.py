"""What was exported of a run, as a section of its report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from apps.output import short
from apps.report import Page
from export.notes import NOTES

TIMES = {
    "export": "this file",
    "dense_equal": "dense model of equal active multiply-adds",
    "all_experts": "with all experts",
    "torch": "PyTorch",
}


def exported_files(page: Page, folder: Path) -> None:
    """Add the files that `export` wrote into a run folder, with what was measured of them; nothing if there is none.

    Args:
        page: of the report.
        folder: of the run.
    """
    notes = folder / NOTES
    if not notes.exists():
        return
    files = {name: one for name, one in json.loads(notes.read_text()).items() if (folder / name).exists()}
    if not files:
        return
    section = page.section("Exported files")
    section.text(
        "Each compared with PyTorch on real inputs. Times are medians of calls of one row, CPU time of one thread, all "
        "forms in turn."
    )
    section.table([_row(name, figures) for name, figures in files.items()])
    timed = {name: figures for name, figures in files.items() if "export_ms_p50" in figures}
    if timed:
        section.figure(_times(timed), "Milliseconds per call, beside PyTorch and other graphs of the same model")


def _row(name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """A file's line; shares in percent."""
    row: dict[str, Any] = {"file": name, "experts": figures.get("experts", "")}
    row["size"] = f"{short(figures['file_bytes'])}B" if "file_bytes" in figures else ""
    row["largest error / range"] = figures.get("max_relative_error", "")
    for key, title in (("decision_agreement", "decisions kept"), ("routing_agreement", "experts kept")):
        row[title] = f"{figures[key]:.2%}" if key in figures else ""
    before = next((key for key in figures if key.endswith("_torch")), None)
    row["task's figure"] = ""
    if before:
        name, after = before.removesuffix("_torch"), before.replace("_torch", "_export")
        row["task's figure"] = f"{name}: {figures[before]:.4g} to {figures[after]:.4g}"
    row["ms"] = figures.get("export_ms_p50", "")
    return row


def _times(files: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(7.5, 0.6 + 0.55 * len(files)))
    axes = figure.add_subplot()
    shown = [form for form in TIMES if any(f"{form}_ms_p50" in figures for figures in files.values())]
    height = 0.8 / len(shown)
    for i, form in enumerate(shown):
        places = [place + i * height for place in range(len(files))]
        axes.barh(places, [one.get(f"{form}_ms_p50", 0.0) for one in files.values()], height, label=TIMES[form])
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(files))], list(files))
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.legend(fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    return figure
