"""Embedded features: each table by itself, numbers as written, sequences in both forms, nothing from padding."""

from __future__ import annotations

import math

import pytest
import torch

from apps.recsys.batch import Batch, DenseInput, InputSpec, SequenceInput, SparseInput, TableSpec, TaskSpec
from apps.recsys.models.encoders import make_pooling
from apps.recsys.models.features import FeatureEncoder
from moecore.factorized import FactorizedInput, linear

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
    flat = encoder(given).features
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
    flat = encoder(given).features
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
    torch.testing.assert_close(fields.features, again.features)
    assert fields.features.isfinite().all()
    assert set(hand_on) <= set(fields.behaviours)
    if hand_on:
        seen = fields.behaviours["seen"]
        assert seen.mask.sum(1).tolist() == [0, 1, 6, 2, 3]
        torch.testing.assert_close(seen.target, part(encoder, fields.features, "item"))


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
    encoder(given).features.square().sum().backward()
    grad = encoder.tables.weights["4"].grad
    dense = FeatureEncoder(SPEC)
    dense.load_state_dict(encoder.state_dict())
    dense(given).features.square().sum().backward()
    assert grad.is_sparse
    torch.testing.assert_close(grad.to_dense(), dense.tables.weights["4"].grad)


def test_features_export(untyped):
    class Flat(torch.nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def forward(self, sparse, dense, seen, tags, liked):
            return self.encoder(Batch(sparse, dense, {"seen": seen, "tags": tags, "liked": liked})).features

    encoder, given = FeatureEncoder(SPEC).eval(), batch()
    inputs = (given.sparse, given.dense, *given.sequences.values())
    exported = torch.export.export(Flat(encoder), inputs, dynamic_shapes=[{0: torch.export.Dim("batch")}] * 5)
    torch.testing.assert_close(exported.module()(*(one[:3] for one in inputs)), encoder(given[:3]).features)


def wide(rows: int) -> tuple[InputSpec, Batch]:
    """Small and large tables of two widths, one of which two features share."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"user": (5000, 8), "city": (9, 8), "hour": (24, 6), "sex": (3, 2)}
    features = ["user", "city", "sex", "hour", "home"]
    tables = {name: "city" if name == "home" else name for name in features}
    spec = InputSpec(
        tables=tuple(TableSpec(name, *size) for name, size in sizes.items()),
        sparse=tuple(SparseInput(name, table) for name, table in tables.items()),
        dense=(DenseInput("age", "standard", 30.0, 10.0),),
        sequences=(SequenceInput("seen", "city", 4, "mean"),),
        tasks=SPEC.tasks,
    )
    ids = [torch.randint(0, sizes[table][0], (rows,), generator=generator) for table in tables.values()]
    seen = torch.randint(0, 9, (rows, 4), generator=generator)
    return spec, Batch(torch.stack(ids, 1), torch.randn(rows, 1, generator=generator), {"seen": seen})


@pytest.mark.parametrize("sparse", [False, True])
def test_small_tables_are_handed_on_where_samples_share_their_rows(sparse):
    spec, given = wide(200)
    encoder = FeatureEncoder(spec, sparse_gradients=sparse, factorize=True)
    plain = FeatureEncoder(spec, sparse_gradients=sparse)
    plain.load_state_dict(encoder.state_dict())
    ours, theirs = encoder(given).features, plain(given).features
    assert isinstance(ours, FactorizedInput)
    assert [len(table) for table in ours.tables] == [24, 9, 9]  # by width; not the large one, not the narrow one
    torch.testing.assert_close(ours.dense(), theirs)
    weight = torch.randn(16, encoder.width, generator=torch.Generator().manual_seed(1))
    for features in (ours, theirs):
        linear(features, weight).square().sum().backward()
    for name, parameter in plain.named_parameters():
        grad = encoder.get_parameter(name).grad
        assert grad.is_sparse == parameter.grad.is_sparse == (sparse and "tables" in name), name
        torch.testing.assert_close(grad.to_dense(), parameter.grad.to_dense(), atol=1e-4, rtol=1e-4)


def test_few_samples_are_laid_out():
    spec, given = wide(200)
    encoder = FeatureEncoder(spec, factorize=True)
    assert isinstance(encoder(given[:50]).features, torch.Tensor)
    torch.testing.assert_close(encoder(given[:50]).features, encoder(given).features.dense()[:50])
    logistic = FeatureEncoder(SPEC, factorize=True)  # of no table wide enough
    assert isinstance(logistic(batch()).features, torch.Tensor)
