"""What each verb of the recsys app does."""

from __future__ import annotations

import math
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from apps import output, training
from apps.recsys.arguments import Benchmark, Evaluate, Export, Predict
from apps.recsys.data import RecsysData
from apps.recsys.evaluation import Evaluation, defined
from apps.recsys.evaluation import evaluate as measure
from apps.recsys.loading import Trained, load_trained
from apps.recsys.settings import RecsysConfig
from apps.recsys.task import RankTask
from apps.runs import BEST, LAST, Runs, load_checkpoint, run_folder
from apps.verbs import Report, Search, Train
from moecore.files import write_atomic


def train(config: RecsysConfig, args: Train, source: str | None) -> None:
    """Train, test the best checkpoint, write the report."""
    training.prepare_process(config.run)
    runs = Runs(config.run.root, "recsys")
    name = run_name(config, source)
    resume = runs.checkpoint(args.ckpt_path, name, resume=True) if args.ckpt_path else None
    data = RecsysData(config.data, config.run.seed)
    data.check()
    task = RankTask(config, data.transform)
    if resume:
        training.check_fits(load_checkpoint(resume, "recsys")["state_dict"], task, resume)
    folder = run_folder(resume) if resume else training.new_folder(runs, name)
    if rank_zero_only.rank == 0:
        write_atomic(folder / "schema.yaml", data.schema.yaml())
    trainer = training.make_trainer(config.trainer, config.run, config.optim.ema_decay, folder, "val/auc", "max")
    if trainer.is_global_zero:
        print(f"run folder: {folder}  (`--ckpt_path last` continues it if it is interrupted)", flush=True)
    training.fit(trainer, task, data, folder, config, resume)
    if trainer.is_global_zero:
        _finish(config, args, folder, data)


def run_name(config: RecsysConfig, source: str | None) -> str:
    """Name of a run: as configured, of the configuration file, or of the data."""
    return config.run.name or Path(source or config.data.source).stem


def _finish(config: RecsysConfig, args: Train, folder: Path, data: RecsysData) -> None:
    checkpoints = folder / "checkpoints"
    path = next(file for file in (checkpoints / BEST, checkpoints / LAST) if file.is_file())
    trained = load_trained(path)
    data.trainer = None
    evaluation = measure(trained, data)
    for target in (folder / "test.json", args.json):
        output.write_json(target, evaluation.scalars())
    _show("test", evaluation)
    if config.run.report:
        from apps.recsys.report import write_report

        print(f"report: {write_report(trained, evaluation, data, folder / 'report.html')}")


def _show(title: str, evaluation: Evaluation) -> None:
    output.show_table(title, evaluation.rows())
    for task in evaluation.undefined():
        print(f"note: {task} has one class among the test rows; its AUC is undefined")
    means = {name: evaluation.mean(name) for name in evaluation.figures}
    output.show("mean AUC over tasks", {name: defined(value) for name, value in means.items()})
    best = means.get("best possible", math.nan)
    if not math.isnan(best + means[evaluation.model]):
        reached = (means[evaluation.model] - 0.5) / (best - 0.5)
        print(f"  {evaluation.model} is {reached:.0%} of the way from chance to the best possible")


def evaluate(config: RecsysConfig, args: Evaluate, source: str | None) -> None:
    """Measure on the test rows of the configured log."""
    training.prepare_process(config.run)
    trained = load_trained(Path(args.ckpt_path), config)
    evaluation = measure(trained, _data(config, trained), args.boosting)
    output.write_json(args.json, evaluation.scalars())
    _show(f"test: {trained.path}", evaluation)


def _data(config: RecsysConfig, trained: Trained) -> RecsysData:
    return RecsysData(config.data, config.run.seed, trained.transform)


def predict(config: RecsysConfig, args: Predict, source: str | None) -> None:
    """Score rows, or rank candidates for users."""
    from apps.recsys.prediction import predict_file

    training.prepare_process(config.run)
    print(predict_file(load_trained(Path(args.ckpt_path), config), args))


def report(config: RecsysConfig, args: Report, source: str | None) -> None:
    """Write the report of a trained model."""
    from apps.recsys.report import write_report

    training.prepare_process(config.run)
    trained = load_trained(Path(args.ckpt_path), config)
    data = _data(config, trained)
    target = Path(args.output) if args.output else run_folder(trained.path) / "report.html"
    print(f"report: {write_report(trained, measure(trained, data), data, target)}")


def export(config: RecsysConfig, args: Export, source: str | None) -> None:
    """Write the model in a deployable form; for devices also what their host computes, as ONNX."""
    from apps import exporting
    from apps.recsys.deploy import exportable, for_device, host_features, metadata_of

    training.prepare_process(config.run)
    trained = load_trained(Path(args.ckpt_path), config)
    path, vectors = exporting.target(args, trained.path), args.format in ("qonnx", "hls4ml")
    one = exportable(trained, _data(config, trained), args.calibration)
    if args.format in exporting.ONNX:
        figures = exporting.write(one, args, path)
    else:
        from export.onnx import save

        figures = exporting.write(for_device(one, trained, vectors), args, path)
        host = path.with_name(f"{path.name.removesuffix('.onnx')}.host.onnx")
        print(f"host: {save(host_features(one, trained, vectors), host, metadata_of(trained))}")
    exporting.show(args, path, figures)


def benchmark(config: RecsysConfig, args: Benchmark, source: str | None) -> None:
    """Time training and ranking beside the dense twin."""
    from apps.recsys.benchmark import run_benchmark

    training.prepare_process(config.run)
    rows = run_benchmark(config, args)
    output.show_table("benchmark: samples per CPU second of a training step, milliseconds of a call", rows)
    output.write_json(args.json, rows)


def search(config: RecsysConfig, args: Search, source: str | None) -> None:
    """Search hyperparameters."""
    from apps.search import run_search

    run_search("recsys", config, args, "apps.recsys.trial:objective", run_name(config, source), direction="maximize")
