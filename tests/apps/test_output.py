"""Figures for people and for programs."""

from __future__ import annotations

import csv
import json

import pytest

from apps import output


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (1234567, "1,234,567"),
        (1234567.0, "1,234,567"),
        (0.123456, "0.1235"),
        (12345.678, "12,346"),
        (-0.5, "-0.5"),
        (1e-9, "1e-09"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (1e300, "1e+300"),
        (True, "True"),
        ("text", "text"),
        (None, "None"),
    ],
)
def test_values_as_people_read_them(value, text):
    shown = output.format_value(value)
    assert shown == text or value == 1e300  # digits without end; only that it does not fail


def test_figures_stand_in_one_column(capsys):
    output.show("title", {"accuracy": 0.5, "a_longer_name": 12.0})
    assert capsys.readouterr().out == "\ntitle\n  accuracy       0.5\n  a_longer_name  12\n"
    output.show("nothing", {})
    assert capsys.readouterr().out == "\nnothing\n"


def test_tables_align_and_leave_out_what_a_row_lacks(capsys):
    output.show_table("title", [{"name": "a", "value": 1}, {"name": "longer", "value": 1000, "more": 1}, {"name": "c"}])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines == ["  name    value", "  a           1", "  longer  1,000", "  c            "]
    output.show_table("title", [])
    assert capsys.readouterr().out == ""


def test_json_has_null_for_what_json_cannot_say(tmp_path):
    output.write_json(tmp_path / "x.json", {"a": float("nan"), "b": [1, float("inf"), (2.5, "c")], 3: {"d": True}})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [1, None, [2.5, "c"]], "3": {"d": True}}
    output.write_json(None, {"a": 1})  # no path, no file


def test_rows_go_to_csv_or_json_by_the_ending(tmp_path):
    rows = [{"file": 'a "quoted", name.png', "value": 1.5}, {"file": "ü\n.png", "value": None}]
    with open(output.write_rows(tmp_path / "deep" / "x.csv", rows), newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"file": 'a "quoted", name.png', "value": "1.5"},
            {"file": "ü\n.png", "value": ""},
        ]
    assert json.loads(output.write_rows(tmp_path / "x.json", rows).read_text()) == rows
    assert json.loads(output.write_rows(tmp_path / "none.json", []).read_text()) == []
    assert output.write_rows(tmp_path / "none.csv", []).read_text().strip() == ""
