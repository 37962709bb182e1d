"""Batches by number, from memory and from files larger than the buffer."""

from __future__ import annotations

import tracemalloc

import pytest
import torch

from apps.recsys.splits import Rows, split
from apps.recsys.streaming import Held, Keys, Streamed, hold
from apps.recsys.tables import FrameTable, open_table
from apps.recsys.transform import Transform
from tests.apps.recsys.conftest import small_log, small_schema

LOG = small_log(400)
SCHEMA = small_schema()
FITTED = Transform.fit(SCHEMA, LOG)


def rows_of(batch) -> list[int]:
    return batch.dense[:, 0].int().tolist()


def streamed(path, batch_size=20, buffer_rows=100, **settings) -> Streamed:
    return Streamed(Rows(open_table(path)), FITTED, batch_size, buffer_rows, **settings)


def held(batch_size=20, **settings) -> Held:
    return Held(hold(Rows(FrameTable(LOG)), FITTED), batch_size, **settings)


def epoch(batches, number=0) -> list[list[int]]:
    return [rows_of(batches[number, i]) for i in range(len(batches))]


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


@pytest.fixture
def folder(parquet):
    return parquet(LOG, files=2, group=30)


def test_both_ways_give_the_same_rows_each_once(folder):
    ways = [held(shuffle=True), streamed(folder, shuffle=True)]
    for batches in ways:
        found = epoch(batches)
        assert [len(batch) for batch in found] == [20] * 20
        assert sorted(flat(found)) == list(range(400))
    in_order = streamed(folder, batch_size=64)
    assert epoch(in_order) == epoch(held(batch_size=64)) == [list(range(400))[i : i + 64] for i in range(0, 400, 64)]


def test_values_are_those_of_the_rows(folder):
    whole = hold(Rows(FrameTable(LOG)), FITTED)
    batches = streamed(folder, shuffle=True)
    for i in range(len(batches)):
        batch = batches[1, i]
        other = whole[torch.tensor(rows_of(batch))]
        assert torch.equal(batch.sparse, other.sparse)
        assert torch.equal(batch.sequences["seen"], other.sequences["seen"])
        assert torch.equal(batch.labels, other.labels)
        assert torch.equal(batch.user, other.user)


@pytest.mark.parametrize("make", [lambda folder, **s: held(**s), streamed], ids=["held", "streamed"])
def test_orders_depend_on_seed_and_epoch_alone(make, folder):
    first, second = (epoch(make(folder, shuffle=True, seed=3), number) for number in (0, 1))
    assert first != second
    assert epoch(make(folder, shuffle=True, seed=3), 1) == second
    assert epoch(make(folder, shuffle=True, seed=4)) != first
    assert min(len({row // 30 for row in batch}) for batch in first) >= 3  # row groups that a batch mixes


@pytest.mark.parametrize("make", [lambda folder, **s: held(**s), streamed], ids=["held", "streamed"])
def test_any_batch_can_be_the_first(make, folder):
    expected = [epoch(make(folder, batch_size=15, shuffle=True), number) for number in (0, 1)]
    assert len(expected[0]) == 26  # ten rows wait for the next epoch
    for number in (0, 1):
        for start in range(26):
            batches = make(folder, batch_size=15, shuffle=True)
            for i in range(start, min(start + 9, 26)):
                assert rows_of(batches[number, i]) == expected[number][i]


def test_resuming_does_not_read_what_came_before(folder, monkeypatch):
    batches = streamed(folder, shuffle=True)
    read = []
    chunks = batches.part.chunks
    monkeypatch.setattr(batches.part, "chunks", lambda unit, *rest: read.append(unit) or chunks(unit, *rest))
    _ = batches[0, 19]
    assert len(read) <= 5  # of 14 row groups, for the last of four blocks


def test_parts_are_streamed_without_the_rows_of_others(folder):
    parts = split(open_table(folder), "random", (0.6, 0.2, 0.2), 0)
    own = set(parts["train"].frame(["row"])["row"])
    batches = Streamed(parts["train"], FITTED, 10, 50, shuffle=True)
    found = flat(epoch(batches))
    assert set(found) <= own
    assert len(found) == len(set(found)) == len(own) // 10 * 10
    for i in (3, 17):
        assert rows_of(Streamed(parts["train"], FITTED, 10, 50, shuffle=True)[0, i]) == epoch(batches)[i]


def test_text_files_stream_too(tmp_path):
    text = LOG.assign(seen=LOG["seen"].map(lambda values: ",".join(map(str, values))))
    text.to_csv(tmp_path / "log.csv.gz", index=False)
    batches = streamed(tmp_path / "log.csv.gz", shuffle=True)
    expected = epoch(batches)
    assert sorted(flat(expected)) == list(range(400))
    assert rows_of(streamed(tmp_path / "log.csv.gz", shuffle=True)[0, 13]) == expected[13]


def test_few_rows_are_one_batch(folder):
    assert [len(batch) for batch in epoch(streamed(folder, batch_size=1000, shuffle=True))] == [400]
    assert [len(batch) for batch in epoch(held(batch_size=1000, shuffle=True))] == [400]
    assert len(held(batch_size=300, shuffle=True)) == 1


def test_memory_is_that_of_the_buffer_not_of_the_data(parquet, tmp_path):
    big = small_log(40_000)
    fitted = Transform.fit(SCHEMA, big)
    part = Rows(open_table(parquet(big, files=4, group=2500)))

    def peak(buffer_rows: int) -> float:
        batches = Streamed(part, fitted, 500, buffer_rows, shuffle=True)
        tracemalloc.start()
        for i in range(len(batches)):
            assert len(batches._block or ()) <= buffer_rows
            _ = batches[0, i]
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most / 1e6

    small = peak(2500)
    assert small < 0.35 * peak(40_000)  # data 16 times as large as the buffer
    del big


def test_processes_share_the_batches_and_end_together():
    keys = [list(Keys(7, rank=rank, world=2)) for rank in (0, 1)]
    assert keys == [[(0, 0), (0, 2), (0, 4)], [(0, 1), (0, 3), (0, 5)]]
    assert list(Keys(7, position=lambda: 8)) == [(1, i) for i in range(1, 7)]
    assert list(Keys(7, limit=3, position=lambda: 4)) == [(1, 1), (1, 2)]
