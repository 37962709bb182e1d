"""Every YAML file of every app."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import yaml

from apps import search, tree
from apps.cli import make_parser

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*/*.yaml"))
SPACES = [file for file in FILES if file.stem.startswith("space")]
RECIPES = [file for file in FILES if file not in SPACES]


def name(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


def test_there_are_files():
    assert FILES


@pytest.mark.parametrize("file", RECIPES, ids=name)
def test_recipes_are_settings_of_their_app(file):
    app = importlib.import_module(f"apps.{file.parent.name}").APP
    values = make_parser(app, "train").parse_args(["-c", str(file)]).as_dict()
    config = tree.build(app.config, values)
    given, kept = tree.flatten(yaml.safe_load(file.read_text())), tree.flatten(tree.plain(config))
    assert {name: kept[name] for name in given} == given


@pytest.mark.parametrize("file", SPACES, ids=name)
def test_spaces_name_settings_of_their_app_and_values_they_take(file):
    space = search.load_space(file, file.parent.name)
    assert space == yaml.safe_load(file.read_text())


@pytest.mark.parametrize("file", RECIPES, ids=name)
def test_a_search_may_start_from_any_recipe(file):
    """Each end of each range of the space, taken alone, gives settings that pass all checks."""
    app = importlib.import_module(f"apps.{file.parent.name}").APP
    config = tree.build(app.config, make_parser(app, "train").parse_args(["-c", str(file)]).as_dict())
    for setting, spec in yaml.safe_load(file.with_name("space.yaml").read_text()).items():
        for value in spec.get("choices") or (spec["low"], spec["high"]):
            flat = tree.flatten(tree.plain(tree.changed(config, {setting: value})))
            kept = flat["model.moe.aux_loss"]["switch"] if "aux_loss" in setting else flat[setting]
            assert kept == value
