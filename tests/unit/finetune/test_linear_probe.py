"""The linear probe: MAE's optimizer, head and views, on a tower that nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from beit3.config import Run
from beit3.data.preprocess import Preprocess
from beit3.errors import ConfigError, DataMissingError
from beit3.finetune.linear_probe import FeatureNorm, LinearProbe, LinearProbeConfig, load_linear_probe
from beit3.model.build import build_model
from beit3.model.presets import ModelConfig
from beit3.recipes import load_recipe
from beit3.train.optim import build_optimizer

STATISTICS: dict[str, Any] = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
RECIPES = ("linear_probe_base", "linear_probe_base:large", "linear_probe_emoji")


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    """A small model of ours with statistics of its own."""
    config = ModelConfig(
        width=16,
        num_layers=2,
        num_heads=2,
        ffn_width=24,
        patch_size=8,
        image_size=(24, 24),
        vocab_size=20,
        fusion_layers=0,
    )
    files = Preprocess(image_size=(24, 24), **STATISTICS).file()
    build_model(config, "pretraining", codebook_size=8).save_pretrained(tmp_path / "tower", files=files)
    return tmp_path / "tower"


def probe(tower: str | Path, **changes: Any) -> LinearProbe:
    fields = {"train": "groups.train.jsonl", "eval": "groups.test.jsonl", "num_classes": 3, "batch_size": 6}
    return LinearProbeConfig(**{"tower": str(tower), **fields, **changes}).build()


def run_of(task: LinearProbe, sets: Path) -> Run:
    return Run(name="probe", task=task.config, data=sets)


def test_the_loss_is_that_of_a_linear_map_of_normalised_features(tower: Path, sets: Path) -> None:
    task = probe(tower).train()
    batch = next(iter(task.train_loader(run_of(task, sets), 0, 1)))
    mean, std = (torch.tensor(STATISTICS[name])[:, None, None] for name in ("mean", "std"))
    features = task.tower((batch.images / 255 - mean) / std)
    normed = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-6).sqrt()
    logits = normed @ task.head.weight.T + task.head.bias
    values = task(batch)
    torch.testing.assert_close(values["loss"], F.cross_entropy(logits, batch.labels))
    assert float(values["accuracy"]) == pytest.approx(float((logits.argmax(1) == batch.labels).float().mean()))
    assert [name for name, _ in task.named_parameters()] == ["head.weight", "head.bias"]
    assert float(task.head.weight.detach().std()) == pytest.approx(0.01, rel=0.4)
    assert not task.head.bias.any()


def mae_lars(parameters: list[Tensor], gradients: list[Tensor], state: dict[int, Tensor], lr: float) -> None:
    """MAE's `util/lars.py` at weight decay 0, momentum 0.9, trust 0.001: vectors are not scaled."""
    for number, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        if parameter.ndim > 1:
            gradient = gradient * (0.001 * parameter.norm() / gradient.norm())
        state[number] = 0.9 * state.get(number, torch.zeros_like(parameter)) + gradient
        parameter -= lr * state[number]


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_take_the_steps_of_maes_lars(name: str, tower: Path) -> None:
    run: Any = load_recipe(f"recipe:finetune/{name}")
    task = probe(tower)
    optimizer = build_optimizer(task, run.optim)
    expected, state = [parameter.detach().clone() for parameter in task.parameters()], dict[int, Tensor]()
    for _ in range(4):
        gradients = [torch.randn_like(parameter) for parameter in expected]
        for parameter, gradient in zip(task.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        mae_lars(expected, gradients, state, run.optim.lr)
    for parameter, wanted in zip(task.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "epochs"), [("linear_probe_base", 90), ("linear_probe_base:large", 50)])
def test_the_published_hyper_parameters(name: str, epochs: int) -> None:
    run: Any = load_recipe(f"recipe:finetune/{name}")
    per_epoch = 1_281_167 // 16_384
    assert run.task.batch_size == 16_384
    assert run.optim.lr == pytest.approx(0.1 * 16_384 / 256)
    assert run.optim.min_lr == 0
    assert run.optim.warmup_steps == 10 * per_epoch
    assert run.loop.steps == epochs * per_epoch
    assert (run.task.scale, run.task.flip, run.task.central_crop) == ((0.08, 1.0), 0.5, 0.875)


