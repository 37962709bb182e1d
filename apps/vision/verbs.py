"""What each verb of the vision app does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apps import output, training
from apps.runs import BEST, LAST, Runs, load_checkpoint, run_folder
from apps.verbs import Benchmark, Search, Train
from apps.vision.arguments import Evaluate, Export, Predict, Report
from apps.vision.data import VisionData
from apps.vision.evaluation import Evaluation
from apps.vision.evaluation import evaluate as measure
from apps.vision.loading import Trained, load_trained
from apps.vision.settings import VisionConfig
from apps.vision.task import ViMoETask
from moecore.errors import require

Verb = Callable[[VisionConfig, Any, str | None], None]


def _by_model(verb: Verb) -> Verb:
    """A verb of the classifier's, or with `model.name=m3vit` the one of the same name for several tasks."""

    @functools.wraps(verb)
    def chosen(config: VisionConfig, args: Any, source: str | None) -> None:
        if config.model.name == "m3vit":
            from apps.vision.multitask import verbs

            getattr(verbs, verb.__name__)(config, args, source)
        else:
            verb(config, args, source)

    return chosen


@_by_model
def train(config: VisionConfig, args: Train, source: str | None) -> None:
    """Train, test the best checkpoint, write the report."""
    training.prepare_process(config.run)
    runs = Runs(config.run.root, "vision")
    name = config.run.name or (Path(source).stem if source else config.data.dataset)
    resume = runs.checkpoint(args.ckpt_path, name, resume=True) if args.ckpt_path else None
    data = VisionData(config.data, config.run.seed)
    for split in ("val", "test"):
        data.images(split)  # where images are held in memory, unreadable ones are found before training
    task = ViMoETask(config, data.spec)
    if resume:
        training.check_fits(load_checkpoint(resume, "vision")["state_dict"], task, resume)
    folder = run_folder(resume) if resume else training.new_folder(runs, name)
    trainer = training.make_trainer(config.trainer, config.run, config.optim.ema_decay, folder, "val/accuracy", "max")
    if trainer.is_global_zero:
        print(f"run folder: {folder}  (`--ckpt_path last` continues it if it is interrupted)", flush=True)
    training.fit(trainer, task, data, folder, config, resume)
    if trainer.is_global_zero:
        _finish(config, args, folder, data)


def _finish(config: VisionConfig, args: Train, folder: Path, data: VisionData) -> None:
    best = folder / "checkpoints" / BEST
    trained = load_trained(best if best.is_file() else folder / "checkpoints" / LAST)
    data.trainer = None
    evaluation = measure(trained.model, data.test_dataloader(), config.trainer.enable_progress_bar)
    figures = _figures(trained, evaluation, data)
    output.write_json(folder / "test.json", figures)
    output.write_json(args.json, figures)
    output.show("test", figures)
    if config.run.report:
        from apps.vision.report import write_report

        print(f"report: {write_report(trained, evaluation, data, folder / 'report.html')}")


def _figures(trained: Trained, evaluation: Evaluation, data: VisionData) -> dict[str, float]:
    import moecore

    figures = evaluation.scalars() | moecore.count_cost(trained.model, trained.model.example_input()).scalars()
    return figures | {"skipped_images": data.skipped} if data.skipped else figures


@_by_model
def evaluate(config: VisionConfig, args: Evaluate, source: str | None) -> None:
    """Measure on the test images of the configured data."""
    require(not args.conflict, "conflict", True, "a classifier has one task; give a run of model.name=m3vit")
    training.prepare_process(config.run)
    trained = load_trained(Path(args.ckpt_path), config)
    data = VisionData(config.data, config.run.seed, spec=trained.model.images)
    evaluation = measure(trained.model, data.test_dataloader(), config.trainer.enable_progress_bar)
    figures = _figures(trained, evaluation, data)
    output.write_json(args.json, figures)
    output.show(f"test: {trained.path}", figures)


@_by_model
def predict(config: VisionConfig, args: Predict, source: str | None) -> None:
    """Classify a file or a folder of images."""
    from apps.vision.prediction import predict_images

    target = args.output or "predictions.csv"
    require(target.endswith((".csv", ".json")), "output", target, "must end in .csv or .json")
    training.prepare_process(config.run)
    trained = load_trained(Path(args.ckpt_path), config)
    rows, skipped = predict_images(trained.model, Path(args.input), config.data)
    path = output.write_rows(target, rows)
    if len(rows) == 1:
        output.show(rows[0]["file"], {name: value for name, value in rows[0].items() if name != "file"})
    print(f"{len(rows)} prediction(s): {path}" + (f" ({skipped} unreadable images skipped)" if skipped else ""))


@_by_model
def report(config: VisionConfig, args: Report, source: str | None) -> None:
    """Write the report of a trained model."""
    from apps.vision.report import write_report

    require(args.beside is None, "beside", args.beside, "compares tasks; give a run of model.name=m3vit")
    training.prepare_process(config.run)
    trained = load_trained(Path(args.ckpt_path), config)
    data = VisionData(config.data, config.run.seed, spec=trained.model.images)
    evaluation = measure(trained.model, data.test_dataloader(), config.trainer.enable_progress_bar)
    target = Path(args.output) if args.output else run_folder(trained.path) / "report.html"
    print(f"report: {write_report(trained, evaluation, data, target)}")


@_by_model
def export(config: VisionConfig, args: Export, source: str | None) -> None:
    """Write the classifier in a deployable form, compared with PyTorch on test images."""
    from apps import exporting
    from apps.vision.deploy import exportable

    require(args.task is None, "task", args.task, "a classifier has one task; give a run of model.name=m3vit")
    several = args.format not in exporting.SUFFIX
    require(not several, "format", args.format, "is for models of several tasks; give a run of model.name=m3vit")
    training.prepare_process(config.run)
    trained = load_trained(Path(args.ckpt_path), config)
    data = VisionData(config.data, config.run.seed, spec=trained.model.images)
    path = exporting.target(args, trained.path)
    exporting.show(args, path, exporting.write(exportable(trained, data, args.calibration), args, path))


@_by_model
def benchmark(config: VisionConfig, args: Benchmark, source: str | None) -> None:
    """Time the model beside its dense twin."""
    from apps.vision.benchmark import run_benchmark

    training.prepare_process(config.run)
    trained = load_trained(Path(args.ckpt_path), config) if args.ckpt_path else None
    rows = run_benchmark(config, trained, args.batch_sizes, args.rounds)
    output.show_table("benchmark: MoE beside the dense twin of equal active multiply-adds", rows)
    output.write_json(args.json, rows)


@_by_model
def search(config: VisionConfig, args: Search, source: str | None) -> None:
    """Search hyperparameters."""
    from apps.search import run_search

    name = config.run.name or (Path(source).stem if source else config.data.dataset)
    run_search("vision", config, args, "apps.vision.trial:objective", name, direction="maximize")
