"""Which layers of a model carry MoE, with how many experts, and how they get there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from moecore.build import build_moe, build_router, router_width
from moecore.config import MoEConfig
from moecore.context import carry_across_layers
from moecore.errors import ConfigError, require
from moecore.ffn import DenseFFN, find_ffns, put_module
from moecore.layer import MoE
from moecore.routing import Router
from moecore.transforms.upcycle import upcycle

Make = Callable[[DenseFFN, int], nn.Module]
"""(the FFN to replace, its number among the replaced) -> what takes its place."""


def place(layers: str | Sequence[int], depth: int) -> list[int]:
    """Layer numbers from a placement.

    Args:
        layers: "all", "none", "last-N", "first-N", "every-N" (the last of every N), or numbers ("1,3,5" or [1, 3, 5];
            negative ones count from the end).
        depth: how many layers there are.

    Raises:
        ConfigError: for anything else, or a number outside the model.
    """
    if not isinstance(layers, str):
        return _checked(layers, layers, depth)
    name, _, number = layers.partition("-")
    if layers in ("all", "none"):
        return list(range(depth)) if layers == "all" else []
    if name in ("last", "first", "every") and number.isdigit() and 1 <= int(number) <= depth:
        n = int(number)
        ranges = {"last": range(depth - n, depth), "first": range(n), "every": range(n - 1, depth, n)}
        return list(ranges[name])
    try:
        numbers = [int(part) for part in layers.split(",")]
    except ValueError:
        remedy = f"use all, none, last-N, first-N or every-N with N in 1..{depth}, or numbers such as 1,3,5"
        raise ConfigError("layers", layers, remedy) from None
    return _checked(numbers, layers, depth)


def _checked(numbers: Sequence[int], given: object, depth: int) -> list[int]:
    inside = all(-depth <= n < depth for n in numbers)
    require(inside, "layers", given, f"the model has layers 0 to {depth - 1}")
    return sorted({n % depth for n in numbers})


def schedule(kind: str, num_layers: int, low: int, high: int) -> list[int]:
    """Expert counts that vary with depth.

    Args:
        kind: "constant" (high everywhere), "ascending", "descending", "pyramid" (most in the middle), "wave" (low and
            high in turn).
        num_layers: how many MoE layers.
        low: fewest experts.
        high: most experts.
    """
    require(1 <= low <= high, "low", low, f"must lie between 1 and high={high}")
    last = max(num_layers - 1, 1)
    half = (num_layers - 1) // 2  # steps from an end to the (first) layer in the middle
    shares: dict[str, Callable[[int], float]] = {
        "constant": lambda i: 1.0,
        "ascending": lambda i: i / last,
        "descending": lambda i: 1 - i / last,
        "pyramid": lambda i: min(i, num_layers - 1 - i) / half if half else 1.0,
        "wave": lambda i: float(i % 2),
    }
    require(kind in shares, "schedule", kind, f"choose one of {', '.join(shares)}")
    return [low + math.floor((high - low) * shares[kind](i) + 0.5) for i in range(num_layers)]


def replace_ffn(
    model: nn.Module,
    layers: str | Sequence[int] = "all",
    make: Make | MoEConfig | None = None,
    init: str = "upcycle",
    experts: Sequence[int] | None = None,
    share_router: bool = False,
) -> list[str]:
    """Turn FFNs of any module tree into MoE layers, in place.

    Args:
        model: a timm or torchvision ViT, a `nn.TransformerEncoder`, a transformers model, or any tree whose FFNs
            `moecore.find_ffns` knows.
        layers: which of its FFNs; see `place`. Numbers count the dense FFNs that are left: a second call on the same
            model sees fewer.
        make: what to put there: a `MoEConfig`, or a function of the FFN and its number. Default: `MoEConfig()`.
        init: for a config, where expert weights come from: "upcycle" copies the FFN (see `moecore.upcycle`), "random".
        experts: for a config, the number of experts of each replaced layer (see `schedule`).
        share_router: for a config, one router for all layers (any score but "recurrent").

    Returns:
        Names of the modules that were replaced.

    Raises:
        ConfigError: if the model has no FFN that is known, `experts` has the wrong length, the layers cannot share a
            router, or the config asks for experts that the FFN cannot be copied into.
    """
    require(not isinstance(layers, MoEConfig), "layers", layers, "comes before the configuration; give e.g. 'last-2'")
    known = make is None or isinstance(make, MoEConfig) or callable(make)
    require(known, "make", make, "give a moecore.MoEConfig, or a function of an FFN and its number")
    ffns = find_ffns(model)
    require(bool(ffns), "model", type(model).__name__, "has no FFN that moecore.find_ffns recognises")
    whole = any(ffn.name == "" for ffn in ffns)
    require(not whole, "model", type(model).__name__, "is itself an FFN; replace it within the module that holds it")
    chosen = [ffns[i] for i in place(layers, len(ffns))]
    if make is None or isinstance(make, MoEConfig):
        make = _maker(make or MoEConfig(), init, experts, share_router, chosen)
    made = [make(ffn, number) for number, ffn in enumerate(chosen)]  # all, before the model changes: any may fail
    for ffn, module in zip(chosen, made, strict=True):
        put_module(model, ffn, module)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            encoder.enable_nested_tensor = encoder.use_nested_tensor = False  # a fused path that knows no experts
    if any(isinstance(m, MoE) and getattr(m.router.score, "cell", None) is not None for m in model.modules()):
        carry_across_layers(model)
    return [ffn.name for ffn in chosen]


def _maker(
    config: MoEConfig, init: str, experts: Sequence[int] | None, share_router: bool, ffns: Sequence[DenseFFN]
) -> Make:
    """A function that builds the layers of one model from a configuration."""
    require(init in ("upcycle", "random"), "init", init, "choose upcycle or random")
    counts = [config.num_experts] * len(ffns) if experts is None else list(experts)
    require(len(counts) == len(ffns), "experts", counts, f"needs one number for each of the {len(ffns)} layers")
    if share_router:
        require(len(set(counts)) <= 1, "experts", counts, "layers that share a router need equal counts")
        widths = sorted({ffn.width for ffn in ffns})
        require(len(widths) <= 1, "share_router", True, f"the layers differ in the width of their tokens, {widths}")
        recurrent = config.score == "recurrent"
        require(not recurrent, "share_router", True, "recurrent routers share their cell as it is; leave it false")
    routers: list[Router] = []

    def make(ffn: DenseFFN, number: int) -> MoE:
        own = replace(config, num_experts=counts[number])
        router = routers[0] if share_router and routers else None
        if router is None and own.score == "recurrent":
            cell = routers[0].score.cell if routers else None
            router = build_router(own, router_width(own, ffn.width), cell=cell)
        layer = build_moe(own, ffn.width, ffn.shape(), router=router).to(ffn.up)  # its device and dtype
        routers.append(layer.router)
        if init == "upcycle":
            upcycle(ffn, layer)
        return layer

    return make
