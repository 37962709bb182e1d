"""CIFAR: torchvision's own download from a server on this machine, and the real images where they are at hand."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from apps.errors import UserError
from apps.vision.data import VisionData
from apps.vision.settings import DataConfig
from apps.vision.sources import load_tables

NAMES = {"cifar10": "label_names", "cifar100": "fine_label_names"}
LABELS = {"cifar10": "labels", "cifar100": "fine_labels"}
CLASSES = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


class Requests(SimpleHTTPRequestHandler):
    """Serves a folder and notes what was asked for."""

    asked: list[str]

    def log_message(self, form, *args):
        self.asked.append(args[0])


@pytest.fixture
def server(tmp_path):
    """(folder that is served, its address, requests so far)."""
    folder = tmp_path / "served"
    folder.mkdir()
    asked: list[str] = []
    handler = type("Handler", (Requests,), {"asked": asked, "directory": str(folder)})
    with ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: handler(*args, directory=str(folder))) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{http.server_port}", asked
        http.shutdown()
        thread.join()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def original(dataset: str) -> dict[str, bytes]:
    """The files of a tiny CIFAR in the format of the originals: a few images, pickled."""
    random = np.random.default_rng(0)
    cls = CLASSES[dataset]
    names = [f"class {i}" for i in range(4)]
    files = {cls.meta["filename"]: pickle.dumps({NAMES[dataset]: names})}
    for name, _ in (*cls.train_list, *cls.test_list):
        labels = [i % 4 for i in range(8)]
        pixels = random.integers(0, 256, (8, 3 * 32 * 32), dtype=np.uint8)
        files[name] = pickle.dumps({"data": pixels, LABELS[dataset]: labels})
    return files


@pytest.fixture
def published(server, monkeypatch):
    """Publishes a tiny CIFAR on the server, as if it were the original; returns its files and the requests."""
    folder, address, asked = server

    def publish(dataset: str) -> tuple[dict[str, bytes], list[str]]:
        cls, files = CLASSES[dataset], original(dataset)
        with tarfile.open(folder / cls.filename, "w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(f"{cls.base_folder}/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        monkeypatch.setattr(cls, "url", f"{address}/{cls.filename}")
        monkeypatch.setattr(cls, "tgz_md5", md5((folder / cls.filename).read_bytes()))
        for split in ("train_list", "test_list"):
            monkeypatch.setattr(cls, split, [[name, md5(files[name])] for name, _ in getattr(cls, split)])
        monkeypatch.setattr(cls, "meta", cls.meta | {"md5": md5(files[cls.meta["filename"]])})
        return files, asked

    return publish


@pytest.mark.parametrize("dataset", CLASSES)
def test_cifar_is_downloaded_verified_and_read(published, tmp_path, dataset):
    files, asked = published(dataset)
    config = DataConfig(dataset=dataset, root=str(tmp_path / "data"))
    tables = load_tables(config)
    first = CLASSES[dataset].train_list[0][0]
    pixels = pickle.loads(files[first])["data"][0].reshape(3, 32, 32)  # noqa: S301
    assert np.array_equal(tables["train"].items[0], pixels.transpose(1, 2, 0))
    assert tables["train"].classes[:5] == ["class 0", "class 1", "class 2", "class 3", "class 0"]
    assert len(tables["test"]) == 8
    requests = len(asked)
    assert requests > 0

    data = VisionData(config)
    assert (data.spec.channels, data.spec.image_size, data.spec.whole) == (3, 32, True)
    assert data.spec.classes == ("class 0", "class 1", "class 2", "class 3")
    assert torch.equal((data.images("test").plain([0])[0][0] * 255).round().byte(), _test_image(files, dataset))
    assert len(asked) == requests  # what is there is not fetched again


def _test_image(files: dict[str, bytes], dataset: str) -> torch.Tensor:
    content = pickle.loads(files[CLASSES[dataset].test_list[0][0]])  # noqa: S301
    return torch.from_numpy(content["data"][0].reshape(3, 32, 32))


def test_a_download_that_is_not_the_original_is_refused(published, tmp_path, monkeypatch):
    published("cifar10")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(b"another"))
    with pytest.raises(UserError, match=r"^data\.dataset=cifar10: cannot be downloaded \(.*\); --data\.root may name"):
        load_tables(DataConfig(dataset="cifar10", root=str(tmp_path / "data")))


@pytest.mark.parametrize("path", ["/nothing.tar.gz", None])
def test_without_the_server_or_the_file_it_is_one_line(server, cli, tmp_path, monkeypatch, path):
    address = "http://127.0.0.1:9" if path is None else server[1] + path  # nothing listens on the discard port
    monkeypatch.setattr(datasets.CIFAR10, "url", address)
    done = cli("train", "--data.dataset", "cifar10", "--data.root", tmp_path / "data", "--run.root", tmp_path)
    assert re.match(r"data\.dataset=cifar10: cannot be downloaded \(.*\); --data\.root may name", done.line)
    assert not (tmp_path / "vision").exists()


@pytest.fixture
def real(shared_data, tmp_path) -> Path:
    """An archive of a few real images per class, cut from the one at hand."""
    source, target = shared_data / "cifar10" / "cifar10-jpeg.tar.gz", tmp_path / "few.tar.gz"
    if not source.is_file():
        pytest.skip(f"no real images at {source} (set MOECORE_TEST_DATA)")
    with tarfile.open(source, "r|gz") as whole, tarfile.open(target, "w:gz", compresslevel=1) as few:
        for member in whole:
            stem = Path(member.name).stem
            if member.isfile() and stem.isdigit() and int(stem) < 12:
                few.addfile(member, whole.extractfile(member))
    return target


def test_real_images_train_from_their_archive(real, train, tmp_path):
    tables = load_tables(DataConfig(dataset="cifar10", root=str(real)))
    assert {split: len(table) for split, table in tables.items()} == {"train": 120, "test": 120}
    assert len(set(tables["train"].classes)) == 10
    data = VisionData(DataConfig(dataset="cifar10", root=str(real)))
    assert (data.spec.image_size, data.spec.whole) == (32, True)
    assert data.spec.mean == pytest.approx((0.49, 0.48, 0.45), abs=0.06)  # CIFAR's well-known means
    assert data.spec.std == pytest.approx((0.25, 0.24, 0.26), abs=0.06)
    folder = train(tmp_path, "--data.dataset", "cifar10", "--data.root", str(real))
    assert (folder / "test.json").is_file()
