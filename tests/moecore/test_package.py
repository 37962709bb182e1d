"""The package from outside: names, quick import, settings, one-line errors."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from jaxtyping import TypeCheckError

import moecore
from moecore.build import CONTROLLERS
from moecore.config import AUX_LOSSES, MoEConfig, ScoreName, SelectionName, WeightName
from moecore.layer import POOLS

ROOT = Path(moecore.__file__).parents[1]


def run_python(code: str) -> str:
    """Output of a fresh interpreter."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", moecore.__all__)
def test_every_public_name_can_be_had(name):
    assert getattr(moecore, name) is not None
    assert name in dir(moecore)


def test_public_names_are_unique_and_point_to_where_they_are_defined():
    assert len(set(moecore.__all__)) == len(moecore.__all__)
    for name, home in moecore._HOME.items():
        assert vars(importlib.import_module(f"moecore.{home}"))[name] is getattr(moecore, name)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'moecore' has no attribute 'MoeLayer'"):
        moecore.MoeLayer  # noqa: B018
    assert not hasattr(moecore, "MoeLayer")


def test_import_is_quick():
    """Neither the package nor its settings and errors load torch; a layer does."""
    code = """
import sys, moecore
assert "torch" not in sys.modules, "import moecore"
from moecore.config import MoEConfig
config = MoEConfig(num_experts=4)
moecore.ConfigError, moecore.AUX_LOSSES, moecore.__version__
assert "torch" not in sys.modules and "numpy" not in sys.modules, "moecore.config"
print(config.top_k)
"""
    assert run_python(code) == "2"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to start over from the same state")
def test_each_module_can_be_the_first_one_imported():
    """No import cycle shows up only in some order."""
    code = f"""
import os, sys, torch
for name in {sorted(set(moecore._HOME.values()))!r}:
    child = os.fork()
    if child == 0:
        __import__("moecore." + name)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(name)
print("done")
"""
    assert run_python(code) == "done"


def test_choices_in_settings_are_the_registries():
    hints = get_type_hints(MoEConfig)
    assert get_args(ScoreName) == tuple(moecore.SCORES)
    assert get_args(SelectionName) == tuple(moecore.SELECTIONS)
    assert get_args(WeightName) == tuple(moecore.WEIGHTINGS)
    assert get_args(hints["controller"]) == tuple(CONTROLLERS)
    assert set(get_args(hints["executor"])) == {"auto", *moecore.EXECUTORS}
    assert get_args(hints["pool"]) == tuple(POOLS)
    assert tuple(moecore.LOSSES) == AUX_LOSSES


def test_every_setting_is_explained_for_the_command_line():
    source = (ROOT / "moecore" / "config.py").read_text().splitlines()
    for field in fields(MoEConfig):
        line = next(i for i, text in enumerate(source) if text.startswith(f"    {field.name}: "))
        assert source[line + 1].startswith('    """'), field.name


def test_settings_of_two_layers_are_independent():
    first, second = MoEConfig(), MoEConfig()
    first.aux_loss["z"] = 1.0
    first.score_options["bias"] = True
    assert second.aux_loss == {"switch": 0.01}
    assert second.score_options == {}


@pytest.mark.parametrize("name", [name for name in moecore.__all__ if callable(getattr(moecore, name))])
def test_signatures_can_be_read(name):
    """An annotation that does not evaluate is one that is never checked."""
    public = getattr(moecore, name)
    if inspect.isroutine(public):
        assert get_type_hints(public)
        return
    get_type_hints(public)
    for method in vars(public).values():
        method = getattr(method, "__func__", method)  # of a class method
        if inspect.isfunction(method):
            get_type_hints(method)


@pytest.mark.skipif(os.environ.get("MOECORE_TEST_SHAPES") == "0", reason="shape checks are off")
@pytest.mark.parametrize("name", moecore.EXECUTORS)
def test_shapes_given_to_executors_are_checked(name):
    """As everywhere while `conftest.py` has its hook in: whole numbers are no tokens."""
    bank = moecore.MLPBank(2, 8, 8)
    assignment = moecore.Assignment(torch.zeros(3, 1, dtype=torch.long), 3, 2)
    with pytest.raises(TypeCheckError, match="parameter 'x'"):
        moecore.EXECUTORS[name](torch.zeros(3, 8, dtype=torch.long), bank, assignment, torch.ones(3, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts=0: must be at least 1"),
        ({"top_k": 0}, "top_k=0: must be at least 1"),
        ({"num_experts": 4, "top_k": 5}, "top_k=5: must not exceed num_experts=4"),
        ({"hidden": 0}, "hidden=0: must be at least 1, or null"),
        ({"shared_hidden": -1}, "shared_hidden=-1: must not be negative"),
        ({"dropout": 1.0}, "dropout=1.0: must lie in [0, 1), or null"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0: must be positive, or null for dropless"),
        ({"unit": 0}, "unit=0: a segment has at least 1 token"),
        ({"aux_loss": {"z": -1.0}}, "aux_loss.z=-1.0: must not be negative"),
        (
            {"aux_loss": {"balance": 1.0}},
            "aux_loss='balance': choose one of entropy, importance_cv2, l1, load_cv2, mutual_information, switch, z",
        ),
    ],
)
def test_impossible_settings_are_one_line_errors(options, message):
    with pytest.raises(moecore.ConfigError) as caught:
        MoEConfig(**options)
    assert str(caught.value) == message
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert message == f"{caught.value.field}={caught.value.value!r}: {caught.value.remedy}"


def test_hidden_units_per_expert():
    assert MoEConfig(top_k=2).hidden_for(64) == 32
    assert MoEConfig(top_k=3, shared_hidden=4).hidden_for(64) == 20
    assert MoEConfig(hidden=7).hidden_for(64) == 7
    with pytest.raises(moecore.ConfigError, match=r"^shared_hidden=64: leaves 0 of the FFN's 64 hidden units"):
        MoEConfig(shared_hidden=64).hidden_for(64)


def test_docstring_examples_run():
    """Every example in a public docstring does what it shows."""
    code = """
import doctest, importlib, pkgutil, moecore
for info in pkgutil.walk_packages(moecore.__path__, "moecore."):
    if info.name.endswith("__main__"):
        continue
    result = doctest.testmod(importlib.import_module(info.name))
    assert result.failed == 0, info.name
    globals()["ran"] = globals().get("ran", 0) + result.attempted
print(ran > 5)
"""
    assert run_python(code) == "True"


def test_arguments_in_the_wrong_order_are_named():
    """In a process without run-time type checks, as users have it."""
    code = """
import moecore, torch
model = torch.nn.Sequential(torch.nn.TransformerEncoderLayer(16, 2, 32))
for arguments in ((moecore.MoEConfig(),), ("all", {"num_experts": 4})):
    try:
        moecore.replace_ffn(model, *arguments)
    except moecore.ConfigError as error:
        print(error.field, error.remedy)
"""
    first, second = run_python(code).splitlines()
    assert first == "layers comes before the configuration; give e.g. 'last-2'"
    assert second == "make give a moecore.MoEConfig, or a function of an FFN and its number"
