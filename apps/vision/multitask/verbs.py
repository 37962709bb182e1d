"""What each verb does with several tasks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import moecore
from apps import output, training
from apps.errors import UserError
from apps.runs import BEST, LAST, Runs, run_folder
from apps.verbs import Benchmark, Search, Train
from apps.vision.arguments import Evaluate, Export, Predict, Report
from apps.vision.multitask.data import MultiTaskData
from apps.vision.multitask.evaluation import Evaluation, against_baselines
from apps.vision.multitask.evaluation import evaluate as measure
from apps.vision.multitask.loading import Trained, load_run, load_trained, refuse_other_run
from apps.vision.multitask.task import M3ViTTask
from apps.vision.settings import VisionConfig


def train(config: VisionConfig, args: Train, source: str | None) -> None:
    """Train, test the best checkpoint, write the report."""
    training.prepare_process(config.run)
    runs = Runs(config.run.root, "vision")
    name = run_name(config, source)
    resume = runs.checkpoint(args.ckpt_path, name, resume=True) if args.ckpt_path else None
    checkpoint = load_run(resume) if resume else None
    if checkpoint:
        refuse_other_run(checkpoint, config, resume)
    data = MultiTaskData(config.data, config.tasks.names, config.run.seed)
    data.images("train")  # what is wrong with the data is found before a folder is made
    task = M3ViTTask(config, data.spec)
    if checkpoint:
        training.check_fits(checkpoint["state_dict"], task, resume)
    folder = run_folder(resume) if resume else training.new_folder(runs, name)
    trainer = training.make_trainer(config.trainer, config.run, config.optim.ema_decay, folder, "val/loss", "min")
    if trainer.is_global_zero:
        print(f"run folder: {folder}  (`--ckpt_path last` continues it if it is interrupted)")
        print(f"tasks: {', '.join(data.spec.names)}", flush=True)
    training.fit(trainer, task, data, folder, config, resume)
    if trainer.is_global_zero:
        _finish(config, args, folder, data)


def run_name(config: VisionConfig, source: str | None) -> str:
    """Name of a run: as configured, of the configuration file, or of the data set."""
    return config.run.name or (Path(source).stem if source else config.data.dataset)


def _finish(config: VisionConfig, args: Train, folder: Path, data: MultiTaskData) -> None:
    best = folder / "checkpoints" / BEST
    trained = load_trained(best if best.is_file() else folder / "checkpoints" / LAST)
    data.trainer = None
    evaluation = measure(trained.model, data.test_dataloader(), config.trainer.enable_progress_bar)
    figures = _figures(trained, evaluation)
    output.write_json(folder / "test.json", figures)
    output.write_json(args.json, figures)
    output.show("test", figures)
    if config.run.report:
        from apps.vision.multitask.report import write_report

        print(f"report: {write_report(trained, evaluation, data, folder / 'report.html')}")


def _figures(trained: Trained, evaluation: Evaluation) -> dict[str, Any]:
    model = trained.model
    figures = evaluation.scalars() | moecore.count_cost(model, model.example_input()).scalars()
    return figures | against_baselines(evaluation.figures, trained.config.tasks.baselines, model.spec.names)


def _loaded(config: VisionConfig, ckpt_path: str) -> tuple[Trained, MultiTaskData]:
    training.prepare_process(config.run)
    trained = load_trained(Path(ckpt_path), config)
    spec = trained.model.spec
    return trained, MultiTaskData(config.data, spec.names, config.run.seed, spec=spec)


def evaluate(config: VisionConfig, args: Evaluate, source: str | None) -> None:
    """Measure on the test images of the configured data."""
    trained, data = _loaded(config, args.ckpt_path)
    evaluation = measure(trained.model, data.test_dataloader(), config.trainer.enable_progress_bar)
    figures = _figures(trained, evaluation)
    if args.conflict:
        from apps.vision.multitask.conflict_runs import conflict_of, save_conflict

        conflict = conflict_of(trained, data, args.conflict_batches, config.trainer.enable_progress_bar)
        figures |= conflict.scalars()
        print(f"conflict: {save_conflict(conflict, run_folder(trained.path))}")
    output.write_json(args.json, figures)
    output.show(f"test: {trained.path}", figures)


def predict(config: VisionConfig, args: Predict, source: str | None) -> None:
    """Write the maps of every task for a file or a folder of images."""
    from apps.vision.multitask.prediction import predict_images

    training.prepare_process(config.run)
    trained = load_trained(Path(args.ckpt_path), config)
    print(predict_images(trained.model, Path(args.input), Path(args.output or "predictions"), config.data))


def report(config: VisionConfig, args: Report, source: str | None) -> None:
    """Write the report of a trained model."""
    from apps.vision.multitask.report import write_report

    trained, data = _loaded(config, args.ckpt_path)
    evaluation = measure(trained.model, data.test_dataloader(), config.trainer.enable_progress_bar)
    own = "report" if trained.model.slice is None else trained.path.stem  # beside that of the whole run
    target = Path(args.output) if args.output else run_folder(trained.path) / f"{own}.html"
    beside = None if args.beside is None else Path(args.beside)
    print(f"report: {write_report(trained, evaluation, data, target, beside)}")


def export(config: VisionConfig, args: Export, source: str | None) -> None:
    """Write the model, or a model for one task, compared with the whole model on test images."""
    from apps import exporting
    from apps.vision.multitask.deploy import export_task, exportable

    trained, data = _loaded(config, args.ckpt_path)
    if args.format == "task":
        path = Path(args.output) if args.output else run_folder(trained.path) / f"{args.task}.ckpt"
        if trained.model.slice is None and path.parent.name == "checkpoints":
            raise UserError(f"output={path}: is where whole runs are kept; give another file")
        exporting.check_place(path, folder=False)
        figures = export_task(trained, data, path, args)
    elif args.format == "edge-moe":
        from apps.vision.multitask.deploy_edge_moe import export_edge_moe

        path = Path(args.output) if args.output else run_folder(trained.path) / "model.edge-moe"
        exporting.check_place(path, folder=True)
        figures = export_edge_moe(trained, data, path, args, args.rescale)
    else:
        path = exporting.target(args, trained.path, args.task or "model")
        figures = exporting.write(exportable(trained, data, args), args, path)
    exporting.show(args, path, figures)


def benchmark(config: VisionConfig, args: Benchmark, source: str | None) -> None:
    """Time all tasks and one task, whole and cut out, beside the dense twin."""
    from apps.vision.multitask.benchmark import run_benchmark

    training.prepare_process(config.run)
    trained = load_trained(Path(args.ckpt_path), config) if args.ckpt_path else None
    rows = run_benchmark(config, trained, args.batch_sizes, args.rounds)
    output.show_table("benchmark: all tasks, one task, and the model cut out for it", rows)
    output.write_json(args.json, rows)


def search(config: VisionConfig, args: Search, source: str | None) -> None:
    """Search hyperparameters."""
    from apps.search import run_search

    if not args.space:
        args = dataclasses.replace(args, space="configs/vision/space_m3vit.yaml")
    name = run_name(config, source)
    run_search("vision", config, args, "apps.vision.multitask.trial:objective", name, direction="minimize")
