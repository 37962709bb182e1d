"""The agent's parts, each against its definition."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

import moecore
from apps.rl.agent_settings import AgentConfig, MoEActorConfig, NoiseConfig, PerturbConfig
from apps.rl.agents.mentor import Experience, Mentor, auxiliary_loss, dormant_ratio, random_shift, reference_aux
from apps.rl.agents.networks import MoELayer
from apps.rl.spaces import EnvSpec
from moecore.errors import ConfigError

PIXELS = EnvSpec("test", (1, 20, 20), 3, 2)
STATES = EnvSpec("test", (5,), 1, 2)
SMALL = {"channels": 4, "hidden": 16, "feature_dim": 8, "moe": MoEActorConfig(hidden=6, gate_hidden=5)}
B = 12


def agent(spec: EnvSpec = PIXELS, **options) -> Mentor:
    torch.manual_seed(0)
    return Mentor(AgentConfig(**SMALL | options), spec)


def batch(spec: EnvSpec = PIXELS) -> Experience:
    generator = torch.Generator().manual_seed(0)

    def obs() -> torch.Tensor:
        if not spec.pixels:
            return torch.randn(B, *spec.stacked, generator=generator)
        return torch.randint(0, 256, (B, *spec.stacked), generator=generator, dtype=torch.uint8)

    action, reward = torch.rand(B, 2, generator=generator) * 2 - 1, torch.rand(B, generator=generator)
    return Experience(obs(), action, reward, torch.tensor([0.9, 0.0] * (B // 2)), obs())


def steppers(one: Mentor) -> dict:
    def stepper(optimizer):
        def step(loss):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    return {name: stepper(optimizer) for name, optimizer in one.optimizers().items()}


def test_images_are_moved_by_whole_pixels_and_edges_repeated():
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    generator = torch.Generator().manual_seed(3)
    shifted = random_shift(images, 2, generator)
    top, left = torch.randint(0, 5, (2, 2), generator=torch.Generator().manual_seed(3))
    for i in range(2):
        for y in range(4):
            for x in range(5):
                source = images[i, :, min(max(y + int(top[i]) - 2, 0), 3), min(max(x + int(left[i]) - 2, 0), 4)]
                assert torch.equal(shifted[i, :, y, x].to(torch.uint8), source)
    assert random_shift(images, 0, generator) is images


@pytest.mark.parametrize("options", [{}, {"actor": "dense"}, {"critic": "moe"}, {"value": True}])
@pytest.mark.parametrize("spec", [PIXELS, STATES], ids=["pixels", "states"])
def test_learns_the_worth_of_actions_and_moves_towards_better_ones(options, spec):
    one, given = agent(spec, shift=0, **options), batch(spec)
    step = steppers(one)
    losses = [float(one.update(given, 0.2, step)["critic_loss"]) for _ in range(150)]
    assert np.mean(losses[-10:]) < 0.25 * losses[0]
    assert one.updates == 150


def test_target_is_reward_and_discounted_smaller_critic():
    one, given = agent(shift=0, moe=MoEActorConfig(gate_dropout=0.0)), batch()
    with torch.no_grad():
        after = one.encoder(given.next_obs)
        worth = one.target(after, one.actor(after)).amin(0)  # std 0: no noise
        scores = one.critic(one.encoder(given.obs), given.action)
        goal = given.reward + given.discount * worth
        expected = (scores - goal).square().mean(1).sum()
    quiet = {name: (lambda loss: None) for name in ("critic", "actor", "value")}
    torch.testing.assert_close(one.update(given, 0.0, quiet)["critic_loss"], expected)


def test_value_network_enters_the_target_as_dormant_units_allow():
    one, features = agent(value=True), torch.randn(B, agent().encoder.width)
    generator = torch.Generator()
    with torch.no_grad():
        share = one.config.value_share / (1 + math.exp(50 * (one.dormant - 0.2)))
        critics = one.target(features, one.actor.eval()(features)).amin(0)
        expected = share * one.value(features) + (1 - share) * critics
        torch.testing.assert_close(one._worth(features, 0.0, generator), expected)
        one.dormant = 1.0
        torch.testing.assert_close(one._worth(features, 0.0, generator), critics)


def test_actor_gradient_stops_at_the_features_and_critics():
    one, given = agent(), batch()
    before = copy.deepcopy(one.state_dict())
    step = steppers(one)
    one.update(given, 0.2, step | {"critic": lambda loss: None})
    changed = {name.split(".")[0] for name, value in one.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"actor"}
    assert all(p.requires_grad for p in one.critic.parameters())


def test_target_networks_follow():
    one, given = agent(tau=0.25), batch()
    start = [p.clone() for p in one.target.parameters()]
    one.update(given, 0.2, steppers(one))
    for old, new, critic in zip(start, one.target.parameters(), one.critic.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * critic)


def test_updates_repeat_from_their_number():
    one, given = agent(moe=MoEActorConfig(gate_dropout=0.0)), batch()
    other = copy.deepcopy(one)
    torch.manual_seed(1)
    one.update(given, 0.2, steppers(one))
    torch.manual_seed(2)
    other.update(given, 0.2, steppers(other))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_noise_falls_in_a_line_or_with_dormant_units():
    linear = agent(noise=NoiseConfig("linear", 1.0, 0.1, 100))
    assert [linear.noise(step) for step in (0, 50, 100, 500)] == pytest.approx([1.0, 0.55, 0.1, 0.1])
    dormant = agent(noise=NoiseConfig("dormant", scale=0.8))
    dormant.dormant = 0.2
    assert dormant.noise(10) == pytest.approx(0.4)
    dormant.dormant = 0.9
    assert dormant.noise(10) == pytest.approx(0.8, abs=1e-3)
    both = agent(noise=NoiseConfig("max", 1.0, 0.1, 100))
    assert both.noise(0) == 1.0
    assert both.noise(100) == pytest.approx(max(0.1, 0.8 / (1 + math.e**2)))


def test_auxiliary_losses():
    layer, x = MoELayer(MoEActorConfig(hidden=6, gate_hidden=5), 16), torch.randn(B, 16)
    with moecore.record(layer) as routings:
        layer(x)
    (routing,) = routings
    load = torch.bincount(routing.assignment.expert.flatten(), minlength=4) / B
    p = routing.probs
    expected = load.var() - (p * p.log()).sum(1).mean()
    torch.testing.assert_close(reference_aux(routing), expected)
    torch.testing.assert_close(auxiliary_loss(MoEActorConfig(aux="reference", aux_scale=3.0), routings), 3 * expected)
    balance = auxiliary_loss(MoEActorConfig(aux_scale=0.5), routings)
    torch.testing.assert_close(balance, 0.5 * moecore.balance.switch_loss(routing))


def test_only_chosen_experts_run_and_weights_sum_to_one():
    layer, x = MoELayer(MoEActorConfig(num_experts=4, top_k=2, hidden=6), 16).eval(), torch.randn(B, 16)
    with moecore.record(layer) as routings:
        y = layer(x)
    (routing,) = routings
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(B))
    idle = next(e for e in range(4) if e not in routing.assignment.expert[0].tolist())
    with torch.no_grad():
        layer.experts.up[idle].fill_(float("nan"))
    torch.testing.assert_close(layer(x[:1]), y[:1])


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_dormant_units_are_those_that_hardly_react(kind):
    one = agent(actor=kind)
    features = torch.randn(64, one.encoder.width)
    units = sum(layer.shape[1] for layer in one.actor.unit_outputs(features))
    with torch.no_grad():
        one.actor.up[0].weight[:4] = 0  # 4 units of a layer give 0
        layers = [layer.abs().mean(0) for layer in one.actor.unit_outputs(features)]
    silent = sum(int((layer <= 0.025 * layer.mean()).sum()) for layer in layers)
    assert int((layers[1] == 0).sum()) == 4
    assert silent >= 4
    assert dormant_ratio(one.actor, features, 0.025) == silent / units
    assert dormant_ratio(one.actor, features, 1e9) == 1.0
    if kind == "moe":  # gate, gate's hidden, and two layers of each expert beside trunk, up and out
        assert units == 8 + 16 + 5 + 4 + 4 * (6 + 16) + 2


def test_pool_keeps_the_weights_of_the_best_episodes():
    one = agent(perturb=PerturbConfig(pool=3))
    kept = [one.remember(value) for value in (1.0, 5.0, 3.0, 0.5, 4.0)]
    assert kept == [True, True, True, False, True]
    assert [value for value, _ in one.pool] == [3.0, 4.0, 5.0]
    weight = one.pool[0][1]["actor.out.weight"]
    with torch.no_grad():
        one.actor.out.weight.add_(1)
    assert torch.equal(weight + 1, one.actor.out.weight)  # a copy
    assert not any(name.startswith("encoder") for name in one.pool[0][1])


def test_perturbation_draws_weights_towards_the_pool():
    one = agent(value=True, perturb=PerturbConfig(interval=10, max_factor=0.75))
    one.updates = 10
    assert not one.perturb_due()  # nothing to draw from
    one.remember(1.0)
    assert not one.perturb_due()  # no spread
    one.remember(2.0)
    assert one.perturb_due()
    start = {name: p.clone() for name, p in one.named_parameters()}
    with torch.no_grad():
        for name, p in one.named_parameters():
            if not name.startswith("encoder"):
                p.add_(1.0)
    assert one.perturb() == 0.75  # the pool's two are equal: its Gaussian is they themselves
    for name, p in one.named_parameters():
        expected = start[name] if name.startswith("encoder") else start[name] + 0.75
        torch.testing.assert_close(p, expected, atol=1e-5, rtol=0)
    one.dormant = 0.9
    assert one.perturb() == one.config.perturb.min_factor
    one.updates = 11
    assert not one.perturb_due()


def test_perturbation_spreads_as_the_pool_does():
    one = agent(STATES, perturb=PerturbConfig(max_factor=0.0, min_factor=0.0, pool=3))
    for shift in (0.0, 1.0, 2.0):
        with torch.no_grad():
            one.actor.out.bias.fill_(shift)
            one.actor.up[0].weight.fill_(shift)
        one.remember(shift)
    one.perturb()
    drawn = one.actor.up[0].weight.detach()
    assert float(drawn.mean()) == pytest.approx(1.0, abs=0.3)
    assert float(drawn.std()) == pytest.approx(1.0, abs=0.3)


def test_random_perturbation_needs_no_pool_and_none_never_is_due():
    one = agent(perturb=PerturbConfig("random", interval=5))
    one.updates = 5
    before = one.actor.out.weight.clone()
    assert not one.remember(1.0)
    assert one.perturb_due()
    one.perturb()
    assert not torch.equal(before, one.actor.out.weight)
    never = agent(perturb=PerturbConfig("none", interval=5))
    never.updates = 5
    never.remember(1.0)
    assert not never.perturb_due()
    assert never.pool == []


def test_policy_is_deterministic_and_bounded():
    one = agent()
    obs = batch().obs.numpy()
    first = one.policy(obs)
    assert one.training
    assert np.array_equal(first, one.policy(obs))
    assert (np.abs(first) <= 1).all()
    assert first.dtype == np.float32


def test_images_too_small_for_the_convolutions():
    with pytest.raises(ConfigError, match=r"agent.strides=\[2, 2, 2, 2\]: too many for images of 20 pixels"):
        agent(strides=[2, 2, 2, 2])
