"""hls4ml's project of a plan: written by hls4ml, compiled with g++, run on samples."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from export.errors import ExportError
from export.hls4ml.elements import PAIRS
from export.hls4ml.formats import TABLE_SIZE, LayerFormats, Settings
from export.hls4ml.plan import Layer, Plan

NAME = "moecore"
"""Of the project, and of its top function."""
PROJECT, MANIFEST = "project", "manifest.json"
"""Folder of the project, and the description, in a bundle."""
VENDOR_HEADERS = Path("firmware/ap_types")
"""What hls4ml puts into a project for g++ alone. HLS tools have headers of their own, and not all of these may be
passed on, so that bundles come without."""
INNER = ("inp_norm", "exp_table", "inv_inp", "inv_table", "table")
"""Types inside a layer."""
LARGEST_UNROLLED = 4096
"""Weights of a layer beyond which HLS tools do not unroll it; hls4ml then computes it in its "resource" form."""


def _dense(layer: Layer) -> dict[str, Any]:
    weight, bias = layer.weights["weight"], layer.weights["bias"]
    own = {"weight_data": weight.T.copy(), "bias_data": bias, "use_bias": True}  # hls4ml keeps [in, out]
    return {"class_name": "Dense", "n_in": weight.shape[1], "n_out": weight.shape[0], **own}


def _affine(layer: Layer) -> dict[str, Any]:
    own = {"scale_data": layer.weights["scale"], "bias_data": layer.weights["bias"]}
    return {"class_name": "BatchNormalization", "n_in": layer.size, "n_filt": -1, **own}


def _mix(layer: Layer) -> dict[str, Any]:
    count = int(layer.weights["count"])
    shapes = {"inp0_shape": (count,), "inp1_shape": (count, layer.size), "out_shape": (layer.size,)}
    return {"class_name": "Einsum", "equation": "k,kn->n", **shapes}


def _softmax(layer: Layer) -> dict[str, Any]:
    sizes = {"exp_table_size": TABLE_SIZE, "inv_table_size": TABLE_SIZE}
    return {"class_name": "Softmax", "activation": "softmax", "axis": -1, "implementation": "stable", **sizes}


def _layer_norm(layer: Layer) -> dict[str, Any]:
    power = max(round(-float(np.log10(layer.weights["epsilon"]))), 1)
    own = {"gamma_data": layer.weights["scale"], "beta_data": layer.weights["bias"]}
    sizes = {"n_in": layer.size, "n_out": layer.size, "seq_len": 1, "axis": 2, "epsilon_power_of_10": power}
    return {"class_name": "LayerNormalization", **sizes, **own}


def _parametrised(class_name: str, activation: str, layer: Layer) -> dict[str, Any]:
    return {"class_name": class_name, "activation": activation, "activ_param": float(layer.weights["alpha"])}


LAYERS = {
    "input": lambda layer: {"class_name": "InputLayer", "input_shape": [layer.size]},
    "dense": _dense,
    "affine": _affine,
    "mix": _mix,
    "softmax": _softmax,
    "layernorm": _layer_norm,
    "concatenate": lambda layer: {"class_name": "Concatenate", "op": "concatenate1d", "axis": 1},
    "elu": lambda layer: _parametrised("ELU", "elu", layer),
    "leaky_relu": lambda layer: _parametrised("LeakyReLU", "leakyrelu", layer),
}
"""Kind of layer -> what hls4ml's frontends hand on for it, beside name and inputs."""


def _description(layer: Layer) -> dict[str, Any]:
    if layer.kind in LAYERS:
        own = LAYERS[layer.kind](layer)
    elif layer.kind in PAIRS.values():
        own = {"class_name": "Merge", "op": layer.kind}
    else:
        own = {"class_name": "Activation", "activation": layer.kind}
    return {"name": layer.name, **own, **({"inputs": list(layer.inputs)} if layer.inputs else {})}


def _settings(layer: Layer, formats: LayerFormats, settings: Settings) -> dict[str, Any]:
    """What hls4ml is told of a layer."""
    spelled = {name: str(one) for name, one in formats.precision.items()}
    # Of types inside a layer hls4ml reads no precision, but attributes.
    own: dict[str, Any] = {f"{name}_t": spelled.pop(name) for name in INNER if name in spelled}
    own |= {"Precision": spelled, "ReuseFactor": settings.reuse_factor, "Strategy": strategy(layer)}
    if layer.kind in ("sigmoid", "tanh", "elu", "layernorm"):
        own["TableSize"] = TABLE_SIZE
    return own


