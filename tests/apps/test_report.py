"""A page that needs nothing else."""

from __future__ import annotations

import re

import numpy as np
import pytest

from apps import figures
from apps.report import Page
from tests.apps import pages

NASTY = "<script>alert(1)</script> & \"quotes\" 'n' {{ 7 * 7 }} $x$"


def write(page: Page, path) -> str:
    return page.write(path).read_text()


def test_an_empty_page_is_a_page(tmp_path):
    text = write(Page("title", "subtitle", {}), tmp_path / "deep" / "report.html")
    page = pages.Page(text)
    page.check_self_contained()
    assert page.headings == ["title"]


def test_sections_figures_tables_and_key_figures_are_all_there(tmp_path):
    page = Page("title", "subtitle", {"accuracy": "97%", "params": "1 M"})
    page.section("Curves").figure(figures.curves({"loss": {"train": ([1, 2], [2.0, 1.0])}}), "The curve.").text(
        "Words."
    )
    page.section("Table").table([{"name": "a", "value": 1234.0}, {"name": "b", "value": 0.5}]).table([])
    page.section("Photo").figure(figures.confusion(np.eye(2, dtype=int), ["a", "b"]), "Pixels.", photo=True)
    text = write(page, tmp_path / "report.html")
    read = pages.Page(text)
    read.check_self_contained()
    assert read.headings == ["title", "Curves", "Table", "Photo"]
    assert read.links == ["#s1", "#s2", "#s3"]
    assert [source.split(";")[0] for source in read.sources] == ["data:image/svg+xml", "data:image/png"]
    assert read.cells == ["name", "value", "a", "1,234", "b", "0.5"]
    assert re.search(r"97%\s*accuracy\s*1 M\s*params", read.words)
    assert "The curve." in read.words
    assert text.count("class=number") == 2


def test_words_from_outside_are_words(tmp_path):
    page = Page(NASTY, NASTY, {NASTY: NASTY})
    page.section(NASTY).text(NASTY).table([{NASTY: NASTY}]).figure(
        figures.bars({NASTY: 1.0}, {NASTY: 0.5}, NASTY, NASTY), NASTY
    )
    text = write(page, tmp_path / "report.html")
    read = pages.Page(text)
    read.check_self_contained()
    assert "<script" not in text
    assert read.headings == [NASTY, NASTY]
    assert read.cells == [NASTY, NASTY]
    assert "49" not in read.headings[0]


def test_a_page_that_cannot_be_made_leaves_the_one_before(tmp_path):
    target = tmp_path / "report.html"
    write(Page("good", "", {}), target)
    before = target.read_text()

    class Broken(dict):
        def items(self):
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        Page("bad", "", Broken()).write(target)
    assert target.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
