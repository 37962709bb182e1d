"""Ids of any type become rows of tables."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from apps.recsys.vocabulary import Counter, Vocabulary, hash_integers, read_ids


def fitted(*parts, min_count: int = 1) -> Vocabulary:
    counter = Counter(hashed=False)
    for part in parts:
        counter.add(read_ids(part))
    return counter.vocabulary(min_count, None)


def rows(vocabulary: Vocabulary, values) -> list[int]:
    return vocabulary.lookup(read_ids(pd.Series(values))).tolist()


SAME = {
    "integers": pd.Series([7, 9, 7]),
    "small": pd.Series([7, 9, 7], dtype="uint8"),
    "floats": pd.Series([7.0, 9.0, 7.0]),
    "nullable": pd.Series([7, 9, 7], dtype="Int64"),
    "arrow": pd.Series([7, 9, 7], dtype=pd.ArrowDtype(pa.int64())),
    "text": pd.Series(["7", "9", "7"]),
    "decimals": pd.Series(["7.0", " 9", "7"]),
    "objects": pd.Series([7, "9", 7.0], dtype=object),
    "categories": pd.Series(["7", "9", "7"], dtype="category"),
    "integer categories": pd.Series([7, 9, 7], dtype="category"),
}


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("buckets", [None, 50])
def test_an_id_is_the_same_in_whatever_type_it_comes(kind, buckets):
    known = Vocabulary(True, np.array([7, 8, 9]), buckets)
    found = known.lookup(read_ids(SAME[kind]))
    if buckets is None:
        assert found.tolist() == [2, 4, 2]
    else:
        assert found.tolist() == hash_integers(np.array([7, 9, 7]), 50).tolist()


@pytest.mark.parametrize(
    "column",
    [
        pd.Series([3.0, np.nan, np.inf]),
        pd.Series([3, None, None], dtype="Int64"),
        pd.Series(["3", "", None]),
        pd.Series(["3", None, np.nan], dtype=object),
        pd.Series(["3", None, None], dtype="category"),
        pd.Series([True, None, None], dtype="boolean"),
    ],
)
def test_what_is_missing_has_the_first_row(column):
    assert fitted(column).lookup(read_ids(column)).tolist() == [2, 0, 0]
    assert fitted(column).rows == 3


def test_unseen_and_rare_values_are_unknown():
    numbers = fitted(pd.Series([5, 5, 70_000_000, 70_000_000, 6]), min_count=2)
    assert rows(numbers, [5, 6, 70_000_000, 4, -(2**62)]) == [2, 1, 3, 1, 1]
    assert rows(numbers, ["5", "five", None]) == [2, 1, 0]
    text = fitted(pd.Series(["a", "b", "b"]), min_count=2)
    assert rows(text, ["a", "b", "c", None]) == [1, 2, 1, 0]
    assert rows(text, [1, 2, 3]) == [1, 1, 1]


def test_text_in_one_part_makes_all_of_it_text():
    mixed = fitted(pd.Series([1, 2]), pd.Series(["2", "x"]), pd.Series([2.5, 1.0]))
    assert mixed.values.to_pylist() == ["1", "2", "2.5", "x"]
    assert rows(mixed, [1, 2, 2.5]) == [2, 3, 4]


def test_parts_may_come_in_any_order_and_number(monkeypatch):
    monkeypatch.setattr(Counter, "PENDING", 5)
    values = np.random.default_rng(0).integers(0, 30, 200)
    whole = fitted(pd.Series(values), min_count=7)
    parts = fitted(*(pd.Series(part) for part in np.array_split(values[::-1], 9)), min_count=7)
    assert np.array_equal(whole.values, parts.values)
    assert 0 < len(whole.values) < 30


@pytest.mark.parametrize(
    "vocabulary",
    [
        Vocabulary(True, np.array([-3, 8, 2**60])),
        Vocabulary(True, np.array([], np.int64)),
        Vocabulary(False, pa.array(["", "a\nb", "é", "日本"])),
        Vocabulary(False, pa.array([], pa.string())),
        Vocabulary(True, buckets=9),
        Vocabulary(False, buckets=9),
    ],
)
def test_plain_data_brings_back_the_same(vocabulary, tmp_path):
    torch.save(vocabulary.plain(), tmp_path / "v.pt")
    back = Vocabulary.from_plain(torch.load(tmp_path / "v.pt", weights_only=True))
    for values in ([-3, 8, 2**60, 5, None], ["a\nb", "é", "日本", "z", None]):
        assert rows(back, values) == rows(vocabulary, values)
    assert back.rows == vocabulary.rows


def test_hashes_need_nothing_but_integer_arithmetic_within_64_bits():
    values = np.array([0, 1, -1, 2**62, -(2**62), 123_456_789_012])
    exact = [2 + (1_103_515_245 * (v % (2**31 - 1)) + 12_345) % (2**31 - 1) % 1000 for v in values.tolist()]
    assert hash_integers(values, 1000).tolist() == exact
    spread = np.bincount(hash_integers(np.arange(100_000), 1000) - 2, minlength=1000)
    assert spread.min() > 50
    assert spread.max() < 160


def test_text_hashes_alike_in_every_process():
    code = (
        "import pandas as pd; from apps.recsys.vocabulary import *; "
        "print(Vocabulary(False, buckets=10**6).lookup(read_ids(pd.Series(['a', 'ö', None]))).tolist())"
    )
    environment = {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(rows(Vocabulary(False, buckets=10**6), ["a", "ö", None]))


@pytest.mark.parametrize(
    "values",
    [
        pd.Series([10**24 + 7, 10**24 + 8, 3], dtype=object),
        pd.Series([f"{10**24 + 7}", f"{10**24 + 8}", "3"]),
        pd.Series([10**24 + 7, f"{10**24 + 8}", 3.0], dtype=object),
    ],
)
def test_integers_beyond_64_bits_are_text(values):
    vocabulary = fitted(values)
    assert vocabulary.values.to_pylist() == [f"{10**24 + 7}", f"{10**24 + 8}", "3"]
    assert vocabulary.lookup(read_ids(values)).tolist() == [2, 3, 4]
    assert rows(fitted(pd.Series([1, 2])), values) == [1, 1, 1]


@pytest.mark.parametrize("dtype", ["uint64", "UInt64", pd.ArrowDtype(pa.uint64()), object])
def test_unsigned_integers_do_not_wrap(dtype):
    values = pd.Series([2**63 + 4, 2**63 + 5, 2**64 - 1], dtype=dtype)
    vocabulary = fitted(values, pd.Series([7, 2**63 - 1]))
    assert vocabulary.lookup(read_ids(values)).tolist() == [5, 6, 2]
    assert rows(vocabulary, [7, 2**63 - 1, 8]) == [3, 4, 1]


def test_text_of_19_digits_is_an_integer_as_far_as_it_fits():
    vocabulary = fitted(pd.Series([2**63 - 1, -(2**62), 5]))
    found = rows(vocabulary, [f"{2**63 - 1}", f"{-(2**62)}", f"{2**63}", "+5", "9999999999999999999"])
    assert found == [4, 2, 1, 3, 1]


@pytest.mark.parametrize("learned", [pd.Series([True, False]), pd.Series([True, None, False], dtype="boolean")])
@pytest.mark.parametrize(
    "given",
    [
        pd.Series([True, False]),
        pd.Series(["True", "False"]),
        pd.Series(["true", "false"]),
        pd.Series(["TRUE", " false"], dtype="category"),
        pd.Series([1, 0]),
        pd.Series([1.0, 0.0]),
        pd.Series(["1", "0"]),
        pd.Series([True, "false"], dtype=object),
    ],
)
def test_booleans_are_the_same_ids_however_written(learned, given):
    assert fitted(learned).lookup(read_ids(given)).tolist() == [3, 2]
    assert rows(fitted(learned), ["truth", "yes", None]) == [1, 1, 0]
