"""Which rows are for what: every row once, the same from memory and from files."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from apps.errors import UserError
from apps.recsys.splits import PARTS, Rows, split, times, user_numbers
from apps.recsys.tables import FrameTable, open_table
from tests.apps.recsys.conftest import small_log

LOG = small_log(2000)
SHARES = (0.7, 0.1, 0.2)


def members(parts: dict[str, Rows]) -> dict[str, list[int]]:
    return {name: part.frame(["row"])["row"].tolist() for name, part in parts.items()}


def cut(table, how: str, seed: int = 1, shares=SHARES) -> dict[str, Rows]:
    return split(table, how, shares, seed, time="when", user="user")


@pytest.mark.parametrize("how", ["time", "user", "random"])
def test_every_row_is_in_one_part_whatever_is_read(how, parquet):
    parts = cut(FrameTable(LOG), how)
    found = members(parts)
    assert sorted(row for rows in found.values() for row in rows) == list(range(2000))
    assert [len(found[name]) for name in PARTS] == [len(parts[name]) for name in PARTS]
    files = open_table(parquet(LOG, files=1, group=130))
    assert members(cut(files, how)) == found
    assert members(cut(files.load(), how)) == found


def test_rows_of_several_files_are_split_alike_from_memory(parquet):
    table = open_table(parquet(LOG, files=3))
    assert members(cut(table, "random")) == members(cut(table.load(), "random"))


def test_time_goes_on_from_part_to_part():
    parts = cut(FrameTable(LOG.sample(frac=1, random_state=0)), "time")
    ends = [(part.frame()["when"].min(), part.frame()["when"].max()) for part in parts.values()]
    assert ends[0][1] < ends[1][0] <= ends[1][1] < ends[2][0]
    assert [len(part) / 2000 for part in parts.values()] == pytest.approx(SHARES, abs=0.01)


def test_users_are_in_one_part():
    parts = cut(FrameTable(LOG), "user")
    users = [set(part.frame()["user"]) for part in parts.values()]
    assert not users[0] & users[1]
    assert not users[0] & users[2]
    assert not users[1] & users[2]


def test_chance_keeps_its_shares_and_follows_the_seed():
    frame = pd.DataFrame({"row": np.arange(50_000)})
    parts = cut(FrameTable(frame), "random")
    assert [len(part) / 50_000 for part in parts.values()] == pytest.approx(SHARES, abs=0.01)
    assert members(cut(FrameTable(frame), "random", seed=2))["val"] != members(parts)["val"]
    assert abs(np.corrcoef(members(parts)["val"][:-1], members(parts)["val"][1:])[0, 1] - 1) < 0.01  # spread evenly


def test_counting_reads_no_more_than_it_must(parquet, monkeypatch):
    table = open_table(parquet(LOG))
    asked = []
    chunks = table.chunks
    monkeypatch.setattr(
        table, "chunks", lambda unit, columns, rows: asked.append(columns) or chunks(unit, columns, rows)
    )
    assert len(cut(table, "time")["train"]) > 0
    assert {tuple(columns) for columns in asked} == {("when",)}


def test_times_are_numbers_or_dates():
    dates = pd.Series(["2022-05-01", "2022-05-02 10:00:00", "2022-05-02T10:00:01"])
    assert (np.diff(times(dates)) > 0).all()
    assert np.array_equal(times(dates), times(pd.to_datetime(dates, format="ISO8601")))
    with pytest.raises(UserError, match=r"^column 't', row 1: is empty; fill it in"):
        times(pd.Series([1.0, np.nan], name="t"))
    with pytest.raises(UserError, match=r"^column 't', row 1: 'soon' is no time; write 2024-05-31"):
        times(pd.Series(["2022-01-01", "soon"], name="t"))


def test_what_cannot_be_split():
    with pytest.raises(UserError, match=r"^data.split=time: the schema says no time column"):
        split(FrameTable(LOG), "time", SHARES, 0)
    with pytest.raises(UserError, match="no column 'who'"):
        split(FrameTable(LOG), "user", SHARES, 0, user="who")
    with pytest.raises(UserError, match=r"^data.split=time: too many rows have one time in column 'when'"):
        cut(FrameTable(LOG.assign(when=5)), "time")
    with pytest.raises(UserError, match=r"^data.split=random: no row is left for .*; change data.shares"):
        cut(FrameTable(LOG.iloc[:1]), "random")


def test_numbers_of_users():
    numbers = user_numbers(pd.Series(["a", None, "b", "a"]))
    assert numbers[0] == numbers[3] != numbers[2]
    assert numbers[1] == -1
    assert user_numbers(pd.Series([4.0, np.nan])).tolist() == [4, -1]
