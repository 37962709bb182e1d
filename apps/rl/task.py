"""Training of an agent with Lightning: its own optimisation, its own counters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

import moecore
from apps.rl.agents.mentor import PARTS, Experience, Mentor
from apps.rl.rollout import Rollout, evaluation_seeds, run_episodes
from apps.rl.settings import RLConfig
from apps.rl.spaces import EnvSpec, Transitions
from apps.tree import plain


class RLTask(LightningModule):
    """Updates an agent, perturbs its weights when due, and evaluates it.

    Lightning counts the critic's optimiser steps alone, so that its `global_step` is the number of updates.

    Args:
        config: all settings; kept in every checkpoint.
        spec: of the environment; kept too.
    """

    def __init__(self, config: RLConfig, spec: EnvSpec) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config, self.spec = config, spec
        self.model = Mentor(config.agent, spec, config.run.seed)
        self.recording = moecore.Recording()
        """What the last update routed; read and cleared by `RoutingMonitor`."""
        self.events: list[dict[str, float]] = []
        """Perturbations so far, for the report."""
        self.latest: dict[str, float] = {}
        """Of what happens now and then, the last: return and length of an episode, what a perturbation kept."""

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Of critic and encoder, actor, value network."""
        return list(self.model.optimizers().values())

    def training_step(self, batch: Transitions, index: int) -> None:
        """One update."""
        data, agent = self.trainer.datamodule, self.model
        for episode in data.take_ended():
            agent.remember(episode.ret)
            self.latest |= {"return": episode.ret, "length": float(episode.length)}
        std = agent.noise(data.collector.steps)
        with moecore.record(agent.actor) as routings:
            figures = agent.update(Experience.of(batch, self.device), std, self._steppers())
        self.recording.extend(routings)
        if agent.perturb_due():
            self._perturb()
        figures |= {"std": std, "dormant": agent.dormant, "agent_steps": float(data.collector.steps)}
        for name, value in (figures | self.latest).items():
            self.log(f"train/{name}", value, prog_bar=name == "return", batch_size=1)

    def _steppers(self) -> dict[str, Callable[[Tensor], None]]:
        clip = self.config.agent.actor_clip

        def stepper(name: str, optimizer: Any) -> Callable[[Tensor], None]:
            def step(loss: Tensor) -> None:
                optimizer.zero_grad()
                self.manual_backward(loss)
                if name == "actor" and clip is not None:
                    torch.nn.utils.clip_grad_norm_(self.model.actor.parameters(), clip)
                counted = name == "critic"
                (optimizer if counted else optimizer.optimizer).step()

            return step

        return {name: stepper(name, one) for name, one in zip(PARTS, self.optimizers(), strict=False)}

    def _perturb(self) -> None:
        """Perturb, and start the optimisers anew: their moments are of other weights."""
        kept = self.model.perturb()
        for optimizer in self.optimizers():
            optimizer.optimizer.state.clear()
        self.events.append({"update": self.model.updates, "kept": kept, "dormant": self.model.dormant})
        self.latest["kept"] = kept

    def validation_step(self, batch: int, index: int) -> None:
        """All evaluation episodes."""
        rollout = self.evaluate(self.config.collect.eval_episodes)
        returns = rollout.returns
        self.log("val/return", float(np.mean(returns)), prog_bar=True, batch_size=1)
        self.log("val/return_std", float(np.std(returns)), batch_size=1)
        self.log("val/length", float(np.mean(rollout.lengths)), batch_size=1)
        self.log("val/agent_steps", float(self.trainer.datamodule.collector.steps), batch_size=1)
        if rollout.has_success:
            self.log("val/success", float(np.mean(rollout.successes)), prog_bar=True, batch_size=1)

    def evaluate(self, episodes: int) -> Rollout:
        """Episodes of the deterministic policy from the same starts every time."""
        seeds = evaluation_seeds(episodes)
        return run_episodes(self.config.env, self.spec, self.model.policy, seeds)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Settings, environment and what an agent has beside weights, as plain data."""
        checkpoint["app"] = "rl"
        checkpoint["config"] = plain(self.config)
        checkpoint["spec"] = plain(self.spec)
        checkpoint["agent"] = self.model.extra_state()
        checkpoint["events"], checkpoint["latest"] = self.events, self.latest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Back to them."""
        self.model.load_extra_state(checkpoint["agent"])
        self.events, self.latest = list(checkpoint["events"]), dict(checkpoint["latest"])
