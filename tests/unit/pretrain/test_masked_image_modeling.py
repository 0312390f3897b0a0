"""BEiT v2's objective against a plain computation, one picture at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import beit3
from beit3.config import OptimConfig, Run, replace
from beit3.data.emoji import load_cells
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.errors import ConfigError
from beit3.model.multiway import MultiwayBlock
from beit3.model.packing import PackedBatch
from beit3.model.presets import ModelConfig
from beit3.pretrain.masked_batches import MaskedBatch
from beit3.pretrain.masked_image_modeling import MaskedImageModeling, MaskedImageModelingConfig
from beit3.tokenizer.vqkd import VQKD
from beit3.train.optim import build_optimizer
from tests.conftest import Workspace

MODEL = ModelConfig(
    width=16,
    num_layers=3,
    num_heads=2,
    ffn_width=24,
    patch_size=8,
    image_size=(48, 48),
    vocab_size=20,
    max_text_positions=8,
    fusion_layers=0,
)
Build = Callable[..., MaskedImageModeling]


@pytest.fixture
def mim_config(workspace: Workspace) -> MaskedImageModelingConfig:
    return MaskedImageModelingConfig(
        model=MODEL,
        visual_tokenizer=workspace.visual_tokenizer,
        images=Stream(sources=(Source(path="images"),), batch_size=5),
        crop=CropConfig(size=48),
        early_layer=2,
        eval_images="test_vendor",
    )


@pytest.fixture
def build(mim_config: MaskedImageModelingConfig) -> Build:
    """Build the Task with weights that are random everywhere, biases and norms included."""

    def make(**changes: object) -> MaskedImageModeling:
        task = MaskedImageModeling(replace(mim_config, **changes))
        with torch.no_grad():
            for parameter in task.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return task

    return make


@pytest.fixture
def batch(build: Build, workspace: Workspace) -> MaskedBatch:
    task = build()
    return next(iter(task.train_loader(Run(name="run", task=task.config, data=workspace.data), 0, 1)))


def plain_block(block: MultiwayBlock, x: Tensor) -> Tensor:
    """One picture's rows (1 + N, D) through a block, head by head."""
    attend: Any = block.attention_in["shared"]
    finish: Any = block.attention_out["shared"]
    expert: Any = block.ffn["vision"]
    q, k, v = attend.qkv(attend.norm(x)).chunk(3, dim=-1)
    mixed = []
    for q_head, k_head, v_head in zip(*(part.chunk(block.num_heads, dim=-1) for part in (q, k, v)), strict=True):
        mixed.append((q_head @ k_head.T / q_head.shape[1] ** 0.5).softmax(-1) @ v_head)
    x = x + finish.out(finish.norm(torch.cat(mixed, dim=-1)))
    hidden = F.gelu(expert.fc1(expert.norm(x)))
    out: Tensor = x + expert.fc2(expert.inner_norm(hidden))
    return out


def plain_predictions(task: MaskedImageModeling, batch: MaskedBatch, image: int) -> tuple[Tensor, Tensor]:
    """Head outputs (1 + N, K) of one picture: after the last layer, and of the aggregation."""
    model, packed = task.model, batch.packed
    assert packed.images is not None
    assert packed.image_mask is not None
    one = PackedBatch(
        images=(packed.images[image : image + 1].float() / 255 - 0.5) / 0.5,
        image_mask=packed.image_mask[image : image + 1],
    )
    x, _, _ = model.backbone.embed(one)
    states = []
    for block in model.backbone.layers():
        x = plain_block(block, x)
        states.append(x)
    norm = model.backbone.norm["vision"]
    mixed = torch.cat([states[-1][:1], states[1][1:]])
    for extra in model.aggregation_blocks:
        assert isinstance(extra, MultiwayBlock)
        mixed = plain_block(extra, mixed)
    return model.head(norm(x)), model.head(norm(mixed))


def test_both_losses_are_cross_entropies_of_hidden_patches(
    build: Build, batch: MaskedBatch, workspace: Workspace
) -> None:
    task = build()
    packed = batch.packed
    assert packed.images is not None
    assert packed.image_mask is not None
    codes = VQKD.load(workspace.visual_tokenizer).tokenize(packed.images.float() / 255)
    sums = [0.0, 0.0]
    right = hidden = 0
    for image in range(len(packed.images)):
        for place, logits in enumerate(plain_predictions(task, batch, image)):
            for patch in range(36):
                if packed.image_mask[image, patch]:
                    target = int(codes[image, patch])
                    sums[place] -= float(logits[1 + patch].detach().log_softmax(-1)[target])
                    right += int(place == 0 and int(logits[1 + patch].argmax()) == target)
                    hidden += place == 0
    values = task(batch)
    assert hidden == 5 * 14
    assert float(values["mim_loss"].detach()) == pytest.approx(sums[0] / hidden, rel=1e-4)
    assert float(values["aggregated_loss"].detach()) == pytest.approx(sums[1] / hidden, rel=1e-4)
    assert float(values["mim_accuracy"]) == pytest.approx(right / hidden)
    assert float(values["loss"].detach()) == pytest.approx(sum(sums) / hidden, rel=1e-4)


def class_gradient(task: MaskedImageModeling, batch: MaskedBatch) -> float:
    """Largest gradient of the loss at the class token's state after the last layer."""
    rows: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        output[0].retain_grad()
        rows.append(output[0])

    list(task.model.backbone.layers())[-1].register_forward_hook(keep)
    task(batch)["loss"].backward()
    gradient = rows[0].grad
    assert gradient is not None
    return float(gradient.view(5, 37, -1)[:, 0].abs().max())