def strategy(layer: Layer) -> str:
    """hls4ml's form of a layer: "Latency", or "Resource" where it is too large to be unrolled."""
    return "Resource" if layer.kind == "dense" and layer.multiply_adds > LARGEST_UNROLLED else "Latency"


def write_project(plan: Plan, formats: Mapping[str, LayerFormats], settings: Settings, folder: Path) -> str:
    """Have hls4ml write its project.

    Args:
        plan: the layers.
        formats: of every layer.
        settings: of the project.
        folder: to write to.

    Returns:
        hls4ml's version.

    Raises:
        ExportError: hls4ml is not installed.
    """
    hls4ml = require_hls4ml()
    with _quiet():
        graph = _graph(plan, formats, settings, folder)
        graph.write()
    shutil.rmtree(folder / VENDOR_HEADERS)
    # What hls4ml draws at random, and the folder it wrote to: no two projects of a model would be the same.
    for text in (folder / "build_lib.sh", folder / "hls4ml_config.yml", folder / "project.tcl"):
        said = text.read_text().replace(graph.config.get_config_value("Stamp"), NAME)
        text.write_text(said.replace(str(folder), "."))
    return hls4ml.__version__


def require_hls4ml() -> Any:
    """The package.

    Raises:
        ExportError: it is not installed.
    """
    try:
        with _quiet():
            import hls4ml
    except ImportError as error:
        raise ExportError(f"hls4ml is not installed ({error}); pip install 'moecore[hls4ml]'") from error
    return hls4ml


def _graph(plan: Plan, formats: Mapping[str, LayerFormats], settings: Settings, folder: Path) -> Any:
    """hls4ml's model. Layers go to it as its frontends hand them on, so that none of their guesses come between."""
    from hls4ml.converters import create_config
    from hls4ml.model import ModelGraph

    config = create_config(
        output_dir=str(folder),
        project_name=NAME,
        backend=settings.backend,
        part=settings.part,
        clock_period=settings.clock_period,
        io_type="io_parallel",
    )
    default = {"Precision": {"default": f"ap_fixed<{settings.width},{settings.width // 2}>"}}
    model = {**default, "ReuseFactor": settings.reuse_factor, "Strategy": "Latency"}
    own = {layer.name: _settings(layer, formats[layer.name], settings) for layer in plan.layers}
    config["HLSConfig"] = {"Model": model, "LayerName": own}
    layers = [_description(layer) for layer in plan.layers]
    layers.sort(key=lambda one: one["class_name"] != "InputLayer")
    return ModelGraph.from_layer_list(
        config, layers, inputs=list(plan.inputs.values()), outputs=list(plan.outputs.values())
    )


def simulate(folder: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs `[B, N]` of a bundle's project, compiled with g++.

    Args:
        folder: of the bundle.
        inputs: by name, `[B, ...]` each.

    Raises:
        ExportError: hls4ml is not installed, or the project does not compile.
    """
    headers = Path(require_hls4ml().__file__).parent / "templates/vivado/ap_types"
    about = json.loads((folder / MANIFEST).read_text())
    given = [np.ascontiguousarray(inputs[one["name"]], np.float32).reshape(-1, one["size"]) for one in about["inputs"]]
    made = [np.zeros((len(given[0]), one["size"]), np.float32) for one in about["outputs"]]
    with tempfile.TemporaryDirectory() as place:
        project = Path(place) / PROJECT
        shutil.copytree(folder / PROJECT, project)
        shutil.copytree(headers, project / VENDOR_HEADERS)
        function = _compiled(project)
        for arrays in zip(*given, *made, strict=True):  # a sample at a time; rows of `made` are written to
            function(*(array.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for array in arrays))
    return {one["name"]: values for one, values in zip(about["outputs"], made, strict=True)}


def _compiled(project: Path) -> Any:
    built = subprocess.run(["bash", "build_lib.sh"], cwd=project, capture_output=True, text=True, check=False)
    if built.returncode:
        said = [line for line in built.stderr.splitlines() if "error" in line] or built.stderr.splitlines()[-1:]
        raise ExportError(f"the hls4ml project does not compile: {' '.join(said[:1])}")
    function = getattr(ctypes.CDLL(str(project / f"firmware/{NAME}-{NAME}.so")), f"{NAME}_float")
    function.restype = None
    return function


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """hls4ml prints what it does, and warns of what is meant."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
