"""What each verb of the rl app does."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from apps import output, training
from apps.rl.arguments import Benchmark, Evaluate, Export, Predict, Report, Train
from apps.rl.conflict import measure_conflict
from apps.rl.data import RLData
from apps.rl.envs.make import has_time_limit, spec_of
from apps.rl.evaluation import Evaluation, iqm
from apps.rl.evaluation import evaluate as measure
from apps.rl.history import evaluations
from apps.rl.loading import load_trained, refuse_other_run
from apps.rl.settings import RLConfig
from apps.rl.task import RLTask
from apps.rl.video import write_video
from apps.runs import BEST, LAST, Runs, load_checkpoint, run_folder
from apps.verbs import Search

Verb = Callable[[RLConfig, Any, str | None], None]


def _by_method(verb: Verb) -> Verb:
    """A verb of MENTOR's, or with `method=t2mir` the one of the same name of the in-context agents."""

    @functools.wraps(verb)
    def chosen(config: RLConfig, args: Any, source: str | None) -> None:
        if config.method == "t2mir":
            from apps.rl.incontext import verbs

            getattr(verbs, verb.__name__)(config, args, source)
        else:
            verb(config, args, source)

    return chosen


def train(config: RLConfig, args: Train, source: str | None) -> None:
    """Train, evaluate the best checkpoint, write video and report; with `seeds`, once for each."""
    if not args.seeds:
        output.write_json(args.json, _train_once(config, args.ckpt_path, source))
        return
    found = {}
    for seed in args.seeds:
        run = dataclasses.replace(config.run, seed=seed, name=f"{run_name(config, source)}-seed{seed}")
        print(f"\nseed {seed}", flush=True)
        found[seed] = _train_once(dataclasses.replace(config, run=run), None, source)
    returns = [figures["return_mean"] for figures in found.values()]
    total = {"return_mean": float(np.mean(returns)), "return_std": float(np.std(returns)), "return_iqm": iqm(returns)}
    output.show_table("seeds", [{"seed": seed, "return_mean": one["return_mean"]} for seed, one in found.items()])
    output.show(f"over {len(found)} seeds", total)
    output.write_json(args.json, total | {f"seed_{seed}": one for seed, one in found.items()})


def _train_once(config: RLConfig, ckpt_path: str | None, source: str | None) -> dict[str, object]:
    if config.method == "t2mir":
        from apps.rl.incontext.verbs import train_once

        return train_once(config, ckpt_path, run_name(config, source))
    training.prepare_process(config.run)
    runs = Runs(config.run.root, "rl")
    name = run_name(config, source)
    resume = runs.checkpoint(ckpt_path, name, resume=True) if ckpt_path else None
    spec = spec_of(config.env)
    task = RLTask(config, spec)
    if resume:
        checkpoint = load_checkpoint(resume, "rl")
        refuse_other_run(checkpoint, config)
        training.check_fits(checkpoint["state_dict"], task, resume)
    folder = run_folder(resume) if resume else training.new_folder(runs, name)
    print(f"run folder: {folder}  (`--ckpt_path last` continues it if it is interrupted)", flush=True)
    if not has_time_limit(config.env):
        print(
            f"note: env.id={config.env.id} has no time limit: if episodes may never end, set env.max_steps", flush=True
        )
    data = RLData(config, spec, task.model, folder / "replay")
    trainer = training.make_trainer(config.loop, config.run, None, folder, "val/return", "max")
    training.fit(trainer, task, data, folder, config, resume)
    return _finish(config, folder)


def run_name(config: RLConfig, source: str | None) -> str:
    """Name of a run: as configured, of the configuration file, or of the environment."""
    return config.run.name or (Path(source).stem if source else config.env.id.replace("/", "-").replace(":", "-"))


def _finish(config: RLConfig, folder: Path) -> dict[str, object]:
    checkpoints = folder / "checkpoints"
    path = next(file for file in (checkpoints / BEST, checkpoints / LAST) if file.is_file())
    trained = load_trained(path)
    evaluation = measure(trained, config.collect.eval_episodes, pictures=2)
    output.write_json(folder / "test.json", evaluation.scalars())
    output.show_table("evaluation", evaluation.rows())
    _video(evaluation, folder / "video.gif")
    if config.run.report:
        from apps.rl.report import write_report

        print(f"report: {write_report(trained, evaluation, folder / 'report.html')}")
    return evaluation.scalars()


def _video(evaluation: Evaluation, path: str | Path) -> None:
    frames = [frame for trace in evaluation.rollouts[evaluation.agent].traces for frame in trace.frames]
    if frames:
        print(f"video: {write_video(path, frames)}")


@_by_method
def evaluate(config: RLConfig, args: Evaluate, source: str | None) -> None:
    """Run evaluation episodes."""
    training.prepare_process(config.run)
    trained = load_trained(Path(args.ckpt_path), config)
    evaluation = measure(trained, args.episodes or 10, pictures=3 if args.video else 0)
    conflict = measure_conflict(trained).scalars() if args.conflict else {}
    output.write_json(args.json, evaluation.scalars() | conflict)
    output.show_table(f"evaluation: {trained.path}", evaluation.rows())
    if conflict:
        output.show("cosines of the actor's gradients", conflict)
    if args.video:
        _video(evaluation, args.video)


@_by_method
def predict(config: RLConfig, args: Predict, source: str | None) -> None:
    """Run episodes and write every step."""
    from apps.rl.prediction import write_episodes

    training.prepare_process(config.run)
    trained = load_trained(Path(args.ckpt_path), config)
    print(write_episodes(trained, args))


@_by_method
def report(config: RLConfig, args: Report, source: str | None) -> None:
    """Write the report of a trained agent."""
    from apps.rl.report import write_report

    training.prepare_process(config.run)
    trained = load_trained(Path(args.ckpt_path), config)
    target = Path(args.output) if args.output else run_folder(trained.path) / "report.html"
    evaluation = measure(trained, config.collect.eval_episodes, pictures=2)
    print(f"report: {write_report(trained, evaluation, target)}")
    if args.curves:
        rows = evaluations(run_folder(trained.path).parent, trained.spec.id)
        print(f"curves of {len({row['run'] for row in rows})} runs: {output.write_rows(args.curves, rows)}")


@_by_method
def export(config: RLConfig, args: Export, source: str | None) -> None:
    """Write the deterministic policy in a deployable form; an ONNX file also acts, in episodes of its own."""
    from apps import exporting
    from apps.rl.deploy import exportable

    training.prepare_process(config.run)
    trained = load_trained(Path(args.ckpt_path), config)
    path = exporting.target(args, trained.path, "policy")
    exporting.show(args, path, exporting.write(exportable(trained, args.calibration), args, path))


@_by_method
def benchmark(config: RLConfig, args: Benchmark, source: str | None) -> None:
    """Time environment, acting, sampling and updates."""
    from apps.rl.benchmark import run_benchmark

    training.prepare_process(config.run)
    rows = run_benchmark(config, args)
    output.show_table("benchmark", rows)
    output.write_json(args.json, rows)


def search(config: RLConfig, args: Search, source: str | None) -> None:
    """Search hyperparameters."""
    from apps.search import run_search

    if config.method == "t2mir" and not args.space:
        args = dataclasses.replace(args, space="configs/rl/space_t2mir.yaml")
    run_search("rl", config, args, "apps.rl.trial:objective", run_name(config, source), direction="maximize")
