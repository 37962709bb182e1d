"""What each verb of the timeseries app does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from apps import output, training
from apps.callbacks import CheckpointFiles
from apps.errors import UserError
from apps.runs import BEST, LAST, Runs, load_checkpoint, load_plain, run_folder
from apps.timeseries.arguments import Benchmark, Evaluate, Export, Predict
from apps.timeseries.cost import forecast_cost
from apps.timeseries.data import SeriesData
from apps.timeseries.evaluation import Evaluation, calibrate_on_validation
from apps.timeseries.evaluation import evaluate as measure
from apps.timeseries.loading import Trained, load_trained, load_untrained
from apps.timeseries.models.build import FAMILIES
from apps.timeseries.routing import example
from apps.timeseries.settings import TimeseriesConfig
from apps.timeseries.task import ForecastTask
from apps.verbs import Report, Search, Train

MOST_ROWS = 20
"""Rows of a table that are worth printing."""


def train(config: TimeseriesConfig, args: Train, source: str | None) -> None:
    """Train, calibrate intervals, test the best checkpoint, write the report."""
    training.prepare_process(config.run)
    runs = Runs(config.run.root, "timeseries")
    name = run_name(config, source)
    resume = runs.checkpoint(args.ckpt_path, name, resume=True) if args.ckpt_path else None
    data = make_data(config)
    task = ForecastTask(config, data.spec)
    if not any(p.requires_grad for p in task.model.parameters()):
        raise UserError(f"model.name={config.model.name}: learns nothing; `evaluate` measures it without training")
    if resume:
        training.check_fits(load_checkpoint(resume, "timeseries")["state_dict"], task, resume)
    else:
        data.check()
        task.prepare(data)
    folder = run_folder(resume) if resume else training.new_folder(runs, name)
    trainer = training.make_trainer(config.trainer, config.run, config.optim.ema_decay, folder, "val/mae", "min")
    if trainer.is_global_zero:
        _note_covariates(task)
        print(f"run folder: {folder}  (`--ckpt_path last` continues it if it is interrupted)", flush=True)
    training.fit(trainer, task, data, folder, config, resume)
    if trainer.is_global_zero:
        _finish(config, args, folder, data)


def _note_covariates(task: ForecastTask) -> None:
    unused = [] if task.model.covariates else [*task.spec.futr, *task.spec.hist, *task.spec.stat]
    if unused:
        print(
            f"note: {task.config.model.name} looks at no covariates ({', '.join(unused)}); moirai_moe does", flush=True
        )


def run_name(config: TimeseriesConfig, source: str | None) -> str:
    """Name of a run: as configured, of the configuration file, or of the data."""
    return config.run.name or Path(source or config.data.source).stem


def make_data(config: TimeseriesConfig) -> SeriesData:
    """The data, with as much future in training windows as the model learns from."""
    family = FAMILIES[config.model.name]
    future = family.future(config.model, config.data.horizon)
    return SeriesData(config.data, config.run.seed, future, family.packs)


def _finish(config: TimeseriesConfig, args: Train, folder: Path, data: SeriesData) -> None:
    checkpoints = folder / "checkpoints"
    path = next(file for file in (checkpoints / BEST, checkpoints / LAST) if file.is_file())
    trained = calibrated(load_trained(path), data)
    data.trainer = None
    evaluation = _measure(trained, data)
    _write(evaluation, trained, data, folder / "test.json", args.json)
    _show("test", evaluation)
    if config.run.report:
        from apps.timeseries.report import write_report

        print(f"report: {write_report(trained, evaluation, data, folder / 'report.html')}")


def calibrated(trained: Trained, data: SeriesData) -> Trained:
    """The model with intervals from its validation windows, kept in its checkpoint from now on."""
    intervals = calibrate_on_validation(trained.model, data)
    if intervals is not None:
        checkpoint = load_plain(trained.path) | {"intervals": intervals.plain()}
        CheckpointFiles().save_checkpoint(checkpoint, trained.path)
    return Trained(trained.model, trained.config, trained.spec, trained.path, intervals)


def _with_intervals(trained: Trained, data: SeriesData) -> Trained:
    """With intervals of this data's validation windows, where the checkpoint has none or those of other data.

    A checkpoint from within training and published weights have none; errors on other series say little of these.
    """
    if trained.intervals is not None:
        source = load_plain(trained.path)["config"]["data"]["source"]
        if source == data.config.source:
            return trained
        print(f"intervals: calibrated anew on the validation windows of {data.config.source}", flush=True)
    return dataclasses.replace(trained, intervals=calibrate_on_validation(trained.model, data))


def _measure(trained: Trained, data: SeriesData) -> Evaluation:
    show = trained.config.trainer.enable_progress_bar
    return measure(trained.title, trained.model, data, trained.intervals, show)


def _write(evaluation: Evaluation, trained: Trained, data: SeriesData, *paths: str | Path | None) -> None:
    figures: dict[str, Any] = evaluation.scalars()
    figures |= forecast_cost(trained.model, example(data), trained.spec.horizon).scalars()
    figures["details"] = evaluation.details()
    for path in paths:
        output.write_json(path, figures)


def _show(title: str, evaluation: Evaluation) -> None:
    output.show_table(title, evaluation.rows())
    averages = {name: value for name, value in evaluation.scalars().items() if name.startswith("average/")}
    if averages:
        output.show("average over horizons", averages)
    rows = next(iter(evaluation.horizons.values())).series_rows("mase")
    if 1 < len(rows) <= MOST_ROWS:
        output.show_table("mase per series", rows)


def evaluate(config: TimeseriesConfig, args: Evaluate, source: str | None) -> None:
    """Measure on the test windows of the configured data."""
    training.prepare_process(config.run)
    trained = load_trained(Path(args.ckpt_path), config) if args.ckpt_path else load_untrained(config)
    data = make_data(config)
    trained = _with_intervals(trained, data)
    evaluation = _measure(trained, data)
    _write(evaluation, trained, data, args.json)
    _show(f"test: {trained.path or trained.title}", evaluation)


def predict(config: TimeseriesConfig, args: Predict, source: str | None) -> None:
    """Forecast what comes after the end of every series of a file."""
    from apps.timeseries.forecaster import Forecaster
    from apps.timeseries.prediction import forecast_frame, write_frame

    training.prepare_process(config.run)
    trained = load_trained(Path(args.ckpt_path), config) if args.ckpt_path else load_untrained(config)
    forecaster = Forecaster(trained)
    levels = tuple(sorted(args.quantiles))
    if args.horizon is None and trained.path is None:
        raise UserError("horizon: is required with weights that were not trained here")
    series = forecaster.read(args.input, args.future)
    forecasts = forecaster.forecast(series, args.horizon, levels)
    path = write_frame(forecast_frame(trained.title, forecasts, levels), args.output)
    print(f"{len(forecasts)} series, {len(forecasts[0].mean)} points each: {path}")
    if args.plots:
        from apps.timeseries.pictures import plot_forecasts

        print(f"pictures: {plot_forecasts(trained.title, forecasts, levels, Path(args.plots))}")


def report(config: TimeseriesConfig, args: Report, source: str | None) -> None:
    """Write the report of a trained model."""
    from apps.timeseries.report import write_report

    training.prepare_process(config.run)
    trained = load_trained(Path(args.ckpt_path), config)
    data = make_data(config)
    trained = _with_intervals(trained, data)
    target = Path(args.output) if args.output else run_folder(trained.path) / "report.html"
    print(f"report: {write_report(trained, _measure(trained, data), data, target)}")


def export(config: TimeseriesConfig, args: Export, source: str | None) -> None:
    """Write the model in a deployable form, compared with PyTorch on test windows."""
    from apps import exporting
    from apps.timeseries.deploy import exportables

    training.prepare_process(config.run)
    trained = load_trained(Path(args.ckpt_path), config)
    path, onnx = exporting.target(args, trained.path), args.format in exporting.ONNX
    found = exportables(trained, make_data(config), args.calibration, device=not onnx)
    exporting.show(args, path, exporting.write(found, args, path))


def benchmark(config: TimeseriesConfig, args: Benchmark, source: str | None) -> None:
    """Time the model beside its dense twin."""
    from apps.timeseries.benchmark import run_benchmark

    training.prepare_process(config.run)
    trained = load_trained(Path(args.ckpt_path), config) if args.ckpt_path else None
    rows = run_benchmark(config, trained, args.batch_sizes, args.rounds)
    output.show_table("benchmark: MoE beside the dense twin of equal active multiply-adds", rows)
    output.write_json(args.json, rows)


def search(config: TimeseriesConfig, args: Search, source: str | None) -> None:
    """Search hyperparameters."""
    from apps.search import run_search

    name = run_name(config, source)
    run_search("timeseries", config, args, "apps.timeseries.trial:objective", name, direction="minimize")
