"""Series by the settings: the embedded ones, a data set of the catalogue, or the user's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from apps.errors import UserError
from apps.timeseries.embedded import embedded_series
from apps.timeseries.frames import Columns, read_series
from apps.timeseries.series import Series
from apps.timeseries.settings import DataConfig

CATALOGUE = {
    "ETTh1": ("ett/ETTh1.csv", "ett_hour"),
    "ETTh2": ("ett/ETTh2.csv", "ett_hour"),
    "ETTm1": ("ett/ETTm1.csv", "ett_minute"),
    "ETTm2": ("ett/ETTm2.csv", "ett_minute"),
    "weather": ("weather/weather.csv", "ratio"),
    "electricity": ("electricity/electricity.csv", "ratio"),
    "traffic": ("traffic/traffic.csv", "ratio"),
}
"""Benchmarks of `datasets/catalog.yaml`: file below `data.root`, and the split their literature uses."""
FETCH = Path(__file__).parents[2] / "datasets" / "fetch.py"


def columns(config: DataConfig) -> Columns:
    """Which columns of a long table mean what."""
    return Columns(
        config.id_column,
        config.time_column,
        config.target_column,
        config.futr_columns,
        config.hist_columns,
        config.stat_columns,
    )


def load_series(config: DataConfig) -> list[Series]:
    """The configured series; those without a single value are left out.

    Raises:
        UserError: if there is nothing to read, or it cannot be read.
    """
    if config.source == "statsmodels":
        series = embedded_series()
    elif config.source in CATALOGUE:
        series = read_series(_catalogue_file(config), columns(config), config.freq)
    else:
        path = Path(config.source)
        if not path.exists():
            known = ", ".join(["statsmodels", *CATALOGUE])
            raise UserError(f"data.source={config.source}: no such file or folder, and none of {known}")
        series = read_series(path, columns(config), config.freq, config.on_duplicates)
    return series


def default_split(config: DataConfig) -> str:
    """The split that "auto" means."""
    if config.split != "auto":
        return config.split
    return CATALOGUE[config.source][1] if config.source in CATALOGUE else "tail"


def _catalogue_file(config: DataConfig) -> Path:
    """Where a data set of the catalogue is, plain or gzipped; downloaded if it is not there."""
    plain = Path(config.root) / CATALOGUE[config.source][0]
    for file in (plain, plain.with_suffix(".csv.gz"), Path(config.root) / plain.name):
        if file.is_file():
            return file
    command = [sys.executable, str(FETCH), config.source.lower(), "--root", config.root]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode or not plain.is_file():
        lines = done.stderr.strip().splitlines()
        why = lines[-1].removeprefix("error: ") if lines else "the download failed"
        raise UserError(f"data.source={config.source}: {why}; put the file at {plain}, or give another --data.root")
    return plain
