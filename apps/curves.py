"""A logger that keeps every curve of a run in one CSV file and goes on with it when the run is resumed."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from moecore.files import write_atomic


class CurveLogger(Logger):
    """`metrics.csv`: one row per logged step, one column per metric.

    While training goes on values are appended as they come, so that a step may have several rows and a killed process
    leaves half a row at most; `read_curves` knows. A new metric and the end of training rewrite the file.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.rows: dict[int, dict[str, float]] = {}
        self._columns: list[str] = []
        """Of the file as it is; empty: it is still to be written."""

    @property
    def file(self) -> Path:
        """The CSV file."""
        return self.folder / "metrics.csv"

    @property
    def name(self) -> str:
        """Empty: files go straight into the run folder."""
        return ""

    @property
    def version(self) -> str:
        """Empty: files go straight into the run folder."""
        return ""

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return str(self.folder)

    @property
    @rank_zero_experiment
    def experiment(self) -> CurveLogger:
        """The logger itself."""
        return self

    def continue_from(self, step: int) -> None:
        """Keep what an interrupted run had logged before `step`."""
        self.rows = {int(row["step"]): row | {"step": int(row["step"])} for row in read_curves(self.file)}
        self.rows = {number: row for number, row in self.rows.items() if number < step}

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add values to the row of a step."""
        step = len(self.rows) if step is None else step
        values = {"step": step} | {name: float(value) for name, value in metrics.items()}
        self.rows.setdefault(step, {}).update(values)
        if self._columns and values.keys() <= set(self._columns):
            with open(self.file, "a", newline="") as text:
                self._writer(text).writerow(_cells(values))
        else:
            self._write()

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Settings are in config.yaml."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the whole file at the end, however it comes."""
        if self.rows:
            self._write()

    def _write(self) -> None:
        self._columns = ["step", *sorted({name for row in self.rows.values() for name in row} - {"step"})]
        text = io.StringIO()
        writer = self._writer(text)
        writer.writeheader()
        writer.writerows(_cells(self.rows[step]) for step in sorted(self.rows))
        write_atomic(self.file, text.getvalue())

    def _writer(self, text: TextIO) -> csv.DictWriter:
        return csv.DictWriter(text, self._columns, restval="", lineterminator="\n")


def _cells(values: dict[str, float]) -> dict[str, int | str]:
    return {name: value if name == "step" else f"{value:.7g}" for name, value in values.items()}


def read_curves(file: Path) -> list[dict[str, float]]:
    """Rows of a `metrics.csv` by step, empty cells left out; an empty list if there is no file."""
    if not file.is_file():
        return []
    text = file.read_text()
    whole = io.StringIO(text[: text.rfind("\n") + 1])  # without the row that a kill cut off
    rows: dict[float, dict[str, float]] = {}
    for row in csv.DictReader(whole):
        values = {name: float(value) for name, value in row.items() if value}
        rows.setdefault(values["step"], {}).update(values)
    return [rows[step] for step in sorted(rows)]
