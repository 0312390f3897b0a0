"""Optimizer groups against the official rule, and the schedule against its formula."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from beit3.config import OptimConfig
from beit3.errors import ConfigError
from beit3.model.heads import PretrainingModel, RetrievalModel, VQAModel
from beit3.model.presets import ModelConfig
from beit3.train.optim import Schedule, build_optimizer
from beit3.train.task import Task, Work

LAYERS = 3
CONFIG = ModelConfig(
    width=8,
    num_layers=LAYERS,
    num_heads=2,
    ffn_width=12,
    patch_size=4,
    image_size=(8, 8),
    vocab_size=20,
    max_text_positions=10,
    fusion_layers=1,
)


class Holder(Task[Tensor]):
    """A Task that holds a model and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def train_loader(self, run: object, rank: int, world_size: int) -> None:  # type: ignore[override]
        raise NotImplementedError

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def work(self, batch: Tensor) -> Work:
        raise NotImplementedError

    def move(self, batch: Tensor, device: torch.device) -> Tensor:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        raise NotImplementedError


def rates(task: Task[Tensor], config: OptimConfig) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter by name, as the optimizer and the schedule set them."""
    optimizer = build_optimizer(task, config)
    Schedule(optimizer, config, 10).set(0.0)
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def official_layer(name: str) -> int:
    """The rule of BEiT-3's optim_factory.py: embeddings 0, block i in i + 1, everything else L + 1."""
    if ".vision_embedding." in name or ".text_embedding." in name:
        return 0
    if ".blocks." in name:
        return int(name.split(".blocks.")[1].split(".")[0]) + 1
    return LAYERS + 1


@pytest.mark.parametrize("kind", [PretrainingModel, RetrievalModel])
@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_layer_decay_follows_the_official_rule(
    kind: type[PretrainingModel] | type[RetrievalModel], decay: float
) -> None:
    task = Holder(kind(CONFIG))
    found = rates(task, OptimConfig(lr=0.8, layer_decay=decay))
    assert found.keys() == dict(task.named_parameters()).keys()
    for name, (lr, _) in found.items():
        assert lr == pytest.approx(0.8 * decay ** (LAYERS + 1 - official_layer(name))), name
    assert {official_layer(name) for name in found} == set(range(LAYERS + 2))


@pytest.mark.parametrize("layer_decay", [None, 1.0, 0.7])
def test_vectors_and_position_tables_do_not_decay(layer_decay: float | None) -> None:
    task = Holder(PretrainingModel(CONFIG))
    found = rates(task, OptimConfig(lr=0.8, weight_decay=0.05, layer_decay=layer_decay))
    parameters = dict(task.named_parameters())
    free = {name for name, (_, decay) in found.items() if decay == 0}
    assert free == {name for name, p in parameters.items() if p.ndim <= 1 or name.endswith("embedding.positions")}
    assert {decay for name, (_, decay) in found.items() if name not in free} == {0.05}
    assert "model.backbone.text_embedding.words.weight" not in free
    if layer_decay != 0.7:
        assert {lr for lr, _ in found.values()} == {0.8}


def test_frozen_parameters_are_left_out() -> None:
    task = Holder(PretrainingModel(CONFIG))
    task.model.get_parameter("backbone.vision_embedding.mask_token").requires_grad_(False)
    assert "model.backbone.vision_embedding.mask_token" not in rates(task, OptimConfig())


def test_options_reach_the_optimizer() -> None:
    optimizer = build_optimizer(Holder(nn.Linear(2, 2)), OptimConfig(betas=(0.8, 0.7), eps=1e-4))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.7)
    assert optimizer.param_groups[0]["eps"] == 1e-4


@pytest.mark.parametrize("name", ["muon", "nmuon", "adamuon"])
def test_muon_turns_the_matrices_of_blocks_and_adamw_moves_the_rest(name: str) -> None:
    model = RetrievalModel(CONFIG)
    task = Holder(model)
    model.backbone.freeze_unreached(images=True, texts=True, pairs=False)
    optimizer = build_optimizer(task, OptimConfig(name=name, lr=0.01, betas=(0.8, 0.7)))
    images, texts = torch.randn(4, 3, 8, 8), torch.randint(4, 20, (4, 5))
    (model.encode_image(images) * model.encode_text(texts)).sum().backward()
    optimizer.step()
    parameters = {name: p for name, p in task.named_parameters() if p.grad is not None}
    turned = {name for name, p in parameters.items() if "momentum_buffer" in optimizer.state[p]}
    assert turned == {name for name, p in parameters.items() if ".blocks." in name and p.ndim == 2}
    assert all(group["betas"] == (0.8, 0.7) for group in optimizer.param_groups)


def test_muon_steps_with_the_orthogonal_factor_of_the_gradient_in_full_precision() -> None:
    layer = nn.Linear(48, 16, bias=False)
    model, weight = nn.ModuleDict({"blocks": nn.ModuleList([layer])}), layer.weight
    before, gradient = weight.detach().clone(), torch.randn_like(weight)
    optimizer = build_optimizer(Holder(model), OptimConfig(name="muon", lr=0.1, weight_decay=0.0))
    weight.grad = gradient.clone()
    optimizer.step()
    step = (before - weight.detach()) / (0.1 * 0.2 * math.sqrt(48))
    left, _, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    values = torch.linalg.svdvals(step.double())
    assert values.min() > 0.6  # the quintic iteration brings all singular values near 1
    assert values.max() < 1.3
    turned = left.T @ step.double() @ right.T
    assert (turned - turned.diagonal().diag()).abs().max() < 1e-4  # bf16 would leave 1e-2


def test_an_unknown_optimizer_is_named() -> None:
    with pytest.raises(ConfigError, match="adamww"):
        build_optimizer(Holder(nn.Linear(2, 2)), OptimConfig(name="adamww"))


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0), (100, 30), (7, 3), (10, 10), (1, 0), (333, 50)])
def test_the_schedule_warms_up_in_a_line_and_falls_as_a_cosine(steps: int, warmup: int) -> None:
    peak, least = 0.8, 0.1
    config = OptimConfig(lr=peak, min_lr=least, warmup_steps=warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = Schedule(optimizer, config, steps)
    for step in range(steps):
        schedule.set(step / steps)
        if step < warmup:
            expected = peak * step / warmup
        else:
            expected = least + (peak - least) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected), f"step {step}"


def test_a_share_beyond_the_end_stays_at_the_last_rate() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = Schedule(optimizer, OptimConfig(lr=1.0, min_lr=0.0), 1000)
    for share in (1.0, 1.7):
        schedule.set(share)
        assert optimizer.param_groups[0]["lr"] < 1e-5


@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("name", ["adamw", "nmuon"])
def test_a_head_has_a_learning_rate_of_its_own(layer_decay: float | None, name: str) -> None:
    """As released for VQA: what is named head, neither the pooler nor the backbone."""
    plain = rates(Holder(VQAModel(CONFIG, num_answers=5)), OptimConfig(name=name, lr=0.8, layer_decay=layer_decay))
    scaled = rates(
        Holder(VQAModel(CONFIG, num_answers=5)), OptimConfig(name=name, lr=0.8, layer_decay=layer_decay, head_lr=20)
    )
    assert scaled.keys() == plain.keys()
    for parameter, (lr, decay) in scaled.items():
        factor = 20 if parameter.startswith("model.head.") else 1
        assert lr == pytest.approx(factor * plain[parameter][0]), parameter
        assert decay == plain[parameter][1], parameter
    assert {parameter for parameter in scaled if parameter.startswith("model.head.")}
