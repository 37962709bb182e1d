"""Measuring a ranking model on test rows, always beside what anyone would try first."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from apps.progress import track
from apps.recsys.baselines import gradient_boosting, logistic_regression, popularity
from apps.recsys.batch import MISSING, Batch, concat
from apps.recsys.data import RecsysData
from apps.recsys.loading import Trained
from apps.recsys.metrics import task_metrics

SHOWN = ("auc", "gauc", "log_loss", "ece", "ndcg_10")
"""Figures that are worth a column."""
MOST_TRAINING_ROWS = 2_000_000
"""Rows that baselines are fitted on at most, where the log is streamed."""


@dataclass
class Evaluation:
    """Scores and labels of the test rows, and the figures of every contender."""

    model: str
    tasks: tuple[str, ...]
    labels: Float[np.ndarray, "N T"]
    scores: dict[str, Float[np.ndarray, "N T"]]
    """Contender -> probabilities; the first is the model."""
    user: Int[np.ndarray, " N"] | None
    short_history: Bool[np.ndarray, " N"] | None
    """Rows of users with less history than the median row has; None where the log has no histories."""
    rows_per_second: float
    """Of the model; CPU time if on a CPU."""
    figures: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Contender -> task -> measure -> value."""

    def __post_init__(self) -> None:
        for name, scores in self.scores.items():
            self.figures[name] = {task: self._task(scores, i) for i, task in enumerate(self.tasks)}

    def _task(self, scores: Float[np.ndarray, "N T"], i: int) -> dict[str, float]:
        figures = task_metrics(scores[:, i], self.labels[:, i], self.user)
        if self.short_history is not None:
            for name, rows in (("short", self.short_history), ("long", ~self.short_history)):
                user = None if self.user is None else self.user[rows]
                part = task_metrics(scores[rows, i], self.labels[rows, i], user)
                figures |= {
                    f"{measure}_{name}_history": part[measure] for measure in ("auc", "gauc") if measure in part
                }
        return figures

    def mean(self, name: str, measure: str = "auc") -> float:
        """Over the tasks where it is defined."""
        values = [figures[measure] for figures in self.figures[name].values() if not math.isnan(figures[measure])]
        return sum(values) / len(values) if values else math.nan

    def rows(self) -> list[dict[str, float | str]]:
        """A table row per task and contender."""
        found = []
        for task in self.tasks:
            for name, figures in self.figures.items():
                shown = {m: figures[task][m] for m in SHOWN if m in figures[task]}
                found.append({"task": task, "model": name} | {m: defined(v) for m, v in shown.items()})
        return found

    def scalars(self) -> dict[str, float]:
        """Figures by flat name, `<task>/<measure>` for the model and `<task>/<contender>/<measure>` for others."""
        figures: dict[str, float] = {}
        for name, tasks in self.figures.items():
            for task, measures in tasks.items():
                prefix = f"{task}/" if name == self.model else f"{task}/{name}/"
                figures |= {f"{prefix}{measure}": value for measure, value in measures.items()}
        figures |= {"mean_auc" if n == self.model else f"{n}/mean_auc": self.mean(n) for n in self.figures}
        return figures | {"rows_per_second": self.rows_per_second}

    def undefined(self) -> list[str]:
        """Tasks of one class among the test rows, whose AUC is undefined."""
        return [task for task in self.tasks if math.isnan(self.figures[self.model][task]["auc"])]


def defined(value: float) -> float | str:
    """The value, or the word for what it is where there is none."""
    return "undefined" if math.isnan(value) else value


def evaluate(trained: Trained, data: RecsysData, boosting: bool = True, part: str = "test") -> Evaluation:
    """Score every row of a part with the model and the baselines.

    Args:
        trained: the model.
        data: the log, encoded by the model's transform.
        boosting: fit gradient boosting too.
        part: "val" or "test".
    """
    trained.model.eval()
    batches = data.batches(part)
    started, scores, kept = time.process_time(), [], []
    for index in track(range(len(batches)), "scoring", trained.config.trainer.enable_progress_bar):
        batch = batches[(0, index)]
        scores.append(trained.score(batch))
        kept.append(batch)
    seconds = time.process_time() - started
    test = concat(kept)
    contenders = {trained.title: np.concatenate(scores)} | _baselines(trained, data, test, boosting)
    bayes = data.bayes(part)
    if bayes is not None:
        contenders["best possible"] = bayes
    user = None if test.user is None else test.user.numpy()
    names = tuple(task.name for task in trained.spec.tasks)
    rate = len(test) / max(seconds, 1e-9)
    return Evaluation(trained.title, names, test.labels.numpy(), contenders, user, _short_history(trained, test), rate)


def _baselines(trained: Trained, data: RecsysData, test: Batch, boosting: bool) -> dict[str, np.ndarray]:
    train, spec = _training(data), trained.spec
    item = _item(trained)
    found: dict[str, np.ndarray] = {"popularity": popularity(train, test, spec, item)} if item else {}
    fits: Iterable[tuple[str, Callable[..., np.ndarray]]] = (
        ("logistic regression", logistic_regression),
        *((("gradient boosting", gradient_boosting),) if boosting else ()),
    )
    for name, fit in fits:
        found[name] = fit(train, test, spec)
    return found


def _training(data: RecsysData) -> Batch:
    """Training rows that baselines are fitted on: all, or evenly spaced batches of a streamed log."""
    batches = data.batches("train")
    every = max(1, -(-len(batches) * batches.batch_size // MOST_TRAINING_ROWS))
    return concat([batches[(0, i)] for i in range(0, len(batches), every)])


def _item(trained: Trained) -> str | None:
    schema = trained.transform.schema
    return next(
        (n for n in schema.named("sparse") if schema.item is not None and schema.column(n) == schema.item), None
    )


def _short_history(trained: Trained, test: Batch) -> Bool[np.ndarray, " N"] | None:
    name = next((one.name for one in trained.spec.sequences if one.target is not None), None)
    if name is None:
        return None
    lengths = (test.sequences[name] != MISSING).sum(1)
    return (lengths < torch.median(lengths)).numpy()
