"""What each verb of the rl app does with `method=t2mir`."""

from __future__ import annotations

from pathlib import Path

from apps import output, training
from apps.rl.arguments import Benchmark, Evaluate, Export, Predict, Report
from apps.rl.envs.make import spec_of
from apps.rl.incontext.data import InContextData
from apps.rl.incontext.evaluation import evaluate_in_context, load_in_context, refuse_other_tasks
from apps.rl.incontext.pictures import film
from apps.rl.incontext.task import InContextTask
from apps.rl.loading import refuse_other_run
from apps.rl.settings import RLConfig
from apps.rl.video import write_video
from apps.runs import BEST, LAST, Runs, load_checkpoint, run_folder
from moecore.errors import require

PICTURES = 6
"""Held-out tasks of which pictures are kept."""


def train_once(config: RLConfig, ckpt_path: str | None, name: str) -> dict[str, object]:
    """Collect histories that are missing, train, evaluate the best checkpoint, write video and report."""
    training.prepare_process(config.run)
    runs = Runs(config.run.root, "rl")
    resume = runs.checkpoint(ckpt_path, name, resume=True) if ckpt_path else None
    spec = spec_of(config.env)
    if resume:
        checkpoint = load_checkpoint(resume, "rl")
        refuse_other_run(checkpoint, config)
        refuse_other_tasks(checkpoint, config)
    data = InContextData(config, spec)
    task = InContextTask(config, spec)
    task.prepare(data)
    if resume:
        training.check_fits(checkpoint["state_dict"], task, resume)
    folder = run_folder(resume) if resume else training.new_folder(runs, name)
    print(f"run folder: {folder}  (`--ckpt_path last` continues it if it is interrupted)", flush=True)
    trainer = training.make_trainer(config.loop, config.run, None, folder, "val/return", "max")
    training.fit(trainer, task, data, folder, config, resume)
    return _finish(config, folder)


def _finish(config: RLConfig, folder: Path) -> dict[str, object]:
    checkpoints = folder / "checkpoints"
    trained = load_in_context(next(file for file in (checkpoints / BEST, checkpoints / LAST) if file.is_file()))
    evaluation = evaluate_in_context(trained, PICTURES)
    output.write_json(folder / "test.json", evaluation.scalars())
    output.show_table("mean return by episode, weights fixed", evaluation.rows())
    output.show("held-out tasks", evaluation.scalars())
    print(f"video: {write_video(folder / 'video.gif', film(evaluation, trained.spec.tasks))}")
    if config.run.report:
        from apps.rl.incontext.report import write_report

        print(f"report: {write_report(trained, evaluation, folder / 'report.html')}")
    return evaluation.scalars()


def evaluate(config: RLConfig, args: Evaluate, source: str | None) -> None:
    """Episodes in tasks held out."""
    require(not args.conflict, "conflict", args.conflict, "is measured for method=mentor alone")
    training.prepare_process(config.run)
    trained = load_in_context(Path(args.ckpt_path), config)
    evaluation = evaluate_in_context(trained, PICTURES if args.video else 0, args.episodes)
    output.write_json(args.json, evaluation.scalars())
    output.show_table(f"mean return by episode, weights fixed: {trained.path}", evaluation.rows())
    output.show("held-out tasks", evaluation.scalars())
    if args.video:
        print(f"video: {write_video(args.video, film(evaluation, trained.spec.tasks))}")


def predict(config: RLConfig, args: Predict, source: str | None) -> None:
    """Write every step of episodes in the tasks held out."""
    from apps.rl.incontext.prediction import write_lives

    training.prepare_process(config.run)
    print(write_lives(load_in_context(Path(args.ckpt_path), config), args))


def report(config: RLConfig, args: Report, source: str | None) -> None:
    """Write the report of a trained agent."""
    require(args.curves is None, "curves", args.curves, "these agents' are in metrics.csv of their run folders")
    from apps.rl.incontext.report import write_report

    training.prepare_process(config.run)
    trained = load_in_context(Path(args.ckpt_path), config)
    target = Path(args.output) if args.output else run_folder(trained.path) / "report.html"
    print(f"report: {write_report(trained, evaluate_in_context(trained, PICTURES), target)}")


def export(config: RLConfig, args: Export, source: str | None) -> None:
    """Write the transformer in a deployable form; an ONNX file also acts, in episodes of its own."""
    from apps import exporting
    from apps.rl.incontext.deploy import exportable

    training.prepare_process(config.run)
    trained = load_in_context(Path(args.ckpt_path), config)
    path, runtime = exporting.target(args, trained.path, "policy"), args.format in exporting.ONNX
    figures = exporting.write(exportable(trained, args.calibration, fixed=not runtime), args, path)
    exporting.show(args, path, figures)


def benchmark(config: RLConfig, args: Benchmark, source: str | None) -> None:
    """Time training steps and actions beside a dense transformer."""
    from apps.rl.incontext.benchmark import run_benchmark

    training.prepare_process(config.run)
    rows = run_benchmark(config, args)
    output.show_table("benchmark", rows)
    output.write_json(args.json, rows)
