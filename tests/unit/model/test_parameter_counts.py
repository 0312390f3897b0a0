"""Every released size, counted: the figures follow from the released shapes and are those that its README prints."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from beit3.model.build import create_model

LAYERS = {"base": 12, "large": 24}
PER_LAYER = {"base": (4_727_808, 6_144, 9_457_152), "large": (8_400_896, 8_192, 16_803_840)}
"""Attention with its inner norm, norms before attention and FFN, FFN with its inner norm; both modalities."""


def sizes(model: nn.Module, keep: Callable[[str], bool] = lambda name: True) -> int:
    return sum(value.numel() for name, value in model.named_parameters() if keep(name))


def build(size: str, side: int = 224, task: str | None = None, **options: Any) -> nn.Module:
    """A model of the released architecture without its numbers."""
    patch = 14 if size == "giant" else 16
    with torch.device("meta"):
        return create_model(f"beit3_{size}_patch{patch}_{side}", task, attention="decoupled", **options)


def of(modality: str) -> Callable[[str], bool]:
    return lambda name: f".{modality}" in f".{name}"


@pytest.mark.parametrize(("size", "total"), [("base", 220_987_392), ("large", 672_702_464), ("giant", 2_113_992_704)])
def test_backbone_with_final_norm(size: str, total: int) -> None:
    assert sizes(build(size)) == total


@pytest.mark.parametrize(("size", "total"), [("base", 170_293_248), ("large", 605_110_272)])
def test_layers(size: str, total: int) -> None:
    model = build(size)
    attention, norms, ffn = PER_LAYER[size]
    for layer in range(LAYERS[size]):
        prefix = f"blocks.{layer}."
        held = {name.removeprefix(prefix): value.numel() for name, value in model.named_parameters() if prefix in name}
        before = {name: number for name, number in held.items() if ".norm." in name and "attention_out" not in name}
        assert sum(before.values()) == norms
        assert sum(held[name] for name in held if "attention" in name and name not in before) == attention
        assert sum(held[name] for name in held if "ffn" in name and name not in before) == ffn
        assert sum(held.values()) == attention + norms + ffn
    assert sizes(model, lambda name: name.startswith("blocks.")) == total


@pytest.mark.parametrize(
    ("size", "vision", "text"), [("base", 85_893_120, 135_094_272), ("large", 303_550_464, 369_152_000)]
)
def test_towers(size: str, vision: int, text: int) -> None:
    model = build(size)
    assert (sizes(model, of("vision")), sizes(model, of("text"))) == (vision, text)
    assert vision + text == sizes(model)


def test_the_vision_tower_of_a_giant() -> None:
    assert round(sizes(build("giant"), of("vision")) / 1e9, 4) == 1.0118


@pytest.mark.parametrize(
    ("size", "words", "codes"), [("base", 49_223_690, 6_299_648), ("large", 65_610_250, 8_396_800)]
)
def test_pretraining_heads(size: str, words: int, codes: int) -> None:
    model = build(size, task="pretraining")
    assert sizes(model, lambda name: name.startswith("mlm_head.")) == words
    assert sizes(model, lambda name: name.startswith("mim_head.")) == codes


TASKS: list[tuple[str, int, str, dict[str, Any], int, int | None]] = [
    ("base", 224, "pretraining", {}, 276_510_730, 276),
    ("large", 224, "pretraining", {}, 746_709_514, 746),
    ("base", 224, "retrieval", {}, 222_167_041, 222),
    ("large", 224, "retrieval", {}, 674_799_617, 674),
    ("base", 384, "retrieval", {}, 222_458_881, None),
    ("large", 384, "retrieval", {}, 675_188_737, None),
    ("base", 224, "classification", {"final_norm": False}, 221_754_856, None),
    ("large", 224, "classification", {"final_norm": False}, 673_725_416, None),
    ("base", 480, "vqa", {"final_norm": False}, 228_110_649, 228),
    ("large", 480, "vqa", {"final_norm": False}, 682_985_529, 683),
    ("large", 768, "vqa", {"final_norm": False}, 684_423_225, 684),
    ("base", 224, "nlvr2", {}, 225_719_810, 226),
    ("large", 224, "nlvr2", {}, 681_109_506, 681),
    ("base", 480, "captioning", {}, 270_751_754, 271),
    ("large", 480, "captioning", {}, 739_033_610, 739),
]
"""Size, side in pixels, task, options, parameters, and the figure of the released README in millions."""


@pytest.mark.parametrize(
    ("size", "side", "task", "options", "total", "printed"), TASKS, ids=lambda value: str(value) if value else ""
)
def test_task_models(size: str, side: int, task: str, options: dict[str, Any], total: int, printed: int | None) -> None:
    count = sizes(build(size, side, task, **options))
    assert count == total
    assert printed is None or math.isclose(count / 1e6, printed, abs_tol=0.8)  # some are cut, some are rounded


@pytest.mark.parametrize(("size", "used", "printed"), [("base", 86_662_120, 87), ("large", 304_575_464, 305)])
def test_what_a_classifier_of_images_uses(size: str, used: int, printed: int) -> None:
    model = build(size, task="classification", final_norm=False)
    count = sizes(model, lambda name: not of("text")(name))
    assert count == used
    assert round(count / 1e6) == printed
