"""Image features: timm's interface, timm's values, and every place of a map where its patch is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from beit3.config import replace
from beit3.errors import ConfigError
from beit3.model.features import FeatureBackbone, feature_maps
from beit3.model.heads import RetrievalModel
from beit3.model.official import to_official
from beit3.model.packing import PackedBatch
from beit3.model.presets import ModelConfig
from beit3.model.store import load_model
from beit3.model.transformer import MultiwayTransformer

Make = Callable[..., MultiwayTransformer]
Close = Callable[..., None]


def timm_beit3(config: ModelConfig, **options: Any) -> Any:
    """timm's BEiT-3 of the same shape."""
    return timm.create_model(
        "beit3_base_patch16_224",
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.num_layers,
        num_heads=config.num_heads,
        mlp_ratio=config.ffn_width / config.width,
        num_classes=0,
        **options,
    )


@pytest.fixture
def decoupled(tiny: ModelConfig) -> ModelConfig:
    return replace(tiny, attention="decoupled", fusion_layers=0)


@pytest.mark.parametrize("out_indices", [2, 3, (0, 2), [-2, -1], (1,)])
@torch.no_grad()
def test_the_interface_is_that_of_timms_feature_models(
    out_indices: int | Sequence[int], decoupled: ModelConfig, make: Make
) -> None:
    ours = FeatureBackbone(make(decoupled).eval(), out_indices)
    theirs = timm_beit3(decoupled, features_only=True, out_indices=out_indices).eval()
    images = torch.randn(2, 3, 12, 8)
    assert [tuple(found.shape) for found in ours(images)] == [tuple(found.shape) for found in theirs(images)]
    assert list(ours.out_indices) == list(theirs.out_indices)
    mine, other = ours.feature_info, theirs.feature_info
    assert mine.channels() == other.channels()
    assert mine.reduction() == other.reduction()
    assert mine.module_name() == other.module_name()
    assert mine.get_dicts(keys=["num_chs", "reduction"]) == other.get_dicts(keys=["num_chs", "reduction"])


@torch.no_grad()
def test_maps_equal_those_of_timms_beit3_with_the_same_weights(
    decoupled: ModelConfig, make: Make, close: Close
) -> None:
    model = make(decoupled).eval()
    theirs = timm_beit3(decoupled).eval()
    official = {key: value.clone() for key, value in to_official(decoupled, model.state_dict()).items()}
    weights = checkpoint_filter_fn(official, theirs)
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    # timm's has no final norm but one after pooling: neither touches a map.
    assert {name.split(".")[0] for name in missing} == {"fc_norm"}
    assert {name.split(".")[0] for name in unexpected} == {"layer_norm"}
    images = torch.randn(2, 3, 12, 8)
    expected = theirs.forward_intermediates(images, indices=[0, 1, 2], intermediates_only=True)
    for found, wanted in zip(FeatureBackbone(model, (0, 1, 2))(images), expected, strict=True):
        close(found, wanted)


@torch.no_grad()
def test_a_map_holds_the_state_of_each_patch_at_its_place(config: ModelConfig, make: Make) -> None:
    model = make(config).eval()
    images = torch.randn(2, 3, 12, 8)
    inner = model.forward_packed(PackedBatch(images=images), layers=(1, 3)).inner
    maps = FeatureBackbone(model, (2, 0))(images)
    for found, layer in zip(maps, (3, 1), strict=True):
        assert found.shape == (2, 32, 3, 2)
        # Image 1, patch row 2, column 1: after the 7 rows of image 0, the class token, and 2 * 2 + 1 patches.
        assert torch.equal(found[1, :, 2, 1], inner[layer][0][7 + 1 + 5])
        assert torch.equal(found[0, :, 1, 0], inner[layer][0][1 + 2])


@torch.no_grad()
def test_without_attention_a_patch_moves_its_own_place_alone_at_any_size(tiny: ModelConfig, make: Make) -> None:
    model = make(tiny).eval()
    for name, parameter in model.named_parameters():
        if ".attention_out." in name:
            parameter.zero_()
    backbone = FeatureBackbone(model, 2)
    images = torch.randn(1, 3, 16, 24)  # made for 12 x 8
    changed = images.clone()
    changed[:, :, 4:8, 16:20] += 1  # patch row 1, column 4
    for before, after in zip(backbone(images), backbone(changed), strict=True):
        assert before.shape == (1, 32, 4, 6)
        moved = (after - before).abs().amax((0, 1))
        assert moved[1, 4] > 0.01
        moved[1, 4] = 0
        assert moved.max() < 1e-6


