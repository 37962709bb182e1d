"""Settings: what they refuse, in one line that names field, value and remedy; help without torch; files that parse."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from apps import tree
from apps.cli import make_parser
from apps.timeseries import APP
from apps.timeseries.settings import TimeseriesConfig
from apps.verbs import VERBS

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"]])
def test_help_is_quick_and_imports_no_torch(argv):
    command = [sys.executable, "-X", "importtime", "-m", "apps.timeseries", *argv]
    before = os.times()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    after = os.times()
    assert done.returncode == 0
    assert "apps.timeseries" in done.stdout
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "jsonargparse" in imported
    assert not imported & {"torch", "lightning", "pandas", "optuna", "onnx", "matplotlib"}
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < 3


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_lists_its_settings_with_their_words(ts, verb):
    done = ts(verb, "--help")
    assert (done.code, done.err) == (0, "")
    for name in [*tree.flatten(tree.plain(TimeseriesConfig())), *APP.verbs[verb].__dataclass_fields__]:
        assert re.search(rf"--{re.escape(name)}\b|^  {name}\b", done.out, re.M), name
    words = " ".join(done.out.split())
    assert "Points a model sees (lookback)." in words
    assert "Patches per segment in each block" in words


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["train", "--model.name=arima"], r"model.name=arima: expected one of 'segmoe', .*'seasonal_naive'"),
        (["train", "--data.horizn=4"], r"--data.horizn=4: .*did you mean --data.horizon\?"),
        (["train", "--data.context=0"], r"data.context=0: must be at least 1"),
        (["train", "--data.horizon=0"], r"data.horizon=0: must be at least 1"),
        (["train", "--data.test_horizons=[96,0]"], r"data.test_horizons=\(96, 0\): must be positive numbers"),
        (["train", "--data.season=0"], r"data.season=0: must be at least 1, or null"),
        (["train", "--data.min_context=200"], r"data.min_context=200: must lie between 1 and context=96, or be null"),
        (["train", "--data.corpora={train: 0}"], r"data.corpora=.*: shares must be positive"),
        (["train", "--data.split=random"], r"data.split=random: expected one of 'auto', .*"),
        (["train", "--model.segmoe.d_model=30"], r"model.segmoe.d_model=30: must be a multiple of 4 heads"),
        (["train", "--model.segmoe.d_model=12"], r"model.segmoe.num_heads=4: must leave an even width per head"),
        (["train", "--model.segmoe.num_kv_heads=3"], r"model.segmoe.num_kv_heads=3: must divide num_heads=4"),
        (["train", "--model.segmoe.segments=[]"], r"model.segmoe.segments=\(\): one length of at least 1 per block"),
        (["train", "--model.segmoe.segments=[3,0]"], r"model.segmoe.segments=\(3, 0\): one length .*"),
        (["train", "--model.segmoe.top_k=9"], r"model.segmoe.top_k=9: between 1 and 4"),
        (["train", "--model.segmoe.dropout=1"], r"model.segmoe.dropout=1.0: must lie in \[0, 1\)"),
        (["train", "--model.segmoe.temperature=0"], r"model.segmoe.temperature=0.0: must be positive"),
        (["train", "--model.segmoe.block=0"], r"model.segmoe.block=0: must be at least 1, or null"),
        (["train", "--model.segmoe.loss_horizons=[0]"], r"model.segmoe.loss_horizons=\(0,\): positive numbers"),
        (["train", "--model.timemoe.horizons=[2,8]"], r"model.timemoe.horizons=\(2, 8\): must rise from 1"),
        (["train", "--model.timemoe.top_k=99"], r"model.timemoe.top_k=99: between 1 and num_experts"),
        (["train", "--model.timemoe.num_experts=-1"], r"model.timemoe.num_experts=-1: must not be negative.*"),
        (["train", "--model.moirai_moe.top_k=9"], r"model.moirai_moe.top_k=9: between 1 and num_experts=8"),
        (["train", "--model.moirai_moe.d_model=8"], r"model.moirai_moe.num_heads=4: must leave an even width of .*"),
        (["train", "--model.ldl_moe.num_samples=1"], r"model.ldl_moe.num_samples=1: must be at least 2"),
        (["train", "--model.dlinear.kernel=4"], r"model.dlinear.kernel=4: must be odd and positive"),
        (["train", "--trainer.precision=bf16-true"], r"trainer.precision='?bf16-true'?: .* use 32-true, bf16-mixed .*"),
        (["evaluate"], r"ckpt_path: is required for model.name=segmoe; train first, then give `last`"),
        (["evaluate", "--ckpt_path", "nowhere"], r"ckpt_path=nowhere: no such checkpoint or run folder"),
        (["predict"], r"--input: is required.*"),
        (["predict", "--input=x.csv"], r"ckpt_path: is required for model.name=segmoe; .*"),
        (
            ["predict", "--input=x", "--quantiles=[0.1,1.5]"],
            r"quantiles=\(0.1, 1.5\): must lie strictly between 0 and 1",
        ),
        (["predict", "--input=x", "--quantiles=[0]"], r"quantiles=\(0.0,\): must lie strictly between 0 and 1"),
        (
            ["predict", "--input=x", "--quantiles=[0.1,0.1]"],
            r"quantiles=\(0.1, 0.1\): must be different from each other",
        ),
        (["predict", "--input=x", "--quantiles=most"], r"quantiles=most: expected a float"),
        (["predict", "--input=x", "--output=f.txt"], r"output='?f.txt'?: must end in .csv, .parquet or .json"),
        (["predict", "--input=x", "--horizon=0"], r"horizon=0: must be at least 1"),
        (["export"], r"--ckpt_path: is required.*"),
        (["report"], r"--ckpt_path: is required.*"),
        (["benchmark", "--batch_sizes=[0]"], r"batch_sizes=\[0\]: must be positive numbers"),
        (["search", "--num_trials=0"], r"num_trials=0: must be at least 1"),
    ],
)
def test_mistakes_are_one_line_that_names_field_value_and_remedy(ts, argv, line):
    done = ts(*argv)
    assert re.fullmatch(line, done.line), done.line
    assert done.out == ""


def test_values_of_all_kinds_reach_the_settings():
    argv = ["--model.segmoe.segments=[3,5,5]", "--data.corpora={synthetic: 0.5, my.csv: 2}", "--data.season=null"]
    argv += ["--data.futr_columns=[price,holiday]", "--data.test_horizons=[96,192]", "--model.segmoe.block=32"]
    config = tree.build(TimeseriesConfig, make_parser(APP, "train").parse_args(argv).as_dict())
    assert config.model.segmoe.segments == (3, 5, 5)
    assert config.data.corpora == {"synthetic": 0.5, "my.csv": 2}
    assert config.data.futr_columns == ("price", "holiday")
    assert (config.data.horizons, config.model.segmoe.block, config.data.season) == ((96, 192), 32, None)
    assert tree.restore(TimeseriesConfig, tree.plain(config)) == config  # as kept in checkpoints


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "timeseries").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_parses(file):
    given = yaml.safe_load(file.read_text())
    assert isinstance(given, dict)
    if file.stem.startswith("space"):
        return  # a search space: tests/apps/test_configs.py
    config = tree.build(TimeseriesConfig, make_parser(APP, "train").parse_args(["-c", str(file)]).as_dict())
    kept = tree.flatten(tree.plain(config))
    assert {name: kept[name] for name in tree.flatten(given)} == tree.flatten(given)
