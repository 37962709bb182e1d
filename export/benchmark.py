"""What mixtures cost in onnxruntime, form by form: `python -m export.benchmark`.

CPU time of one thread, or wall time of several, medians of calls in turn, random weights; every figure also as a ratio
to the dense model of equal active multiply-adds in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import moecore
from export.errors import ExportError
from export.lowering import lower
from export.lowering.twin import lower_twin
from export.measure import session_of, timed
from export.quantize import quantize
from export.trace import trace

if TYPE_CHECKING:
    import onnx

D, HIDDEN, HEADS, DEPTH, TOKENS = 192, 768, 3, 12, 197
"""ViT-tiny at 224 pixels: width, hidden units of an FFN, heads, layers, tokens."""
FORMS: dict[str, Any] = {
    "dense_equal": lower_twin,
    "sparse": "sparse",
    "all_experts": "dense",
    "loop": "loop",
    "ort_moe": "ort_moe",
}


def layer(num_experts: int, hidden: int, activation: str = "gelu") -> nn.Module:
    """One layer with two active experts."""
    torch.manual_seed(0)
    moe = moecore.MoE.build(D, num_experts=num_experts, top_k=2, hidden=hidden, activation=activation, bias=True)
    nn.init.normal_(moe.router.score.weight)  # spread over all experts
    return moe.eval()


class VisionTransformer(nn.Module):
    """ViT-tiny whose every second FFN is a mixture."""

    def __init__(self, num_experts: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, D, 16, 16)
        self.positions = nn.Parameter(torch.randn(1, TOKENS - 1, D))
        block = nn.TransformerEncoderLayer(
            D, HEADS, HIDDEN, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(block, DEPTH, enable_nested_tensor=False)
        moe = moecore.MoEConfig(num_experts=num_experts, top_k=2, hidden=HIDDEN)
        moecore.replace_ffn(self.encoder, "every-2", moe, init="random")
        for module in self.modules():
            if isinstance(module, moecore.MoE):
                nn.init.normal_(module.router.score.weight)
        self.head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 1000))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, 224, 224] -> [B, 1000]."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.encoder(tokens).mean(1))


def run_forms(
    opaque: onnx.ModelProto, x: np.ndarray, forms: Mapping[str, Any], rounds: int, module: nn.Module, threads: int
) -> list[dict[str, Any]]:
    """A row per form, and one of PyTorch eager: milliseconds, and the ratio to the first."""
    calls: dict[str, Callable[[], object]] = {}
    name = opaque.graph.input[0].name
    for form, how in forms.items():
        try:
            session = session_of(how if hasattr(how, "graph") else lower(opaque, how), threads)
        except ExportError:
            continue
        calls[form] = lambda session=session: session.run(None, {name: x})
    calls["torch eager"] = lambda: _eager(module, x)
    clock = time.process_time if threads == 1 else time.perf_counter
    times = {form: 1e3 * float(np.median(seconds)) for form, seconds in timed(calls, rounds, clock).items()}
    first = times[next(iter(times))]
    return [{"form": form, "ms": ms, "ratio": ms / first} for form, ms in times.items()]


def _eager(module: nn.Module, x: np.ndarray) -> None:
    with torch.no_grad():
        module(torch.from_numpy(x))


def layers(rounds: int, threads: int) -> list[dict[str, Any]]:
    """One layer at several numbers of tokens and experts."""
    rows: list[dict[str, Any]] = []
    cases = [(8, HIDDEN, (1, TOKENS, 32 * TOKENS)), (32, HIDDEN // 2, (1, TOKENS)), (128, HIDDEN // 2, (1, TOKENS))]
    for num_experts, hidden, sizes in cases:
        for activation in ("gelu", "gelu_tanh", "relu"):
            module = layer(num_experts, hidden, activation)
            opaque = trace(module, torch.randn(2, D), ["x"], ["y"], ({0: torch.export.Dim("tokens", min=1)},))
            for tokens in sizes:
                x = np.random.default_rng(0).normal(size=(tokens, D)).astype(np.float32)
                repeats = rounds if tokens > TOKENS else 5 * rounds
                case = {"experts": num_experts, "activation": activation, "tokens": tokens}
                rows += [case | row for row in run_forms(opaque, x, FORMS, repeats, module, threads)]
    return rows


def whole(rounds: int, threads: int) -> list[dict[str, Any]]:
    """ViT-tiny with six layers of mixtures, in float32 and quantised."""
    rows: list[dict[str, Any]] = []
    module = VisionTransformer()
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    opaque = trace(module, torch.randn(2, 3, 224, 224), ["images"], ["scores"], shapes)
    images = np.random.default_rng(0).normal(size=(16, 3, 224, 224)).astype(np.float32)
    forms = {name: how for name, how in FORMS.items() if name != "loop"}
    for kind in ("int8", "int8-dynamic"):
        forms[kind] = quantize(opaque, kind, [{"images": images[i : i + 4]} for i in range(0, 16, 4)])
    for batch in (1, 8):
        case = {"model": "ViT-tiny, 6 of 12 layers MoE", "batch": batch}
        rows += [case | row for row in run_forms(opaque, images[:batch], forms, rounds, module, threads)]
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m export.benchmark", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds; medians are reported")
    parser.add_argument("--threads", type=int, default=1, help="threads of each call; 0: all cores; wall time unless 1")
    parser.add_argument("--only", choices=("layers", "whole"), help="one of the two tables")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    tables = {name: table(args.rounds, args.threads) for name, table in TABLES.items() if args.only in (None, name)}
    for name, rows in tables.items():
        print(f"\n{name}")
        for row in rows:
            cells = (f"{value:10.3f}" if isinstance(value, float) else f"{value!s:>12}" for value in row.values())
            print("  ".join(cells))
    if args.json:
        args.json.write_text(json.dumps(tables, indent=1))


TABLES = {"layers": layers, "whole": whole}

if __name__ == "__main__":
    main()
