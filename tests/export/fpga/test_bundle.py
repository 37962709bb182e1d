"""Whole small models: traced, compiled, built by g++, and the same bits as the simulator in every layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moecore
from export.errors import ExportError
from export.fpga import FixedSettings, export_fpga, load, run_bundle, simulate_bundle
from export.fpga.calibrate import FloatGraph
from export.fpga.manifest import checksum
from export.trace import trace

D, N = 16, 10
FAST = "-std=c++14 -O0 -Wall -Wextra -Werror -Wno-unknown-pragmas"
Feeds = list[dict[str, np.ndarray]]


@pytest.fixture(autouse=True)
def _fast_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", FAST)


class Vit(nn.Module):
    """Patches, attention, a mixture of experts gated by task, a classifier."""

    def __init__(self, task: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.task = nn.Conv2d(3, D, 4, 4), task
        self.position = nn.Parameter(torch.randn(1, N - 1, D) / 4)
        self.token = nn.Parameter(torch.randn(1, 1, D) / 4)
        self.norms = nn.ModuleList([nn.LayerNorm(D, eps=1e-6) for _ in range(2)])
        self.qkv, self.merge = nn.Linear(D, 3 * D), nn.Linear(D, D)
        options = {"score": "per_task", "score_options": {"num_tasks": 2}, "weight_options": {"renormalize": False}}
        self.moe = moecore.MoE.build(D, num_experts=5, top_k=2, hidden=24, activation="gelu", **options)
        nn.init.normal_(self.moe.router.score.weight)
        self.head = nn.Linear(D, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        q, k, v = self.qkv(self.norms[0](x)).reshape(-1, N, 3, 2, D // 2).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.merge(attended)
        with moecore.routing_context(task=self.task):
            x = x + self.moe(self.norms[1](x))
        return self.head(x[:, 0])


class Ranker(nn.Module):
    """MMoE: embeddings and numbers, experts that every gate mixes, a tower for each task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.bias = nn.Embedding(20, 5), nn.BatchNorm1d(13)
        self.up, self.down = nn.Parameter(torch.randn(4, 13, 8) / 4), nn.Parameter(torch.randn(4, 8, 6) / 3)
        self.gates = nn.ModuleList([nn.Linear(13, 4) for _ in range(2)])
        self.towers = nn.ModuleList([nn.Linear(6, 1) for _ in range(2)])

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        x = self.bias(torch.cat([self.table(ids).flatten(1), numbers], 1))
        outputs = torch.bmm(torch.relu(torch.bmm(x.expand(4, -1, -1), self.up)), self.down).transpose(0, 1)
        weights = torch.stack([gate(x).softmax(-1) for gate in self.gates], 1)
        mixed = torch.bmm(weights, outputs)
        return torch.cat([tower(mixed[:, i]) for i, tower in enumerate(self.towers)], 1).sigmoid()


