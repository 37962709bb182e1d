"""Hyperparameter search with Optuna: resumable, prunable, shared by processes and machines."""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import time
import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import MaxTrialsCallback
from optuna.trial import FrozenTrial, Trial, TrialState

from apps import output, search_settings, training, tree
from apps.cli import make_parser
from apps.errors import ConfigError, UserError
from apps.loading import derive_seed
from apps.runs import Runs
from apps.trial import Report
from apps.verbs import Search
from moecore.files import write_atomic

DONE = (TrialState.COMPLETE, TrialState.PRUNED)
Space = dict[str, dict[str, Any]]
Objective = Callable[[Any, Path, Report], float]
"""(settings, folder of the trial, report) -> value; `report` may end the trial by raising TrialPruned."""


@dataclass(frozen=True)
class Job:
    """All that a worker process needs; plain data."""

    objective: str
    """`module:function`."""
    config: Any
    space: Space
    storage: str
    study: str
    folder: str
    direction: str
    num_trials: int


def run_search(app: str, config: Any, args: Search, objective: str, name: str, direction: str) -> None:
    """Run or continue a study until it has `args.num_trials` finished trials, then show the best.

    Args:
        app: the app's name.
        config: settings that every trial starts from.
        args: space, storage, workers.
        objective: `module:function`, an `Objective`.
        name: for the folder.
        direction: "maximize" or "minimize".

    Raises:
        UserError: the space varies what does nothing, or the study was begun with other settings.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = load_space(args.space or f"configs/{app}/space.yaml", app)
    unused = importlib.import_module(f"apps.{app}").APP.unused
    search_settings.refuse_idle(space, config, unused)
    study_suffix = "" if args.study == Search.study else f"-{args.study}"
    folder = Runs(config.run.root, app).folder / f"search-{name}{study_suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    storage = args.storage or str(folder / "study.log")
    job = Job(objective, config, space, storage, args.study, str(folder), direction, args.num_trials)
    study = _study(job, seed=0)
    remedy = "give another --study" + (" or --run.name" if args.storage is None else "")
    search_settings.remember(study, config, space, unused, remedy)
    finished = len(study.get_trials(deepcopy=False, states=DONE))
    left = max(args.num_trials - finished, 0)
    workers = min(args.workers, max(left, 1))
    print(
        f"study {args.study!r} in {storage}: {finished} trials finished, {left} to go, {workers} worker(s)", flush=True
    )
    shares = [left // workers + (i < left % workers) for i in range(workers)]
    if workers == 1:
        _work(job, shares[0], 0)
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for future in [pool.submit(_work, job, share, i) for i, share in enumerate(shares)]:
                future.result()
    _conclude(study, config, space, folder, args)


def _study(job: Job, seed: int) -> optuna.Study:
    """Open or create the study; several processes may do so at once."""
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    try:
        return optuna.create_study(
            study_name=job.study,
            storage=open_storage(job.storage),
            direction=job.direction,
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
        )
    except Exception as error:  # database drivers raise what they like
        raise UserError(f"storage={job.storage}: cannot be opened ({str(error).splitlines()[0]})") from error


def _machine(job: Job) -> int:
    """A number of this machine, where a storage was given that others may share; else 0."""
    return 0 if Path(job.storage).parent == Path(job.folder) else uuid.getnode()


def open_storage(storage: str) -> str | BaseStorage:
    """A database by its URL, or a journal file by its path."""
    if "://" in storage:
        return storage
    Path(storage).parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(storage))


def _work(job: Job, trials: int, number: int) -> None:
    """Run some trials of the study in this process."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    training.prepare_process(job.config.run)
    module, function = job.objective.split(":")
    objective: Objective = getattr(importlib.import_module(module), function)
    # What a worker proposes depends on the run's seed, on who it is, and on what the study had when it came: alone it
    # repeats exactly, and workers on one study differ.
    present = len(_study(job, seed=0).get_trials(deepcopy=False))
    study = _study(job, seed=derive_seed(job.config.run.seed, present, number, _machine(job)) % 2**31)

    def one(trial: Trial) -> float:
        started = time.process_time()
        value = _run_trial(job, objective, trial)
        print(
            f"trial {trial.number}: {value:.4f} in {time.process_time() - started:.0f} CPU s, {trial.params}",
            flush=True,
        )
        return value

    study.optimize(one, n_trials=trials, callbacks=[MaxTrialsCallback(job.num_trials, states=DONE), _say_pruned])


