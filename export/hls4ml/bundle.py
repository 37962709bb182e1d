"""A folder with an hls4ml project of a model, what it gives on samples, and how far that is from the model."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.errors import ExportError
from export.hls4ml.formats import LayerFormats, Settings, choose_formats
from export.hls4ml.norms import fit_layernorms
from export.hls4ml.plan import Plan, make_plan
from export.hls4ml.project import MANIFEST, NAME, PROJECT, require_hls4ml, simulate, strategy, write_project
from export.lowering import lower
from export.notes import require_replaceable
from moecore.errors import require

if TYPE_CHECKING:
    import onnx

GOLDEN = 256
"""Samples in a bundle at most."""
FLOAT_TOLERANCE = 1e-4
"""Largest error of the plan in floating point, relative to the largest output: it must be the same model."""
README = """# {title}

An hls4ml project (hls4ml {version}), generated and compared with the model by moecore.

- `{project}/`: the project. Top function `{name}`, weights in `firmware/weights/`.
- `{manifest}`: layers with their fixed-point formats and ranges, inputs, outputs, figures, SHA-256 of every file.
- `golden/`: `inputs.<name>.npy`, what the model gives in float (`reference.<name>.npy`), and what the project gives
  (`outputs.<name>.npy`).

Inputs are the features that the first layer reads. Embeddings stay on the host: look rows up there and hand on numbers.

{figures}

Synthesis (Vitis HLS or Vivado HLS; not tried by moecore): `cd {project} && vitis_hls -f build_prj.tcl`. Its testbench
reads the golden samples from `tb_data/`.

Simulation with g++: HLS tools have headers of `ap_fixed` of their own; g++ takes those of hls4ml, which are not passed
on here because not all of their licences allow it. With hls4ml installed,
`export.hls4ml.simulate(folder, inputs)` compiles and runs the project; or by hand:

    hls4ml=$(python -c "import hls4ml, pathlib; print(pathlib.Path(hls4ml.__file__).parent)")
    cp -r $hls4ml/templates/vivado/ap_types {project}/firmware/
    cd {project} && bash build_lib.sh
"""


def write_hls4ml(
    proto: onnx.ModelProto,
    calibration: Mapping[str, np.ndarray],
    folder: Path,
    settings: Settings | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Write a model as an hls4ml project that was compiled and compared with it.

    Args:
        proto: traced with a batch of one sample (`export.onnx.trace`).
        calibration: samples by input, `[B, ...]` each: formats are chosen from half of them, figures are of the others.
        folder: of the bundle; written whole or not at all, what was there before is replaced.
        settings: widths, FPGA, clock.
        metadata: plain data for the manifest.

    Returns:
        Figures by flat name: `<output>_relative_rms_error` (root of the mean squared error over the standard deviation,
        in each unit, of which the largest), `<output>_correlation` (the smallest of all units), `multiply_adds`,
        `layers`, `samples`.

    Raises:
        ExportError: hls4ml has no layers for the model or is not installed, or the project does not compile.
    """
    require_hls4ml()
    require_replaceable(Path(folder))
    settings = settings or Settings()
    count = min(map(len, calibration.values()))
    require(count >= 4, "calibration", count, "give at least four samples")
    proto = lower(proto, "dense")
    plan = make_plan(proto)
    seen, unseen = ({name: one[k::2] for name, one in calibration.items()} for k in (0, 1))
    _check_float(proto, plan, unseen)
    plan = fit_layernorms(plan, plan.run(seen))
    formats = choose_formats(plan, plan.run(seen), settings)
    golden = {name: one[:GOLDEN] for name, one in unseen.items()}
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
        made = Path(place) / folder.name
        version = write_project(plan, formats, settings, made / PROJECT)
        about = {**(metadata or {}), "format": "moecore-hls4ml", "hls4ml": version, **_describe(plan, formats)}
        _write_json(made / MANIFEST, about)
        figures, units = _compare(plan, made, golden)
        (made / "README.md").write_text(_readme(str(about.get("title", "Model")), version, figures))
        _write_json(made / MANIFEST, {**about, "figures": figures, "units": units, "sha256": _digests(made)})
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return figures


