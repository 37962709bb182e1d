"""Throughput of training and latency of ranking, beside the dense twin and, if installed, torch-rechub."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from apps.errors import UserError
from apps.recsys.arguments import Benchmark
from apps.recsys.batch import Batch, InputSpec
from apps.recsys.data import RecsysData
from apps.recsys.loading import load_trained
from apps.recsys.losses import task_losses
from apps.recsys.models.build import FAMILIES, Ranker
from apps.recsys.optimizers import make_optimizer
from apps.recsys.settings import RecsysConfig
from apps.recsys.task import trainable_model
from apps.timing import interleaved

STEPS, CALLS = 12, 20
"""Training steps and ranking calls in a round."""
Step = Callable[[], None]


def run_benchmark(config: RecsysConfig, args: Benchmark) -> list[dict[str, Any]]:
    """One row per contender: samples per CPU second of training, milliseconds of a ranking call.

    A training step is what training does: cut a batch, forward, loss, backward, optimiser. Calls are of batches that
    are encoded already. Rounds are interleaved; medians over them, and the 99th percentile of calls.

    Args:
        config: model and data.
        args: a trained model, batch sizes (the first ranks, the last trains), rounds, peers. With peers, ours has fresh
            weights and takes what they can: tables of one width, standardised numbers, no sequences.

    Raises:
        UserError: peers asked for and not installed.
    """
    trained = None if args.ckpt_path is None else load_trained(Path(args.ckpt_path), config)
    data = RecsysData(config.data, config.run.seed, None if trained is None else trained.transform)
    spec = _plain(data.spec, config.data.embed_dim) if args.peers else data.spec
    family = FAMILIES[config.model.name]
    models = {family.title: trained.model if trained and not args.peers else trainable_model(config, spec)}
    if family.experts and not config.model.dense:
        twin = dataclasses.replace(config, model=dataclasses.replace(config.model, dense=True))
        models["dense twin"] = trainable_model(twin, spec)
    ranked, size = args.batch_sizes[0], args.batch_sizes[-1]
    trains = {name: _training(model, data, config, size) for name, model in models.items()}
    some = data.encoded("train")[: max(args.batch_sizes)]
    calls = {name: _ranking(model, some[:ranked]) for name, model in models.items()}
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    if args.peers:
        trains_of, calls_of, count = _peers(config, data, size, ranked)
        trains, calls, parameters = trains | trains_of, calls | calls_of, parameters | count
    rates = interleaved(trains, args.rounds, STEPS)
    spent = interleaved(calls, args.rounds, CALLS)
    first = next(iter(trains))
    return [
        {
            "model": name,
            "batch": size,
            "samples_per_cpu_s": size / statistics.median(rates[name]),
            "to_first": statistics.median(rates[first]) / statistics.median(rates[name]),
            "ranked_rows": ranked,
            "call_p50_ms": statistics.median(spent[name]) * 1e3 if name in spent else None,
            "call_p99_ms": sorted(spent[name])[int(0.99 * len(spent[name]))] * 1e3 if name in spent else None,
            "parameters": parameters[name],
        }
        for name in trains
    ]


def _plain(spec: InputSpec, dim: int) -> InputSpec:
    """What peers can take: every table of one width, numbers standardised, no sequences."""
    tables = tuple(dataclasses.replace(table, dim=dim) for table in spec.tables)
    dense = tuple(dataclasses.replace(one, encode="standard") for one in spec.dense)
    return dataclasses.replace(spec, tables=tables, dense=dense, sequences=())


def _training(model: Ranker, data: RecsysData, config: RecsysConfig, size: int) -> Step:
    optimizer = make_optimizer(model, config.optim, 10**6)["optimizer"]
    batches = data.shuffled(size)
    keys = _endless(len(batches))

    def step() -> None:
        model.train()
        batch = batches[next(keys)]
        output = model(batch)
        losses = task_losses(output.logits, batch.labels, data.spec.tasks, config.loss)
        optimizer.zero_grad()
        (losses.sum() + sum(output.losses.values())).backward()
        optimizer.step()

    return step


def _endless(count: int) -> Iterator[tuple[int, int]]:
    epoch = 0
    while True:
        yield from ((epoch, index) for index in range(count))
        epoch += 1


def _ranking(model: Ranker, batch: Batch) -> Step:
    @torch.no_grad()
    def call() -> None:
        model.eval()
        model(batch)

    return call


def _peers(config: RecsysConfig, data: RecsysData, size: int, ranked: int) -> tuple[dict, dict, dict]:
    try:
        from apps.recsys.benchmark_peers import rechub_contenders
    except ImportError as error:
        raise UserError(f"peers=true: {error}; pip install torch-rechub") from error
    return rechub_contenders(config, data, size, ranked)