class Policy(nn.Module):
    """Bytes of a camera, convolutions, a mixture in the actor, tanh."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.encoder = nn.Sequential(nn.Conv2d(2, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten())
        self.trunk = nn.Sequential(nn.Linear(64, D), nn.LayerNorm(D), nn.Tanh())
        self.moe = moecore.MoE.build(D, num_experts=4, top_k=2, hidden=6, activation="relu")
        self.mean = nn.Linear(D, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.tanh(self.mean(self.moe(self.trunk(self.encoder(pixels / 255.0 - 0.5)))))


class Step(nn.Module):
    """One step of a decoder: RMS norm, rotary angles, cached keys and values, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.project, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.moe = moecore.MoE.build(D, num_experts=3, top_k=1, hidden=8, glu=True, activation="silu", bias=False)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * 1.5
        q, k, v = self.project(normal).reshape(1, 1, 3, 2, D // 2).permute(2, 0, 3, 1, 4)
        angle = keys.shape[2] / 100 ** (torch.arange(0, D // 2, 2) / (D // 2))
        cos, sin = angle.cos().repeat(2), angle.sin().repeat(2)
        q, k = (t * cos + torch.cat([-t[..., D // 4 :], t[..., : D // 4]], -1) * sin for t in (q, k))
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        attended = F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2)
        return self.moe(x + self.out(attended)), keys, values


def inputs_of(shapes: dict[str, tuple[int, ...]], count: int = 6) -> Feeds:
    rng = np.random.default_rng(0)
    kinds = {
        "ids": lambda shape: rng.integers(0, 20, shape),
        "pixels": lambda shape: rng.integers(0, 256, shape).astype(np.uint8),
        "images": lambda shape: rng.random(shape).astype(np.float32),
    }
    normal = lambda shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return [{name: kinds.get(name, normal)(shape) for name, shape in shapes.items()} for _ in range(count)]


MODELS: dict[str, tuple[type[nn.Module], dict[str, tuple[int, ...]], list[str], set[str]]] = {
    "vit": (Vit, {"images": (1, 3, 12, 12)}, ["scores"], {"conv2d", "norm", "softmax", "experts", "concat"}),
    "ranker": (Ranker, {"ids": (1, 2), "numbers": (1, 3)}, ["chances"], {"gather", "matmul", "softmax", "table"}),
    "policy": (Policy, {"pixels": (1, 2, 13, 13)}, ["action"], {"conv2d", "experts", "norm", "table"}),
    "step": (
        Step,
        {"x": (1, 1, D), "keys": (1, 2, 5, D // 2), "values": (1, 2, 5, D // 2)},
        ["y", "keys_out", "values_out"],
        {"norm", "concat", "softmax", "experts"},
    ),
}


def traced(name: str) -> tuple[onnx.ModelProto, Feeds]:
    model, shapes, outputs, _ = MODELS[name]
    feeds = inputs_of(shapes)
    example = tuple(torch.from_numpy(value) for value in feeds[0].values())
    return trace(model().eval(), example, list(shapes), outputs), feeds


@pytest.mark.parametrize("name", list(MODELS))
def test_a_whole_model_gives_the_same_bits_in_every_layer(tmp_path, name):
    proto, feeds = traced(name)
    folder = tmp_path / "bundle"
    figures = export_fpga(proto, feeds[:4], folder, metadata={"task": name})
    last = run_bundle(folder).splitlines()[-1]
    assert last.startswith(f"PASSED: {figures['layers']:.0f} layers, 1 runs, ")
    assert " 0 mismatches, 0 overflows" in last
    kinds = {layer.op.kind for layer in load(folder).layers}
    assert kinds >= MODELS[name][3]
    found, overflows = simulate_bundle(folder, feeds[4:])
    assert not overflows
    graph = FloatGraph(proto)
    for outputs, feed in zip(found, feeds[4:], strict=True):
        expected = graph.run(feed)
        for key, value in outputs.items():
            assert np.abs(value - expected[key]).max() < 3e-4 * np.abs(expected[key]).max()


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, onnx.ModelProto], Feeds]:
    """A bundle whose gates differ by task; tests only read it."""
    feeds = inputs_of(MODELS["vit"][1])
    example = torch.from_numpy(feeds[0]["images"])
    protos = {name: trace(Vit(task).eval(), example, ["images"], ["scores"]) for task, name in enumerate(("a", "b"))}
    folder = tmp_path_factory.mktemp("tasks") / "bundle"
    export_fpga(protos, feeds[:4], folder, FixedSettings(overflow="wrap"))
    return folder, protos, feeds


def test_the_task_is_another_gate_table_and_nothing_else(two_tasks):
    folder, protos, feeds = two_tasks
    assert ", 2 runs, " in run_bundle(folder).splitlines()[-1]
    manifest = json.loads((folder / "manifest.json").read_text())
    varied = {name: held["size"] for name, held in manifest["constants"].items() if held["variants"] > 1}
    assert list(varied.values()) == [5 * D]
    results = []
    for task, proto in enumerate(protos.values()):
        (found,), _ = simulate_bundle(folder, feeds[5:], task)
        expected = FloatGraph(proto).run(feeds[5])["scores"]
        assert np.abs(found["scores"] - expected).max() < 3e-4 * np.abs(expected).max()
        results.append(found["scores"])
    assert np.abs(results[0] - results[1]).max() > 1e-3


def test_tasks_of_other_structure_are_refused(tmp_path):
    feeds = inputs_of(MODELS["vit"][1])
    deeper = Vit(1)
    deeper.head = nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, 4))
    example = torch.from_numpy(feeds[0]["images"])
    protos = {n: trace(m.eval(), example, ["images"], ["scores"]) for n, m in (("a", Vit()), ("b", deeper))}
    with pytest.raises(
        ExportError, match=r"^task b: its graph has \d+ layers, the first one's \d+; export the tasks one "
    ):
        export_fpga(protos, feeds, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_the_manifest_says_what_is_there(two_tasks):
    folder, _, _ = two_tasks
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"manifest.json"}
    assert files == set(manifest["files"])
    for name, digest in manifest["files"].items():
        assert checksum((folder / name).read_bytes()) == digest
    (experts,) = [layer for layer in manifest["layers"] if layer["op"] == "experts"]
    assert experts["dims"] == {"tokens": N, "top_k": 2, "experts": 5, "in": D, "hidden": 24, "out": D, "gated": 0}
    assert experts["macs"] == N * 2 * 24 * 2 * D
    assert experts["weight_bytes"] == 2 * 5 * 24 * 2 * D
    assert experts["module"] == "moe"
    assert "loaded once" in experts["schedule"]
    assert manifest["settings"]["overflow"] == "wrap"
    for layer in manifest["layers"]:
        for name in layer["outputs"]:
            tensor = manifest["tensors"][name]
            assert -(2 ** (tensor["integer"] - 1)) <= tensor["low"] <= tensor["high"] < 2 ** (tensor["integer"] - 1)


def test_queues_in_the_bundle_are_the_models_routing(two_tasks):
    folder, _, feeds = two_tasks
    model = Vit(1).eval()
    with moecore.record(model) as recording, torch.no_grad():
        model(torch.from_numpy(feeds[0]["images"]))
    (routing,) = recording
    lines = [line.split() for line in (folder / "golden" / "index.txt").read_text().splitlines()]
    start = next(i for i, line in enumerate(lines) if line[:2] == ["case", "1"])
    parts = {
        line[2]: np.fromfile(folder / line[5], "<i4") for line in lines[start:] if line[-1].startswith("_symbolic")
    }
    assert parts["2"].tolist() == routing.assignment.load().tolist()
    queue = np.split(parts["1"], np.cumsum(parts["2"]))
    for expert, tokens in enumerate(queue[:5]):
        assert sorted(tokens.tolist()) == sorted(np.nonzero((routing.assignment.expert == expert).any(1).numpy())[0])


def test_a_changed_file_is_not_simulated(tmp_path):
    proto, feeds = traced("ranker")
    folder = tmp_path / "bundle"
    export_fpga(proto, feeds[:2], folder)
    weights = folder / "weights" / "weights.bin"
    raw = bytearray(weights.read_bytes())
    raw[0] ^= 1
    weights.write_bytes(bytes(raw))
    with pytest.raises(ExportError, match=r"not the file that manifest\.json describes"):
        simulate_bundle(folder, feeds[:1])
    if shutil.which("sha256sum"):
        with pytest.raises(ExportError, match=r"weights/weights\.bin: FAILED"):
            run_bundle(folder)
    weights.unlink()
    with pytest.raises(ExportError, match="No such file"):
        simulate_bundle(folder, feeds[:1])
    with pytest.raises(ExportError, match="no readable manifest"):
        simulate_bundle(tmp_path / "elsewhere", feeds[:1])


@pytest.mark.parametrize("overflow", ["saturate", "wrap"])
def test_what_does_not_fit_is_counted_by_tensor_in_both(tmp_path, overflow):
    proto, feeds = traced("step")
    settings = FixedSettings(margin=0, overflow=overflow)
    folder = tmp_path / "bundle"
    loud = [{name: 8 * value for name, value in feed.items()} for feed in feeds]
    figures = export_fpga(proto, feeds[:1], folder, settings)
    assert figures["golden_overflows"] == 0
    _, overflows = simulate_bundle(folder, loud)
    assert overflows
    assert {"x", "keys"} <= set(overflows)  # inputs are clamped, and counted
    assert set(overflows) <= set(load(folder).tensors)


@pytest.mark.parametrize("name", ["ids", "x"])
def test_inputs_that_do_not_fit_are_one_line(tmp_path, name):
    proto, feeds = traced("ranker")
    export_fpga(proto, feeds[:1], tmp_path / "bundle")
    bad = dict(feeds[0])
    if name == "x":
        bad["numbers"] = np.array([[1, np.nan, 0]], np.float32)
        message = "^numbers: holds missing or infinite values; fixed point has none, fill them$"
    else:
        bad["ids"] = np.zeros((2, 2), np.int64)
        message = r"^ids: has shape \[2, 2\], not \[1, 2\]$"
    with pytest.raises(ExportError, match=message):
        simulate_bundle(tmp_path / "bundle", [bad])