def _check_float(proto: onnx.ModelProto, plan: Plan, inputs: Mapping[str, np.ndarray]) -> None:
    """The plan against the graph in onnxruntime, on a few samples."""
    import onnxruntime

    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    few = {name: np.asarray(one[:8]) for name, one in inputs.items()}
    shapes = {one.name: one.shape for one in session.get_inputs()}
    rows = [
        session.run(
            list(plan.outputs), {name: one[row].reshape(shapes[name]).astype(np.float32) for name, one in few.items()}
        )
        for row in range(len(next(iter(few.values()))))
    ]
    values = plan.run(few)
    for name, *given in zip(plan.outputs, *rows, strict=True):
        expected = np.stack([one.ravel() for one in given])
        error = np.abs(values[plan.outputs[name]] - expected).max()
        if not error <= FLOAT_TOLERANCE * max(np.abs(expected).max(), 1e-12):
            raise ExportError(f"output {name}: layers for hls4ml differ from the graph by {error:.2g}; report a bug")


def _compare(plan: Plan, made: Path, golden: Mapping[str, np.ndarray]) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures of a bundle, and those of every unit of its outputs; its golden samples are written."""
    values, outputs = plan.run(golden), simulate(made, golden)
    place, tests = made / "golden", made / PROJECT / "tb_data"
    place.mkdir()
    figures: dict[str, float] = {}
    units: dict[str, Any] = {}
    for name, got in outputs.items():
        expected = values[plan.outputs[name]]
        errors, correlations = _errors(got, expected), _correlations(got, expected)
        figures[f"{name}_relative_rms_error"] = float(errors.max())
        figures[f"{name}_correlation"] = float(correlations.min())
        units[name] = {"relative_rms_error": errors.tolist(), "correlation": correlations.tolist()}
        np.save(place / f"outputs.{name}.npy", got)
        np.save(place / f"reference.{name}.npy", expected.astype(np.float32))
    for name, given in golden.items():
        np.save(place / f"inputs.{name}.npy", np.asarray(given, np.float32))
    flat = [np.asarray(golden[name]).reshape(len(golden[name]), -1) for name in plan.inputs]
    np.savetxt(tests / "tb_input_features.dat", np.concatenate(flat, 1), "%.8g")
    np.savetxt(tests / "tb_output_predictions.dat", np.concatenate(list(outputs.values()), 1), "%.8g")
    sizes = {"multiply_adds": sum(layer.multiply_adds for layer in plan.layers), "layers": len(plan.layers)}
    return {**figures, **{k: float(v) for k, v in sizes.items()}, "samples": float(len(flat[0]))}, units


def _errors(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """`[B, N]` each -> `[N]`: root of the mean squared error over the standard deviation."""
    return np.sqrt(((got - expected) ** 2).mean(0)) / np.maximum(expected.std(0), 1e-12)


def _correlations(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """`[B, N]` each -> `[N]`, Pearson's."""
    a, b = got - got.mean(0), expected - expected.mean(0)
    return (a * b).mean(0) / np.maximum(a.std(0) * b.std(0), 1e-24)


def _describe(plan: Plan, formats: Mapping[str, LayerFormats]) -> dict[str, Any]:
    """What the manifest says of the layers."""
    sizes = {layer.name: layer.size for layer in plan.layers}
    note = "features as the first layer reads them; embeddings stay on the host"
    return {
        "inputs": [{"name": name, "size": sizes[layer], "note": note} for name, layer in plan.inputs.items()],
        "outputs": [{"name": name, "size": sizes[layer]} for name, layer in plan.outputs.items()],
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "module": layer.origin,
                "inputs": list(layer.inputs),
                "size": layer.size,
                "multiply_adds": layer.multiply_adds,
                "strategy": strategy(layer),
                "largest": formats[layer.name].largest,
                "formats": {name: str(one) for name, one in formats[layer.name].precision.items()},
            }
            for layer in plan.layers
        ],
    }


def _readme(title: str, version: str, figures: Mapping[str, float]) -> str:
    text = "\n".join(f"- {name}: {value:.6g}" for name, value in figures.items())
    words = {"title": title, "version": version, "project": PROJECT, "manifest": MANIFEST, "name": NAME}
    return README.format(figures=text, **words)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(one for one in folder.rglob("*") if one.is_file() and one.name != MANIFEST)
    return {str(one.relative_to(folder)): hashlib.sha256(one.read_bytes()).hexdigest() for one in files}
