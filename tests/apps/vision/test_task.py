"""The loss of a training step, against its parts computed by hand."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.nn import functional as F

import moecore
from apps.vision.models.vimoe import ImageSpec
from apps.vision.settings import DataConfig, ModelConfig, VisionConfig
from apps.vision.task import ViMoETask
from moecore import MoEConfig

SPEC = ImageSpec(1, 8, ("a", "b", "c"), (0.5,), (0.3,))


class Task(ViMoETask):
    """Keeps what it would log, and has an optimiser without a trainer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config, SPEC)
        self.logged: dict[str, torch.Tensor] = {}

    def log(self, name, value, **options):
        self.logged[name] = value

    def optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.25)


def task(label_smoothing: float = 0.0, aux_loss: dict[str, float] | None = None, **data: float) -> Task:
    moe = MoEConfig(num_experts=4, top_k=2, aux_loss=aux_loss or {})
    model = ModelConfig(embed_dim=16, depth=2, num_heads=2, stem="patch", moe_layers="all", moe=moe)
    data = DataConfig(**{"mixup": 0.0, "cutmix": 0.0} | data)
    return Task(VisionConfig(model=model, data=data, label_smoothing=label_smoothing))


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_smoothed_cross_entropy(batch, smoothing):
    module = task(smoothing)
    scores = module(batch[0]).log_softmax(-1)
    target = (1 - smoothing) * F.one_hot(batch[1], 3) + smoothing / 3
    expected = -(target * scores).sum(-1).mean()
    assert torch.allclose(module.training_step(batch, 0), expected, atol=1e-6)
    assert torch.allclose(module.logged["train/loss"], expected, atol=1e-6)
    assert module.logged["train/lr"] == 0.25
    assert module.logged["train/accuracy"] == (scores.argmax(-1) == batch[1]).float().mean()


def test_balance_losses_are_added_with_their_coefficients_and_logged_apart(batch):
    module = task(aux_loss={"switch": 0.5, "z": 0.25})
    loss = module.training_step(batch, 0)
    with moecore.record(module.model) as recording:
        module(batch[0])
    balance = moecore.balance_loss(recording)
    assert balance > 0
    assert torch.allclose(module.logged["train/balance_loss"], balance)
    assert torch.allclose(loss - module.logged["train/loss"], balance)
    assert [routing.name for routing in module.recording] == ["backbone.blocks.0.mlp", "backbone.blocks.1.mlp"]


@pytest.mark.parametrize("data", [{"mixup": 1.0}, {"cutmix": 1.0}])
def test_mixed_labels_are_distributions_and_give_no_accuracy(batch, data):
    module = task(**data)
    assert module.training_step(batch, 0).isfinite()
    assert "train/accuracy" not in module.logged


def test_evaluation_never_mixes(batch):
    module = task(mixup=1.0, label_smoothing=0.3).eval()
    module.validation_step(batch, 0)
    assert torch.allclose(module.logged["val/loss"], F.cross_entropy(module(batch[0]), batch[1]))


def test_the_task_is_a_lightning_module_around_a_plain_one():
    module = task()
    assert isinstance(module, LightningModule)
    assert not isinstance(module.model, LightningModule)
