"""Run folders and checkpoints: where they are, which one is meant, and loading them without executing anything."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apps.errors import UserError

LAST, BEST = "last.ckpt", "best.ckpt"


@dataclass(frozen=True)
class Runs:
    """The runs of one app: `<root>/<app>/<name>[-number]`."""

    root: str
    app: str

    @property
    def folder(self) -> Path:
        """Folder of the app's runs."""
        return Path(self.root) / self.app

    def create(self, name: str) -> Path:
        """A new folder, numbered if the name is taken."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = self.folder / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir()
                return path
            except FileExistsError:
                number += 1

    def newest(self, name: str | None) -> Path:
        """The newest run of that name (any, if None) that has a checkpoint."""
        candidates = [p.parent.parent for p in self.folder.glob(f"*/checkpoints/{LAST}")]
        if name is not None:
            candidates = [p for p in candidates if p.name == name or _is_numbered(p.name, name)]
        if not candidates:
            raise UserError(
                f"ckpt_path=last: no run{f' named {name}' if name else ''} with a checkpoint in {self.folder}"
            )
        return max(candidates, key=lambda p: (p / "checkpoints" / LAST).stat().st_mtime_ns)

    def checkpoint(self, spec: str, name: str | None, resume: bool = False) -> Path:
        """The file that `--ckpt_path` means.

        Args:
            spec: a file, a run folder, or "last".
            name: which runs "last" looks at; None: all of the app.
            resume: prefer the newest state over the best one.
        """
        path = self.newest(name) if spec == "last" else Path(spec)
        if path.is_file():
            return path
        for file in (LAST, BEST) if resume else (BEST, LAST):
            if (path / "checkpoints" / file).is_file():
                return path / "checkpoints" / file
        raise UserError(f"ckpt_path={spec}: no such checkpoint or run folder")


def _is_numbered(name: str, base: str) -> bool:
    return name.startswith(f"{base}-") and name[len(base) + 1 :].isdigit()


def run_folder(checkpoint: Path) -> Path:
    """The run a checkpoint belongs to, or its own folder."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def load_plain(path: str | Path) -> Any:
    """`torch.load` that refuses anything but tensors and plain data."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch on pickles that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # a damaged file can raise anything
        if isinstance(error, pickle.UnpicklingError) and _is_pickle(Path(path), error):
            raise UserError(
                f"{path}: refused, it holds pickled objects that would run code; "
                "save tensors and plain data only (a state_dict, or safetensors)"
            ) from None
        kind = "weights alone; --model.pretrained takes them" if Path(path).suffix == ".safetensors" else "damaged"
        raise UserError(f"{path}: not a checkpoint, or {kind}") from None


def _is_pickle(path: Path, error: pickle.UnpicklingError) -> bool:
    """Whether torch stopped at something that is no plain data, rather than at something that is no pickle."""
    if "GLOBAL" in str(error) or "allowlisted" in str(error):
        return True
    with open(path, "rb") as file:
        return file.read(1) == pickle.PROTO


def load_checkpoint(path: Path, app: str) -> dict[str, Any]:
    """A checkpoint of this app as plain data: state_dict, config, data and more."""
    checkpoint = load_plain(path)
    if not isinstance(checkpoint, dict) or "config" not in checkpoint or "state_dict" not in checkpoint:
        raise UserError(f"{path}: holds no moecore run; plain weights go to --model.pretrained")
    if checkpoint.get("app") != app:
        raise UserError(f"{path}: belongs to apps.{checkpoint.get('app')}, not to apps.{app}")
    return checkpoint
