"""What anyone would try first, on the same encoded rows: popularity, logistic regression, gradient boosting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from apps.recsys.batch import Batch, InputSpec
from apps.recsys.losses import task_losses
from apps.recsys.models.features import FeatureEncoder
from apps.recsys.train_settings import LossConfig

Probabilities = Float[np.ndarray, "N T"]
Baseline = Callable[[Batch, Batch, InputSpec], Probabilities]
"""(training rows, test rows, spec) -> probabilities of the test rows."""
MOST_ROWS = 500_000
"""Training rows that gradient boosting is given at most, evenly spaced."""


def popularity(train: Batch, test: Batch, spec: InputSpec, item: str | None = None) -> Probabilities:
    """The item's rate of positives in training, smoothed by 20 rows at the mean rate.

    Args:
        train: rows to count.
        test: rows to score.
        spec: of both.
        item: sparse feature of the item; None: the mean rate for all.
    """
    labels = train.labels.numpy()
    column = next((i for i, one in enumerate(spec.sparse) if one.name == item), None)
    ids, wanted = (np.zeros(len(b), np.int64) if column is None else b.sparse[:, column].numpy() for b in (train, test))
    rows = int(max(ids.max(initial=0), wanted.max(initial=0))) + 1
    scores = np.empty((len(test), labels.shape[1]))
    for task in range(labels.shape[1]):
        inside = ~np.isnan(labels[:, task])
        mean = labels[inside, task].mean() if inside.any() else 0.5
        ones = np.bincount(ids[inside], labels[inside, task], rows)
        scores[:, task] = ((ones + 20 * mean) / (np.bincount(ids[inside], minlength=rows) + 20))[wanted]
    return scores


class _Logistic(nn.Module):
    """A weight per id, and one per encoded number."""

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        tasks = len(spec.tasks)
        tables = tuple(dataclasses.replace(table, dim=tasks) for table in spec.tables)
        sequences = tuple(dataclasses.replace(one, pooling="mean", target=None) for one in spec.sequences)
        dense = tuple(dataclasses.replace(one, dim=tasks) for one in spec.dense)
        self.encoder = FeatureEncoder(dataclasses.replace(spec, tables=tables, sequences=sequences, dense=dense))
        numbers = {one.name for one in spec.dense if one.encode != "bins"}
        slots = self.encoder.slots
        self.numbers = [i for slot in slots if slot.name in numbers for i in range(slot.start, slot.stop)]
        rest = [i for slot in slots if slot.name not in numbers for i in range(slot.start, slot.stop)]
        self.ids, self.tasks = rest, tasks
        self.weight = nn.Parameter(torch.zeros(len(self.numbers), tasks))
        self.bias = nn.Parameter(torch.zeros(tasks))
        for weight in self.encoder.tables.weights.values():
            nn.init.zeros_(weight)

    def forward(self, batch: Batch) -> torch.Tensor:
        flat = self.encoder(batch).features
        return flat[:, self.ids].unflatten(1, (-1, self.tasks)).sum(1) + flat[:, self.numbers] @ self.weight + self.bias


def logistic_regression(train: Batch, test: Batch, spec: InputSpec, passes: int = 3, seed: int = 0) -> Probabilities:
    """Logistic regression on ids and encoded numbers, all tasks at once.

    Args:
        train: rows to learn from.
        test: rows to score.
        spec: of both.
        passes: over the training rows.
        seed: of their order.
    """
    marginal = dataclasses.replace(spec, tasks=tuple(dataclasses.replace(task, given=None) for task in spec.tasks))
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = _Logistic(marginal)
        with torch.no_grad():
            rates = train.labels.nanmean(0).nan_to_num(0.5)
            model.bias.copy_(rates.clamp(1e-4, 1 - 1e-4).logit())
        size = max(64, min(2048, len(train) // 50))
        steps = passes * max(1, len(train) // size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
        for _ in range(passes):
            for rows in torch.randperm(len(train)).split(size)[: max(1, len(train) // size)]:
                batch = train[rows]
                optimizer.zero_grad()
                task_losses(model(batch), batch.labels, marginal.tasks, LossConfig()).sum().backward()
                optimizer.step()
                schedule.step()
    with torch.no_grad():
        parts = [model(test[i : i + 8192]).sigmoid() for i in range(0, len(test), 8192)]
    return torch.cat(parts).numpy()


def gradient_boosting(train: Batch, test: Batch, spec: InputSpec, seed: int = 0) -> Probabilities:
    """scikit-learn's histogram gradient boosting, a model per task; ids are taken as numbers.

    Args:
        train: rows to learn from, `MOST_ROWS` at most.
        test: rows to score.
        spec: of both.
        seed: of its early stopping.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    train = train[torch.arange(0, len(train), max(1, -(-len(train) // MOST_ROWS)))]
    x, wanted = (_columns(batch) for batch in (train, test))
    labels = train.labels.numpy()
    scores = np.empty((len(test), len(spec.tasks)))
    for task in range(len(spec.tasks)):
        inside = ~np.isnan(labels[:, task])
        y = labels[inside, task]
        if len(np.unique(y)) < 2:
            scores[:, task] = y.mean() if len(y) else 0.5
            continue
        seen = ~np.isnan(x[inside]).all(0)  # scikit-learn fails at a column without a value
        if not seen.any():
            scores[:, task] = y.mean()
            continue
        model = HistGradientBoostingClassifier(random_state=seed).fit(x[inside][:, seen], y)
        scores[:, task] = model.predict_proba(wanted[:, seen])[:, 1]
    return scores


def _columns(batch: Batch) -> Float[np.ndarray, "N C"]:
    lengths = [(ids != 0).sum(1, keepdim=True).numpy() for ids in batch.sequences.values()]
    return np.concatenate([batch.sparse.numpy(), batch.dense.numpy(), *lengths], 1).astype(np.float32)