def _run_trial(job: Job, objective: Objective, trial: Trial) -> float:
    def report(step: int, value: float) -> None:
        trial.report(value, step)
        if trial.should_prune():
            raise optuna.TrialPruned(f"behind the median at step {step}")

    values = suggest(trial, job.space)
    try:
        config = tree.changed(job.config, values)
        value = objective(config, Path(job.folder) / f"trial-{trial.number}", report)
    except (ConfigError, UserError) as error:  # settings that do not work are a result, not the end of the search
        print(f"trial {trial.number}: {error}", flush=True)
        raise optuna.TrialPruned(str(error)) from error
    if not math.isfinite(value):
        raise optuna.TrialPruned("not a number")
    return value


def _say_pruned(study: optuna.Study, trial: FrozenTrial) -> None:
    if trial.state == TrialState.PRUNED:
        print(f"trial {trial.number}: pruned, {trial.params}", flush=True)


def load_space(path: str | Path, app: str) -> Space:
    """Read and check a search space: dotted setting of the app -> distribution.

    A distribution is `{choices: [...]}`, or `{low: a, high: b}` with optional `log: true` and `step: s`; whole
    numbers give whole numbers.
    """
    try:
        space = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"space={path}: cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(space, dict) or not space:
        raise UserError(
            f"space={path}: must map settings such as optim.lr to {{low: ..., high: ...}} or {{choices: [...]}}"
        )
    parser = make_parser(importlib.import_module(f"apps.{app}").APP, "train")
    for name, spec in space.items():
        keys = set(spec) if isinstance(spec, dict) else set()
        if not (keys == {"choices"} or {"low", "high"} <= keys <= {"low", "high", "log", "step"}):
            raise UserError(f"space: {name}: give choices, or low and high (with log or step)")
        ends = [spec.get(end) for end in ("low", "high")]
        if all(isinstance(end, int | float) for end in ends) and ends[0] > ends[1]:
            raise UserError(f"space: {name}: low={spec['low']} is above high={spec['high']}")
        for value in spec.get("choices") or (spec["low"], spec["high"]):
            text = value if isinstance(value, str) else json.dumps(value)
            parser.parse_args([f"--{name}={text}"])  # the setting must exist and take such values
    return space


def suggest(trial: Trial, space: Space) -> dict[str, Any]:
    """A value for every setting of the space."""
    return {name: _value(spec, _suggest(trial, name, spec)) for name, spec in space.items()}


def _suggest(trial: Trial, name: str, spec: dict[str, Any]) -> Any:
    try:
        return _draw(trial, name, spec)
    except ValueError as error:  # a range that is none, or choices that differ from those of the study's other trials
        raise UserError(f"space: {name}: {error} (a changed space may need another --study)") from error


def _draw(trial: Trial, name: str, spec: dict[str, Any]) -> Any:
    if "choices" in spec:
        # Only scalars can be stored as choices; lists and dictionaries go by what they look like.
        return trial.suggest_categorical(name, [c if _is_scalar(c) else str(c) for c in spec["choices"]])
    low, high, log = spec["low"], spec["high"], bool(spec.get("log"))
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, log=log, step=int(spec.get("step", 1)))
    return trial.suggest_float(name, float(low), float(high), log=log, step=spec.get("step"))


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None)))


def _value(spec: dict[str, Any], stored: Any) -> Any:
    """The setting's value from what the study stores."""
    return next((c for c in spec.get("choices", ()) if not _is_scalar(c) and str(c) == stored), stored)


def _conclude(study: optuna.Study, config: Any, space: Space, folder: Path, args: Search) -> None:
    """Show the best trials, and keep all of them and the best settings as files."""
    trials = study.get_trials(deepcopy=False)
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    if not complete:
        raise UserError(f"no trial of study {args.study!r} ended well; {folder} has their folders")
    complete.sort(key=lambda t: t.value, reverse=study.direction == optuna.study.StudyDirection.MAXIMIZE)
    rows = [{"trial": t.number, "value": t.value, **t.params} for t in complete]
    output.show_table(f"best of {len(trials)} trials ({len(complete)} complete)", rows[:10])
    output.write_rows(folder / "trials.csv", [_row(t, space) for t in trials])
    best = tree.changed(
        config, {name: _value(space[name], v) for name, v in complete[0].params.items() if name in space}
    )
    write_atomic(folder / "best.yaml", yaml.safe_dump(tree.plain(best), sort_keys=False))
    print(f"best settings: {folder / 'best.yaml'}  (train -c {folder / 'best.yaml'})")
    output.write_json(args.json, {"trials": len(trials), "complete": len(complete), "best": rows[0]})


def _row(trial: FrozenTrial, space: Space) -> dict[str, Any]:
    seconds = trial.duration.total_seconds() if trial.duration else ""
    row = {"trial": trial.number, "state": trial.state.name, "value": trial.value, "seconds": seconds}
    return row | {name: trial.params.get(name, "") for name in space}
