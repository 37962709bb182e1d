"""A Python that has onnxruntime and NumPy alone, and the serving examples run in it."""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import tempfile
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

EXAMPLES = Path(__file__).parents[2] / "export" / "serving"


def serve(example: str, *argv: object) -> str:
    """What `export/serving/<example>.py ARGV` prints where nothing but onnxruntime and NumPy is installed."""
    command = [str(python()), "-I", str(EXAMPLES / f"{example}.py"), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir(), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def python() -> Path:
    """The interpreter of an environment whose packages are links to those installed here; removed at exit."""
    root = Path(tempfile.mkdtemp(prefix="serving-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    venv.create(root, with_pip=False, symlinks=True)
    site = next(root.glob("lib/python*/site-packages"))
    for distribution in map(metadata.distribution, required("onnxruntime", "numpy")):
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(str(distribution.locate_file(top)))
    found = root / "bin" / "python"
    banned = "import importlib.util as u; assert not any(map(u.find_spec, ('torch', 'onnx', 'moecore', 'apps')))"
    subprocess.run([found, "-I", "-c", banned], check=True, cwd=root)
    return found


def required(*names: str) -> set[str]:
    """Distributions and all that they need."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            needs = map(Requirement, metadata.requires(name) or ())
            waiting += [one.name for one in needs if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found
