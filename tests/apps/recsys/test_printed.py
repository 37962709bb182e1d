"""Lists as text files have them."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from apps.errors import UserError
from apps.recsys.columns import read_lists

VALUES = [['item,1 "x"', "b"], ["it's", "c d", "[e]"], [], ["b"], None]
NUMBERS = [[101, 7], [], [-5], [3, 2, 1], None]


def read(texts, separator: str = ",") -> list[list[str | None]]:
    lists = read_lists(pd.Series(texts, dtype=object, name="seen"), separator)
    ends = np.cumsum(lists.lengths)
    values = lists.ids.as_text().to_pylist()
    parts = [values[end - n : end] for end, n in zip(ends, lists.lengths, strict=True)]
    return [[value for value in part if value is not None] for part in parts]


@pytest.mark.parametrize(
    "write", [str, json.dumps, lambda v: str(np.array(v, object)), lambda v: str(np.array(v)), lambda v: str(tuple(v))]
)
@pytest.mark.parametrize("separator", [",", "|"])
@pytest.mark.parametrize("rows", [VALUES, NUMBERS])
def test_printed_lists_are_those_that_were_printed(write, separator, rows):
    texts = [None if row is None else write(row) for row in rows]
    assert read(texts, separator) == [[str(value) for value in row or []] for row in rows]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("[1. 2.]", ["1", "2"]),
        ("[ 1  2\n 30]", ["1", "2", "30"]),
        ("['a' 'b'\n 'c']", ["a", "b", "c"]),
        ("['a' None]", ["a"]),
        (r"['it\'s' 'b']", ["it's", "b"]),
        ("[New York, Oslo]", ["New York", "Oslo"]),
        ("[Oslo]", ["Oslo"]),
    ],
)
def test_as_numpy_and_people_write_them(text, values):
    assert read([text]) == [values]


def test_text_with_a_separator_keeps_its_brackets_and_quotes():
    assert read(['Drama (US)|item,1 "x"', "(a)|(b)", "'a' | 'b'"], "|") == [
        ["Drama (US)", 'item,1 "x"'],
        ["(a)", "(b)"],
        ["a", "b"],
    ]
    assert read(["[New York|Oslo]", "[New York]"], "|") == [["New York", "Oslo"], ["New York"]]


@pytest.mark.parametrize("text", ["[New York]", "[1 2 ... 8 9]", "['a' b]", "['a' 'b', 'c']"])
def test_what_cannot_be_told_apart_is_one_line(text):
    with pytest.raises(UserError, match=r"^column 'seen', row 1: .* is a printed list .* write Parquet") as error:
        read(["[]", text.replace(" ", "\n ")])
    assert "\n" not in str(error.value)


def test_lists_of_integers_beyond_64_bits():
    assert read([[10**24, 5], [7]]) == [[str(10**24), "5"], ["7"]]


def test_text_with_another_separator_than_the_schema_says():
    column = pd.Series(["a|b|c", "b|c", "c"] * 20, name="seen")
    assert read_lists(column, "|").lengths[:3].tolist() == [3, 2, 1]
    with pytest.raises(UserError, match=r"column 'seen': no ',' in any row and '\|' in most; .* separator: '\|'"):
        read_lists(column, ",")
    assert len(read_lists(column[:6], ",").lengths) == 6  # too few to tell
    assert len(read_lists(pd.Series(["one value"] * 40, name="seen"), ",").lengths) == 40
