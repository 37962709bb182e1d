"""Where exports may go."""

from __future__ import annotations

import os

import pytest

from apps.errors import UserError
from apps.exporting import FOLDERS, SUFFIX, check_place, target
from apps.verbs import Export
from export.errors import ExportError
from export.notes import require_replaceable


@pytest.mark.parametrize("form", sorted(SUFFIX))
def test_files_and_folders_are_named_after_their_format(tmp_path, form):
    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"
    path = target(Export(str(checkpoint), form), checkpoint, "policy")
    assert path == tmp_path / "run" / f"policy{SUFFIX[form]}"


@pytest.mark.parametrize("form", ["hls4ml", "fpga"])
def test_only_empty_folders_and_earlier_exports_are_replaced(tmp_path, form):
    assert form in FOLDERS
    mine = tmp_path / "mine"
    mine.mkdir()
    arguments = Export("x.ckpt", form, str(mine))
    assert target(arguments, tmp_path / "x.ckpt") == mine
    (mine / "thesis.txt").touch()
    with pytest.raises(UserError, match=r"^output=.*mine: is there, and no folder that an export wrote; give another"):
        target(arguments, tmp_path / "x.ckpt")
    with pytest.raises(ExportError, match="thesis"):
        require_replaceable(mine / "thesis.txt")
    (mine / "manifest.json").touch()
    assert target(arguments, tmp_path / "x.ckpt") == mine


def test_places_where_no_file_can_be_are_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a folder; give the name of a file"):
        check_place(tmp_path, folder=False)
    with pytest.raises(UserError, match="file is no folder; give another path"):
        check_place(tmp_path / "file" / "deep" / "m.onnx", folder=False)
    with pytest.raises(UserError, match="is a folder"):
        target(Export("x.ckpt", json=str(tmp_path)), tmp_path / "x.ckpt")
    check_place(tmp_path / "new" / "deep" / "m.onnx", folder=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_places_that_may_not_be_written_are_refused_at_once(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="nothing can be written there"):
        check_place(tmp_path / "m.onnx", folder=False)
