"""What routers score with."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import moecore
from moecore.routing import Scores

T, D, E = 9, 12, 5
NOTHING = moecore.Context()
TASKED = ("per_task", "task_conditioned")


def make(name: str, **options) -> nn.Module:
    return moecore.SCORES[name](D, E, **options)


def context_for(name: str) -> moecore.Context:
    return moecore.Context(task=1) if name in TASKED else moecore.Context()


def value(scores: Scores | torch.Tensor) -> torch.Tensor:
    return scores.value if isinstance(scores, Scores) else scores


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", moecore.SCORES)
def test_shape_and_dtype(name, dtype, training):
    score = make(name).train(training)
    scores = value(score(torch.randn(T, D, dtype=dtype), context_for(name)))
    assert scores.shape == (T, E)
    assert scores.dtype == dtype
    assert scores.isfinite().all()


@pytest.mark.parametrize("name", moecore.SCORES)
def test_no_tokens_no_scores(name):
    assert value(make(name)(torch.randn(0, D), context_for(name))).shape == (0, E)


@pytest.mark.parametrize("name", moecore.SCORES)
def test_gradient_reaches_every_parameter(name):
    score, context = make(name), context_for(name)
    if name == "recurrent":  # a later layer, whose state is not zero
        score.first, context.carry[score.carry_key] = False, torch.randn(T, score.cell.hidden_size)
    scores = value(score(torch.randn(T, D), context))
    if name in ("centroid", "hash"):
        assert not list(score.parameters())
        assert not scores.requires_grad
        return
    (scores * torch.randn(T, E)).sum().backward()
    assert list(score.parameters())
    for parameter in score.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("name", moecore.SCORES)
def test_eval_is_deterministic_and_looks_at_one_token(name):
    score, x = make(name).eval(), torch.randn(T, D)
    scores = score(x, context_for(name))
    torch.testing.assert_close(score(x, context_for(name)), scores, rtol=0, atol=0)
    torch.testing.assert_close(score(x[3:4], context_for(name)), scores[3:4])


def test_linear_is_one_matrix():
    score, x = make("linear", bias=True), torch.randn(T, D)
    nn.init.normal_(score.bias)
    torch.testing.assert_close(score(x, NOTHING), x @ score.weight.t() + score.bias)
    assert make("linear").bias is None


def test_temperature_divides_linear_scores():
    cold, x = make("linear", temperature=0.25), torch.randn(T, D)
    torch.testing.assert_close(cold(x, NOTHING), 4 * (x @ cold.weight.t()))


def test_dropped_experts_cannot_be_chosen_and_never_are_all_gone():
    """Each with the given probability, in training only; the scores of those that are left stay what they were."""
    score, x = make("linear", temperature=2.0, dropout=0.6), torch.randn(20_000, D)
    clean = score.eval()(x, NOTHING)
    torch.testing.assert_close(clean, x @ score.weight.t() / 2)
    scores = score.train()(x, NOTHING)
    gone = scores < -1e30
    assert scores.isfinite().all()
    assert torch.equal(scores[~gone], clean[~gone])
    all_gone = 0.6**E  # for these tokens nothing is dropped
    assert gone.float().mean().item() == pytest.approx(0.6 - all_gone, abs=0.01)
    assert not gone.all(-1).any()
    assert (scores.softmax(-1)[gone] == 0).all()
    half = score(x.half(), NOTHING)
    assert half.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"^temperature=0.0: must be positive"),
        ({"dropout": 1.0}, r"^dropout=1.0: must lie in \[0, 1\)"),
        ({"dropout": -0.1}, r"^dropout=-0.1: must lie in"),
    ],
)
def test_linear_scores_refuse_what_cannot_work(options, message):
    with pytest.raises(moecore.ConfigError, match=message):
        make("linear", **options)


def test_mlp_is_two_layers_with_relu_and_dropout_in_training():
    score, x = make("mlp", hidden=7, dropout=0.5), torch.randn(T, D)
    expected = score.fc2((x @ score.fc1.weight.t() + score.fc1.bias).relu())
    torch.testing.assert_close(score.eval()(x, NOTHING), expected)
    assert not torch.allclose(score.train()(x, NOTHING), expected)


@pytest.mark.parametrize(("name", "options"), [("noisy", {}), ("noisy", {"noise_std": 1.5})])
def test_noise_in_training_only(name, options):
    score, x = make(name, **options), torch.randn(T, D)
    clean = score.eval()(x, NOTHING)
    assert isinstance(clean, torch.Tensor)
    torch.testing.assert_close(clean, x @ score.weight.t())
    first, second = score.train()(x, NOTHING), score(x, NOTHING)
    assert not torch.equal(first.value, second.value)
    torch.testing.assert_close(first.clean, clean)
    assert (first.noise_std > 0).all()


@pytest.mark.parametrize("name", ["noisy", *TASKED])
def test_fixed_noise_is_std_over_experts(name):
    score = make(name, noise_std=2.0)
    x = torch.randn(4000, D)
    scores = score(x, context_for(name))
    assert scores.noise_std.unique().tolist() == pytest.approx([2.0 / E])
    noise = scores.value - scores.clean
    assert noise.std().item() == pytest.approx(2.0 / E, rel=0.03)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.01)
    assert isinstance(make(name, noise_std=0.0)(x, context_for(name)), torch.Tensor)


def test_learned_noise_is_softplus_of_its_own_map():
    score, x = make("noisy"), torch.randn(T, D)
    nn.init.normal_(score.noise_weight)
    scores = score(x, NOTHING)
    torch.testing.assert_close(scores.noise_std, (1 + (x @ score.noise_weight.t()).exp()).log() + 1e-2)
    with pytest.raises(moecore.ConfigError, match=r"^noise_std=-1.0: must not be negative"):
        make("noisy", noise_std=-1.0)


def test_cosine_is_bounded_by_its_temperature_and_blind_to_length():
    score = make("cosine", temperature=0.25)
    x = torch.randn(2000, D) * 100
    scores = score(x, NOTHING)
    assert scores.abs().max() <= 4.0 * (1 + 1e-5)
    assert scores.abs().max() > 1.0
    torch.testing.assert_close(score(x * 7, NOTHING), scores)
    assert score(torch.zeros(1, D), NOTHING).tolist() == [[0.0] * E]


def test_cosine_scale_is_learned_up_to_100():
    score, x = make("cosine"), torch.randn(T, D)
    before = score(x, NOTHING)
    with torch.no_grad():
        score.log_scale += math.log(3.0)
    torch.testing.assert_close(score(x, NOTHING), 3 * before)
    with torch.no_grad():
        score.log_scale.fill_(50.0)
    assert score(x, NOTHING).abs().max() <= 100 * (1 + 1e-5)
    with pytest.raises(moecore.ConfigError, match=r"^temperature=0.0: must be positive"):
        make("cosine", temperature=0.0)


def test_centroid_prefers_the_nearest_or_the_farthest():
    x = torch.randn(T, D)
    near, far = make("centroid"), make("centroid", prefer="farthest")
    far.load_state_dict(near.state_dict())
    distance = torch.stack([(x - c).square().sum(-1).sqrt() for c in near.centroids], 1)
    assert torch.equal(near(x, NOTHING).argmax(-1), distance.argmin(-1))
    assert torch.equal(far(x, NOTHING).argmax(-1), distance.argmax(-1))
    torch.testing.assert_close(far(x, NOTHING), distance, rtol=1e-4, atol=1e-4)
    assert near(near.centroids.clone(), NOTHING).argmax(-1).tolist() == list(range(E))
    with pytest.raises(moecore.ConfigError, match=r"^prefer='middle': choose one of farthest, nearest"):
        make("centroid", prefer="middle")


def test_hash_is_the_same_for_the_same_seed_and_ranks_all_experts():
    x = torch.randn(200, D)
    scores = make("hash")(x, NOTHING)
    assert torch.equal(make("hash")(x, NOTHING), scores)
    assert not torch.equal(make("hash", seed=1)(x, NOTHING), scores)
    assert (-scores).sort(-1).values.tolist() == [list(range(E))] * 200


def test_hash_by_content_is_blind_to_length():
    """Signs of projections: a token and its multiples share experts."""
    x = torch.randn(50, D)
    assert torch.equal(make("hash")(x, NOTHING), make("hash")(x * 3, NOTHING))


def test_hash_by_id_ignores_content_and_spreads_ids():
    score = make("hash")
    ids = torch.arange(3000)
    scores = score(torch.randn(3000, D), moecore.Context(ids=ids))
    assert torch.equal(score(torch.zeros(3000, D), moecore.Context(ids=ids)), scores)
    load = scores.argmax(-1).bincount(minlength=E)
    assert load.min() > 0.8 * 3000 / E
    assert load.max() < 1.2 * 3000 / E
    negative = score(torch.zeros(2, D), moecore.Context(ids=torch.tensor([-1, 2**62])))
    assert negative.shape == (2, E)


@pytest.mark.parametrize("name", TASKED)
def test_int_task_and_tensor_of_tasks_agree(name):
    score, x = make(name, num_tasks=3), torch.randn(T, D)
    tasks = torch.arange(T) % 3
    mixed = score(x, moecore.Context(task=tasks))
    by_task = [score(x, moecore.Context(task=t)) for t in range(3)]
    for t in range(T):
        torch.testing.assert_close(mixed[t], by_task[t % 3][t])
    assert not torch.allclose(by_task[0], by_task[1])


def test_per_task_uses_the_tasks_own_gate():
    score, x = make("per_task", num_tasks=3), torch.randn(T, D)
    torch.testing.assert_close(score(x, moecore.Context(task=2)), x @ score.weight[2].t())


def test_task_conditioned_appends_an_embedding_to_the_token():
    score, x = make("task_conditioned", num_tasks=3, task_width=4), torch.randn(T, D)
    hidden = nn.functional.gelu(score.embed.fc1.weight[:, 2] + score.embed.fc1.bias)
    embedding = score.embed.norm(score.embed.fc2(hidden))
    expected = x @ score.weight[:, :D].t() + score.weight[:, D:] @ embedding
    torch.testing.assert_close(score(x, moecore.Context(task=2)), expected)


@pytest.mark.parametrize("name", TASKED)
def test_task_must_be_given_and_exist(name):
    score, x = make(name, num_tasks=2), torch.randn(T, D)
    with pytest.raises(ValueError, match=r"context\.task=None.*routing_context\(task=\.\.\.\)"):
        score(x, NOTHING)
    for task in (-1, 2):
        with pytest.raises(ValueError, match=rf"context\.task={task}: must lie between 0 and 1"):
            score(x, moecore.Context(task=task))
        per_token = torch.tensor([0, 1, task] + [0] * (T - 3))
        with pytest.raises(ValueError, match=rf"context\.task={task}: must lie between 0 and 1"):
            score(x, moecore.Context(task=per_token))
    with pytest.raises(moecore.ConfigError, match=r"^num_tasks=0: must be at least 1"):
        make(name, num_tasks=0)


def recurrent_stack(layers: int = 3) -> nn.ModuleList:
    first = make("recurrent", hidden=6)
    return nn.ModuleList([first, *(make("recurrent", cell=first.cell, first=False) for _ in range(layers - 1))])


def test_recurrent_carries_state_from_layer_to_layer():
    stack, context = recurrent_stack(), moecore.Context()
    xs = torch.randn(3, T, D)
    scores = [score(x, context) for score, x in zip(stack, xs, strict=True)]
    state = None
    for score, x, got in zip(stack, xs, scores, strict=True):
        state = score.cell(score.project(x), state)
        torch.testing.assert_close(got, state @ score.weight.t())
    scores[-1].sum().backward()
    assert stack[0].project.weight.grad.abs().sum() > 0  # through the state


def test_recurrent_first_layer_starts_from_zeros_every_time():
    stack, context, x = recurrent_stack(2), moecore.Context(), torch.randn(T, D)
    alone = stack[0](x, moecore.Context())
    stack[0](x * 3, context)
    stack[1](x * 3, context)
    assert torch.equal(stack[0](x, context), alone)


def test_recurrent_layer_without_its_predecessor_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"routing_context\(\).*carry_across_layers"):
        recurrent_stack()[1](torch.randn(T, D), moecore.Context())


class Deep(nn.Module):
    """Two MoE layers with recurrent routers."""

    def __init__(self) -> None:
        super().__init__()
        config = moecore.MoEConfig(num_experts=4, top_k=2, score="recurrent", score_options={"hidden": 6})
        first = moecore.build_router(config, D)
        routers = [first, moecore.build_router(config, D, cell=first.score.cell)]
        self.layers = nn.ModuleList(moecore.MoE(router, moecore.MLPBank(4, D, 8)) for router in routers)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_recurrent_layers_in_a_model():
    model, x = Deep(), torch.randn(2, 3, D)
    with pytest.raises(RuntimeError, match="recurrent router: no state"):
        model(x)
    with moecore.routing_context():
        expected = model(x)
    moecore.carry_across_layers(model)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x), expected)  # nothing is left over from the call before
    assert sum("cell" in name for name, _ in model.named_parameters()) == 4  # one cell for both


def test_router_shared_by_two_layers_gets_both_gradients():
    router = moecore.build_router(moecore.MoEConfig(num_experts=4, top_k=2), D)
    layers = [moecore.MoE(router, moecore.MLPBank(4, D, 8)) for _ in range(2)]
    model, x = nn.Sequential(*layers), torch.randn(T, D)
    assert len([n for n, _ in model.named_parameters() if "router" in n]) == 1
    hidden = layers[0](x)
    only_first = torch.autograd.grad(hidden.sum(), router.score.weight, retain_graph=True)[0]
    only_second = torch.autograd.grad(layers[1](hidden.detach()).sum(), router.score.weight)[0]
    model.zero_grad()
    (layers[0](x).sum() + layers[1](hidden.detach()).sum()).backward()
    torch.testing.assert_close(router.score.weight.grad, only_first + only_second)
