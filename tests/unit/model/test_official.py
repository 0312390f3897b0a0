"""The official layout: nothing lost, nothing ignored, every refusal explained."""

from __future__ import annotations

import argparse
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from beit3.config import replace
from beit3.errors import ConfigError, DataMissingError
from beit3.model.heads import build_model
from beit3.model.official import read_official, to_official, to_ours
from beit3.model.presets import ModelConfig, model_config
from beit3.model.transformer import MultiwayTransformer

Make = Callable[..., MultiwayTransformer]
State = dict[str, Tensor]


@pytest.fixture
def decoupled(tiny: ModelConfig) -> ModelConfig:
    """Sizes that a file tells by itself: square grid, head width 64."""
    return replace(tiny, attention="decoupled", fusion_layers=0, width=128, num_heads=2, image_size=(12, 12))


@pytest.fixture
def official(decoupled: ModelConfig, make: Make) -> State:
    return to_official(decoupled, make(decoupled).state_dict())


OPTIONS = {"pretraining": {"codebook_size": 24}, "classification": {"num_classes": 7}, "vqa": {"num_answers": 9}}


@pytest.mark.parametrize("task", [None, "pretraining", "retrieval", "classification", "vqa", "nlvr2"])
def test_ours_to_official_and_back_is_bit_equal(decoupled: ModelConfig, task: str | None) -> None:
    options = OPTIONS.get(task or "", {})
    state = build_model(decoupled, task, **options).state_dict()
    back = to_ours(to_official(decoupled, state))
    assert (back.config, back.task, back.head_options) == (decoupled, task, options)
    assert back.state.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back.state[name], tensor), name
    build_model(back.config, back.task, **back.head_options).load_state_dict(back.state)


@pytest.mark.parametrize(("name", "tensors"), [("beit3_base_patch16_224", 491), ("beit3_large_patch16_224", 971)])
def test_the_released_sizes_have_the_released_tensors(name: str, tensors: int) -> None:
    config = model_config(name, attention="decoupled")
    with torch.device("meta"):
        official = to_official(config, MultiwayTransformer(config).state_dict())
    assert len(official) == tensors
    assert to_ours(official).config == config
    shapes = {key: tuple(value.shape) for key, value in official.items()}
    width, hidden = config.width, config.ffn_width
    assert shapes["beit3.text_embed.weight"] == (64010, width)
    assert shapes["beit3.vision_embed.cls_token"] == (1, 1, width)
    assert shapes["beit3.vision_embed.proj.weight"] == (width, 3, 16, 16)
    assert shapes["beit3.encoder.embed_positions.A.weight"] == (199, width)
    assert shapes["beit3.encoder.embed_positions.B.weight"] == (1024, width)
    assert shapes["beit3.encoder.layers.3.self_attn.q_proj.B.weight"] == (width, width)
    assert shapes["beit3.encoder.layers.3.ffn.A.fc1.weight"] == (hidden, width)
    assert shapes["beit3.encoder.layers.3.ffn.A.ffn_layernorm.weight"] == (hidden,)
    assert shapes["beit3.encoder.layers.3.final_layer_norm.B.bias"] == (width,)


def test_a_model_without_final_norm_is_recognised(decoupled: ModelConfig, make: Make) -> None:
    config = replace(decoupled, final_norm=False)
    official = to_official(config, make(config).state_dict())
    assert not [key for key in official if key.startswith("beit3.encoder.layer_norm")]
    assert to_ours(official).config == config


@pytest.mark.parametrize("prefix", ["", "beit3.", "module.beit3.", "_orig_mod.beit3.", "_orig_mod.module.beit3."])
def test_prefixes_and_wrappers_are_removed(official: State, prefix: str) -> None:
    renamed = {prefix + key.removeprefix("beit3."): value for key, value in official.items()}
    expected = to_ours(official)
    for wrapped in (renamed, {"model": renamed, "epoch": 3}, {"module": renamed}, {"module": {"model": renamed}}):
        found = to_ours(wrapped)
        assert found.config == expected.config
        assert found.state.keys() == expected.state.keys()


def test_two_names_for_one_tensor_are_refused(official: State) -> None:
    key = next(iter(official))
    with pytest.raises(ConfigError, match="two tensors are named"):
        to_ours({**official, f"module.{key}": official[key]})


def test_a_shared_model_writes_its_attention_for_both_modalities(decoupled: ModelConfig, make: Make) -> None:
    shared = replace(decoupled, attention="shared")
    model = make(shared).eval()
    official = to_official(shared, model.state_dict())
    layer = "beit3.encoder.layers.1.self_attn.v_proj"
    assert torch.equal(official[f"{layer}.A.weight"], official[f"{layer}.B.weight"])
    converted = to_ours(official)
    other = MultiwayTransformer(converted.config).eval()
    other.load_state_dict(converted.state)
    images, ids = torch.randn(2, 3, 12, 12), torch.randint(0, 40, (2, 5))
    with torch.no_grad():
        expected, actual = model(images, ids), other(images, ids)
    assert torch.equal(actual.vision, expected.vision)
    assert torch.equal(actual.text, expected.text)


