"""A released ImageNet-1k file against timm's `beit3_base_patch16_224`: both read it and give the same logits.

timm keeps the vision half in a network of its own and has its own translation of the released names. The file is
written here from the published list of names and shapes, with every norm and bias random, so that neither side's idea
of the layout goes into it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

import beit3
from beit3.model.heads import ClassificationModel
from beit3.model.official import to_official

WIDTH, HIDDEN, ROWS, CLASSES = 768, 3072, 199, 1000
IMAGE_SIDE = 224
DEPTHS = [2, pytest.param(12, marks=pytest.mark.slow)]


def released_in1k(num_layers: int, vocabulary: int) -> dict[str, Tensor]:
    """Names and shapes of `beit3_base_patch16_224_in1k.pth`, random numbers."""
    shapes: dict[str, tuple[int, ...]] = {
        "beit3.text_embed.weight": (vocabulary, WIDTH),
        "beit3.vision_embed.mask_token": (1, 1, WIDTH),
        "beit3.vision_embed.cls_token": (1, 1, WIDTH),
        "beit3.vision_embed.proj.weight": (WIDTH, 3, 16, 16),
        "beit3.vision_embed.proj.bias": (WIDTH,),
        "beit3.encoder.embed_positions.A.weight": (ROWS, WIDTH),
        "beit3.encoder.embed_positions.B.weight": (1024, WIDTH),
    }
    for layer in range(num_layers):
        for x in "AB":
            names: dict[str, tuple[int, ...]] = {
                **{f"self_attn.{name}_proj.{x}": (WIDTH, WIDTH) for name in ("k", "v", "q", "out")},
                f"self_attn.inner_attn_ln.{x}": (WIDTH,),
                f"self_attn_layer_norm.{x}": (WIDTH,),
                f"ffn.{x}.fc1": (HIDDEN, WIDTH),
                f"ffn.{x}.fc2": (WIDTH, HIDDEN),
                f"ffn.{x}.ffn_layernorm": (HIDDEN,),
                f"final_layer_norm.{x}": (WIDTH,),
            }
            for name, shape in names.items():
                shapes[f"beit3.encoder.layers.{layer}.{name}.weight"] = shape
                shapes[f"beit3.encoder.layers.{layer}.{name}.bias"] = shape[:1]
    shapes |= {"fc_norm.weight": (WIDTH,), "fc_norm.bias": (WIDTH,)}
    shapes |= {"head.weight": (CLASSES, WIDTH), "head.bias": (CLASSES,)}
    norms = ("ln.", "norm.")
    made = {}
    for name, shape in shapes.items():
        centre = 1.0 if name.endswith("weight") and any(norm in name for norm in (*norms, "_norm")) else 0.0
        made[name] = torch.empty(shape).normal_(centre, 0.1 if len(shape) == 1 else 0.05)
    return made


@pytest.fixture(scope="module", params=DEPTHS, ids=lambda depth: f"{depth} layers")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The weights, and the model that each side makes of the file."""
    torch.manual_seed(0)
    whole = request.param == 12
    state = released_in1k(request.param, 64010 if whole else 90)
    path: Path = tmp_path_factory.mktemp("released") / "beit3_base_patch16_224_in1k.pth"
    torch.save({"model": state, "args": argparse.Namespace(model="beit3_base_patch16_224")}, path)
    theirs: nn.Module = timm.create_model("beit3_base_patch16_224", pretrained=False, depth=request.param).eval()
    converted = translate(torch.load(path, weights_only=False)["model"], theirs)
    theirs.load_state_dict(converted, strict=True)
    ours = beit3.load_model(path)
    path.unlink()
    return {"state": state, "converted": converted, "theirs": theirs, "ours": ours}


def translate(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """By timm, which changes the dictionary that it is given."""
    translated: dict[str, Tensor] = checkpoint_filter_fn(dict(state), model)
    return translated


def test_both_give_the_same_logits(pair: dict[str, Any]) -> None:
    images = torch.randn(2, 3, IMAGE_SIDE, IMAGE_SIDE)
    with torch.no_grad():
        expected, actual = pair["theirs"](images), pair["ours"](images)
    assert expected.shape == actual.shape == (2, CLASSES)
    assert (expected[0] - expected[1]).abs().max() > 0.01 * expected.abs().max(), "images must matter"
    error, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= 1e-4 * largest, f"error {error:.2e}, largest value {largest:.2e}"


def test_nothing_of_the_vision_half_is_lost_on_timms_side(pair: dict[str, Any]) -> None:
    """A strict load has no missing names; that no number is left out either, their count tells."""
    text = {"beit3.text_embed.weight", "beit3.vision_embed.mask_token"}
    vision = {name: value for name, value in pair["state"].items() if ".B." not in name and name not in text}
    dead_rows = 2 * WIDTH
    stored = sum(value.numel() for value in vision.values()) - dead_rows
    assert stored == sum(value.numel() for value in pair["theirs"].parameters())


def test_every_tensor_that_timm_uses_moves_our_logits(pair: dict[str, Any]) -> None:
    """Each of our parameters that timm has as well gets a gradient; those of the text half get none."""
    ours = pair["ours"]
    assert isinstance(ours, ClassificationModel)
    ours.zero_grad()
    ours(torch.randn(1, 3, IMAGE_SIDE, IMAGE_SIDE)).square().sum().backward()
    gradients = to_official(ours.backbone.config, _gradients(ours.backbone))
    used = {name for name, value in gradients.items() if value.any()}
    text = {"beit3.text_embed.weight", "beit3.vision_embed.mask_token"}
    assert used == {name for name in gradients if ".B." not in name and name not in text}


def test_what_we_write_is_what_timm_read(pair: dict[str, Any]) -> None:
    ours = pair["ours"]
    written = to_official(ours.model_config, ours.state_dict())
    assert written.keys() == pair["state"].keys()
    back = translate(written, pair["theirs"])
    assert back.keys() == pair["converted"].keys() == pair["theirs"].state_dict().keys()
    for name, value in pair["converted"].items():
        assert torch.equal(back[name], value), name


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in module.named_parameters()
    }