def test_the_class_token_learns_from_the_aggregation_alone_through_its_last_state(
    build: Build, batch: MaskedBatch
) -> None:
    """Without aggregation nothing predicts from the final class token; with it, the last block's class row matters."""
    found = {early: class_gradient(build(early_layer=early), batch) for early in (None, 2)}
    assert found[None] == 0
    assert found[2] > 0


def test_pixel_targets_are_patches_normalised_one_by_one(build: Build, batch: MaskedBatch) -> None:
    task = build(target="pixels", visual_tokenizer=None, early_layer=None)
    packed = batch.packed
    assert packed.images is not None
    assert packed.image_mask is not None
    images = (packed.images.double() / 255 - 0.5) / 0.5
    total = values = 0.0
    predictions = task.model(batch)[0]
    row = 0
    for image in range(5):
        for patch in range(36):
            if not packed.image_mask[image, patch]:
                continue
            top, left = patch // 6 * 8, patch % 6 * 8
            pixels = images[image, :, top : top + 8, left : left + 8].flatten()
            target = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            total += float(((predictions[row].detach().double() - target) ** 2).sum())
            values += len(target)
            row += 1
    found = task(batch)
    assert found.keys() == {"loss", "mim_loss"}
    assert float(found["loss"].detach()) == pytest.approx(total / values, rel=1e-4)


def test_every_trained_parameter_gets_a_gradient_and_text_parameters_are_frozen(
    build: Build, batch: MaskedBatch
) -> None:
    task = build()
    task(batch)["loss"].backward()
    for name, parameter in task.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert not any("text" in name for name in trained)
    assert any("aggregation" in name for name in trained)


def test_attention_of_its_own_per_modality_works_under_aggregation(build: Build, batch: MaskedBatch) -> None:
    task = build(**{"model.attention": "decoupled"})
    task(batch)["loss"].backward()
    for name, parameter in task.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert not any("text" in name for name, _ in task.model.aggregation_blocks.named_parameters())


def test_drop_path_drops_whole_pictures_in_the_aggregation_too(build: Build, batch: MaskedBatch) -> None:
    task = build(**{"model.drop_path": 0.999999})
    task.train()
    early: list[Tensor] = []
    task.model.backbone.blocks[1].register_forward_hook(lambda _block, _inputs, out: early.append(out[0]))
    last: list[Tensor] = []
    task.model.aggregation_blocks[-1].register_forward_hook(lambda _block, _inputs, out: last.append(out[0]))
    task(batch)
    shape = (5, 37, MODEL.width)
    torch.testing.assert_close(last[0].view(shape)[:, 1:], early[0].view(shape)[:, 1:])


def test_the_blocks_of_aggregation_are_turned_by_muon_and_decay_as_the_last_layer(
    build: Build, batch: MaskedBatch
) -> None:
    task = build()
    muon = build_optimizer(task, OptimConfig(name="nmuon", lr=0.01))
    task(batch)["loss"].backward()
    muon.step()
    blocks = dict(task.model.aggregation_blocks.named_parameters())
    for name, parameter in blocks.items():
        assert ("momentum_buffer" in muon.state[parameter]) == (parameter.ndim == 2), name
    assert "exp_avg" in muon.state[task.model.head.weight]
    decayed = build_optimizer(task, OptimConfig(layer_decay=0.5, lr=0.01))
    scales = {id(p): group["lr_scale"] for group in decayed.param_groups for p in group["params"]}
    assert {scales[id(parameter)] for parameter in blocks.values()} == {1.0}


def test_a_fixed_batch_is_learned(build: Build, batch: MaskedBatch) -> None:
    task = build()
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = task(batch)["loss"]
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def test_the_export_embeds_pictures_and_says_that_it_has_no_words(
    build: Build, workspace: Workspace, tmp_path: Path
) -> None:
    task = build()
    task.save(tmp_path / "export")
    predictor = beit3.load(tmp_path / "export", device="cpu")
    pictures = [cell.image for cell in load_cells("google")[:3]]
    assert predictor.embed_images(pictures).shape == (3, 16)
    with pytest.raises(ConfigError, match="it reads no texts"):
        predictor.embed_texts(["a cat"])


def test_evaluation_repeats_itself_and_is_over_held_out_pictures(build: Build, workspace: Workspace) -> None:
    task = build().eval()
    run = Run(name="run", task=task.config, data=workspace.data)
    loaders = [task.eval_loader(run) for _ in range(2)]
    assert loaders[0] is not None
    assert loaders[1] is not None
    with torch.no_grad():
        first, second = (task.evaluate(loader) for loader in loaders if loader is not None)
    assert first == second
    assert first.keys() == {"mim_loss", "mim_accuracy", "aggregated_loss", "aggregated_accuracy"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"early_layer": 3}, r"early_layer must lie in 1\.\.2"),
        ({"visual_tokenizer": None}, "target 'codes' needs visual_tokenizer"),
        ({"crop": CropConfig(size=32)}, r"crop\.size \(32\) must be the model's image_size"),
        (
            {"target": "pixels", "images": Stream(sources=(Source(path="images", codes="codes"),), batch_size=5)},
            "target 'pixels' reads no codes",
        ),
    ],
)
def test_contradictions_are_refused(
    mim_config: MaskedImageModelingConfig, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(mim_config, **changes)


def test_a_tokenizer_of_another_grid_is_refused(mim_config: MaskedImageModelingConfig) -> None:
    with pytest.raises(ConfigError, match=r"a grid of \(6, 6\) codes, the model one of \(3, 3\) patches"):
        MaskedImageModeling(replace(mim_config, **{"model.patch_size": 16}))
