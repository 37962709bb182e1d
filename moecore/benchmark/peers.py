"""Layers of other libraries at our shapes; each is used if it is installed."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from moecore.benchmark.shapes import Shape


class Flat(nn.Module):
    """Gives a layer that wants [B, N, D] one sequence, and takes the output out of what it returns."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        y = self.layer(x[None])
        y = y if isinstance(y, Tensor) else y[0]
        return y.reshape(x.shape[0], -1)


def peers(shape: Shape) -> Iterator[tuple[str, nn.Module]]:
    """Name and layer of every peer that is installed and runs here."""
    for package, makers in PEERS.items():
        if importlib.util.find_spec(package) is None:
            continue
        for name, make in makers.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    layer = make(shape)
                    layer(torch.randn(8, shape.width))
            except Exception as error:  # a peer that does not run here is no reason to stop
                print(f"  {name}: does not run here ({str(error).splitlines()[0]})")
                continue
            yield name, layer


def _transformers(implementation: str) -> Callable[[Shape], nn.Module]:
    def make(shape: Shape) -> nn.Module:
        if shape.shared:
            from transformers import Qwen2MoeConfig as Config
            from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock as Block

            config = Config(
                hidden_size=shape.width,
                moe_intermediate_size=shape.hidden,
                shared_expert_intermediate_size=shape.shared,
                num_experts=shape.experts,
                num_experts_per_tok=shape.top_k,
                norm_topk_prob=True,
            )
        else:
            from transformers import MixtralConfig as Config
            from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as Block

            config = Config(
                hidden_size=shape.width,
                intermediate_size=shape.hidden,
                num_local_experts=shape.experts,
                num_experts_per_tok=shape.top_k,
            )
        config._experts_implementation = implementation
        block = Block(config)
        for p in block.parameters():  # the block leaves its weights uninitialised
            nn.init.normal_(p, std=0.02)
        return Flat(block)

    return make


def _tutel(shape: Shape) -> nn.Module:
    from tutel import moe

    hidden = shape.dense_hidden * 3 // (2 * shape.top_k)  # two matrices per expert: equal multiply-adds need 3/2 units
    layer = moe.moe_layer(
        gate_type={"type": "top", "k": shape.top_k, "capacity_factor": 0},  # 0: dropless
        model_dim=shape.width,
        experts={
            "type": "ffn",
            "num_experts_per_device": shape.experts,
            "hidden_size_per_expert": hidden,
            "activation_fn": nn.functional.gelu,
        },
    )
    return Flat(layer)


def _st_moe(shape: Shape) -> nn.Module:
    from st_moe_pytorch import MoE

    # A GEGLU expert has hidden_mult * 2/3 * D units; it drops tokens beyond its capacity.
    layer = MoE(
        shape.width,
        num_experts=shape.experts,
        expert_hidden_mult=shape.hidden * 1.5 / shape.width,
        gating_top_n=max(shape.top_k, 2),
    )
    return Flat(layer)


PEERS: dict[str, dict[str, Callable[[Shape], nn.Module]]] = {
    "transformers": {
        "transformers eager": _transformers("eager"),
        "transformers grouped_mm": _transformers("grouped_mm"),
    },
    "tutel": {"tutel": _tutel},
    "st_moe_pytorch": {"st-moe-pytorch": _st_moe},
}
"""Package -> name -> maker."""
