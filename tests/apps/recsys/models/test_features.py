"""Embedded features: each table by itself, numbers as written, sequences in both forms, nothing from padding."""

from __future__ import annotations

import math

import pytest
import torch

from apps.recsys.batch import Batch, DenseInput, InputSpec, SequenceInput, SparseInput, TableSpec, TaskSpec
from apps.recsys.models.encoders import make_pooling
from apps.recsys.models.features import FeatureEncoder

NAN = float("nan")
SPEC = InputSpec(
    tables=(TableSpec("user", 9, 4), TableSpec("item", 7, 4), TableSpec("city", 5, 3)),
    sparse=(SparseInput("user", "user"), SparseInput("city", "city"), SparseInput("item", "item")),
    dense=(
        DenseInput("age", "standard", 30.0, 10.0),
        DenseInput("income", "log", 8.0, 2.0),
        DenseInput("price", "piecewise", edges=(0.0, 1.0, 3.0, 7.0)),
        DenseInput("score", "bins", edges=(0.0, 1.0), dim=2),
        DenseInput("rank", "bins", edges=(5.0,), dim=2),
    ),
    sequences=(
        SequenceInput("seen", "item", 6, "target", "item"),
        SequenceInput("tags", "city", 4, "mean"),
        SequenceInput("liked", "item", 6, "attention"),
    ),
    tasks=(TaskSpec("click", "all", None, 1.0, 0.3),),
)


