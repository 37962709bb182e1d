"""The documentation says what is true: its code runs, its commands parse, its links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import re
import runpy
import shlex
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import yaml

import apps
import moecore
from apps.cli import _brackets, main, make_parser
from apps.recsys.schema import read_schema
from apps.verbs import VERBS
from moecore.config import MoEConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")] if path.is_file())
ROUTING_GUIDE = ROOT / "docs" / "core" / "routing.md"
APP_GUIDE = ROOT / "docs" / "apps" / "add-an-app.md"

FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.M | re.S)
NEEDS = re.compile(r"<!-- needs: (?P<what>[\w./-]+) -->\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    """Of its first line of content."""
    info: str
    """What follows the opening fence: language and attributes."""
    body: str
    needs: str | None
    """Module or file without which it is not run, from a comment `<!-- needs: ... -->` above it."""
    output: str | None
    """What a block `text` that follows directly says it prints."""

    @property
    def language(self) -> str:
        return self.info.split()[0] if self.info else ""

    @property
    def file(self) -> str | None:
        """The file that the block is, from `title="apps/..."`."""
        title = re.search(r'title="([^"]+)"', self.info)
        return title[1] if title and "/" in title[1] else None


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text()
    found = []
    fences = list(FENCE.finditer(text))
    for i, fence in enumerate(fences):
        needs = NEEDS.search(text[: fence.start()])
        follower = fences[i + 1] if i + 1 < len(fences) else None
        shown = follower and follower["info"] == "text" and not text[fence.end() : follower.start()].strip()
        block = Block(
            page,
            text[: fence.start("body")].count("\n") + 1,
            fence["info"].strip(),
            textwrap.dedent(fence["body"]),
            needs["what"] if needs else None,
            textwrap.dedent(follower["body"]) if shown else None,
        )
        if block.language in languages:
            found.append(block)
    return found


def at_hand(needed: str | None) -> bool:
    if needed is None:
        return True
    return Path(needed).exists() if "/" in needed else importlib.util.find_spec(needed) is not None


def name_of(value: object) -> str | None:
    """Test id of a page or a command."""
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else None


def pages_with(*languages: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, *languages)]


# Code


@pytest.mark.parametrize("page", pages_with("python"), ids=name_of)
def test_code_runs_and_prints_what_is_shown(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "docs"}
    for block in blocks(page, "python"):
        if block.file or not at_hand(block.needs):
            continue
        code = "\n" * (block.line - 1) + block.body  # so that a traceback gives the line of the page
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), namespace)
        if block.output is not None and printed.getvalue():
            assert printed.getvalue() == block.output, f"{page}:{block.line}"


ROUTERS = blocks(ROUTING_GUIDE, "yaml")


@pytest.mark.parametrize("block", ROUTERS, ids=lambda block: f"line {block.line}")
def test_every_router_of_the_guide_trains(block):
    import torch

    settings = yaml.safe_load(block.body)
    assert set(settings) <= {field.name for field in fields(MoEConfig)}
    layer = moecore.MoE.build(32, **settings)
    x = torch.randn(2, 12, 32)
    with moecore.routing_context(task=1):
        with moecore.record(layer) as recording:
            y = layer(x)
        (y.square().mean() + moecore.balance_loss(recording)).backward()
        moecore.update_controllers(recording)
        assert layer.eval()(x).isfinite().all()


@pytest.mark.parametrize(
    "registry", [moecore.SCORES, moecore.SELECTIONS, moecore.WEIGHTINGS, moecore.CONTROLLERS, moecore.LOSSES]
)
def test_every_registered_name_has_its_heading_in_the_guide(registry):
    text = ROUTING_GUIDE.read_text()
    for name in registry:
        assert f"\n### `{name}`\n" in text or (name == "none" and "`none`" in text), name


# Commands


def commands(page: Path) -> Iterator[list[str]]:
    """Every `python -m ...` of a page's `bash` blocks, as arguments."""
    for block in blocks(page, "bash"):
        for line in block.body.replace("\\\n", " ").splitlines():
            words: list[str] = []
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
            lexer.whitespace_split, lexer.commenters = True, "#"
            for word in [*lexer, ";"]:
                if set(word) <= set("&|;<>"):
                    if words[:2] == ["python", "-m"]:
                        yield words[2:]
                    words = []
                else:
                    words.append(word)


COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[" ".join(command)[:90] for _, command in COMMANDS])
def test_command_parses(page, command, example_app):
    module, *arguments = command
    if module == "moecore.benchmark":
        importlib.import_module("moecore.benchmark.__main__")._parser().parse_args(arguments)
    elif module.startswith("apps.") and arguments and arguments[0] not in ("-h", "--help"):
        verb, *rest = arguments
        assert verb in VERBS
        if not {"-h", "--help", "--print_config"} & set(rest):
            parser = make_parser(importlib.import_module(module).APP, verb)
            parser.parse_args(_brackets(parser, located(rest, example_app)))


def located(arguments: list[str], example_app: Path) -> list[str]:
    """Settings files by their full path; those that an earlier command makes are left out."""
    kept: list[str] = []
    for argument in arguments:
        if not kept or kept[-1] not in ("-c", "--config"):
            kept.append(argument)
        elif argument.startswith("runs/"):
            kept.pop()
        else:
            kept.append(
                str(next((path for path in (ROOT / argument, example_app / argument) if path.is_file()), argument))
            )
    return kept


def sessions() -> Iterator[tuple[str, str, str]]:
    """Page, command and what it prints, from blocks `console`."""
    for page in PAGES:
        for block in blocks(page, "console"):
            for session in block.body.split("$ ")[1:]:
                command, _, printed = session.partition("\n")
                yield name_of(page), command, printed


SESSIONS = list(sessions())


@pytest.mark.parametrize(("page", "command", "printed"), SESSIONS, ids=[command for _, command, _ in SESSIONS])
def test_command_prints_what_is_shown(page, command, printed, tmp_path, monkeypatch, capsys):
    """Errors, which come quickly."""
    monkeypatch.chdir(tmp_path)
    python, m, module, *arguments = shlex.split(command)
    assert [python, m] == ["python", "-m"]
    assert main(importlib.import_module(module).APP, arguments) == 2
    assert capsys.readouterr().err == printed


# Settings files


SETTINGS = [block for page in PAGES if page != ROUTING_GUIDE for block in blocks(page, "yaml")]


@pytest.mark.parametrize("block", SETTINGS, ids=[f"{name_of(block.page)}:{block.line}" for block in SETTINGS])
def test_settings_files_shown_are_read(block, example_app, tmp_path):
    """Search spaces, recipes and schemas of logs; the routers of the guide are built above."""
    file = tmp_path / "shown.yaml"
    file.write_text(block.body)
    if block.page.stem == "recsys" and "features:" in block.body:
        assert read_schema(file).labels
        return
    app = "wine" if block.page == APP_GUIDE else "vision"
    if re.search(r"\{(choices|low):", block.body):
        assert importlib.import_module("apps.search").load_space(file, app)
    else:
        make_parser(importlib.import_module(f"apps.{app}").APP, "train").parse_args(["-c", str(file)])


# The example app


@pytest.fixture
def example_app(tmp_path, monkeypatch) -> Path:
    """The files of the app guide, importable as a part of `apps`; returns their root."""
    for block in blocks(APP_GUIDE, "python", "yaml"):
        if block.file:
            path = tmp_path / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.body)
    monkeypatch.setattr(apps, "__path__", [*apps.__path__, str(tmp_path / "apps")])
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("apps."):
            del sys.modules[name]
            vars(apps).pop(name.split(".")[1], None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "file", [block.file for block in blocks(APP_GUIDE, "python") if "/test_" in (block.file or "")]
)
def test_tests_of_the_example_app_pass(file, example_app, tmp_path_factory, capsys):
    tests = [one for name, one in runpy.run_path(str(example_app / file)).items() if name.startswith("test_")]
    assert tests
    for test in tests:  # the assertions are theirs
        given = {"tmp_path": tmp_path_factory.mktemp("runs"), "capsys": capsys}
        capsys.readouterr()
        test(**{key: value for key, value in given.items() if key in inspect.signature(test).parameters})


# Links


LINK = re.compile(r"(?<!\!)\[[^\]\[]*\]\((?P<target>[^)\s]+)\)|!\[[^\]]*\]\((?P<image>[^)\s]+)\)")


def prose(page: Path) -> str:
    """The page without code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """What headings can be linked by, the way mkdocs and GitHub name them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?)\s*$", FENCE.sub("", page.read_text()), re.M):
        slug = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).strip().lower()
        slug = re.sub(r"[-\s]+", "-", slug)
        number = 1
        while (name := slug if number == 1 else f"{slug}_{number - 1}") in found:
            number += 1
        found.add(name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in LINK.finditer(prose(page)):
        target = link["target"] or link["image"]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file), f"{page}: {target}"
