"""What a training step and an action cost, beside a dense transformer of equal active multiply-adds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch

from apps.rl.agents.t2mir import T2MIR, Windows
from apps.rl.arguments import Benchmark
from apps.rl.envs.make import spec_of
from apps.rl.settings import RLConfig
from apps.timing import interleaved

STEPS = 3
"""Calls in a round."""


def run_benchmark(config: RLConfig, args: Benchmark) -> list[dict[str, Any]]:
    """One row per agent and part: CPU milliseconds of a call, medians over interleaved rounds, and the ratio to dense.

    Weights are fresh and histories random: neither changes what a call costs.
    """
    spec, calls = spec_of(config.env), {}
    for name in dict.fromkeys(("none", config.t2mir.experts)):
        own = dataclasses.replace(config.t2mir, experts=name)
        agent = T2MIR(own, spec.stacked[0], spec.action_dim)
        calls |= {f"training step, {name}": _training(agent), f"action, {name}": _acting(agent)}
    spent = interleaved(calls, args.rounds, STEPS)
    rows = []
    for name, seconds in spent.items():
        part, experts = name.split(", ")
        median, base = statistics.median(seconds), statistics.median(spent[f"{part}, none"])
        row = {"part": part, "experts": experts, "milliseconds": 1e3 * median, "per_cpu_second": 1 / median}
        rows.append(row | {"to_dense": median / base})
    return sorted(rows, key=lambda row: row["part"])


def _training(agent: T2MIR) -> Callable[[], None]:
    one = agent.config
    lead = (2 * one.batch_tasks, one.context)
    obs, action = torch.randn(*lead, agent.state_dim), torch.rand(*lead, agent.action_dim)
    batch = Windows(obs, action, torch.randn(lead), action)
    optimizer = torch.optim.AdamW(agent.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        agent.losses(batch)[0]["loss"].backward()
        optimizer.step()
        agent.follow()

    return step


def _acting(agent: T2MIR) -> Callable[[], None]:
    obs = torch.randn(1, agent.context, agent.state_dim)
    action, reward = torch.rand(1, agent.context - 1, agent.action_dim), torch.randn(1, agent.context - 1)

    @torch.no_grad()
    def act() -> None:
        agent.eval().next_action(obs, action, reward)
        agent.train()

    return act