def batch(rows: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(0)
    sparse = torch.stack([torch.randint(0, n, (rows,), generator=generator) for n in (9, 5, 7)], 1)
    dense = torch.randn(rows, 5, generator=generator) * 5 + 3
    sequences = {}
    for name, (high, length) in {"seen": (7, 6), "tags": (5, 4), "liked": (7, 6)}.items():
        ids = torch.randint(1, high, (rows, length), generator=generator)
        lengths = torch.tensor([0, 1, length, 2, 3])[:rows, None]
        sequences[name] = torch.where(torch.arange(length) < lengths, ids, 0)
    return Batch(sparse, dense, sequences)


def part(encoder: FeatureEncoder, flat: torch.Tensor, name: str) -> torch.Tensor:
    slot = next(slot for slot in encoder.slots if slot.name == name)
    return flat[:, slot.start : slot.stop]


def test_every_id_is_a_row_of_its_own_table():
    encoder, given = FeatureEncoder(SPEC), batch()
    flat = encoder(given).flat
    assert flat.shape == (5, encoder.width)
    assert {slot.name for slot in encoder.slots} == {one.name for one in (*SPEC.sparse, *SPEC.dense, *SPEC.sequences)}
    wide, narrow = encoder.tables.weights["4"], encoder.tables.weights["3"]
    torch.testing.assert_close(part(encoder, flat, "user"), wide[given.sparse[:, 0]])
    torch.testing.assert_close(part(encoder, flat, "item"), wide[9 + given.sparse[:, 2]])
    torch.testing.assert_close(part(encoder, flat, "city"), narrow[given.sparse[:, 1]])


def test_numbers_are_encoded_as_written():
    encoder, given = FeatureEncoder(SPEC), batch(4)
    given.dense[:, 0] = torch.tensor([30.0, 50.0, NAN, 1e9])
    given.dense[:, 1] = torch.tensor([math.e - 1, -(math.e - 1), 0, NAN])
    given.dense[:, 2] = torch.tensor([-1.0, 2.0, 9.0, NAN])
    given.dense[:, 3] = torch.tensor([-0.5, 0.0, 5.0, NAN])
    given.dense[:, 4] = torch.tensor([4.0, 5.0, math.inf, -math.inf])
    with torch.no_grad():
        encoder.dense["numbers"].missing.fill_(0.25)
        encoder.dense["piecewise"].missing.fill_(-1)
    flat = encoder(given).flat
    assert part(encoder, flat, "age").flatten().tolist() == [0, 2, 0.25, 10]  # the last one is cut off
    torch.testing.assert_close(part(encoder, flat, "income").flatten(), torch.tensor([-3.5, -4.5, -4.0, 0.25]))
    assert part(encoder, flat, "price").tolist() == [[0, 0, 0], [1, 0.5, 0], [1, 1, 1], [-1, -1, -1]]
    table = encoder.dense["bins"].weight.view(2, 4, 2)
    torch.testing.assert_close(part(encoder, flat, "score"), table[0, [1, 2, 3, 0]])
    torch.testing.assert_close(part(encoder, flat, "rank"), table[1, [1, 2, 2, 1]])
    assert flat.isfinite().all()


@pytest.mark.parametrize("name", ["mean", "sum", "target"])
def test_packed_and_padded_forms_give_the_same(name):
    pooling = make_pooling(name, 4)
    values, target = torch.randn(5, 6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    mask = torch.arange(6) < torch.tensor([0, 1, 6, 2, 3])[:, None]
    row, place = mask.nonzero(as_tuple=True)
    padded, packed = pooling(values, mask, target), pooling.packed(values[row, place], row, 5, target)
    torch.testing.assert_close(padded, packed)
    assert (padded[0] == 0).all()
    given = [values, target, *pooling.parameters()]
    for one, other in zip(
        torch.autograd.grad(padded.square().sum(), given, allow_unused=True),
        torch.autograd.grad(packed.square().sum(), given, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("hand_on", [(), ("seen", "tags", "liked")])
def test_padding_changes_nothing_and_empty_sequences_are_finite(hand_on):
    encoder, given = FeatureEncoder(SPEC, hand_on=hand_on), batch()
    fields = encoder(given)
    longer = {name: torch.nn.functional.pad(ids, (0, 3)) for name, ids in given.sequences.items()}
    again = encoder(Batch(given.sparse, given.dense, longer))
    torch.testing.assert_close(fields.flat, again.flat)
    assert fields.flat.isfinite().all()
    assert set(hand_on) <= set(fields.behaviours)
    if hand_on:
        seen = fields.behaviours["seen"]
        assert seen.mask.sum(1).tolist() == [0, 1, 6, 2, 3]
        torch.testing.assert_close(seen.target, part(encoder, fields.flat, "item"))


def test_target_attention_as_written():
    pooling = make_pooling("target", 3)
    values, target = torch.randn(1, 2, 3), torch.randn(1, 3)
    expected = torch.zeros(1, 3)
    for h in values[0]:
        t = target[0]
        hidden = pooling.pair(torch.cat([h, h * t])) + pooling.target(t)
        expected += pooling.out(hidden.relu()) * h
    torch.testing.assert_close(pooling(values, torch.ones(1, 2, dtype=torch.bool), target), expected)


def test_gradients_of_rows_can_be_sparse():
    encoder, given = FeatureEncoder(SPEC, sparse_gradients=True), batch()
    encoder(given).flat.square().sum().backward()
    grad = encoder.tables.weights["4"].grad
    dense = FeatureEncoder(SPEC)
    dense.load_state_dict(encoder.state_dict())
    dense(given).flat.square().sum().backward()
    assert grad.is_sparse
    torch.testing.assert_close(grad.to_dense(), dense.tables.weights["4"].grad)


def test_features_export(untyped):
    class Flat(torch.nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def forward(self, sparse, dense, seen, tags, liked):
            return self.encoder(Batch(sparse, dense, {"seen": seen, "tags": tags, "liked": liked})).flat

    encoder, given = FeatureEncoder(SPEC).eval(), batch()
    inputs = (given.sparse, given.dense, *given.sequences.values())
    exported = torch.export.export(Flat(encoder), inputs, dynamic_shapes=[{0: torch.export.Dim("batch")}] * 5)
    torch.testing.assert_close(exported.module()(*(one[:3] for one in inputs)), encoder(given[:3]).flat)
