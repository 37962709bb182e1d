"""Files and folders as users have them."""

from __future__ import annotations

import pandas as pd
import pytest

from apps.errors import UserError
from apps.recsys.tables import Derived, FrameTable, ParquetTable, TextTable, open_table
from tests.apps.recsys.conftest import small_log

FLAT = small_log(120).drop(columns="seen")


def whole(table, columns=None, rows=7) -> pd.DataFrame:
    parts = [frame for unit in range(len(table.units)) for frame in table.chunks(unit, columns, rows)]
    assert max(map(len, parts)) <= rows
    return pd.concat(parts)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("log.csv", {}), ("log.tsv", {"sep": "\t"}), ("log.csv.gz", {"sep": ";"}), ("log.txt", {"encoding": "utf-8-sig"})],
)
def test_text(tmp_path, name, settings):
    FLAT.to_csv(tmp_path / name, index=False, **settings)
    table = open_table(tmp_path / name)
    assert isinstance(table, TextTable)
    assert table.columns == tuple(FLAT.columns)
    pd.testing.assert_frame_equal(whole(table), FLAT, check_dtype=False)
    pd.testing.assert_frame_equal(whole(table, ["price", "user"]), FLAT[["price", "user"]])
    pd.testing.assert_frame_equal(table.load().frames[0], FLAT, check_dtype=False)


def test_parquet_keeps_lists_and_whole_numbers_with_gaps(tmp_path):
    frame = small_log(60).assign(big=pd.Series([2**62 + 1, None] * 30, dtype="Int64"))
    frame.to_parquet(tmp_path / "log.parquet", row_group_size=25)
    table = open_table(tmp_path / "log.parquet")
    assert isinstance(table, ParquetTable)
    assert [(unit.start, unit.rows) for unit in table.units] == [(0, 25), (25, 25), (50, 10)]
    read = whole(table)
    assert read["big"].iloc[0] == 2**62 + 1
    assert read["seen"].map(list).tolist() == frame["seen"].tolist()
    assert read.index.tolist() == list(range(60))


def test_folders_are_one_table_and_rows_are_counted_in_each_file(tmp_path, parquet):
    table = open_table(parquet(FLAT, files=3, group=15))
    assert [unit.file for unit in table.units] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    read = whole(table)
    assert read["row"].tolist() == list(range(120))
    assert read.index.tolist() == list(range(40)) * 3
    loaded = table.load()
    assert [len(frame) for frame in loaded.frames] == [40, 40, 40]


def test_columns_that_are_made_when_read(tmp_path):
    FLAT.to_csv(tmp_path / "log.csv", index=False)
    table = Derived(open_table(tmp_path / "log.csv"), lambda frame: frame.assign(hour=frame["when"] % 24))
    assert table.columns[-1] == "hour"
    assert whole(table, ["hour"])["hour"].tolist() == (FLAT["when"] % 24).tolist()
    assert whole(table, ["row"])["row"].tolist() == list(range(120))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "the folder has no table (.csv"),
        ({"a.csv": ""}, "a.csv: cannot be read|a.csv: the file is empty"),
        ({"a.csv": "x,y\n1,2\n", "b.csv": "x,z\n1,2\n"}, "b.csv: no column 'y'; it has x, z"),
        ({"a.csv": "x,y\n1,2,3\n4,5,6\n"}, "a.csv: rows have more fields than the header"),
        ({"a.csv": "x,y,x\n1,2,3\n"}, "a.csv: two columns are called 'x'; rename one"),
        ({"a.parquet": "no parquet"}, "a.parquet: cannot be read ("),
        ({"a.csv": "x\n1\n", "b.parquet": ""}, "has both text and Parquet files; keep one kind"),
        ({"a.csv.gz": "x\n1\n"}, "a.csv.gz: cannot be read ("),
    ],
)
def test_what_cannot_be_read(tmp_path, files, words):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        open_table(tmp_path).load()
    assert any(one in str(error.value) for one in words.split("|")), str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        open_table(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    with pytest.raises(UserError, match="not UTF-8 text"):
        open_table(tmp_path / "x.csv").load()


def test_frames_with_a_column_twice():
    with pytest.raises(UserError, match="two columns are called 'x'"):
        FrameTable(pd.DataFrame([[1, 2]], columns=["x", "x"]))
