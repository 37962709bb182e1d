"""Settings of T2MIR. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moecore.errors import require


@dataclass
class T2MIRConfig:
    """T2MIR (Token- and Task-wise MoE for In-context RL, arXiv 2506.05426): a transformer over (state, action, reward)
    tokens that learns offline, from the histories of agents that `agent` and `collect` describe, one per task."""

    histories: str | None = None
    """Folder of the agents' histories; those that it lacks are collected first. null: below `run.root`, by
    environment."""
    history_seed: int = 0
    """Seed of those agents; another one needs another folder."""
    val_tasks: int = 5
    """Tasks, not learned from, that choose the best checkpoint."""
    held_out: int = 10
    """Further tasks, not learned from, that the agent is tested on."""
    target: Literal["final", "history"] = "final"
    """What to imitate at every step: the action that the task's agent takes once it has learned (as decision-pretrained
    transformers do), or the one it took then (algorithm distillation)."""
    early: float | None = None
    """Share of every history, from its beginning, that windows come from. null: 0.3 with target=final, as later actions
    give away what is to be imitated and rewards need not be read; else 1."""
    context: int = 60
    """Steps that the agent remembers, over episodes; three tokens each."""
    whole_steps: bool = True
    """The token of a reward holds its state and action too, so that what an action earned need not be gathered from
    three tokens first; false: the reward alone, as published."""
    layers: int = 3
    """Transformer layers; the last one has the experts."""
    width: int = 64
    """Width of tokens."""
    heads: int = 4
    """Attention heads."""
    experts: Literal["both", "token", "task", "none"] = "both"
    """In the last layer: mixtures routed by token and by task side by side, one of them, or a dense network of as many
    active multiply-adds."""
    token_experts: int = 6
    """Experts of the token-wise mixture."""
    task_experts: int = 8
    """Experts of the task-wise mixture."""
    top_k: int = 2
    """Experts used of each mixture."""
    hidden: int | None = None
    """Hidden units per expert; null: a dense network's multiply-adds (4 widths) shared by all that are active."""
    task_unit: Literal["token", "sequence"] = "token"
    """What the task-wise mixture routes as one; sequence: the whole window by its mean token."""
    balance: float = 0.01
    """Coefficient of the token-wise balance loss, squared variation of importance and load."""
    contrast: float = 0.01
    """Coefficient of the contrastive loss of the task-wise gate; 0: none."""
    momentum: float = 0.005
    """Share by which the gate that gives the keys follows."""
    dropout: float = 0.0
    """Dropout in the dense layers and on attention's output."""
    batch_tasks: int = 16
    """Tasks of a batch; each gives two windows."""
    steps: int = 1000
    """Optimiser steps."""
    lr: float = 2e-3
    """Peak learning rate of AdamW, with warm-up and cosine."""
    weight_decay: float = 1e-4
    """On matrices."""
    eval_every: int = 250
    """Steps between evaluations."""
    eval_episodes: int = 6
    """Episodes in a row in each task of an evaluation; the context starts empty."""

    def __post_init__(self) -> None:
        least = {"val_tasks": 1, "held_out": 1, "context": 2, "layers": 1, "width": 2, "heads": 1, "batch_tasks": 2}
        least |= {"token_experts": 1, "task_experts": 1, "top_k": 1, "steps": 1, "eval_every": 1, "eval_episodes": 1}
        for name, value in least.items():
            require(getattr(self, name) >= value, name, getattr(self, name), f"must be at least {value}")
        require(self.width % self.heads == 0, "width", self.width, f"must be a multiple of heads={self.heads}")
        require(self.width % 2 == 0, "width", self.width, "must be even: each mixture gives half of it")
        fewest = min(self.token_experts, self.task_experts)
        require(self.top_k <= fewest, "top_k", self.top_k, f"must not exceed the {fewest} experts")
        for name in ("balance", "contrast", "weight_decay"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        require(0 < self.momentum <= 1, "momentum", self.momentum, "must lie in (0, 1]")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "must lie in [0, 1)")
        good = self.early is None or 0 < self.early <= 1
        require(good, "early", self.early, "must lie in (0, 1], or null")
        require(self.lr > 0, "lr", self.lr, "must be positive")
        require(self.hidden is None or self.hidden >= 1, "hidden", self.hidden, "must be at least 1, or null")

    @property
    def share(self) -> float:
        """Of every history, from its beginning, that windows come from."""
        return self.early or (0.3 if self.target == "final" else 1.0)
