"""Settings of the timeseries app. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from apps.settings import OptimConfig, RunConfig, TrainerConfig
from apps.timeseries.model_settings import ModelConfig
from moecore.errors import require


@dataclass
class DataConfig:
    """Series, how they are split, and the windows cut from them."""

    source: str = "statsmodels"
    """statsmodels (real series that come with that library), a data set of the catalogue (ETTh1, ETTh2, ETTm1, ETTm2,
    weather, electricity, traffic), or your file or folder: CSV (comma, semicolon or tab; also .gz, .bz2, .xz, .zip)
    or Parquet, long (unique_id, ds, y) or wide (a column per series)."""
    root: str = "data"
    """Folder of the catalogue's data sets; what is missing is downloaded."""
    id_column: str = "unique_id"
    """Long tables: column that names the series."""
    time_column: str = "ds"
    """Long tables: column of timestamps, or of whole numbers."""
    target_column: str = "y"
    """Long tables: column of values."""
    futr_columns: tuple[str, ...] = ()
    """Covariates known in the future too (holidays, prices). Of the models, moirai_moe looks at covariates."""
    hist_columns: tuple[str, ...] = ()
    """Covariates known only in the past; moirai_moe looks at them."""
    stat_columns: tuple[str, ...] = ()
    """Numbers that never change within a series; moirai_moe looks at them."""
    freq: str | None = None
    """Step of the series: a pandas frequency (h, 15min, D, W, MS, ...) or a whole number; null: found per series."""
    on_duplicates: Literal["raise", "mean", "last"] = "raise"
    """Several values at one timestamp stop the run, are averaged, or the last one counts."""
    season: int | None = None
    """Season length in points, for seasonal naive and MASE; null: by frequency (24 for hours, 12 for months)."""
    context: int = 96
    """Points a model sees (lookback)."""
    horizon: int = 24
    """Points to forecast: in training where the model takes it, in validation, and by default in tests."""
    test_horizons: tuple[int, ...] = ()
    """Horizons to test, one table row each; none: `horizon`."""
    split: Literal["auto", "tail", "ratio", "ett_hour", "ett_minute"] = "auto"
    """tail: the last windows of every series are for testing, those before for validation; ratio: 70, 10 and 20
    percent of the points; ett_hour, ett_minute: 12, 4 and 4 months of 30 days; auto: by the catalogue, or tail."""
    test_windows: int = 2
    """tail: horizons at the end of every series that are for testing, where its length allows; as many before them are
    for validation."""
    scale: Literal["standard", "none"] = "standard"
    """Measure errors in deviations of each series' training points (as benchmarks do), or in its own units."""
    min_context: int | None = None
    """Least observed points a training window starts from; null: all of the context, or half a horizon in series too
    short for that."""
    min_future: int | None = None
    """Least points of the horizon that a training window shows: with fewer than all of them the last windows before the
    border, the most recent ones, are learned from too. null: all, where the series allows."""
    stride: int = 1
    """Points between training windows."""
    val_stride: int = 1
    """Points between validation windows."""
    batch_size: int = 64
    """Windows per training step."""
    eval_batch_size: int = 256
    """Windows per step of validation and testing."""
    corpora: dict[str, float] = field(default_factory=dict)
    """Pretrain on these, in these shares, instead of the source's windows: synthetic, train (the training parts of the
    source), statsmodels, or paths of corpora (.jsonl, .json, .npy, a folder with meta.json) and of series files."""
    corpus_length: int = 512
    """Pretraining: points per sequence; short series are packed into one where the model keeps them apart."""
    corpus_size: int | None = None
    """Pretraining: sequences per epoch; null: as many as there are."""
    synthetic_series: int = 2000
    """Pretraining: number of synthetic series to draw, each of twice `corpus_length` points."""

    def __post_init__(self) -> None:
        for name in ("context", "horizon", "test_windows", "stride", "val_stride", "batch_size", "eval_batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        tests = self.test_horizons
        require(all(h >= 1 for h in tests), "test_horizons", tests, "must be positive numbers")
        require(self.season is None or self.season >= 1, "season", self.season, "must be at least 1, or null")
        least = self.min_future
        require(least is None or least >= 1, "min_future", least, "must be at least 1, or null")
        least = self.min_context
        good = least is None or 1 <= least <= self.context
        require(good, "min_context", least, f"must lie between 1 and context={self.context}, or be null")
        require(all(share > 0 for share in self.corpora.values()), "corpora", self.corpora, "shares must be positive")
        require(self.corpus_length >= 16, "corpus_length", self.corpus_length, "must be at least 16")
        size = self.corpus_size
        require(size is None or size >= 1, "corpus_size", size, "must be at least 1, or null")
        require(self.synthetic_series >= 1, "synthetic_series", self.synthetic_series, "must be at least 1")

    @property
    def horizons(self) -> tuple[int, ...]:
        """Horizons that are tested."""
        return self.test_horizons or (self.horizon,)


@dataclass
class TimeseriesConfig:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Training loop."""
    run: RunConfig = field(default_factory=RunConfig)
    """Run folder and repeatability."""

    def __post_init__(self) -> None:
        precision = self.trainer.precision
        mixed = precision in ("auto", "32", "32-true") or precision.endswith("mixed")
        require(mixed, "trainer.precision", precision, "series are float32; use 32-true, bf16-mixed or 16-mixed")