@torch.no_grad()
def test_with_attention_a_patch_moves_its_own_place_most(config: ModelConfig, make: Make) -> None:
    backbone = FeatureBackbone(make(config).eval(), (0,))
    images = torch.randn(1, 3, 20, 16)
    for row, column in ((0, 0), (3, 1), (4, 3)):
        changed = images.clone()
        changed[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
        moved = (backbone(changed)[0] - backbone(images)[0]).square().sum((0, 1))
        assert divmod(int(moved.argmax()), 4) == (row, column)
        assert moved.sum() > moved.max()


def test_it_holds_the_image_tower_alone_and_shares_it(config: ModelConfig, make: Make) -> None:
    model = make(config).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backbone = FeatureBackbone(model, (0, 1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = {names[id(parameter)] for parameter in backbone.parameters()}
    assert not [name for name in held if "text" in name or "fusion" in name or name.startswith(("norm.", "blocks.2."))]
    sum(found.square().sum() for found in backbone(torch.randn(2, 3, 12, 8))).backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == held - {"vision_embedding.mask_token"}
    assert model.state_dict().keys() == before.keys()
    out = model(torch.randn(2, 3, 12, 8), torch.randint(0, 40, (2, 4)))
    assert out.text is not None, "the model still reads texts"


@torch.no_grad()
def test_task_models_and_the_plain_function_give_the_same_maps(tiny: ModelConfig) -> None:
    model = RetrievalModel(tiny).eval()
    images = torch.randn(2, 3, 12, 8)
    expected = FeatureBackbone(model.backbone, 3)(images)
    for other in (FeatureBackbone(model)(images), feature_maps(model.backbone, images, (0, 1, 2))):
        for found, wanted in zip(other, expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("out_indices", "message"),
    [
        ((0, 3), r"out_indices holds 3, but the layers of this model are 0\.\.2"),
        (4, r"out_indices holds -4, but"),
        ((), "out_indices is empty"),
        (0, "out_indices is empty"),
    ],
)
def test_layers_that_are_not_there_are_refused(
    out_indices: int | Sequence[int], message: str, tiny: ModelConfig, make: Make
) -> None:
    with pytest.raises(ConfigError, match=message):
        FeatureBackbone(make(tiny), out_indices)


@torch.no_grad()
def test_the_vision_part_is_enough_and_the_text_part_is_not(
    config: ModelConfig, make: Make, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, folder = make(config).eval(), tmp_path_factory.mktemp("model") / "saved"
    model.save_pretrained(folder)
    images: Tensor = torch.randn(1, 3, 12, 8)
    found = FeatureBackbone(load_model(folder, parts="vision"), 1)(images)
    assert torch.equal(found[0], FeatureBackbone(model, 1)(images)[0])
    with pytest.raises(ConfigError, match="needs the vision tower, which this model was loaded without"):
        FeatureBackbone(load_model(folder, parts="text"))


@torch.no_grad()
def test_the_tower_is_saved_and_loaded_as_a_vision_part(config: ModelConfig, make: Make, tmp_path: Path) -> None:
    backbone = FeatureBackbone(make(config).eval(), (0, 1))
    backbone.model.save_pretrained(tmp_path / "tower")
    loaded = load_model(tmp_path / "tower")
    assert loaded.part == "vision"
    images = torch.randn(2, 3, 12, 8)
    for found, wanted in zip(FeatureBackbone(loaded, (0, 1))(images), backbone(images), strict=True):
        assert torch.equal(found, wanted)
    with pytest.raises(ConfigError, match="loaded without its text tower"):
        backbone.model(text_ids=torch.zeros(1, 2, dtype=torch.long))


def test_no_images_give_empty_maps(config: ModelConfig, make: Make) -> None:
    maps = FeatureBackbone(make(config), (0, 2))(torch.empty(0, 3, 12, 8))
    assert [tuple(found.shape) for found in maps] == [(0, 32, 3, 2)] * 2
