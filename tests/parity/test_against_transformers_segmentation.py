"""Our segmentation heads against the whole models of transformers, given the same maps and the same weights.

Those models bring a backbone of their own; a stub that hands out our pyramid's maps takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    ResNetConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from beit3.config import replace
from beit3.model.presets import ModelConfig
from beit3.model.segmentation import SegmentationModel

CHANNELS, WIDTH, CLASSES, QUERIES = 8, 32, 5, 7
CONFIG = ModelConfig(
    width=16,
    num_layers=4,
    num_heads=2,
    ffn_width=32,
    patch_size=8,
    image_size=(32, 32),
    vocab_size=8,
    max_text_positions=4,
)
MASK2FORMER_NAMES = {
    "pixel_decoder": "model.pixel_level_module.decoder",
    "transformer_module": "model.transformer_module",
    "class_predictor": "class_predictor",
}


class Stub(nn.Module):
    """Stands where a backbone does; returns the maps it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: Sequence[Tensor] = ()

    def forward(self, pixels: Tensor, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(feature_maps=self.maps, hidden_states=None, attentions=None)

    forward_with_filtered_kwargs = forward


def small_backbone() -> ResNetConfig:
    """A configuration with the channels of our pyramid at each level."""
    settings: dict[str, Any] = {"embedding_size": 4, "hidden_sizes": [CHANNELS] * 4, "depths": [1] * 4}
    settings |= {"layer_type": "basic", "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    return ResNetConfig(**settings)


def own_model(head: Any, config: ModelConfig = CONFIG) -> SegmentationModel:
    model = SegmentationModel(config, CLASSES, head, CHANNELS, WIDTH, QUERIES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))
    return model


def upernet() -> Any:
    settings: dict[str, Any] = {"num_labels": CLASSES, "auxiliary_channels": WIDTH // 2, "hidden_size": WIDTH}
    theirs = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=small_backbone(), **settings))
    theirs.backbone = Stub()
    return theirs


def mask2former() -> Any:
    settings: dict[str, Any] = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), WIDTH)
    settings |= {"num_labels": CLASSES, "num_queries": QUERIES, "num_attention_heads": 1}
    settings |= {"encoder_feedforward_dim": 4 * WIDTH, "dim_feedforward": 8 * WIDTH}
    theirs = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=small_backbone(), **settings))
    theirs.model.pixel_level_module.encoder = Stub()
    return theirs


def copy_weights(ours: SegmentationModel, theirs: Any, names: dict[str, str]) -> None:
    """Every weight of our head has its place in their model, and nothing but the criterion's constant is left."""
    state = {}
    for name, value in ours.head.state_dict().items():
        part = name.split(".")[0]
        state[f"{names[part]}{name.removeprefix(part)}"] = value
    left = theirs.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert set(left.missing_keys) <= {"criterion.empty_weight"}


def targets(size: tuple[int, int]) -> Tensor:
    """Labels (2, H, W) in 4 x 6 areas, some ignored."""
    areas = torch.randint(0, CLASSES, (2, 1, 4, 6)).float()
    labels = nn.functional.interpolate(areas, size, mode="nearest")[:, 0].long()
    labels[0, :5] = 255
    return labels


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_upernet_logits_and_loss(training: bool) -> None:
    ours, theirs = own_model("upernet"), upernet()
    copy_weights(ours, theirs, {"decode_head": "decode_head", "auxiliary_head": "auxiliary_head"})
    images, labels = torch.randn(2, 3, 32, 48), targets((32, 48))
    ours.train(training)
    theirs.train(training)
    theirs.backbone.maps = ours.maps(images)
    if not training:
        torch.testing.assert_close(ours(images), theirs(images).logits)
    torch.testing.assert_close(ours.loss(images, labels)["loss"], theirs(images, labels=labels).loss)


@pytest.mark.parametrize("patch", [8, 14])
def test_mask2former_loss_and_gradients(patch: int) -> None:
    """Points are drawn from torch's generator: the same seed draws the same ones."""
    size = (4 * patch, 6 * patch)
    ours, theirs = own_model("mask2former", replace(CONFIG, patch_size=patch, image_size=size)), mask2former()
    copy_weights(ours, theirs, MASK2FORMER_NAMES)
    images, labels = torch.randn(2, 3, *size), targets(size)
    theirs.model.pixel_level_module.encoder.maps = ours.maps(images)
    classes = [torch.tensor(sorted(set(image.unique().tolist()) - {255})) for image in labels]
    masks = [
        torch.stack([image == label for label in kinds]).float() for image, kinds in zip(labels, classes, strict=True)
    ]
    torch.manual_seed(3)
    expected = theirs(images, mask_labels=masks, class_labels=classes).loss
    torch.manual_seed(3)
    found = ours.loss(images, labels)["loss"]
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    weight, other = ours.head.get_parameter("class_predictor.weight"), theirs.class_predictor.weight
    torch.testing.assert_close(weight.grad, other.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_mask2former_names_the_classes_that_transformers_names() -> None:
    """Its post-processing resizes masks to 384 pixels: images of that size compare."""
    ours, theirs = own_model("mask2former", replace(CONFIG, patch_size=32, image_size=(384, 384))).eval(), mask2former()
    for name, parameter in ours.head.named_parameters():  # queries as different as trained ones
        if "decoder.layers" in name and "transformer" in name and parameter.dim() > 1:
            parameter.mul_(0.1)
        elif name in ("class_predictor.weight", "pixel_decoder.mask_projection.weight"):
            parameter.mul_(20)
    copy_weights(ours, theirs, MASK2FORMER_NAMES)
    images = torch.randn(1, 3, 384, 384)
    theirs.eval().model.pixel_level_module.encoder.maps = ours.maps(images)
    processor: Any = Mask2FormerImageProcessor()
    outputs = theirs(images)
    scores = ours(images)
    for size in ((384, 384), (100, 250)):
        found = processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0]
        resized = nn.functional.interpolate(scores, size, mode="bilinear", align_corners=False)
        assert torch.equal(resized.argmax(1)[0], found)
    assert len(scores.argmax(1).unique()) > 2
