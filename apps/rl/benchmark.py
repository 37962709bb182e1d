"""What a training step costs, and where: environment, acting, drawing batches, updates, experts."""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.rl.agents.mentor import Experience, Mentor
from apps.rl.agents.networks import MoELayer
from apps.rl.arguments import Benchmark
from apps.rl.data import RLData
from apps.rl.envs.make import spec_of
from apps.rl.loading import load_trained
from apps.rl.settings import RLConfig
from apps.rl.spaces import Transitions
from apps.timing import interleaved

STEPS = 8
"""Calls in a round."""
Call = Callable[[], Any]


def run_benchmark(config: RLConfig, args: Benchmark) -> list[dict[str, Any]]:
    """One row per part: CPU milliseconds of a call and calls per CPU second, medians over interleaved rounds.

    An agent step acts, steps the environment and fills the replay. "experts" is the mixture alone, forward and backward
    on a batch. Ratios are to the row of the same name without a comma; "all experts" computes every expert for every
    observation, as the published code does; "its collection" is what agent steps between two updates cost.

    Args:
        config: settings.
        args: a trained agent; rounds.
    """
    spec = spec_of(config.env)
    agent = load_trained(Path(args.ckpt_path)).agent if args.ckpt_path else Mentor(config.agent, spec, config.run.seed)
    with tempfile.TemporaryDirectory() as folder:
        data = RLData(config, spec, agent, Path(folder))
        try:
            while data.replay.sampleable(config.agent.n_step) < config.collect.batch_size:
                data.collector.step(data.explore)
            calls = _collection(config, data) | _learning(config, data)
            spent = interleaved(calls, args.rounds, STEPS)
        finally:
            data.collector.close()
    medians = {name: statistics.median(seconds) for name, seconds in spent.items()}
    one = config.collect
    medians["update, its collection"] = medians["agent step"] * one.update_every / one.num_envs
    return [
        {"part": name, "milliseconds": 1e3 * s, "per_cpu_second": 1 / s, "ratio": s / medians[name.split(",")[0]]}
        for name, s in medians.items()
    ]


def _collection(config: RLConfig, data: RLData) -> dict[str, Call]:
    obs = data.replay.sample(config.collect.num_envs, 1, 1.0, np.random.default_rng(0)).obs
    step, policy = data.collector.step, data.agent.policy
    return {"agent step": lambda: step(lambda seen, _: policy(seen)), "agent step, acting alone": lambda: policy(obs)}


def _learning(config: RLConfig, data: RLData) -> dict[str, Call]:
    one = config.agent

    def draw() -> Transitions:
        return data.replay.sample(config.collect.batch_size, one.n_step, one.gamma, np.random.default_rng(0))

    given = Experience.of(draw())
    calls: dict[str, Call] = {"draw a batch": draw, "update": _update(data.agent, given)}
    if one.actor == "moe":
        calls["update, all experts"] = _update(_all_experts(data.agent), given)
        calls["update, bfloat16"] = _lower(_update(copy.deepcopy(data.agent), given))
        x = torch.randn(config.collect.batch_size, one.hidden)
        calls["experts"] = _mixture(data.agent.actor.middle, x)
        calls["experts, all experts"] = _mixture(_all_experts(data.agent).actor.middle, x)
    return calls


def _all_experts(agent: Mentor) -> Mentor:
    other = copy.deepcopy(agent)
    for module in other.modules():
        if isinstance(module, MoELayer):
            module.executor = "dense"
    return other


def _update(agent: Mentor, batch: Experience) -> Call:
    def stepper(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
        def step(loss: Tensor) -> None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    step = {name: stepper(optimizer) for name, optimizer in agent.optimizers().items()}
    return lambda: agent.update(batch, 0.2, step)


def _lower(call: Call) -> Call:
    def lowered() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            call()

    return lowered


def _mixture(layer: MoELayer, x: Tensor) -> Call:
    def call() -> None:
        inputs = x.clone().requires_grad_()
        layer(inputs).square().mean().backward()

    return call
