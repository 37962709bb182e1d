"""Moirai-MoE's start: the weights of a dense run, and clusters of what its FFNs see as the router."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from apps.runs import Runs, load_checkpoint
from apps.settings import RunConfig
from apps.timeseries.data import SeriesData
from apps.timeseries.models.base import Windows
from apps.timeseries.models.centroids import initialise_from_dense
from apps.timeseries.models.moirai_moe import MoiraiMoE
from apps.training import check_fits

BATCHES = 64
"""Training batches that centroids are fitted on at most."""


def start_from_run(model: MoiraiMoE, source: str, run: RunConfig, data: SeriesData) -> None:
    """Give a fresh model the weights of a dense run, and centroids fitted on this run's training windows.

    Args:
        model: changed in place.
        source: checkpoint or run folder of the dense run.
        run: where runs are, and the seed.
        data: whose training windows.

    Raises:
        UserError: if there is no such run, or it is of other sizes.
    """
    path = Runs(run.root, "timeseries").checkpoint(source, None)
    state = load_checkpoint(path, "timeseries")["state_dict"]
    weights = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    check_fits(weights, MoiraiMoE(model.config, dense=True), path)
    initialise_from_dense(model, weights, _some_batches(data, run.seed), run.seed)


def _some_batches(data: SeriesData, seed: int) -> Iterator[Windows]:
    windows, size = data.train_set, data.config.batch_size
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    for part in order.split(size)[:BATCHES]:
        yield windows.__getitems__([(0, int(i)) for i in part])
