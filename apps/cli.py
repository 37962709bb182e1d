"""The command line of every app: `python -m apps.<app> VERB [-c FILE] [--section.field VALUE ...]`.

Settings are typed dataclasses, read by jsonargparse from YAML files and dotted flags. Nothing here imports torch
before a verb runs, so help and errors come at once.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import re
import sys
import threading
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from apps import tree
from apps.errors import ConfigError, UserError
from apps.settings import RunConfig
from apps.verbs import VERBS

set_parsing_settings(docstring_parse_attribute_docstrings=True)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk or quota that has no room left."""
NO_PLACE = (
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)
"""Errors of a path where nothing can be written, or nothing is."""


@dataclass(frozen=True)
class App:
    """What the command line needs to know of an app."""

    name: str
    """Its folder under apps/."""
    title: str
    """One line for `--help`."""
    config: type
    """Dataclass of all its settings; must have a section `run: RunConfig`."""
    arguments: Mapping[str, type] = field(default_factory=dict)
    """Verb -> its arguments, where they differ from those of `apps.verbs`."""
    unused: Callable[[Any], Mapping[str, str]] = lambda config: {}
    """Settings -> prefixes of those that do nothing beside them (of another model), with what would change that."""
    own: tuple[str, ...] = ()
    """Settings that a checkpoint answers by what it holds: of those it was trained with, verbs but `train` are not told
    them, only what flags and files of the command itself say."""

    @property
    def verbs(self) -> dict[str, type]:
        """Every verb with its arguments."""
        return VERBS | dict(self.arguments)

    def call(self, verb: str, config: object, args: object, source: str | None) -> None:
        """Run a verb: function `verb(config, args, source)` of `apps.<app>.verbs`."""
        getattr(importlib.import_module(f"apps.{self.name}.verbs"), verb)(config, args, source)


class _Parser(ArgumentParser):
    """Errors are one line; the CLI prints it and leaves with code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if isinstance(ex, ConfigError):
            raise ex
        raise UserError(_one_line(message, self))


def main(app: App, argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_overview(app), flush=True)
            return 0
        _run(app, argv)
    except (UserError, ConfigError) as error:
        return _fail(str(error))
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _fail(_about_file(error))
    except KeyboardInterrupt as stop:
        print("\n" + "; ".join(["interrupted", *map(str, stop.args)]), file=sys.stderr)
        return 130
    except SystemExit as leave:  # --help and --print_config
        return int(leave.code or 0)
    return 0


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _about_file(error: OSError) -> str:
    """What to say of an error at a path, or of a disk; any other error is raised again."""
    path = error.filename2 or error.filename
    if error.errno in FULL:
        file = error.filename or "results"
        return f"disk: {error.strerror} while writing {file}; free some space, files written before are good"
    if error.errno not in NO_PLACE or path is None:
        raise error
    path = Path(os.fsdecode(path))
    whole = re.fullmatch(r"\.(.+)\.\w+\.part", path.name)  # of which this would have been the beginning
    return f"{path.with_name(whole[1]) if whole else path}: {error.strerror}; give another path"


def _run(app: App, argv: list[str]) -> None:
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(VERBS)}"
        raise UserError(f"verb={verb!r}: {hint}")
    parser, rest = make_parser(app, verb), _files_first(rest)
    rest = _brackets(parser, rest)
    values = _parse(parser, rest)
    checkpoint = _checkpoint(app, verb, values)
    if checkpoint is not None:  # the settings kept in it, on which files and flags go
        from apps.runs import load_checkpoint

        stored = tree.restore(app.config, load_checkpoint(checkpoint, app.name)["config"])
        kept = tree.flatten(tree.plain(stored))
        parser.set_defaults({name: value for name, value in kept.items() if verb == "train" or name not in app.own})
        values = _parse(parser, rest) | {"ckpt_path": str(checkpoint)}
    source = str(values["config"][-1]) if values["config"] else None
    config, args, began = tree.build(app.config, values), tree.build(app.verbs[verb], values), time.time()
    try:
        app.call(verb, config, args, source)
    except KeyboardInterrupt as stop:
        resumable = verb == "train" and (args.ckpt_path is not None or _saved(app, config.run, began - 1))
        raise KeyboardInterrupt(*["`--ckpt_path last` continues a training run"] * resumable) from stop


def _saved(app: App, run: RunConfig, began: float) -> bool:
    """Whether a run of the app has a checkpoint written since then (file systems have coarse clocks)."""
    files = Path(run.root, app.name).glob("*/checkpoints/last.ckpt")
    return any(file.stat().st_mtime >= began for file in files)


def _files_first(argv: Sequence[str]) -> list[str]:
    """The arguments with `-c FILE` before all flags, so that flags go over files wherever they stand."""
    files, flags = [], []
    arguments = iter(argv)
    for argument in arguments:
        if argument in ("-c", "--config"):
            files += [argument, *[value for value in [next(arguments, None)] if value is not None]]
        else:
            (files if argument.startswith("--config=") else flags).append(argument)
    return files + flags


def _brackets(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The arguments with `0.1,0.5` as `[0.1,0.5]` and `promo` as `[promo]`, for settings that are lists."""
    kinds = {flag: getattr(action, "_typehint", None) for action in parser._actions for flag in action.option_strings}
    lists = {flag: kind for flag, kind in kinds.items() if typing.get_origin(kind) in (list, tuple)}
    done: list[str] = []
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if equals and flag in lists:
            done.append(f"{flag}={_bracketed(value, lists[flag])}")
        elif done and done[-1] in lists:
            done.append(_bracketed(argument, lists[done[-1]]))
        else:
            done.append(argument)
    return done


