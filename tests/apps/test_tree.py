"""Settings as trees of plain data, and back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from apps import tree
from apps.errors import ConfigError, UserError
from apps.vision.settings import VisionConfig
from moecore.errors import require


@dataclass
class Inner:
    count: int = 3
    range: tuple[float, float] = (0.0, 1.0)
    extra_options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.count >= 1, "count", self.count, "must be at least 1")


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    name: str | None = None
    aux_loss: dict[str, float] = field(default_factory=dict)


NAMES = st.text("abc_.", max_size=5)
SCALARS = st.one_of(st.integers(), st.floats(allow_nan=False), NAMES, st.booleans(), st.none())
OUTERS = st.builds(
    Outer,
    st.builds(
        Inner,
        st.integers(min_value=1),
        st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
        st.dictionaries(NAMES, st.one_of(SCALARS, st.lists(SCALARS, max_size=3)), max_size=3),
    ),
    st.one_of(st.none(), NAMES),
    st.dictionaries(NAMES, st.floats(allow_nan=False), max_size=3),
)


@settings(max_examples=40)
@given(OUTERS)
def test_settings_survive_the_way_through_plain_data(outer):
    plain = tree.plain(outer)
    assert tree.build(Outer, plain) == outer
    assert tree.restore(Outer, plain) == outer


def test_settings_survive_yaml():
    config = VisionConfig()
    config.data.crop_scale = (0.25, 0.75)
    config.model.moe.select_options = {"num_groups": 2}
    text = yaml.safe_dump(tree.plain(config))
    assert tree.build(VisionConfig, yaml.safe_load(text)) == config


@settings(max_examples=40)
@given(OUTERS)
def test_flat_names_lead_to_every_value(outer):
    flat = tree.flatten(tree.plain(outer))
    assert set(flat) == {"inner.count", "inner.range", "inner.extra_options", "name", "aux_loss"}
    assert flat["inner.count"] == outer.inner.count
    assert flat["inner.extra_options"] == outer.inner.extra_options
    assert flat["aux_loss"] == outer.aux_loss


@settings(max_examples=40)
@given(OUTERS, st.integers(min_value=1))
def test_changed_copies_and_touches_nothing_else(outer, count):
    before = tree.plain(outer)
    copy = tree.changed(outer, {"inner.count": count, "aux_loss.z": 0.5})
    assert tree.plain(outer) == before
    assert (copy.inner.count, copy.aux_loss) == (count, outer.aux_loss | {"z": 0.5})
    assert dataclasses.replace(copy.inner, count=outer.inner.count) == outer.inner


def test_checks_run_again_and_name_the_whole_field():
    with pytest.raises(ConfigError, match=r"^inner\.count=0: must be at least 1$"):
        tree.changed(Outer(), {"inner.count": 0})
    with pytest.raises(ConfigError, match=r"^inner\.count=0: "):
        tree.build(Outer, {"inner": {"count": 0, "range": [0, 1], "extra_options": {}}, "name": "x", "aux_loss": {}})


@pytest.mark.parametrize("value", [3, "fast", [1], None])
def test_a_section_must_have_settings(value):
    with pytest.raises(ConfigError, match=r"^inner=.*: is a section; give its settings$"):
        tree.build(Outer, {"inner": value, "name": None, "aux_loss": {}})


def test_settings_of_an_earlier_version_get_defaults():
    assert tree.restore(Outer, {"inner": {"count": 5}, "aux_loss": {"z": 1.0}}) == Outer(Inner(5), None, {"z": 1.0})


@pytest.mark.parametrize(("values", "name"), [({"colour": 1}, "colour"), ({"inner": {"number": 1}}, r"inner\.number")])
def test_settings_this_version_does_not_know_are_named(values, name):
    with pytest.raises(UserError, match=f"^{name}: the checkpoint has this setting, this version does not know it$"):
        tree.restore(Outer, values)


def test_dictionaries_that_are_values_replace_the_default_whole():
    assert tree.restore(Outer, {"aux_loss": {}}).aux_loss == {}
    assert tree.restore(VisionConfig, {"model": {"moe": {"aux_loss": {"z": 0.1}}}}).model.moe.aux_loss == {"z": 0.1}
