"""From a dense Moirai to Moirai-MoE: centroids of what its FFNs see, and experts from its FFNs.

Moirai-MoE (arXiv 2410.10469) clusters the attention outputs of a pretrained dense model by k-means; the centroids then
stand in for a router and stay as they are. Starting the experts from the dense FFNs is sparse upcycling (arXiv
2212.05055).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from sklearn.cluster import KMeans
from torch import Tensor

import moecore
from apps.errors import UserError
from apps.timeseries.models.base import Windows
from apps.timeseries.models.moirai_moe import MoiraiMoE
from apps.timeseries.models.moirai_tokens import make_grid
from moecore.errors import require

MAX_TOKENS = 20_000
"""Tokens per layer that k-means sees: drawn evenly from all batches."""


@torch.no_grad()
def ffn_inputs(model: MoiraiMoE, windows: Windows) -> Float[Tensor, "layers T D"]:
    """What the FFN or router of every layer sees of a batch: normalised attention outputs of all observed patches."""
    seen: list[Tensor] = []
    hooks = [ffn.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for ffn in model.ffns]
    training = model.training
    model.eval()
    try:
        tokens = make_grid(windows, model.config.patch_size, ahead=model.config.known_ahead).tokens
        model.encoder(tokens)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return torch.stack([x[tokens.valid] for x in seen])


def fit_centroids(
    dense: MoiraiMoE, batches: Iterable[Windows], num_experts: int, seed: int = 0
) -> Float[Tensor, "layers E D"]:
    """Cluster what every layer's FFN sees into as many clusters as there are to be experts.

    Args:
        dense: a trained model.
        batches: of training windows; a few thousand patches per expert are plenty.
        num_experts: E.
        seed: of the choice of tokens and of k-means.

    Raises:
        UserError: if there are fewer distinct tokens than experts.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(dense.parameters()).device
    kept, rank = None, torch.empty(0)
    for batch in batches:
        seen = ffn_inputs(dense, batch.to(device)).float().cpu()
        kept = seen if kept is None else torch.cat([kept, seen], 1)
        rank = torch.cat([rank, torch.rand(seen.shape[1], generator=generator)])
        index = rank.argsort()[:MAX_TOKENS]  # those of lowest rank among all so far: an even draw from the stream
        kept, rank = kept[:, index], rank[index]
    distinct = 0 if kept is None else min(len(layer.unique(dim=0)) for layer in kept)
    if distinct < num_experts:
        raise UserError(f"num_experts={num_experts}: the data hold only {distinct} distinct patches to cluster")
    kmeans = [KMeans(num_experts, n_init=3, random_state=seed).fit(layer.numpy()) for layer in kept]
    return torch.stack([torch.from_numpy(fit.cluster_centers_) for fit in kmeans])


@torch.no_grad()
def start_from_dense(model: MoiraiMoE, dense: MoiraiMoE, centroids: Float[Tensor, "layers E D"]) -> MoiraiMoE:
    """Give a sparse model a dense one's weights, its FFNs cut into experts (`moecore.upcycle`), and centroids.

    Raises:
        ConfigError: for models of different sizes, or a model that has no experts.
    """
    require(len(model.moe_layers) > 0, "num_experts", model.config.num_experts, "must be at least 2 to upcycle")
    require(dense.config.num_experts == 1, "num_experts", dense.config.num_experts, "of the dense model must be 1")
    for name in ("patch_size", "d_model", "num_layers", "num_heads"):
        theirs, ours = getattr(dense.config, name), getattr(model.config, name)
        require(ours == theirs, name, ours, f"must be {theirs}, as in the dense model")
    shape = (model.config.num_layers, model.config.num_experts, model.config.d_model)
    require(tuple(centroids.shape) == shape, "centroids", tuple(centroids.shape), f"must have shape {shape}")
    own = model.state_dict()
    own.update({name: weight for name, weight in dense.state_dict().items() if name in own})
    model.load_state_dict(own)
    for layer, ffn, centres in zip(model.moe_layers, moecore.find_ffns(dense), centroids, strict=True):
        moecore.upcycle(ffn, layer)
        layer.router.score.centroids.copy_(centres)
    return model


def initialise_from_dense(
    model: MoiraiMoE, dense_state: Mapping[str, Tensor], batches: Iterable[Windows], seed: int = 0
) -> MoiraiMoE:
    """Start a sparse model from the weights of a dense run of the same sizes; see `fit_centroids`.

    Args:
        model: the model to be; changed in place, and returned.
        dense_state: `state_dict` of a `MoiraiMoE` with the same configuration but `dense=True`.
        batches: of training windows.
        seed: of the choice of tokens and of k-means.

    Raises:
        UserError: for weights of another model, or too few data.
    """
    dense = MoiraiMoE(model.config, dense=True)
    try:
        dense.load_state_dict(dict(dense_state))
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"centroids_from: not the weights of a dense run of the same sizes: {reason}") from None
    dense.to(next(model.parameters()).device)
    return start_from_dense(model, dense, fit_centroids(dense, batches, model.config.num_experts, seed))