def _bracketed(value: str, kind: object) -> str:
    written = value.strip()
    pair = typing.get_origin(kind) is tuple and ... not in typing.get_args(kind)  # one value is never all of it
    as_is = written in ("", "null", "None") or written.startswith(("[", "(", "--")) or (pair and "," not in written)
    return value if as_is else f"[{written}]"


def _parse(parser: ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    try:
        return parser.parse_args(argv).as_dict()
    except UnicodeDecodeError as error:
        raise UserError(f"config: not a text file ({error.reason})") from error


def _checkpoint(app: App, verb: str, values: Mapping[str, Any]) -> Path | None:
    """The file that `--ckpt_path` means; `last` is the newest run of the name that flags or file give, or of any."""
    spec, files = values.get("ckpt_path"), values["config"]
    if spec is None or (verb == "train" and spec == "last"):  # what training resumes is found by its own settings
        return None
    from apps.runs import Runs

    run = tree.build(RunConfig, values["run"], "run.")
    name = run.name or (Path(str(files[-1])).stem if files else None)
    return Runs(run.root, app.name).checkpoint(spec, name, resume=verb == "train")


def make_parser(app: App, verb: str) -> ArgumentParser:
    """The parser of one verb: the app's settings and the verb's arguments."""
    arguments = app.verbs[verb]
    parser = _Parser(
        prog=f"python -m apps.{app.name} {verb}", description=arguments.__doc__, allow_abbrev=False, default_env=False
    )
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file of settings; flags go over it.")
    parser.add_class_arguments(arguments)
    parser.add_class_arguments(app.config)
    return parser


def _overview(app: App) -> str:
    lines = [f"{app.title}", "", f"usage: python -m apps.{app.name} VERB [-c FILE] [--section.field VALUE ...]", ""]
    lines += [f"  {name:<10} {_first_line(verb)}" for name, verb in app.verbs.items()]
    lines += ["", f"`python -m apps.{app.name} VERB --help` lists every setting of a verb.", ""]
    return "\n".join(lines)


def _first_line(obj: object) -> str:
    return (obj.__doc__ or "").strip().splitlines()[0]


_WRONG_TYPE = re.compile(r'(?:Parser key|Key) "(?P<key>[\w.]+)":?\s*(?P<why>.*)', re.S)
_UNKNOWN_KEY = re.compile(r"(?:Group '(?P<group>[\w.]+)' does not accept option|Option) '(?P<key>[\w.]+)'")


def _one_line(message: str, parser: ArgumentParser) -> str:
    """jsonargparse's message as `field=value: what to do`."""
    known = [option for action in parser._actions for option in action.option_strings]
    if message.startswith("unrecognized arguments:"):
        given = message.split(":", 1)[1].split()
        flag = next((arg for arg in given if arg.startswith("-")), given[0])
        return f"{flag}: unknown setting{_suggest(flag.split('=')[0], known)}"
    if message.startswith("the following arguments are required:"):
        return f"--{message.split(': ')[1].split(',')[0].lstrip('-')}: is required; --help says what to give"
    unknown = _UNKNOWN_KEY.search(message)
    if unknown:
        key = f"{unknown['group']}.{unknown['key']}" if unknown["group"] else unknown["key"]
        return f"{key}: unknown setting{_suggest('--' + key, known)}"
    wrong = _WRONG_TYPE.search(message)
    if wrong:
        return _wrong_type(wrong["key"], " ".join(wrong["why"].split()))
    if message.startswith("Unexpected config"):
        return "config: must be a YAML file of settings by their names"
    return message


def _wrong_type(key: str, why: str) -> str:
    value = re.search(r"Got value: (.*?)(?:;|$)|Given value: (.*)$", why)
    options = re.findall(r"- Expected (.*?)(?= - Expected | Given value )", why)  # one for each type of a union
    expected = f"expected {' or '.join(options)}" if options else why.split(" Got value:")[0].removesuffix(".")
    expected = re.sub(r"an? typing\.Literal\[(.*?)\]", r"one of \1", expected)
    expected = re.sub(r"<class '([\w.]+)'>", r"\1", expected)
    return f"{key}={value[1] or value[2]}: {expected[:1].lower()}{expected[1:]}" if value else f"{key}: {expected}"


def _suggest(flag: str, known: list[str]) -> str:
    abbreviated = [name for name in known if name.startswith(flag)]
    close = abbreviated or difflib.get_close_matches(flag, known, 1)
    return f"; did you mean {close[0]}?" if close else "; --help lists them"


def _in_thread(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer hands a full disk on to the main thread, which says so in one line."""
    if getattr(args.exc_value, "errno", None) not in FULL:
        threading.__excepthook__(args)


def run(app: App) -> NoReturn:
    """Entry point of `python -m apps.<app>`."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: more threads must be asked for
    threading.excepthook = _in_thread
    sys.exit(main(app))
