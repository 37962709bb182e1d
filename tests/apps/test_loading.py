"""The order of training batches, and where it continues."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from apps.loading import ResumableBatches, ResumableLoader, as_is, derive_seed

SIZES = {"num_samples": st.integers(1, 60), "batch_size": st.integers(1, 20), "seed": st.integers(0, 2**63 - 1)}


def indices(batches: ResumableBatches) -> list[list[int]]:
    return [[index for _, index in batch] for batch in batches]


@given(**SIZES, epoch=st.integers(0, 3))
def test_an_epoch_is_every_sample_once(num_samples, batch_size, seed, epoch):
    batches = ResumableBatches(num_samples, batch_size, seed)
    batches.position = lambda: epoch * len(batches)
    drawn = list(batches)
    assert len(drawn) == len(batches)
    assert all(len(batch) == batch_size for batch in drawn[:-1])
    assert sorted(index for batch in drawn for _, index in batch) == list(range(num_samples))
    assert {number for batch in drawn for number, _ in batch} == {epoch}


@given(**SIZES, position=st.integers(0, 200), limit=st.none() | st.integers(1, 10))
def test_a_resumed_epoch_is_the_rest_of_the_whole_one(num_samples, batch_size, seed, position, limit):
    batches = ResumableBatches(num_samples, batch_size, seed, limit=limit)
    done = position % len(batches)
    batches.position = lambda: position - done
    whole = list(batches)
    assert len(whole) == len(batches)
    batches.position = lambda: position
    assert list(batches) == whole[done:]


@given(**SIZES, world=st.integers(2, 4), position=st.integers(0, 9))
def test_processes_share_an_epoch_without_overlap_and_in_step(num_samples, batch_size, seed, world, position):
    ranks = [ResumableBatches(num_samples, batch_size, seed, lambda: position, None, r, world) for r in range(world)]
    drawn = [indices(batches) for batches in ranks]
    assert len({len(batches) for batches in ranks}) == len({len(own) for own in drawn}) == 1
    flat = [index for own in drawn for batch in own for index in batch]
    assert len(flat) == len(set(flat))
    assert all(len(batch) == batch_size for own in drawn for batch in own)


def test_epochs_and_seeds_differ_and_repeat():
    def order(seed: int, position: int) -> list[list[int]]:
        return indices(ResumableBatches(50, 50, seed, lambda: position))

    assert order(0, 0) == order(0, 0)
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@given(st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=4))
def test_seeds_are_what_torch_takes(parts):
    assert 0 <= derive_seed(*parts) < 2**63
    torch.Generator().manual_seed(derive_seed(*parts))


def test_seeds_are_mixed_well():
    """Neighbouring numbers, and the same numbers in another order, have nothing in common."""
    grid = [derive_seed(i, j) for i in range(100) for j in range(100)]
    assert len(set(grid)) == 10_000
    flipped = [bin(derive_seed(7, i) ^ derive_seed(7, i + 1)).count("1") for i in range(1000)]
    assert 28 < sum(flipped) / len(flipped) < 35  # of 63 bits
    assert derive_seed(0) != derive_seed(0, 0)


class Batches(Dataset):
    """Returns what it is asked for."""

    def __getitems__(self, keys):
        return keys

    def __len__(self):
        return 10


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")  # pytest has threads
@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_hands_whole_batches_through_and_keeps_no_state(workers):
    loader = ResumableLoader(Batches(), batch_sampler=ResumableBatches(10, 4, 0), collate_fn=as_is, num_workers=workers)
    assert list(loader) == list(ResumableBatches(10, 4, 0))
    assert loader.state_dict() == {}
    loader.load_state_dict({})
