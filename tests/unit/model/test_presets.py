"""Names, sizes and parameter counts of the catalogue."""

from __future__ import annotations

import pytest
import torch

import beit3
from beit3.errors import ConfigError
from beit3.model.heads import build_model
from beit3.model.presets import ModelConfig, list_models, model_config, native_head_width

# Counts published with the released files ("222M", "276M", "674M", "746M"), exact by arithmetic from their shapes.
COUNTS = [
    ("beit3_base_patch16_224", None, 220_987_392),
    ("beit3_large_patch16_224", None, 672_702_464),
    ("beit3_base_patch16_224", "pretraining", 276_510_730),
    ("beit3_large_patch16_224", "pretraining", 746_709_514),
    ("beit3_base_patch16_224", "retrieval", 222_167_041),
    ("beit3_large_patch16_224", "retrieval", 674_799_617),
    ("beit3_base_patch16_384", "retrieval", 222_458_881),
    ("beit3_large_patch16_384", "retrieval", 675_188_737),
]


@pytest.mark.parametrize(("name", "task", "count"), COUNTS)
def test_decoupled_models_have_the_released_number_of_parameters(name: str, task: str | None, count: int) -> None:
    with torch.device("meta"):
        model = build_model(model_config(name, attention="decoupled"), task)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_shared_giant_has_the_papers_number_of_parameters() -> None:
    with torch.device("meta"):
        model = build_model(model_config("beit3_giant_patch14_224"))
    counts = {"attention": 0, "vision": 0, "text": 0, "fusion": 0}
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and parameter.ndim == 2:
            part = name.split(".")
            counts["attention" if part[2].startswith("attention") else part[3]] += parameter.numel()
    # Table 2 of the paper: V-FFN 692M, L-FFN 692M, VL-FFN 52M, shared attention 317M.
    assert {name: round(count / 1e6) for name, count in counts.items()} == {
        "attention": 317,
        "vision": 692,
        "text": 692,
        "fusion": 52,
    }


def test_every_name_of_the_catalogue_builds() -> None:
    for name in list_models():
        config = model_config(name)
        assert native_head_width(config.width) == config.width // config.num_heads
        assert config.num_patches == (config.image_size[0] // config.patch_size) ** 2


def test_list_models_filters_by_pattern() -> None:
    assert "beit3_base_patch16_224" in list_models("beit3_base_*")
    assert all(name.startswith("beit3_large_") for name in list_models("beit3_large_*"))
    assert list_models("vit_*") == []


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'beit3_bsae_patch16_224'; did you mean 'beit3_base_patch16"):
        beit3.create_model("beit3_bsae_patch16_224")


def test_an_unknown_task_or_field_is_answered_with_the_nearest() -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match="did you mean 'pretraining'"):
        beit3.create_model("beit3_tiny_patch16_224", task="pretrain")
    with pytest.raises(ConfigError, match="did you mean 'num_layers'"):
        beit3.create_model("beit3_tiny_patch16_224", num_layer=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "must divide by model.num_heads"),
        ({"image_size": (224, 225)}, "must divide by model.patch_size"),
        ({"fusion_layers": 13}, "must lie in 0..12"),
        ({"attention": "decoupled", "fusion_layers": 1}, "needs attention='shared'"),
        ({"drop_path": 1.0}, "must lie in 0..1"),
        ({"num_layers": 0}, "must be at least 1"),
        ({"max_text_positions": 2}, "must exceed 2"),
    ],
)
def test_contradictions_fail_when_the_configuration_is_built(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_config("beit3_base_patch16_224", **changes)


def test_the_text_table_holds_1022_tokens() -> None:
    assert model_config("beit3_base_patch16_224").max_text_length == 1022
    assert isinstance(beit3.ModelConfig, type)
    assert beit3.ModelConfig is ModelConfig
