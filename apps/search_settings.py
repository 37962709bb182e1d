"""What a search holds fixed: remembered by its study, so that trials of one study can be compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import optuna

from apps import tree
from apps.errors import ConfigError, UserError

ATTRIBUTE = "settings"
"""Of a study: names that its space varies, and all other settings that matter."""
HARMLESS = (
    "trainer.accelerator",
    "trainer.deterministic",
    "trainer.detect_anomaly",
    "trainer.enable_progress_bar",
    "trainer.limit_test_batches",
    "trainer.log_every_n_steps",
    "trainer.num_sanity_val_steps",
    "trainer.profiler",
    "data.cache",
    "data.eval_batch_size",
    "data.num_workers",
)
"""Settings that leave the values of trials as they are, apart from what devices round differently."""
Unused = Callable[[Any], Mapping[str, str]]
"""Settings -> what they leave without effect, see `apps.cli.App.unused`."""


def refuse_idle(space: Mapping[str, Mapping[str, Any]], config: Any, unused: Unused) -> None:
    """Check that every setting of a space can change something.

    Args:
        space: setting -> distribution.
        config: settings that trials start from.
        unused: of the app.

    Raises:
        UserError: a setting does nothing, with these settings or any choice of the space.
    """
    idle = [unused(one) for one in (config, *_alternatives(space, config))]
    for name in space:
        remedies = [next((words for prefix, words in one.items() if name.startswith(prefix)), None) for one in idle]
        if None not in remedies:
            raise UserError(f"space: {name}: does nothing with these settings; {remedies[0]}, or another --space")


def _alternatives(space: Mapping[str, Mapping[str, Any]], config: Any) -> Iterator[Any]:
    """The settings with each choice of the space, taken alone."""
    for name, spec in space.items():
        for value in spec.get("choices", ()):
            try:
                yield tree.changed(config, {name: value})
            except ConfigError:  # works with other choices only, if at all
                continue


def remember(study: optuna.Study, config: Any, space: Mapping[str, Any], unused: Unused, remedy: str) -> None:
    """Keep the settings with a new study; compare those of a study that is there.

    Not compared are settings of the run (but early stopping is) and those that cannot change the value of a trial.

    Args:
        study: to keep them with.
        config: settings that trials start from.
        space: setting -> distribution.
        unused: of the app.
        remedy: what to give for a study of its own.

    Raises:
        UserError: the study was begun with other settings.
    """
    kept = {"varied": sorted(space), "fixed": _fixed(config, space, unused)}
    kept = json.loads(json.dumps(kept))  # as it is read back
    if ATTRIBUTE not in study.user_attrs:
        study.set_user_attr(ATTRIBUTE, kept)
    before = study.user_attrs[ATTRIBUTE]
    for name in sorted({*before["varied"]} ^ {*kept["varied"]}):
        then, now = ("varied", "fixed") if name in before["varied"] else ("fixed", "varied")
        raise UserError(f"space: {name} is {now} here and {then} in the trials of study {study.study_name!r}; {remedy}")
    for name, value in kept["fixed"].items():
        if name in before["fixed"] and before["fixed"][name] != value:
            raise UserError(f"{name}={value}: study {study.study_name!r} has {before['fixed'][name]}; {remedy}")


def _fixed(config: Any, space: Mapping[str, Any], unused: Unused) -> dict[str, Any]:
    """All settings that matter and that the space does not vary, by dotted name."""
    idle = (*unused(config), *HARMLESS)
    flat = tree.flatten(tree.plain(config))
    for name in space:
        flat.pop(name, None)
        owner, _, key = name.rpartition(".")
        if isinstance(flat.get(owner), dict):  # an entry of a setting that is a dictionary
            flat[owner] = {k: v for k, v in flat[owner].items() if k != key}
    named = {name: value for name, value in flat.items() if not name.startswith(idle)}
    return {n: v for n, v in named.items() if not n.startswith("run.") or n.startswith("run.early_stop.")}
