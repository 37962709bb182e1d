"""Corpora in their published formats."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from apps.errors import UserError
from apps.timeseries.pretraining_binary import BinaryCorpus, write_binary
from apps.timeseries.pretraining_corpora import Corpus, open_corpus

SEQUENCES = [[1, 2, 3], [10.5, None, 30.25, 40], [7]]
"""Integers, a missing value, a single point."""


def expected(index: int) -> np.ndarray:
    return np.array(SEQUENCES[index], np.float64)


def check(corpus: Corpus) -> None:
    assert len(corpus) == 3
    assert corpus.lengths.tolist() == [3, 4, 1]
    for i in (2, 0, 1):
        np.testing.assert_array_equal(corpus.read(i), expected(i))
        np.testing.assert_array_equal(corpus.read(i, 1, 3), expected(i)[1:3])
        assert corpus.read(i).dtype == np.float64


def lines(path: Path) -> None:
    first, *rest = [json.dumps({"id": [1, 2], "sequence": s}) for s in SEQUENCES]
    path.write_text("\n".join([first, "", rest[0], json.dumps(SEQUENCES[2])]) + "\n")


def binary(path: Path) -> None:
    write_binary(path, [*map(expected, range(3)), []], file_values=3)


WRITERS = {
    "a.jsonl": lines,
    "a.json": lambda path: path.write_text(json.dumps([{"sequence": SEQUENCES[0]}, *SEQUENCES[1:]])),
    "a.npz": lambda path: np.savez(path, *map(expected, range(3))),
    "a": binary,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_its_sequences_in_any_order_and_in_part(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)

    check(open_corpus(tmp_path / name))


def test_a_folder_of_corpora_is_one(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write_binary(tmp_path / "inner" / "one", [expected(0)])
    np.save(tmp_path / "two.npy", expected(1)[None])
    (tmp_path / "v.csv").write_text("date,a\n2024-01-01,7\n2024-01-02,8\n2024-01-03,9\n")
    (tmp_path / "README.md").write_text("about it")

    corpus = open_corpus(tmp_path)

    assert corpus.lengths.tolist() == [3, 4, 3]
    np.testing.assert_array_equal(corpus.read(0), expected(0))
    np.testing.assert_array_equal(corpus.read(1, 2), expected(1)[2:])
    np.testing.assert_array_equal(corpus.read(2), [7, 8, 9])


def test_arrays_are_a_sequence_or_one_per_row(tmp_path: Path) -> None:
    rows = np.arange(12, dtype=np.int16).reshape(3, 4)
    np.save(tmp_path / "rows.npy", np.asfortranarray(rows))
    np.save(tmp_path / "one.npy", rows[1])

    np.testing.assert_array_equal(open_corpus(tmp_path / "rows.npy").read(1), [4, 5, 6, 7])
    np.testing.assert_array_equal(open_corpus(tmp_path / "one.npy").read(0, 1), [5, 6, 7])


def test_the_binary_format_as_published(tmp_path: Path) -> None:
    values = np.arange(10, dtype=np.float32)
    values[:6].tofile(tmp_path / "data-1-of-2.bin")
    values[6:].tofile(tmp_path / "data-2-of-2.bin")
    scales = [{"offset": 0, "length": 4}, {"offset": 4, "length": 5, "mean": 100.0, "std": 2.0}]
    files = {"data-2-of-2.bin": 4, "data-1-of-2.bin": 6}
    meta = {"num_sequences": 2, "dtype": "float32", "files": files, "scales": scales}
    (tmp_path / "meta.json").write_text(json.dumps(meta))

    corpus = open_corpus(tmp_path)

    assert isinstance(corpus, BinaryCorpus)
    np.testing.assert_array_equal(corpus.read(0), [0, 1, 2, 3])
    np.testing.assert_array_equal(corpus.read(1), 100 + 2 * values[4:9])  # over both files
    np.testing.assert_array_equal(corpus.read(1, 1, 2), [110])
    assert corpus.read(1, 5).shape == (0,)


def test_a_written_corpus_is_whole_or_absent(tmp_path: Path) -> None:
    def breaks():
        yield [1.0, 2.0]
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError):
        write_binary(tmp_path / "corpus", breaks())
    assert not list(tmp_path.iterdir())
    write_binary(tmp_path / "corpus", [[1.0, 2.0]])
    with pytest.raises(UserError, match="exists"):
        write_binary(tmp_path / "corpus", [[3.0]])


def test_many_files_stay_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    corpus = open_corpus(write_binary(tmp_path / "c", ([float(i)] for i in range(12)), file_values=1))

    assert len(list((tmp_path / "c").glob("data-*-of-12.bin"))) == 12
    assert [corpus.read(i)[0] for i in range(12)] == list(range(12))


def test_large_integers_survive_in_float64(tmp_path: Path) -> None:
    corpus = open_corpus(write_binary(tmp_path / "c", [[2**40 + 1]], dtype="float64"))

    assert corpus.read(0)[0] == 2**40 + 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pkl", pickle.dumps([[1]]), "a pickle can run code"),
        ("a.npy", None, "pickled objects"),
        ("a.npy", b"nothing", "damaged"),
        ("a.jsonl", b'{"sequence": [1, 2]}\n{"values": [1]}\n', "line 2: expected"),
        ("a.jsonl", b"", "no sequence"),
        ("a.json", b"[[1, 2], ", "not JSON"),
        ("a.json", b'[{"sequence": [1, "x"]}]', "sequence 0: expected numbers"),
        ("a.json", b"[[[1, 2], [3, 4]]]", "sequence 0: expected numbers"),
        ("a.json", b"7", "expected a list"),
        ("a.xyz", b"7", "no known format"),
    ],
)
def test_files_that_are_no_corpus(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is None:
        np.save(path, np.array([[1], [2, 3]], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(content)

    with pytest.raises(UserError, match=message) as error:
        open_corpus(path)
    assert "\n" not in str(error.value)


def test_a_broken_line_is_named_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"sequence": [1, 2]}\n{"sequence": [1, oops]}\n')
    corpus = open_corpus(tmp_path / "a.jsonl")

    with pytest.raises(UserError, match="sequence 1: not JSON"):
        corpus.read(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_sequences": 5}, "num_sequences"),
        ({"dtype": "object"}, "no type of numbers"),
        ({"scales": [{"offset": 1, "length": 3}]}, "sequence 0 lies outside"),
        ({"files": {"data-1-of-1.bin": 4}}, "has 12 bytes, not 16"),
        ({"files": {"data-9-of-9.bin": 3}}, "is missing"),
        ({"files": None}, "no index"),
    ],
)
def test_damaged_binary_corpora(tmp_path: Path, change: dict, message: str) -> None:
    folder = write_binary(tmp_path / "c", [[1.0, 2.0, 3.0]])
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | change))

    with pytest.raises(UserError, match=message):
        open_corpus(folder)


def test_paths_without_a_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no corpus in this folder"):
        open_corpus(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        open_corpus(tmp_path / "none")
    with pytest.raises(UserError, match="no such file or folder"):
        open_corpus(tmp_path / "none.jsonl")


def test_series_files_are_corpora_too(tmp_path: Path) -> None:
    frame = pd.DataFrame({"ds": range(5), "y": [1.0, 2.0, np.nan, 4.0, 5.0]})
    frame.to_parquet(tmp_path / "s.parquet")

    np.testing.assert_array_equal(open_corpus(tmp_path / "s.parquet").read(0), frame.y)
