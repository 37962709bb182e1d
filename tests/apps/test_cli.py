"""The command line: help, errors, and where settings come from."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from apps import tree
from apps.cli import App, main
from apps.errors import UserError
from apps.verbs import VERBS
from apps.vision import APP
from apps.vision.settings import VisionConfig
from moecore.files import write_atomic
from tests.apps.processes import start

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Recorder(App):
    """The vision app, but its verbs only note what they are given, or raise what they are told to."""

    calls: list[Any] = field(default_factory=list)
    error: BaseException | None = None

    def call(self, verb, config, args, source):
        self.calls.append((verb, config, args, source))
        if self.error is not None:
            raise self.error


@pytest.fixture
def recorder() -> Recorder:
    return Recorder("vision", "title", VisionConfig)


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"]])
def test_help_is_quick_and_imports_no_torch(argv):
    command = [sys.executable, "-X", "importtime", "-m", "apps.vision", *argv]
    before = os.times()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    after = os.times()
    assert done.returncode == 0
    assert "apps.vision" in done.stdout
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "jsonargparse" in imported
    assert not imported & {"torch", "lightning", "timm", "optuna", "onnx", "matplotlib"}
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < 3


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_overview_names_every_verb(cli, argv):
    done = cli(*argv)
    assert (done.code, done.err) == (0, "")
    for name, verb in APP.verbs.items():
        assert re.search(rf"^  {name} +{re.escape(verb.__doc__.splitlines()[0])}$", done.out, re.M)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_lists_its_settings_with_their_words(cli, verb):
    done = cli(verb, "--help")
    assert (done.code, done.err) == (0, "")
    for name in [*tree.flatten(tree.plain(VisionConfig())), *APP.verbs[verb].__dataclass_fields__]:
        assert re.search(rf"--{re.escape(name)}\b|^  {name}\b", done.out, re.M), name
    words = " ".join(done.out.split())
    assert "Routed experts per layer." in words
    assert "Peak learning rate" in words


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["tain"], r"verb='tain': did you mean train\?"),
        (["frobnicate"], r"verb='frobnicate': choose one of train, .*benchmark"),
        (["train", "--model.moe.num_expert=4"], r"--model.moe.num_expert=4: .*did you mean --model.moe.num_experts\?"),
        (["train", "--learning_rate", "1"], r"--learning_rate: unknown setting; --help lists them"),
        (["train", "stray"], r"stray: unknown setting; .*"),
        (["train", "--model.moe.num_exp", "4"], r"--model.moe.num_exp: unknown setting; did you mean .*num_experts\?"),
        (["train", "--trainer.max_ep", "4"], r"--trainer.max_ep: unknown setting; did you mean --trainer.max_epochs\?"),
        (["train", "--model.moe.num_experts", "four"], r"model.moe.num_experts=four: expected a int"),
        (["train", "--trainer.max_epochs", "1.5"], r"trainer.max_epochs=1.5: expected a int"),
        (["train", "--model.share_router", "maybe"], r"model.share_router=maybe: expected a bool"),
        (["train", "--data.dataset", "mnist"], r"data.dataset=mnist: expected one of 'digits', .*'cityscapes'"),
        (["train", "--model.moe.unit", "image"], r"model.moe.unit=image: expected one of 'token', .* or a int"),
        (["train", "--data.crop_scale", "1"], r"data.crop_scale=1: expected a tuple"),
        (["train", "--model.moe.num_experts", "0"], r"model.moe.num_experts=0: must be at least 1"),
        (["train", "--model.moe.top_k=9"], r"model.moe.top_k=9: must not exceed num_experts=8"),
        (["train", "--model.moe.aux_loss", "{swich: 1}"], r"model.moe.aux_loss='swich': choose one of .*switch.*"),
        (["train", "--run.name", "a/b"], r"run.name='a/b': is a folder name: .*"),
        (["train", "--trainer.max_epochs", "0"], r"trainer.max_epochs=0: must be at least 1 .*"),
        (["train", "--trainer.limit_train_batches", "0"], r"trainer.limit_train_batches=0: must be positive, or null"),
        (["train", "--label_smoothing", "1"], r"label_smoothing=1.0: must lie in \[0, 1\)"),
        (["train", "--data.dataset", "folder"], r"data.root=None: give the folder of images"),
        (["train", "--optim.lr", "0"], r"optim.lr=0.0: must be positive.*"),
        (["search", "--num_trials", "0"], r"num_trials=0: must be at least 1"),
        (["benchmark", "--batch_sizes", "[0]"], r"batch_sizes=\[0\]: must be positive numbers"),
        (["export", "--ckpt_path", "x", "--format", "tflite"], r"format=tflite: expected one of .*'onnx'.*"),
        (["evaluate"], r"--ckpt_path: is required; --help says what to give"),
        (["evaluate", "--ckpt_path", "nowhere"], r"ckpt_path=nowhere: no such checkpoint or run folder"),
        (["train", "-c", "nowhere.yaml"], r"config: File does not exist: .*nowhere.yaml'"),
    ],
)
def test_mistakes_are_one_line_that_names_field_value_and_remedy(cli, argv, line):
    done = cli(*argv)
    assert re.fullmatch(line, done.line)
    assert done.out == ""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: {moe: {num_expert: 4}}", r"model.moe.num_expert: unknown .*did you mean --model.moe.num_experts\?"),
        ("optimizer: {lr: 1}", r"optimizer.lr: unknown setting; did you mean --optim.lr\?"),
        ("model: {moe: {num_experts: four}}", r"model.moe.num_experts=four: expected a int"),
        ("model: {moe: {num_experts: 0}}", r"model.moe.num_experts=0: must be at least 1"),
        ("model: {moe: {num_experts: 2, top_k: 3}}", r"model.moe.top_k=3: must not exceed num_experts=2"),
        ("model: 3", r"model=3: is a section; give its settings"),
        ("run: fast", r"run: Unable to load config .fast.*"),
        ("- 1", r"config: must be a YAML file of settings by their names"),
        ("model: [", r"Problems parsing config: .*line \d.*"),
        (b"\xff\xfe\x00", r"config: not a text file .*"),
    ],
)
def test_mistakes_in_a_file_are_one_line(cli, tmp_path, text, line):
    file = tmp_path / "settings.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert re.fullmatch(line, cli("train", "-c", file).line)


def test_an_error_leaves_a_real_process_with_code_2_and_one_line(tmp_path):
    command = start(["train", "--model.moe_layers", "9", "--run.root", str(tmp_path)], tmp_path / "log")
    assert command.wait() == 2
    assert re.fullmatch(r"error: model.moe_layers='9': the model has layers 0 to 3\n", command.err)
    assert not list(tmp_path.glob("vision/*"))


def test_flags_go_over_file_and_file_over_defaults(recorder, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {moe: {num_experts: 4, top_k: 1}}\ntrainer: {max_epochs: 7}\n")
    assert main(recorder, ["train", "--trainer.max_epochs", "8", "-c", str(file), "--model.depth=3"]) == 0
    ((verb, config, args, source),) = recorder.calls
    assert (verb, source, args.ckpt_path) == ("train", str(file), None)
    assert (config.model.moe.num_experts, config.model.moe.top_k, config.model.depth) == (4, 1, 3)
    assert config.trainer.max_epochs == 8
    assert config.data == VisionConfig().data


def test_values_of_all_kinds_reach_the_settings(recorder):
    argv = ["--model.moe.select_options={num_groups: 2}", "--model.moe.aux_loss={z: 0.1}", "--optim.betas=[0.8,0.9]"]
    argv += ["--trainer.limit_val_batches=0.5", "--trainer.val_check_interval=3", "--trainer.devices=0,1"]
    argv += ["--model.moe.unit=4", "--data.num_workers=null", "--optim.ema_decay", "null", "--batch_sizes=[1,2]"]
    assert main(recorder, ["benchmark", *argv]) == 0
    ((_, config, args, _),) = recorder.calls
    moe, trainer = config.model.moe, config.trainer
    assert (moe.select_options, moe.aux_loss, moe.unit) == ({"num_groups": 2}, {"z": 0.1}, 4)
    assert config.optim.betas == (0.8, 0.9)
    assert (trainer.limit_val_batches, trainer.val_check_interval, trainer.devices) == (0.5, 3, "0,1")
    assert config.optim.ema_decay is config.data.num_workers is None
    assert args.batch_sizes == [1, 2]


def test_print_config_is_a_file_that_reads_back(recorder, cli, tmp_path):
    done = cli("train", "--model.depth=3", "--optim.betas=[0.8,0.9]", "--print_config")
    assert (done.code, done.err) == (0, "")
    (tmp_path / "printed.yaml").write_text(done.out)
    assert main(recorder, ["train", "-c", str(tmp_path / "printed.yaml")]) == 0
    config = recorder.calls[0][1]
    assert (config.model.depth, config.optim.betas) == (3, (0.8, 0.9))
    assert set(yaml.safe_load(done.out)) >= {"model", "data", "optim", "trainer", "run", "label_smoothing"}


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("two\nlines"), 2, "error: two lines\n"),
        (OSError(28, "No space left on device", "a.ckpt"), 2, "error: disk: No space left .* while writing a.ckpt.*\n"),
        (OSError(27, "File too large"), 2, "error: disk: File too large while writing results.*\n"),
        (FileExistsError(17, "File exists", "out"), 2, "error: out: File exists; give another path\n"),
        (IsADirectoryError(21, "Is a directory", "out"), 2, "error: out: Is a directory; give another path\n"),
        (PermissionError(13, "Permission denied", "out"), 2, "error: out: Permission denied; give another path\n"),
        (OSError(30, "Read-only file system", "out"), 2, "error: out: Read-only file system; give another path\n"),
        (OSError(36, "File name too long", "out"), 2, "error: out: File name too long; give another path\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
)
def test_what_ends_a_verb_becomes_exit_code_and_line(capsys, error, code, line):
    assert main(Recorder("vision", "title", VisionConfig, error=error), ["train"]) == code
    assert re.fullmatch(line, capsys.readouterr().err)


def test_bugs_are_not_hidden():
    for error in (ValueError("a bug"), OSError(5, "Input/output error"), FileNotFoundError(2, "of no file")):
        with pytest.raises(type(error)):
            main(Recorder("vision", "title", VisionConfig, error=error), ["train"])


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("/proc/a.json", "/proc/a.json: No such file or directory; give another path"),
        ("{}/file/a.json", "{}/file: File exists; give another path"),
        ("{}/file/deep/a.json", "{}/file/deep: Not a directory; give another path"),
        ("{}/" + "n" * 250, "{}/" + "n" * 250 + ": File name too long; give another path"),
    ],
)
def test_where_nothing_can_be_written_another_path_is_asked_for(capsys, tmp_path, path, line):
    (tmp_path / "file").write_text("")

    class Writer(Recorder):
        def call(self, verb, config, args, source):
            write_atomic(path.format(tmp_path), "words")

    assert main(Writer("vision", "title", VisionConfig), ["train"]) == 2
    assert capsys.readouterr().err == f"error: {line.format(tmp_path)}\n"


@pytest.mark.parametrize(
    ("verb", "saved", "resumed", "advised"),
    [
        ("train", None, False, False),  # before anything was saved
        ("train", "before", False, False),  # by another run
        ("train", "now", False, True),
        ("train", "before", True, True),
        ("benchmark", "now", False, False),
    ],
)
def test_an_interrupted_training_is_said_to_go_on_if_it_can(capsys, tmp_path, verb, saved, resumed, advised):
    checkpoint = tmp_path / "vision" / "mine" / "checkpoints" / "last.ckpt"
    if saved:
        write_atomic(checkpoint, "weights")
        os.utime(checkpoint, (1e9, 1e9))

    class Interrupted(Recorder):
        def call(self, verb, config, args, source):
            if saved == "now":
                os.utime(checkpoint)
            raise KeyboardInterrupt

    argv = [verb, f"--run.root={tmp_path}", *(["--ckpt_path=last"] if resumed else [])]
    assert main(Interrupted("vision", "title", VisionConfig), argv) == 130
    words = "; `--ckpt_path last` continues a training run" if advised else ""
    assert capsys.readouterr().err == f"\ninterrupted{words}\n"
