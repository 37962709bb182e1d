"""torch-rechub's MMoE at the sizes of ours, fed as its users feed it and by slices of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.models.multi_task import MMOE
from torch_rechub.utils.data import DataGenerator

from apps.recsys.batch import Batch
from apps.recsys.data import RecsysData
from apps.recsys.settings import RecsysConfig

Step = Callable[[], None]


def rechub_contenders(
    config: RecsysConfig, data: RecsysData, size: int, ranked: int
) -> tuple[dict[str, Step], dict[str, Step], dict[str, int]]:
    """Training steps, ranking calls and parameters by name.

    The same embedding widths, experts and towers as `model.mmoe`; numbers are standardised single columns.
    """
    spec, train = data.spec, data.encoded("train")
    dim = config.data.embed_dim
    features = [SparseFeature(one.name, spec.table(one.table).rows, dim) for one in spec.sparse]
    features += [DenseFeature(one.name) for one in spec.dense]
    mmoe, tower = config.model.mmoe, config.model.tower
    model = MMOE(
        features,
        ["classification"] * len(spec.tasks),
        mmoe.num_experts,
        {"dims": list(mmoe.experts.units), "activation": "relu"},
        [{"dims": list(tower.units), "activation": "relu"} for _ in spec.tasks],
    )
    columns, labels = _columns(train, data), train.labels.nan_to_num()
    sliced, loaded = _sliced(columns, labels, size), _loaded(columns, labels, size)
    some = {name: column[:ranked] for name, column in columns.items()}

    @torch.no_grad()
    def call() -> None:
        model.eval()
        model(some)

    steps = {
        "torch-rechub, its DataGenerator": _training(model, loaded),
        "torch-rechub, slices of tensors": _training(model, sliced),
    }
    count = sum(p.numel() for p in model.parameters())
    return steps, dict.fromkeys(steps, call), dict.fromkeys(steps, count)


def _columns(batch: Batch, data: RecsysData) -> dict[str, Tensor]:
    columns = {one.name: batch.sparse[:, i].contiguous() for i, one in enumerate(data.spec.sparse)}
    for i, one in enumerate(data.spec.dense):
        columns[one.name] = ((batch.dense[:, i].nan_to_num() - one.mean) / (one.std or 1.0)).contiguous()
    return columns


def _training(model: MMOE, batches: Iterator[tuple[dict[str, Tensor], Tensor]]) -> Step:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)  # its trainer's
    losses = torch.nn.BCELoss()

    def step() -> None:
        model.train()
        x, y = next(batches)
        predicted = model(x)
        loss = sum(losses(predicted[:, i], y[:, i].float()) for i in range(y.shape[1]))
        model.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _loaded(columns: dict[str, Tensor], labels: Tensor, size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    arrays = {name: column.numpy() for name, column in columns.items()}
    generator = DataGenerator(arrays, labels.numpy())
    loader, _, _ = generator.generate_dataloader(split_ratio=[0.9, 0.05], batch_size=size, num_workers=0)
    while True:
        yield from loader


def _sliced(columns: dict[str, Tensor], labels: Tensor, size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    while True:
        for rows in torch.randperm(len(labels)).split(size)[:-1]:
            yield {name: column[rows] for name, column in columns.items()}, labels[rows]
