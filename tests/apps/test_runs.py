"""Run folders and checkpoints: where they are, which one is meant, and loading them safely."""

from __future__ import annotations

import io
import os
import pickle
import re
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from apps.errors import UserError
from apps.runs import BEST, LAST, Runs, load_checkpoint, load_plain, run_folder


@pytest.fixture
def runs(tmp_path) -> Runs:
    return Runs(str(tmp_path), "vision")


def put(folder: Path, *names: str, age: int = 0) -> Path:
    for name in names:
        file = folder / "checkpoints" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.utime(file, (1e9 - age, 1e9 - age))
    return folder


def test_a_taken_name_gets_a_number(runs):
    assert [runs.create("a").name for _ in range(3)] == ["a", "a-2", "a-3"]
    assert all(path.is_dir() for path in runs.folder.iterdir())


def test_runs_started_at_once_get_folders_of_their_own(runs):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(runs.create, ["same"] * 24))
    assert len(set(folders)) == 24


def test_last_is_the_newest_run_with_a_checkpoint(runs):
    put(runs.create("a"), LAST, age=5)
    newest = put(runs.create("b"), LAST, age=1)
    runs.create("c")  # has none yet
    assert runs.checkpoint("last", None) == newest / "checkpoints" / LAST
    assert runs.checkpoint("last", "a").parent.parent.name == "a"


def test_last_of_a_name_means_its_numbered_runs_and_no_others(runs):
    for i, name in enumerate(["cifar-small", "cifar-2x", "cifar-2", "cifar"]):
        put(runs.folder / name, LAST, age=i)
    assert runs.newest("cifar").name == "cifar-2"
    assert runs.newest("cifar-small").name == "cifar-small"


def test_a_run_folder_means_its_best_or_when_resuming_its_last_checkpoint(runs):
    both, last_only = put(runs.create("a"), BEST, LAST), put(runs.create("b"), LAST)
    assert runs.checkpoint(str(both), None).name == BEST
    assert runs.checkpoint(str(both), None, resume=True).name == LAST
    assert runs.checkpoint(str(last_only), None).name == LAST
    assert runs.checkpoint(str(both / "checkpoints" / LAST), None) == both / "checkpoints" / LAST


@pytest.mark.parametrize(
    ("spec", "name", "line"),
    [
        ("last", None, r"ckpt_path=last: no run with a checkpoint in .*"),
        ("last", "x", r"ckpt_path=last: no run named x with a checkpoint in .*"),
        ("nowhere", None, r"ckpt_path=nowhere: no such checkpoint or run folder"),
    ],
)
def test_nothing_there_is_said(runs, spec, name, line):
    with pytest.raises(UserError, match=f"^{line}$"):
        runs.checkpoint(spec, name)


def test_the_run_of_a_checkpoint():
    assert run_folder(Path("r/a/checkpoints/best.ckpt")) == Path("r/a")
    assert run_folder(Path("elsewhere/model.ckpt")) == Path("elsewhere")


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def write_with_torch(payload: object, path: Path) -> None:
    torch.save({"state_dict": {}, "config": payload}, path)


def write_with_old_torch(payload: object, path: Path) -> None:
    torch.save({"config": payload}, path, _use_new_zipfile_serialization=False)


def write_with_pickle(payload: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(payload))


@pytest.mark.parametrize("write", [write_with_torch, write_with_old_torch, write_with_pickle])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path, write):
    write(Payload(tmp_path / "executed"), tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match=r"evil\.ckpt: refused, it holds pickled objects that would run code; save "):
        load_plain(tmp_path / "evil.ckpt")
    assert not (tmp_path / "executed").exists()


def test_the_payload_would_have_worked(tmp_path):
    write_with_pickle(Payload(tmp_path / "executed"), tmp_path / "evil.ckpt")
    pickle.loads((tmp_path / "evil.ckpt").read_bytes())  # noqa: S301
    assert (tmp_path / "executed").is_dir()


def test_modules_are_refused_like_all_objects(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(UserError, match="refused, it holds pickled objects"):
        load_plain(tmp_path / "module.pt")


def test_plain_data_comes_back(tmp_path):
    data = {"a": torch.arange(3), "b": [1, 2.5, None, "x"], "c": OrderedDict(d=(True, {"e": torch.float32}))}
    torch.save(data, tmp_path / "good.ckpt")
    loaded = load_plain(tmp_path / "good.ckpt")
    assert torch.equal(loaded.pop("a"), data.pop("a"))
    assert loaded == data


def whole_checkpoint() -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": {"w": torch.arange(500.0)}, "config": {"a": 1}, "app": "vision"}, file)
    return file.getvalue()


WHOLE = whole_checkpoint()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, len(WHOLE) - 1), flip=st.lists(st.integers(0, len(WHOLE) - 1), max_size=3), junk=st.binary())
def test_damage_of_any_kind_is_one_line(tmp_path, cut, flip, junk):
    damaged = bytearray(WHOLE)
    for i in flip:
        damaged[i] ^= 0xFF
    for content in (WHOLE[:cut], bytes(damaged), junk, junk + b"."):
        (tmp_path / "x.ckpt").write_bytes(content)
        try:
            load_plain(tmp_path / "x.ckpt")
        except UserError as error:
            assert re.match(r"^\S+x\.ckpt: (not a checkpoint, or damaged|refused, )", str(error))  # noqa: PT017


@pytest.mark.parametrize("content", [b"", b"hello, this is text\n" * 9, b"\x89PNG\r\n\x1a\n", b"<html>", WHOLE[:1500]])
def test_what_is_no_checkpoint_is_not_called_a_pickle(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.ckpt: not a checkpoint, or damaged$"):
        load_plain(tmp_path / "x.ckpt")


def test_weights_alone_are_sent_where_they_belong(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"w\.safetensors: [^\n]*--model\.pretrained"):  # newer torch can read the file
        load_checkpoint(tmp_path / "w.safetensors", "vision")
    torch.save({"w": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth: holds no moecore run; plain weights go to --model\.pretrained$"):
        load_checkpoint(tmp_path / "w.pth", "vision")


def test_a_checkpoint_belongs_to_its_app(tmp_path):
    torch.save({"state_dict": {}, "config": {}, "app": "timeseries"}, tmp_path / "t.ckpt")
    with pytest.raises(UserError, match=r"t\.ckpt: belongs to apps\.timeseries, not to apps\.vision$"):
        load_checkpoint(tmp_path / "t.ckpt", "vision")
    assert load_checkpoint(tmp_path / "t.ckpt", "timeseries")["config"] == {}


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(UserError, match=r"none\.ckpt: no such file$"):
        load_plain(tmp_path / "none.ckpt")
