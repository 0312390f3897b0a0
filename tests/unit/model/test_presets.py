"""Names, sizes and parameter counts of the catalogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import beit3
from beit3.errors import ConfigError
from beit3.model.build import build_model
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


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_layers", 1.5, "model.num_layers must be a whole number, not 1.5"),
        ("num_layers", True, "model.num_layers must be a whole number, not True"),
        ("width", "64", "model.width must be a whole number, not '64'"),
        ("width", 10**30, "model.width must be a whole number"),
        ("image_size", "x", "model.image_size must be 2 values, each a whole number, not 'x'"),
        ("image_size", [], r"model.image_size must be 2 values, .* not \(\)"),
        ("image_size", [16], r"not \(16,\)"),
        ("image_size", (16.0, 16), r"not \(16.0, 16\)"),
        ("image_size", None, "not None"),
        ("norm_eps", "x", "model.norm_eps must be a finite number, not 'x'"),
        ("norm_eps", float("nan"), "model.norm_eps must be a finite number, not nan"),
        ("norm_eps", -1e-5, "model.norm_eps must be above 0"),
        ("drop_path", False, "model.drop_path must be a finite number, not False"),
        ("final_norm", 1, "model.final_norm must be true or false, not 1"),
        ("attention", "both", "model.attention must be 'shared' or 'decoupled', not 'both'"),
        ("attention", ["shared"], "model.attention must be 'shared' or 'decoupled'"),
    ],
)
def test_fields_of_another_type_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        model_config("beit3_tiny_patch16_224", **{field: value})
    assert len(str(caught.value)) < 200


def test_a_list_from_json_becomes_the_pair_that_it_stands_for() -> None:
    made = model_config("beit3_tiny_patch16_224", image_size=[16, 32], drop_path=0)
    assert made.image_size == (16, 32)
    assert hash(made) == hash(model_config("beit3_tiny_patch16_224", image_size=(16, 32)))


@pytest.mark.parametrize("value", ["x", 1.5, -1, 0, True, None, 2**40, [3]])
def test_options_of_heads_are_whole_numbers(value: Any) -> None:
    with pytest.raises(ConfigError, match="num_answers must be a whole number of at least 1, not "):
        build_model(model_config("beit3_tiny_patch16_224"), "vqa", num_answers=value)
    with pytest.raises(ConfigError, match="a vqa model has no option config"):
        build_model(model_config("beit3_tiny_patch16_224"), "vqa", **{"config": 3})
