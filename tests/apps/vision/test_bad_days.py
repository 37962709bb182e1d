"""What goes wrong ends in one line that says what to do, and what was good stays good."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from apps.verbs import VERBS
from tests.apps.processes import start

LOADING = [verb for verb in VERBS if verb not in ("train", "search")]


def needed(verb: str, tmp_path: Path) -> list[str]:
    """Arguments that a verb needs besides a checkpoint."""
    return ["--input", str(tmp_path)] if verb == "predict" else []


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def checkpoint(tiny_run, tmp_path):
    """A copy of the trained checkpoint, changed by a function of its content, and where it is."""

    def make(change=lambda content: content) -> Path:
        content = change(torch.load(tiny_run / "checkpoints" / "best.ckpt", weights_only=True))
        torch.save(content, tmp_path / "x.ckpt")
        return tmp_path / "x.ckpt"

    return make


@pytest.mark.parametrize("verb", [*LOADING, "train"])
def test_a_checkpoint_with_code_is_refused_and_the_code_does_not_run(cli, checkpoint, tmp_path, verb):
    evil = checkpoint(lambda content: content | {"hyper_parameters": Payload(tmp_path / "executed")})
    done = cli(verb, "--ckpt_path", evil, *needed(verb, tmp_path))
    assert done.line.startswith(f"{evil}: refused, it holds pickled objects that would run code; ")
    assert not (tmp_path / "executed").exists()


def test_a_truncated_checkpoint_is_named(cli, checkpoint, tmp_path):
    file = checkpoint()
    content = file.read_bytes()
    for share in (0.0, 0.001, 0.3, 0.9, 0.999):
        file.write_bytes(content[: int(share * len(content))])
        assert cli("evaluate", "--ckpt_path", file).line == f"{file}: not a checkpoint, or damaged"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda c: c | {"app": "timeseries"}, r"belongs to apps\.timeseries, not to apps\.vision"),
        (lambda c: c["state_dict"], r"holds no moecore run; plain weights go to --model\.pretrained"),
        (lambda c: [1, 2], r"holds no moecore run; .*"),
        (
            lambda c: c | {"config": c["config"] | {"colour": "red"}},
            r"colour: the checkpoint has this setting, this version does not know it",
        ),
        (
            lambda c: c | {"state_dict": {k: v for k, v in c["state_dict"].items() if "head" not in k}},
            r"of another architecture \(\d+ tensors differ; .* is absent there, .*",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_one_line(cli, checkpoint, change, line):
    assert re.search(line, cli("evaluate", "--ckpt_path", checkpoint(change)).line)


def test_settings_that_a_checkpoint_of_an_earlier_version_lacks_get_defaults(cli, checkpoint):
    def older(content):
        for section, name in (("model", "stem"), ("data", "on_error"), ("run", "threads")):
            del content["config"][section][name]
        return content

    done = cli("evaluate", "--ckpt_path", checkpoint(older), "--model.stem=auto")
    assert done.code == 0, done.err


@pytest.mark.parametrize("verb", ["evaluate", "train"])
def test_a_safetensors_file_is_no_run(cli, tiny_run, tmp_path, verb):
    state = torch.load(tiny_run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "w.safetensors")
    assert "--model.pretrained" in cli(verb, "--ckpt_path", tmp_path / "w.safetensors").line


def test_nan_stops_training_names_the_step_and_keeps_the_last_good_checkpoint(cli, tiny, tmp_path, load):
    argv = tiny(tmp_path, optim__lr=1e30, trainer__gradient_clip_val="null", trainer__limit_train_batches=20)
    line = cli("train", *argv, "--run.checkpoint_every=1", "--run.name=nan").line
    step = int(re.match(r"step (\d+): loss or gradients are (NaN|infinite); training stopped, ", line)[1])
    assert f"the last good checkpoint is {tmp_path}/vision/nan/checkpoints/last.ckpt" in line
    checkpoint = load(tmp_path / "vision" / "nan")
    assert checkpoint["global_step"] == step > 0
    assert (tmp_path / "vision" / "nan" / "metrics.csv").is_file()
    assert not (tmp_path / "vision" / "nan" / "test.json").exists()


def test_a_weight_that_is_infinite_is_found_in_the_first_batch(cli, train, tiny, tmp_path, load):
    run = train(tmp_path, run__name="broken")
    content = load(run)
    content["state_dict"]["model.backbone.blocks.0.mlp.experts.w1"] = None
    names = [name for name, value in load(run)["state_dict"].items() if "mlp.experts" in name and value.dim() == 3]
    content = load(run)
    content["state_dict"][names[0]].fill_(float("inf"))
    torch.save(content, run / "checkpoints" / "last.ckpt")
    argv = tiny(tmp_path, run__name="broken", trainer__max_epochs=2)
    assert cli("train", *argv, "--ckpt_path", "last").line.startswith("step 3: loss or gradients are ")


FULL = r"error: disk: (No space left on device|File too large) while writing .*; free some space, .*\n"


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of some KiB; skips where that is not allowed."""
    mounted = []

    def mount(kib: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk is not allowed here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def size_of(run: Path) -> int:
    return (run / "checkpoints" / "last.ckpt").stat().st_size


def test_a_full_disk_is_one_line_and_what_was_written_is_good(train, tiny, tmp_path, small_disk, load):
    size = size_of(train(tmp_path, run__name="measure"))
    disk = small_disk(int(2.5 * size / 1024))  # room for two checkpoints, not for a third beside them
    argv = tiny(disk, run__name="full", trainer__max_epochs=3)
    command = start(["train", *argv], tmp_path / "log")
    assert command.wait() == 2
    assert re.fullmatch(FULL, command.err)
    assert load(disk / "vision" / "full")["global_step"] == 3
    assert not list(disk.rglob("*.part"))


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_a_file_that_may_not_grow_is_one_line_and_the_one_before_stays(train, tiny, tmp_path, load, share):
    """What a quota does, and allowed everywhere."""
    run = train(tmp_path, run__name="quota")
    before = load(run)["global_step"]
    argv = tiny(tmp_path, run__name="quota", trainer__max_epochs=3)
    command = start(["train", *argv, "--ckpt_path", "last"], tmp_path / "log", file_size=int(share * size_of(run)))
    assert command.wait() == 2
    assert re.fullmatch(FULL, command.err)
    assert load(run)["global_step"] == before
    assert not list(run.rglob("*.part"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != int(share * size_of(run))


def test_a_report_that_cannot_be_written_leaves_the_one_before(tiny_run, tmp_path):
    target = tmp_path / "report.html"
    target.write_text("good")
    argv = ["report", "--ckpt_path", str(tiny_run), "--output", str(target)]
    command = start(argv, tmp_path / "log", file_size=100_000)
    assert command.wait() == 2
    assert re.fullmatch(FULL, command.err)
    assert target.read_text() == "good"


@pytest.mark.parametrize(
    ("make", "options", "line"),
    [
        (lambda root, draw: root.mkdir(), {}, r"data\.root=.*: no images; .*"),
        (lambda root, draw: draw(root / "cat", 9), {}, r"data\.root=.*: only the class 'cat'; .*"),
        (lambda root, draw: None, {}, r"data\.root=.*: no such folder or archive"),
        (lambda root, draw: [draw(root / c, 2) for c in ("cat", "dog")], {}, r"class 'cat': 2 training image\(s\); .*"),
    ],
)
def test_data_that_cannot_train_are_one_line_and_make_no_run(cli, tiny, draw, tmp_path, make, options, line):
    make(tmp_path / "images", draw)
    argv = tiny(tmp_path, data__dataset="folder", data__root=tmp_path / "images", **options)
    assert re.fullmatch(line, cli("train", *argv).line)
    assert not (tmp_path / "vision").exists()


@pytest.mark.parametrize("size", [(12, 12), (40, 30)])
def test_a_truncated_image_is_named_or_skipped_and_counted(cli, tiny, draw, tmp_path, size):
    for number, name in enumerate(["cat", "dog"]):
        for split in ("train", "val", "test"):
            draw(tmp_path / "images" / split / name, 6, number, size=size)
    bad = [tmp_path / "images" / split / "dog" / "2.png" for split in ("train", "val", "test")]
    for file in bad:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    argv = tiny(tmp_path, data__dataset="folder", data__root=tmp_path / "images", data__image_size=12)
    argv += ["--data.num_workers=0", "--data.batch_size=4", "--trainer.limit_train_batches=null"]
    line = cli("train", *argv).line
    assert any(line.startswith(f"{file}: unreadable image (") for file in bad)
    assert line.endswith("mend it, or --data.on_error skip")
    done = cli("train", *argv, "--data.on_error", "skip", "--trainer.max_epochs=2", "--run.report=true")
    assert done.code == 0, done.err
    assert re.search(r"skipped_images +3\n", done.out)
    assert re.search(r"\bimages +11\n", done.out)
