"""AdamW for networks; rules of their own for embedding tables, at the cost of the touched rows where these are few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from apps.recsys.models.features import Tables
from apps.recsys.train_settings import RankOptimConfig
from apps.training import learning_rate_factor
from moecore.errors import require


class RankAdamW(torch.optim.AdamW):
    """AdamW, and rules for embedding tables; with sparse gradients at a cost that no table's size changes.

    A group's `rows` says which: "adagrad", a step `lr g / (sqrt(s) + eps)` with one sum s per row of the mean squares
    of its gradients (row-wise Adagrad, state of one number per row), of sparse gradients or, to the same end, of dense
    ones; or "adam", with moments that move only when their row has a gradient that is not zero (lazy Adam, state of
    twice the table; AdamW where gradients are dense). Both take `lr` of their group, and no weight decay.

    Args:
        groups: as for `torch.optim.AdamW`; those of tables with `rows`.
        betas: of AdamW and lazy Adam.
        eps: likewise, and of Adagrad.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__([{"rows": None, **group} for group in groups], betas=betas, eps=eps, fused=_can_fuse(groups))
        self._step_supports_amp_scaling = False  # rows need unscaled gradients too, and no step where one is infinite

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; gradients stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tables = [(g, p, p.grad) for g in self.param_groups for p in g["params"] if _is_ruled(g["rows"], p)]
        for _, table, _ in tables:
            table.grad = None  # AdamW passes by what has none
        super().step()
        for group, table, grad in tables:
            table.grad = grad
            if not grad.is_sparse:
                self._adagrad_whole(group, table, grad)
                continue
            update = self._adam if group["rows"] == "adam" else self._adagrad
            update(group, table, *_touched(grad))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ConfigError: it is of other rules for tables.
        """
        own, stored = (_rules(groups) for groups in (self.param_groups, state_dict["param_groups"]))
        require(own == stored, "optim.tables", own, f"the checkpoint was trained with {stored}; go on with that")
        super().load_state_dict(state_dict)

    def _sums(self, table: Tensor) -> Float[Tensor, " rows"]:
        state = self.state[table]
        if not state:
            state["step"] = torch.tensor(0.0)  # AdamW looks for it when a state is loaded
            state["sum"] = torch.zeros(table.shape[0], dtype=table.dtype, device=table.device)
        state["step"] += 1
        return state["sum"]

    def _adagrad_whole(self, group: dict[str, Any], table: Tensor, grad: Tensor) -> None:
        total = self._sums(table).add_(grad.square().mean(1))
        table.addcdiv_(grad, (total.sqrt() + group["eps"])[:, None], value=-group["lr"])

    def _adagrad(self, group: dict[str, Any], table: Tensor, rows: Tensor, grad: Tensor) -> None:
        sums = self._sums(table)
        total = sums.index_select(0, rows) + grad.square().mean(1)
        sums.index_copy_(0, rows, total)
        table.index_add_(0, rows, grad / (total.sqrt() + group["eps"])[:, None], alpha=-group["lr"])

    def _adam(self, group: dict[str, Any], table: Tensor, rows: Tensor, grad: Tensor) -> None:
        state = self.state[table]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
        state["step"] += 1
        (first, second), step = group["betas"], float(state["step"])
        mean = torch.lerp(grad, state["exp_avg"].index_select(0, rows), first)
        square = torch.lerp(grad.square(), state["exp_avg_sq"].index_select(0, rows), second)
        state["exp_avg"].index_copy_(0, rows, mean)
        state["exp_avg_sq"].index_copy_(0, rows, square)
        size = (square / (1 - second**step)).sqrt() + group["eps"]
        table.index_add_(0, rows, mean / size, alpha=-group["lr"] / (1 - first**step))


def _touched(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a sparse gradient that are not zero, and their numbers; small tables are read as a whole."""
    grad = grad.coalesce()
    kept = grad.values().any(1)
    return grad.indices()[0][kept], grad.values()[kept]


def _can_fuse(groups: Sequence[dict[str, Any]]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for g in groups for p in g["params"])


def _rules(groups: Sequence[dict[str, Any]]) -> str:
    return ", ".join(sorted({group["rows"] for group in groups if group.get("rows")})) or "dense"


def _is_ruled(rule: str | None, parameter: Tensor) -> bool:
    """Whether a rule for rows, not AdamW, takes what gradient there is."""
    return parameter.grad is not None and (rule == "adagrad" or (rule is not None and parameter.grad.is_sparse))


def row_updates(config: RankOptimConfig, rows: int) -> bool:
    """Whether tables of so many rows together get gradients of the touched rows alone."""
    return config.tables == "adam" or (config.tables != "dense" and rows > config.dense_rows)


def make_optimizer(module: nn.Module, config: RankOptimConfig, steps: int) -> dict[str, Any]:
    """The optimiser and its schedule, as Lightning's `configure_optimizers` returns them.

    Tables that were made with sparse gradients have a rule for rows, others AdamW unless the settings say adagrad.

    Args:
        module: the model, or what holds it.
        config: its settings.
        steps: of the whole training.
    """
    lr = 2e-3 if config.lr is None else config.lr
    rates = {None: lr, "adam": lr, "adagrad": 0.05}
    rule = "adam" if config.tables == "adam" else "adagrad"
    whole_rule = "adagrad" if config.tables == "adagrad" else None
    by_row, whole = _tables(module)
    ids = {id(p) for p in (*by_row, *whole)}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in ids]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay, "lr": lr},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0, "lr": lr},
        _group(whole, whole_rule, config.table_lr or rates[whole_rule], config.table_decay),
        _group(by_row, rule, config.table_lr or rates[rule], 0.0),
    ]
    optimizer = RankAdamW([group for group in groups if group["params"]], tuple(config.betas))
    schedule = LambdaLR(optimizer, learning_rate_factor(config, steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _group(tables: list[nn.Parameter], rule: str | None, lr: float, decay: float) -> dict[str, Any]:
    return {"params": tables, "weight_decay": 0.0 if rule else decay, "lr": lr, "rows": rule}


def _tables(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices of embedding tables: those with sparse gradients, and the others."""
    found: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for tables in module.modules():
        if isinstance(tables, Tables):
            found[0 if tables.sparse else 1].extend(p for p in tables.parameters() if p.requires_grad)
    return found
