"""Image towers: the features that their own networks give, frozen, and described well enough to be loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor

from beit3.config import replace
from beit3.data.preprocess import Preprocess
from beit3.errors import ConfigError, DataMissingError
from beit3.finetune.image_tower import ImageTower, load_image_tower
from beit3.model.build import build_model
from beit3.model.official import to_official
from beit3.model.parts import keep_part
from beit3.model.presets import ModelConfig

CONFIG = ModelConfig(
    width=64,
    num_layers=2,
    num_heads=1,
    ffn_width=24,
    patch_size=8,
    image_size=(24, 16),
    vocab_size=50,
    max_text_positions=20,
    attention="decoupled",
    fusion_layers=0,
)
NETWORKS = {"test_vit": 100, "test_resnet": 25, "test_convnext": 25, "resnet10t": 36}
"""timm's, with their patches."""


def own(folder: Path, task: str | None, **options: int) -> Any:
    """A model with every weight random, and its folder."""
    model = build_model(CONFIG, task, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    preprocess = Preprocess(image_size=CONFIG.image_size, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    model.save_pretrained(folder, files=preprocess.file())
    return model


def images_for(tower: ImageTower) -> Tensor:
    return torch.randn(2, 3, *tower.preprocess.image_size)


@torch.no_grad()
@pytest.mark.parametrize(
    ("task", "pooled"),
    [
        (None, "mean"),
        ("pretraining", "mean"),
        ("classification", "mean"),
        ("superclass", "mean"),
        ("vqa", "mean"),
        ("retrieval", "class"),
    ],
)
def test_ours_gives_the_states_of_the_plain_forward(task: str | None, pooled: str, tmp_path: Path) -> None:
    model = own(tmp_path / "model", task)
    tower = load_image_tower(tmp_path / "model")
    images = images_for(tower)
    states = (model if task is None else model.backbone)(images).vision
    expected = {"mean": states[:, 1:].mean(1), "class": states[:, 0]}
    assert tower.width == 64
    torch.testing.assert_close(tower(images), expected[pooled])
    torch.testing.assert_close(tower.patches(images), states[:, 1:])
    for pooling in ("mean", "class"):
        torch.testing.assert_close(load_image_tower(tmp_path / "model", pooling=pooling)(images), expected[pooling])
    assert tower.preprocess == Preprocess(image_size=(24, 16), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


@torch.no_grad()
def test_a_released_file_is_a_tower_with_the_released_preprocessing(tmp_path: Path) -> None:
    config = replace(CONFIG, image_size=(24, 24))
    model: Any = build_model(config, "retrieval").eval()
    torch.save({"model": to_official(config, model.state_dict())}, tmp_path / "retrieval.pth")
    tower = load_image_tower(tmp_path / "retrieval.pth")
    images = images_for(tower)
    torch.testing.assert_close(tower(images), model.backbone(images).vision[:, 0])
    assert tower.preprocess == Preprocess(image_size=(24, 24), max_text_length=18)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_timm_gives_what_its_classifier_reads(name: str) -> None:
    tower: Any = load_image_tower(f"timm:{name}", pretrained=False)
    images = images_for(tower)
    states = tower.net.forward_features(images)
    feature = tower(images)
    assert torch.equal(feature, tower.net.forward_head(states, pre_logits=True))
    assert feature.shape == (2, tower.width)
    patches = tower.patches(images)
    assert patches.shape == (2, NETWORKS[name], tower.width)
    if states.ndim == 4:
        torch.testing.assert_close(patches.mean(1), states.mean((2, 3)))
    else:
        assert torch.equal(patches, states[:, 1:])
        assert torch.equal(load_image_tower(f"timm:{name}", pooling="class", pretrained=False)(images), states[:, 0])
    averaged = load_image_tower(f"timm:{name}", pooling="mean", pretrained=False)
    torch.testing.assert_close(averaged(images), patches.mean(1))


@torch.no_grad()
def test_channels_last_maps_of_timm_are_read_row_by_row() -> None:
    tower: Any = load_image_tower("timm:swin_s3_tiny_224", pretrained=False)
    images = images_for(tower)
    states = tower.net.forward_features(images)
    assert states.shape == (2, 7, 7, 768)
    assert torch.equal(tower.patches(images)[:, 8], states[:, 1, 1])


@torch.no_grad()
def test_trained_weights_and_statistics_of_timm_come_from_a_folder(tmp_path: Path) -> None:
    net = timm.create_model("test_vit", num_classes=7).eval()
    save_for_hf(net, tmp_path / "net")
    settings = json.loads((tmp_path / "net/config.json").read_text())
    settings["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.2, 0.3, 0.4]}
    (tmp_path / "net/config.json").write_text(json.dumps(settings))
    tower = load_image_tower(f"timm:local-dir:{tmp_path / 'net'}")
    images = images_for(tower)
    torch.testing.assert_close(tower(images), net.forward_head(net.forward_features(images), pre_logits=True))
    expected = Preprocess(image_size=(160, 160), resize="crop", mean=(0.1, 0.2, 0.3), std=(0.2, 0.3, 0.4))
    assert tower.preprocess == expected


@pytest.mark.parametrize("source", ["ours", "timm:test_resnet"])
def test_a_tower_is_frozen_and_stays_in_eval_mode(source: str, tmp_path: Path) -> None:
    if source == "ours":
        own(tmp_path / "ours", "pretraining")
        source = str(tmp_path / "ours")
    tower = load_image_tower(source, pretrained=source != "timm:test_resnet")
    around = torch.nn.Sequential(tower, torch.nn.Linear(tower.width, 2)).train()
    assert around[1].training
    assert not any(module.training for module in tower.modules())
    images = images_for(tower)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    first = around(images)
    first.sum().backward()
    assert torch.equal(around(images), first)
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert all(torch.equal(before[name], value) for name, value in tower.state_dict().items())


@torch.no_grad()
def test_what_is_described_is_loaded_again(tmp_path: Path) -> None:
    own(tmp_path / "ours", "retrieval")
    for tower in (load_image_tower(tmp_path / "ours"), load_image_tower("timm:test_vit", pretrained=False)):
        described = json.loads(json.dumps(tower.describe()))
        torch.rand(3)
        images = images_for(tower)
        assert torch.equal(load_image_tower(**described)(images), tower(images))


def test_operations_are_those_of_the_matrix_products() -> None:
    tower = load_image_tower("timm:vit_tiny_patch16_224", pretrained=False)
    tokens, width, layers = 197, 192, 12
    blocks = layers * (24 * tokens * width**2 + 4 * tokens**2 * width)
    assert tower.flops == blocks + 2 * 196 * 768 * width


@pytest.mark.parametrize(
    ("source", "options", "kind", "line"),
    [
        ("nowhere", {}, DataMissingError, "nowhere does not exist"),
        ("timm:no_such_net", {}, DataMissingError, r"'timm:no_such_net' could not be loaded: .*Unknown model"),
        ("timm:local-dir:nowhere", {}, DataMissingError, "could not be loaded"),
        ("timm:resnet10t", {"pretrained": False, "pooling": "class"}, ConfigError, "has no class token"),
        ("timm:resnet10t", {"pooling": "max"}, ConfigError, "pooling is one of auto, mean, class, not 'max'"),
        ("model", {"pretrained": False}, ConfigError, "give timm:NAME"),
        ("text", {}, ConfigError, "text tower alone"),
    ],
)
def test_errors_are_one_line(
    source: str, options: dict[str, Any], kind: type[Exception], line: str, tmp_path: Path
) -> None:
    if source == "text":
        model = build_model(CONFIG, "pretraining")
        keep_part(model, "text")
        model.save_pretrained(tmp_path / "text")
        source = str(tmp_path / "text")
    with pytest.raises(kind, match=line) as caught:
        load_image_tower(source, **options)
    assert "\n" not in str(caught.value)
