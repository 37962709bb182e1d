"""`python -m moecore.benchmark [--peers] [--shapes vision recsys] [--json FILE]`."""

from __future__ import annotations

import argparse
import functools
import json
import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import moecore
from moecore.benchmark.peers import peers
from moecore.benchmark.shapes import SHAPES, Shape, build, skewed
from moecore.benchmark.timing import forward_call, interleave, peak_memory, training_call
from moecore.files import write_atomic


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the benchmark, print a table per shape, and return the rows."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"moecore {moecore.__version__}, torch {torch.__version__}, {platform.processor() or platform.machine()}")
    print(
        f"{args.threads} thread(s), {args.device}, {args.dtype}; ratios to a dense FFN of equal active multiply-adds\n"
    )
    rows = []
    for name in args.shapes:
        rows += _measure(SHAPES[name], args)
    if args.json:
        write_atomic(args.json, json.dumps(rows, indent=2) + "\n")
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moecore.benchmark", description=__doc__, allow_abbrev=False)
    parser.add_argument("--peers", action="store_true", help="measure other libraries too, those that are installed")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="layers to measure")
    parser.add_argument("--executors", nargs="+", default=["sorted", "grouped_mm"], help="of moecore.EXECUTORS")
    parser.add_argument("--rounds", type=int, default=25, help="interleaved rounds (default 25)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of weights and input")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory of forward and backward")
    parser.add_argument("--json", help="write the rows to this file")
    return parser


def _contenders(shape: Shape, args: argparse.Namespace, x: Tensor) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {"dense FFN": shape.dense()}
    for executor in args.executors:
        modules[f"moecore {executor}"] = shape.moe(executor)
    if shape.top_k < shape.experts:
        modules["moecore sorted, skewed"] = skewed(shape.moe("sorted"), x)
    if args.peers:
        modules |= dict(peers(shape))
    return {name: m.to(args.device, getattr(torch, args.dtype)) for name, m in modules.items()}


def _measure(shape: Shape, args: argparse.Namespace) -> list[dict[str, Any]]:
    print(
        f"{shape.name}: {shape.tokens} tokens, width {shape.width}, {shape.experts} experts of {shape.hidden}, "
        f"top-{shape.top_k}{f', shared {shape.shared}' if shape.shared else ''}"
    )
    x = shape.input()
    modules = _contenders(shape, args, x)
    x = x.to(args.device, getattr(torch, args.dtype))
    forward = interleave({n: forward_call(m, x) for n, m in modules.items()}, args.rounds, device=args.device)
    training = interleave({n: training_call(m, x) for n, m in modules.items()}, args.rounds, device=args.device)
    print(f"  {'':28} {'forward':>22} {'forward+backward':>24} {'peak memory':>14}")
    rows = []
    for name in modules:
        memory = None if args.no_memory or args.device != "cpu" else _memory(shape, name)
        row = {
            "shape": shape.name,
            "layer": name,
            "forward_ms": forward[name].median * 1e3,
            "forward_ratio": forward[name].ratio,
            "training_ms": training[name].median * 1e3,
            "training_ratio": training[name].ratio,
            "peak_memory_bytes": memory,
        }
        rows.append(row)
        print(f"  {name:28} {_cell(forward[name])} {_cell(training[name])}   {_megabytes(memory)}", flush=True)
    print()
    return rows


def _cell(timing) -> str:
    spread = f"({timing.ratio_low:.2f}-{timing.ratio_high:.2f})"
    return f"{timing.median * 1e3:8.1f} ms {timing.ratio:5.2f} {spread}"


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:8.0f} MiB"


def _memory(shape: Shape, name: str) -> int | None:
    if name == "dense FFN":
        return peak_memory(functools.partial(build, shape, None))
    executor = name.removeprefix("moecore ")
    return peak_memory(functools.partial(build, shape, executor)) if executor in moecore.EXECUTORS else None


if __name__ == "__main__":
    main()
