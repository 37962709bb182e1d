"""The export verb of every app: from a model ready for export to files, with what was measured of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from apps import output
from apps.errors import UserError
from apps.runs import run_folder
from apps.verbs import Export
from export.deliver import deliver
from export.errors import ExportError
from export.exportable import Exportable
from export.notes import require_replaceable

SUFFIX = {
    "onnx": ".onnx",
    "onnx-int8": ".int8.onnx",
    "onnx-int8-dynamic": ".int8-dynamic.onnx",
    "onnx-int4": ".int4.onnx",
    "onnx-fp16": ".fp16.onnx",
    "qonnx": ".qonnx.onnx",
    "hls4ml": ".hls4ml",
    "fpga": ".fpga",
}
"""What the names of files and folders end in by default."""
FOLDERS = ("hls4ml", "fpga", "edge-moe")
"""Formats that are folders."""
ONNX = tuple(form for form in SUFFIX if form.startswith("onnx"))


def target(args: Export, checkpoint: Path, stem: str = "model") -> Path:
    """Where to write, checked before any work is done.

    Raises:
        UserError: for a place where nothing can be written, or that holds something else.
    """
    path = Path(args.output) if args.output else run_folder(checkpoint) / f"{stem}{SUFFIX[args.format]}"
    check_place(path, folder=args.format in FOLDERS)
    if args.json:
        check_place(Path(args.json), folder=False)
    return path


def check_place(path: Path, folder: bool) -> None:
    """Refuse a place where a file, or a folder, cannot be written, or would take the place of something else.

    Raises:
        UserError: names the path.
    """
    if folder:
        try:
            require_replaceable(path)
        except ExportError as error:
            raise UserError(str(error)) from error
    elif path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file")
    parent = next(one for one in (path.absolute().parent, *path.absolute().parents) if one.exists())
    if not parent.is_dir():
        raise UserError(f"{path}: {parent} is no folder; give another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{path}: nothing can be written there; give another path")


def write(exportable: Exportable | Mapping[str, Exportable], args: Export, path: Path) -> dict[str, float]:
    """Write a model in the form asked for, and measure it.

    Args:
        exportable: the model; or several, of which the first is written to `path` and others to `<path's name>.<key>`.
        args: of the verb.
        path: of the file or folder; what was there stays as it is unless all goes well.

    Returns:
        Figures by flat name; those of a second model after its key.

    Raises:
        UserError: if the model has no such form, or is out of tolerance.
    """
    if isinstance(exportable, Exportable):
        exportable = {"": exportable}
    figures: dict[str, float] = {}
    for key, one in exportable.items():
        where = path.with_name(f"{path.name.removesuffix(path.suffix)}.{key}{path.suffix}") if key else path
        try:
            found = _write(one, args, where)
        except ExportError as error:
            raise UserError(f"export: {f'{key}: ' if key else ''}{error}") from error
        figures |= {f"{key}_{name}" if key else name: value for name, value in found.items()}
    return figures


def _write(exportable: Exportable, args: Export, path: Path) -> dict[str, float]:
    if args.format in ONNX:
        return deliver(exportable, args.format, path, args.onnx).scalars()
    from export import devices

    return devices.deliver(exportable, args.format, path, args.fpga)


def show(args: Export, path: Path, figures: Mapping[str, float]) -> None:
    """Print the figures, and write them as JSON where asked to."""
    output.write_json(args.json, figures)
    output.show(f"exported: {path}", figures)
