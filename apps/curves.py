"""A logger that keeps every curve of a run in one CSV file and goes on with it when the run is resumed."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from moecore.files import write_atomic


class CurveLogger(Logger):
    """`metrics.csv`: one row per logged step, one column per metric, always a whole file.

    Args:
        folder: of the run.
        every: rows between writes.
    """

    def __init__(self, folder: Path, every: int = 20) -> None:
        super().__init__()
        self.folder, self.every = Path(folder), every
        self.rows: dict[int, dict[str, float]] = {}
        self._unsaved = 0

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
        self.rows = {int(row["step"]): row for row in read_curves(self.file) if row["step"] < step}

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add values to the row of a step."""
        step = len(self.rows) if step is None else step
        self.rows.setdefault(step, {"step": step}).update({k: float(v) for k, v in metrics.items()})
        self._unsaved += 1
        if self._unsaved >= self.every:
            self.save()

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Settings are in config.yaml."""

    @rank_zero_only
    def save(self) -> None:
        """Write the file."""
        if not self.rows:
            return
        columns = sorted({name for row in self.rows.values() for name in row} - {"step"})
        text = io.StringIO()
        writer = csv.DictWriter(text, ["step", *columns], restval="", lineterminator="\n")
        writer.writeheader()
        for step in sorted(self.rows):
            row = self.rows[step]
            writer.writerow({name: step if name == "step" else f"{value:.7g}" for name, value in row.items()})
        write_atomic(self.file, text.getvalue())
        self._unsaved = 0

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the file at the end, however it comes."""
        self.save()


def read_curves(file: Path) -> list[dict[str, float]]:
    """Rows of a `metrics.csv`, empty cells left out; an empty list if there is no file."""
    if not file.is_file():
        return []
    with open(file, newline="") as text:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(text)]
