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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from apps import tree
from apps.errors import ConfigError, UserError
from apps.verbs import VERBS

set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass(frozen=True)
class App:
    """What the command line needs to know of an app."""

    name: str
    """Its folder under apps/."""
    title: str
    """One line for `--help`."""
    config: type
    """Dataclass of all its settings; must have a section `run: RunConfig`."""

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
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(app))
        return 0
    try:
        _run(app, argv)
    except (UserError, ConfigError) as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        return _fail(f"disk: {error.strerror} while writing {error.filename or 'results'}; good files were kept")
    except KeyboardInterrupt:
        print("\ninterrupted; `--ckpt_path last` continues a training run", file=sys.stderr)
        return 130
    except SystemExit as leave:  # --help and --print_config
        return int(leave.code or 0)
    return 0


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _run(app: App, argv: list[str]) -> None:
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(VERBS)}"
        raise UserError(f"verb={verb!r}: {hint}")
    parser = make_parser(app, verb)
    base = None if {"-h", "--help"} & set(rest) else _stored_settings(app, verb, rest)
    if base:
        parser.set_defaults(tree.flatten(base))
    namespace = parser.parse_args(rest)
    sources = [str(path) for path in (namespace.pop("config", None) or [])]
    settings = tree.build(app.config, namespace)
    args = tree.build(VERBS[verb], namespace)
    app.call(verb, settings, args, sources[-1] if sources else None)


def make_parser(app: App, verb: str) -> ArgumentParser:
    """The parser of one verb: the app's settings and the verb's arguments."""
    arguments = VERBS[verb]
    parser = _Parser(
        prog=f"python -m apps.{app.name} {verb}", description=arguments.__doc__, allow_abbrev=False, default_env=False
    )
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file of settings; flags go over it.")
    parser.add_class_arguments(arguments)
    parser.add_class_arguments(app.config)
    return parser


def _overview(app: App) -> str:
    lines = [f"{app.title}", "", f"usage: python -m apps.{app.name} VERB [-c FILE] [--section.field VALUE ...]", ""]
    lines += [f"  {name:<10} {_first_line(verb)}" for name, verb in VERBS.items()]
    lines += ["", f"`python -m apps.{app.name} VERB --help` lists every setting of a verb.", ""]
    return "\n".join(lines)


def _first_line(obj: object) -> str:
    return (obj.__doc__ or "").strip().splitlines()[0]


def _stored_settings(app: App, verb: str, argv: list[str]) -> dict[str, Any] | None:
    """Settings kept in the checkpoint that `--ckpt_path` names, on which files and flags go."""
    spec = _peek(argv, "--ckpt_path")
    if spec is None:
        return None
    from apps.runs import Runs, load_checkpoint

    config = _peek(argv, "--config", "-c")
    name = _peek(argv, "--run.name") or (Path(config).stem if config else None)
    runs = Runs(_peek(argv, "--run.root") or "runs", app.name)
    if verb == "train" and spec == "last":
        return None  # the command itself says everything; what it resumes is found by its name
    return load_checkpoint(runs.checkpoint(spec, name, resume=verb == "train"), app.name)["config"]


def _peek(argv: list[str], *flags: str) -> str | None:
    """The last value of a flag, before anything is parsed."""
    value = None
    for i, arg in enumerate(argv):
        for flag in flags:
            if arg == flag and i + 1 < len(argv):
                value = argv[i + 1]
            elif arg.startswith(f"{flag}="):
                value = arg[len(flag) + 1 :]
    return value


_WRONG_TYPE = re.compile(r'(?:Parser key|Key) "(?P<key>[\w.]+)":?\s*(?P<why>.*)', re.S)
_UNKNOWN_KEY = re.compile(r"(?:Key|key) [\"'](?P<key>[\w.]+)[\"'] is not expected")


def _one_line(message: str, parser: ArgumentParser) -> str:
    """jsonargparse's message as `field=value: what to do`."""
    known = [option for action in parser._actions for option in action.option_strings]
    if message.startswith("unrecognized arguments:"):
        given = message.split(":", 1)[1].split()
        flag = next((arg for arg in given if arg.startswith("-")), given[0])
        return f"{flag}: unknown setting{_suggest(flag.split('=')[0], known)}"
    unknown = _UNKNOWN_KEY.search(message)
    if unknown:
        return f"{unknown['key']}: unknown setting{_suggest('--' + unknown['key'], known)}"
    wrong = _WRONG_TYPE.search(message)
    if wrong:
        why = " ".join(wrong["why"].split())
        value = re.search(r"Got value: (.*?)(?:;|$)", why)
        expected = re.sub(r"<class '([\w.]+)'>", r"\1", why.split(" Got value:")[0]).removesuffix(".")
        return f"{wrong['key']}={value[1] if value else '?'}: {expected[:1].lower()}{expected[1:]}"
    return message


def _suggest(flag: str, known: list[str]) -> str:
    close = difflib.get_close_matches(flag, known, 1, 0.6) or [k for k in known if k.startswith(flag)][:1]
    return f"; did you mean {close[0]}?" if close else "; --help lists them"


def run(app: App) -> NoReturn:
    """Entry point of `python -m apps.<app>`."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: more threads must be asked for
    sys.exit(main(app))