def test_fusion_experts_have_no_place_in_the_official_layout(decoupled: ModelConfig, make: Make) -> None:
    fused = replace(decoupled, attention="shared", fusion_layers=1)
    with pytest.raises(ConfigError, match=r"fusion experts .* has no official layout"):
        to_official(fused, make(fused).state_dict())


def test_all_wrong_keys_are_listed_in_one_line(official: State) -> None:
    broken = dict(official)
    del broken["beit3.encoder.layers.0.ffn.A.fc1.bias"]
    del broken["beit3.encoder.layer_norm.B.weight"]
    broken["beit3.encoder.relative_position.weight"] = torch.zeros(2)
    broken["beit3.vision_embed.cls_token"] = torch.zeros(1, 1, 5)
    with pytest.raises(ConfigError) as caught:
        to_ours(broken)
    message = str(caught.value)
    assert "\n" not in message
    assert "missing encoder.layers.0.ffn.A.fc1.bias, encoder.layer_norm.B.weight;" in message
    assert "unknown encoder.relative_position.weight;" in message
    assert "vision_embed.cls_token (1, 1, 5) instead of (1, 1, 128)" in message


def test_a_gap_between_layers_is_an_error(official: State) -> None:
    moved = {key.replace("layers.2.", "layers.7."): value for key, value in official.items()}
    with pytest.raises(ConfigError, match=r"missing encoder\.layers\.2\..*unknown encoder\.layers\.7\."):
        to_ours(moved)


def test_heads_without_a_model_are_named_and_can_be_left_out(official: State) -> None:
    classifier = {**official, "fc_norm.weight": torch.ones(128), "head.weight": torch.zeros(7, 128)}
    with pytest.raises(ConfigError, match=r"unknown keys besides the backbone: fc_norm\.weight, head\.weight"):
        to_ours(classifier)
    converted = to_ours(classifier, heads=False)
    assert converted.task is None
    assert converted.state.keys() == to_ours(official).state.keys()


def test_another_models_file_is_named_as_such() -> None:
    with pytest.raises(ConfigError, match=r"not an official BEiT-3 file: it has no 'text_embed\.weight'"):
        to_ours({"cls_token": torch.zeros(1, 1, 8)})
    with pytest.raises(ConfigError, match="no tensors under epoch"):
        to_ours({"epoch": 3})


def test_a_grid_that_is_no_square_needs_its_size(decoupled: ModelConfig, make: Make) -> None:
    wide = replace(decoupled, image_size=(12, 20))
    official = to_official(wide, make(wide).state_dict())
    with pytest.raises(ConfigError, match="give image_size"):
        to_ours(official)
    assert to_ours(official, image_size=(12, 20)).config == wide


def test_a_width_of_no_whole_heads_needs_their_number(tiny: ModelConfig, make: Make) -> None:
    config = replace(tiny, attention="decoupled", fusion_layers=0, image_size=(12, 12))
    official = to_official(config, make(config).state_dict())
    with pytest.raises(ConfigError, match="the width 32 does not divide by a head width of 64: give num_heads"):
        to_ours(official)
    assert to_ours(official, num_heads=4).config == config


@pytest.mark.parametrize("name", ["weights.pth", "weights.zip"])
@pytest.mark.parametrize("modern", [True, False])
def test_a_file_with_training_options_is_read(tmp_path: Path, official: State, name: str, modern: bool) -> None:
    path = tmp_path / name
    content = {"model": official, "args": argparse.Namespace(lr=1e-3, model="beit3"), "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=modern)
    read = read_official(path)
    assert read.keys() == official.keys()
    assert all(torch.equal(read[key], official[key]) for key in official)


class Trap:
    """What a hostile file does: call a function of its choice when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("trapped",)


def test_a_file_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.zeros(1)}, "trap": Trap()}, "bad.pth")
    with pytest.raises(ConfigError, match="no checkpoint of tensors alone") as caught:
        read_official("bad.pth")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "trapped").exists()


def test_an_unpacked_file_is_explained(tmp_path: Path, official: State) -> None:
    torch.save(official, tmp_path / "weights.pth")
    with zipfile.ZipFile(tmp_path / "weights.pth") as archive:
        archive.extractall(tmp_path / "unpacked")
    for folder in (tmp_path / "unpacked", next((tmp_path / "unpacked").iterdir())):
        with pytest.raises(ConfigError, match=r"has unpacked: download the \.pth file again"):
            read_official(folder)
    with pytest.raises(ConfigError, match="a folder without an unpacked checkpoint"):
        read_official(tmp_path)


def test_missing_and_damaged_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match=r"none\.pth does not exist"):
        read_official(tmp_path / "none.pth")
    for name, content in (("page.pth", b"<html>not found</html>"), ("empty.pth", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match="is no checkpoint") as caught:
            read_official(tmp_path / name)
        assert "\n" not in str(caught.value)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match="holds a list, not named weights"):
        read_official(tmp_path / "list.pth")


def test_a_file_cut_short_is_refused(tmp_path: Path, official: State) -> None:
    torch.save(official, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:20000])
    with pytest.raises(ConfigError, match="is no checkpoint"):
        read_official(tmp_path / "cut.pth")
