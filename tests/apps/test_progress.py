"""Progress: a bar on a terminal, lines in a log file; and nothing where it is not wanted."""

from __future__ import annotations

import io
import re
import sys

import pytest

from apps.cli import main
from apps.progress import track
from apps.vision import APP


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("show", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
def test_items_come_through_and_a_bar_only_on_a_terminal(monkeypatch, show, terminal):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(track(range(5), "counting", show)) == [0, 1, 2, 3, 4]
    assert ("counting" in stream.getvalue()) == (show and terminal)


def test_a_log_file_gets_a_line_per_validation(cli, tiny, tmp_path):
    done = cli("train", *tiny(tmp_path, trainer__enable_progress_bar="true", trainer__max_epochs=2))
    assert (done.code, done.err) == (0, "")
    lines = re.findall(r"^epoch (\d+), step (\d+): loss=[\d.]+, val/accuracy=[\d.]+ \(\d+ s\)$", done.out, re.M)
    assert lines == [("1", "3"), ("2", "6")]


def test_a_terminal_gets_a_bar_over_the_whole_training(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", Terminal())
    argv = tiny(tmp_path, trainer__enable_progress_bar="true", trainer__max_steps=4, trainer__max_epochs=2)
    assert main(APP, ["train", *argv]) == 0
    assert "4/4" in sys.stderr.getvalue()
    assert not re.search(r"^epoch", capsys.readouterr().out, re.M)
