from __future__ import annotations

import gzip
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def catalog(fetch):
    return fetch.load_catalog()


def test_entries_are_complete(catalog):
    for entry in catalog.values():
        assert re.fullmatch(r"[a-z0-9-]+", entry.name)
        assert entry.app in ("vision", "timeseries", "rl", "recsys")
        assert all(url.startswith("https://") for url in entry.urls)
        assert all((entry.title, entry.licence, entry.citation, entry.homepage.startswith("https://")))
        assert len(entry.licence) <= 30  # a column of the table
        assert entry.size is None or entry.size > 0


def test_entries_do_not_overwrite_each_other(catalog):
    paths = [path for entry in catalog.values() for path in {entry.file, entry.unpack or entry.file}]
    assert len(paths) == len(set(paths))


def test_cifar_is_where_and_what_torchvision_expects(catalog):
    datasets = pytest.importorskip("torchvision.datasets")
    for name, cls in (("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)):
        entry = catalog[name]
        assert (entry.urls[0], entry.file, entry.unpack) == (cls.url, cls.filename, cls.base_folder)
        assert entry.md5 == cls.tgz_md5


@pytest.mark.parametrize("name", ["etth1", "etth2"])
def test_sums_of_ett_are_those_of_the_files(catalog, shared_data, name):
    entry = catalog[name]
    content = gzip.decompress((shared_data / "ett" / f"{Path(entry.file).name}.gz").read_bytes())
    assert (len(content), hashlib.sha256(content).hexdigest()) == (entry.size, entry.sha256)


def test_readme_names_every_entry_and_what_is_not_verified(catalog):
    readme = (ROOT / "datasets" / "README.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z0-9-]+)` \|.*\| ([^|]*) \|$", readme, re.M))
    assert set(rows) == set(catalog)
    for name, entry in catalog.items():
        assert ("none" in rows[name]) == (entry.checksum is None)


def test_readme_commands(fetch, catalog, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(fetch, "fetch", lambda entry, root: asked.append((entry.name, str(root))))
    commands = re.findall(r"^python datasets/fetch.py(.*?)#", (ROOT / "datasets" / "README.md").read_text(), re.M)
    assert [fetch.main(command.split()) for command in commands] == [0, 0, 0]
    assert asked == [("cifar10", "data"), ("etth1", "data"), ("kuairand-pure", "/disk")]


def test_use_names_a_verb_of_the_app(catalog):
    for entry in catalog.values():
        if entry.use:
            command = entry.use.format(root="data", target="data/x").split()
            assert command[:4] == ["python", "-m", f"apps.{entry.app}", "train"]
            assert (ROOT / "apps" / entry.app / "__main__.py").exists()


def test_imagenette_would_be_read_by_the_vision_app(tmp_path):
    sources = pytest.importorskip("apps.vision.sources")
    settings = pytest.importorskip("apps.vision.settings")
    image = pytest.importorskip("PIL.Image")
    for name in ("train/n01440764", "train/n02102040", "val/n01440764", "val/n02102040"):
        (tmp_path / name).mkdir(parents=True)
        image.new("RGB", (8, 8)).save(tmp_path / name / "1.JPEG")
    (tmp_path / "noisy_imagenette.csv").touch()
    tables = sources.load_tables(settings.DataConfig(dataset="folder", root=str(tmp_path)))
    assert {split: len(table) for split, table in tables.items()} == {"train": 2, "val": 2}


def test_listing(fetch, tool, catalog, capsys):
    assert fetch.main(["--root", str(tool.root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "app", "size", "licence", "here", "goes", "to"]
    assert [line.split()[0] for line in lines[1:]] == list(catalog)
    assert re.fullmatch(rf"cifar10 +vision +170\.5 MB +.* - +{tool.root}/cifar-10-batches-py", lines[1])
    assert not tool.root.exists()


def test_listing_shows_what_is_here(tool):
    for name in ("x", "y", "z"):
        tool.add(name, "http://127.0.0.1/x")
    tool.root.mkdir()
    (tool.root / "x.bin").touch()
    (tool.root / "y.bin.part").touch()
    assert [line.split()[-2] for line in tool().out.splitlines()[1:]] == ["yes", "part", "-"]


def test_script_runs_from_anywhere(tmp_path):
    environment = {**os.environ, "PYTHONPATH": ""}
    result = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "datasets" / "fetch.py"), "cifar1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert re.fullmatch(r"error: name='cifar1': no such data set; did you mean 'cifar10+'\?\n", result.stderr)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"urls": []}, "x.urls=[]: give at least one, http or https"),
        ({"urls": ["file:///etc/passwd"]}, "give at least one, http or https"),
        ({"file": "../x"}, "'../x' is the root or leads out of it"),
        ({"unpack": "/x"}, "'/x' is the root or leads out of it"),
        ({"unpack": "."}, "'.' is the root or leads out of it"),
        ({"sha256": "abc"}, "x.sha256='abc': give 64 lower-case hexadecimal digits, or null"),
        ({"md5": "A" * 32}, "give 32 lower-case hexadecimal digits"),
        ({"colour": "red"}, "unexpected keyword argument 'colour'"),
    ],
)
def test_bad_entries(tool, fields, words):
    tool.add("x", "http://127.0.0.1/x", **fields)
    result = tool()
    assert result.code == 2
    assert words in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("text", ["", "x: [", "- x", "x: {urls: [http://a]}"])
def test_bad_catalogues(tool, text):
    tool.catalog.write_text(text)
    result = tool()
    assert result.code == 2
    assert "not a catalogue that can be read" in result.err
    assert len(result.err.splitlines()) == 1


def test_missing_catalogue(tool):
    assert tool().code == 2