def test_training_lowers_the_loss_and_leaves_the_tower_alone(sets: Path) -> None:
    task = probe("timm:test_vit", pretrained=False, batch_size=12).train()
    tower = {name: value.clone() for name, value in task.tower.state_dict().items()}
    batch = next(iter(task.train_loader(run_of(task, sets), 0, 1)))
    optimizer = torch.optim.Adam(task.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        loss = task(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(tower[name], value) for name, value in task.tower.state_dict().items())
    assert not any(module.training for module in task.tower.modules())
    assert all(name.startswith(("head.", "norm.")) for name in task.state_dict()), "no checkpoint holds the tower"


def test_pictures_are_mirrored_only_where_asked(tower: Path, tmp_path: Path) -> None:
    """A crop keeps left and right of a picture whose halves are black and white."""
    halves = np.zeros((40, 40, 3), np.uint8)
    halves[:, 20:] = 255
    Image.fromarray(halves).save(tmp_path / "halves.png")
    (tmp_path / "halves.jsonl").write_text('{"image_path": "halves.png", "label": 0}\n' * 32)

    def mirrored(flip: float) -> float:
        task = probe(tower, train="halves.jsonl", eval=None, batch_size=32, scale=(0.9, 1.0), flip=flip)
        images = next(iter(task.train_loader(run_of(task, tmp_path), 0, 1))).images.float()
        assert len({tuple(image.flatten().tolist()) for image in images}) > 4, "crops vary"
        assert torch.equal(images[:, 0], images[:, 1]), "colours do not"
        return float((images[..., :8].mean((1, 2, 3)) > images[..., -8:].mean((1, 2, 3))).float().mean())

    assert mirrored(0.0) == 0
    assert mirrored(1.0) == 1
    assert 0.2 < mirrored(0.5) < 0.8


@torch.no_grad()
def test_evaluation_sees_the_middle_of_every_picture_once(tower: Path, sets: Path) -> None:
    task = probe(tower, eval_batch_size=5, central_crop=0.75).eval()
    nn.init.normal_(task.head.weight)
    batches = list(task.eval_loader(run_of(task, sets)) or [])
    picture = Image.open(sets / "drawings/07.png").convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    middle = torch.from_numpy(np.asarray(picture)[4:28, 4:28].copy()).permute(2, 0, 1)
    assert torch.equal(torch.cat([batch.images for batch in batches])[7], middle)
    right = [task.logits(batch).argmax(1) == batch.labels for batch in batches]
    assert len(torch.cat(right)) == 12
    assert task.evaluate(batches) == pytest.approx({"acc1": float(torch.cat(right).float().mean()), "acc5": 1.0})


def test_an_index_to_evaluate_on_is_missed_before_training(tower: Path, sets: Path) -> None:
    task = probe(tower, eval="none.jsonl")
    with pytest.raises(DataMissingError, match=r"none\.jsonl does not exist"):
        task.train_loader(run_of(task, sets), 0, 1)


@torch.no_grad()
@pytest.mark.parametrize("source", ["ours", "timm:test_vit"])
def test_what_is_saved_gives_the_same_logits(source: str, tower: Path, sets: Path, tmp_path: Path) -> None:
    task = probe(tower if source == "ours" else source, pretrained=source == "ours")
    batch = next(iter(task.train_loader(run_of(task, sets), 0, 1)))
    for _ in range(3):
        task.train()(batch)  # the norm's statistics
    nn.init.normal_(task.head.weight)
    nn.init.normal_(task.head.bias)
    task.eval().save(tmp_path / "export")
    loaded = load_linear_probe(tmp_path / "export")
    images = task.tower.preprocess.normalize(batch.images)
    torch.testing.assert_close(loaded(images), task.logits(batch), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match=r"holds a 'model', not a linear probe"):
        load_linear_probe(tower)
    with pytest.raises(DataMissingError, match="does not exist"):
        load_linear_probe(tmp_path)


def test_evaluation_normalises_by_what_training_saw() -> None:
    norm = FeatureNorm(3).train()
    rows = 5 + 2 * torch.randn(400, 3)
    for _ in range(200):
        norm(rows)
    expected = (rows - rows.mean(0)) / (rows.var(0) + 1e-6).sqrt()
    torch.testing.assert_close(norm.eval()(rows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"central_crop": 0.0}, "central_crop must lie in"),
        ({"flip": 2.0}, "flip is a probability"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_contradictions_fail_before_anything_is_loaded(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        probe("nowhere", **changes)
