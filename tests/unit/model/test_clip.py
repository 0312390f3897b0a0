"""The clip model: two towers, what stands for an image and a text, and how it is saved, cut and started from."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import beit3
from beit3.config import replace
from beit3.errors import ConfigError
from beit3.export import export_program
from beit3.model.build import build_model
from beit3.model.exchange import read_tensors
from beit3.model.heads import ClipModel, Pooling, RetrievalModel
from beit3.model.official import to_official
from beit3.model.packing import PackedBatch, pack_texts
from beit3.model.presets import ModelConfig
from beit3.model.store import fill_model
from beit3.model.transformer import MultiwayTransformer

OPTIONS: dict[str, Any] = {"text_width": 12, "text_layers": 2, "text_heads": 3, "embed_width": 10}


def shaken(model: Any) -> Any:
    """The same model, random in every tensor."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def clip(config: ModelConfig, **changes: Any) -> Any:
    return shaken(build_model(config, "clip", **{**OPTIONS, **changes}))


def pictures(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 12, 8)


def texts() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 40, (4, 6)), torch.arange(6) < torch.tensor([2, 6, 3, 4])[:, None]


def names(part: nn.Module) -> set[str]:
    return set(part.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_vectors_come_from_the_towers_by_the_plain_formula(config: ModelConfig, pooling: Pooling) -> None:
    model = clip(config, pooling=pooling)
    images, (ids, mask) = pictures(), texts()
    states = model.backbone(images).vision
    seen = states[:, 0] if pooling == "class" else states[:, 1:].mean(1)
    expected = seen @ model.vision_head.weight.T
    torch.testing.assert_close(model.encode_image(images), expected / expected.norm(dim=1, keepdim=True))
    expected = model.text_backbone(text_ids=ids, text_mask=mask).text[:, 0] @ model.language_head.weight.T
    torch.testing.assert_close(model.encode_text(ids, mask), expected / expected.norm(dim=1, keepdim=True))
    assert expected.shape == (4, 10)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_a_packed_batch_gives_the_same_vectors(config: ModelConfig, pooling: Pooling) -> None:
    model = clip(config, pooling=pooling)
    images, (ids, mask) = pictures(), texts()
    packed_ids, positions, lengths, order = pack_texts(ids, mask)
    batch = PackedBatch(images=images, text_ids=packed_ids, text_positions=positions, text_lengths=lengths)
    seen, read = model(batch)
    torch.testing.assert_close(seen, model.encode_image(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(read, model.encode_text(ids, mask)[order], atol=1e-5, rtol=0)


@torch.no_grad()
def test_every_word_of_a_text_counts(config: ModelConfig) -> None:
    """The first token sees those behind it: there is no causal mask."""
    model, ids = clip(config), torch.randint(0, 40, (1, 6))
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 40
    assert (model.encode_text(ids) - model.encode_text(changed)).abs().max() > 1e-3


def test_each_tower_holds_its_own_modality_alone(config: ModelConfig) -> None:
    model = clip(config)
    assert not [name for name in names(model.backbone) if "text" in name or "fusion" in name]
    assert not [name for name in names(model.text_backbone) if "vision" in name or "fusion" in name]
    text = model.text_backbone.config
    assert (text.width, text.num_layers, text.num_heads, text.ffn_width) == (12, 2, 3, 48)
    assert (text.vocab_size, text.max_text_positions) == (config.vocab_size, config.max_text_positions)
    assert model.text_backbone.text_embedding.words.weight.shape == (40, 12)
    with pytest.raises(ConfigError, match="without its text tower"):
        model.backbone(text_ids=torch.zeros(1, 2, dtype=torch.long))


def test_it_has_no_official_layout(config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match=r"fusion experts|weights do not fit"):
        to_official(config, clip(config).state_dict())


def test_a_text_tower_has_a_final_norm_whatever_the_image_tower(config: ModelConfig) -> None:
    model = clip(replace(config, final_norm=False))
    assert not model.backbone.norm
    assert list(model.text_backbone.norm) == ["text"]


@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_it_is_saved_and_loaded_with_its_options(
    config: ModelConfig, pooling: Pooling, loss: str, tmp_path: Path
) -> None:
    model = clip(config, pooling=pooling, loss=loss)
    assert (model.logit_bias is None) == (loss == "clip")
    model.save_pretrained(tmp_path / "model")
    loaded = beit3.load_model(tmp_path / "model")
    assert isinstance(loaded, ClipModel)
    assert loaded.head_options == model.head_options
    assert names(loaded) == names(model)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@torch.no_grad()
def test_one_tower_is_enough_for_its_own_vectors(config: ModelConfig, tmp_path: Path) -> None:
    model = clip(config)
    model.save_pretrained(tmp_path / "whole")
    images, (ids, mask) = pictures(), texts()
    for part, other in (("vision", "text"), ("text", "vision")):
        loaded: Any = beit3.load_model(tmp_path / "whole", parts=part)  # type: ignore[arg-type]
        loaded.save_pretrained(tmp_path / part)
        for half in (loaded, beit3.load_model(tmp_path / part)):
            gone = "backbone." if part == "text" else "text_backbone."
            assert not [name for name in names(half) if name.startswith(gone)]
            assert half.part == part
            assert half.head_options == model.head_options
            assert half.model_config == config
            calls = {"vision": lambda half=half: half.encode_image(images)}
            calls["text"] = lambda half=half: half.encode_text(ids, mask)
            assert torch.equal(
                calls[part](), model.encode_image(images) if part == "vision" else model.encode_text(ids, mask)
            )
            with pytest.raises(ConfigError, match=f"without its {other} tower"):
                calls[other]()
        with pytest.raises(ConfigError, match=f"this model is a {part} tower alone"):
            beit3.load_model(tmp_path / part, parts=other)  # type: ignore[arg-type]


def test_a_retrieval_folder_from_before_siglip_is_loaded(config: ModelConfig, tmp_path: Path) -> None:
    """What is written today without SigLIP is, name by name, what was written before there was a bias."""
    model = shaken(RetrievalModel(config))
    model.save_pretrained(tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    assert settings["heads"] == {}
    heads = {"vision_head.weight", "language_head.weight", "logit_scale"}
    assert read_tensors(tmp_path / "model").keys() == heads | {f"backbone.{name}" for name in names(model.backbone)}
    loaded = beit3.load_model(tmp_path / "model")
    assert isinstance(loaded, RetrievalModel)
    assert loaded.logit_bias is None
    assert torch.equal(loaded.logit_scale, model.logit_scale)


def test_a_siglip_dual_encoder_keeps_its_bias(config: ModelConfig, tmp_path: Path) -> None:
    model = shaken(RetrievalModel(config, loss="siglip"))
    model.save_pretrained(tmp_path / "model")
    loaded = beit3.load_model(tmp_path / "model")
    assert isinstance(loaded, RetrievalModel)
    assert loaded.logit_bias is not None
    assert model.logit_bias is not None
    assert torch.equal(loaded.logit_bias, model.logit_bias)
    again = RetrievalModel(config, loss="siglip")
    fill_model(again, tmp_path / "model")
    assert torch.equal(again.state_dict()["logit_bias"], model.logit_bias)


@torch.no_grad()
def test_its_image_tower_is_loaded_as_a_backbone(config: ModelConfig, tmp_path: Path) -> None:
    model = clip(config)
    model.save_pretrained(tmp_path / "clip")
    backbone = beit3.load_model(tmp_path / "clip", task="backbone")
    assert isinstance(backbone, MultiwayTransformer)
    assert backbone.part == "vision"
    images = pictures()
    assert torch.equal(backbone(images).vision, model.backbone(images).vision)
    named: Any = beit3.load_model(tmp_path / "clip", task="classification", strict=False)
    assert named.part == "vision"
    kept = {name for name in names(model.backbone) if config.attention == "shared" or not name.startswith("norm.")}
    assert names(named.backbone) == kept, "as of every decoupled model, the final norm goes"
    with pytest.raises(ConfigError, match="holds a clip model, not a classification model"):
        beit3.load_model(tmp_path / "clip", task="classification")
    with pytest.raises(ConfigError, match="a vqa model needs both towers"):
        beit3.load_model(tmp_path / "clip", task="vqa", strict=False)
    beit3.load_model(tmp_path / "clip", parts="text").save_pretrained(tmp_path / "text")
    with pytest.raises(ConfigError, match="no backbone in it"):
        beit3.load_model(tmp_path / "text", task="backbone")


def test_it_starts_from_a_pretrained_backbone(config: ModelConfig, make: Any, tmp_path: Path) -> None:
    """Words and text positions of the source do not matter to an image tower."""
    source = make(replace(config, vocab_size=77, max_text_positions=33))
    source.save_pretrained(tmp_path / "source")
    model = clip(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fill_model(model, tmp_path / "source")
    for name, value in model.state_dict().items():
        expected = source.state_dict()[name.removeprefix("backbone.")] if name.startswith("backbone.") else before[name]
        assert torch.equal(value, expected), name
    with pytest.raises(ConfigError, match="ffn_width differ"):
        fill_model(clip(replace(config, ffn_width=24)), tmp_path / "source")


def test_it_starts_from_another_clip_model(config: ModelConfig, tmp_path: Path) -> None:
    source = clip(config)
    source.save_pretrained(tmp_path / "source")
    same, other = clip(config), clip(config, text_layers=1)
    text_before = {name: value.clone() for name, value in other.text_backbone.state_dict().items()}
    fill_model(same, tmp_path / "source")
    fill_model(other, tmp_path / "source")
    for name, value in source.state_dict().items():
        assert torch.equal(same.state_dict()[name], value), name
    for name, value in source.backbone.state_dict().items():
        assert torch.equal(other.backbone.state_dict()[name], value), name
    for name, value in other.text_backbone.state_dict().items():
        assert torch.equal(text_before[name], value), name
    beit3.load_model(tmp_path / "source", parts="text").save_pretrained(tmp_path / "text")
    with pytest.raises(ConfigError, match="no backbone in it"):
        fill_model(other, tmp_path / "text")


def test_other_models_start_from_its_image_tower(config: ModelConfig, tmp_path: Path) -> None:
    """Their text experts stay as they are."""
    source = clip(config)
    source.save_pretrained(tmp_path / "source")
    model = shaken(build_model(replace(config, vocab_size=77), "vqa", num_answers=3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fill_model(model, tmp_path / "source")
    taken = 0
    for name, value in model.state_dict().items():
        inner = name.removeprefix("backbone.")
        is_taken = name != inner and inner in names(source.backbone)
        taken += is_taken
        assert torch.equal(value, source.backbone.state_dict()[inner] if is_taken else before[name]), name
    assert taken == len(names(source.backbone))


def test_positions_of_its_images_are_resized(config: ModelConfig, tmp_path: Path, caplog: Any) -> None:
    clip(config).save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.WARNING, "beit3"):
        larger = beit3.load_model(tmp_path / "model", image_size=(16, 16))
    assert "from 3 x 2 to 4 x 4 patches" in caplog.text
    assert larger.model_config.image_size == (16, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "max"}, "pooling must be class or mean, not 'max'"),
        ({"loss": 1}, "loss must be clip or siglip, not 1"),
        ({"text_width": "wide"}, "text_width must be a whole number of at least 1, not 'wide'"),
        ({"embed_width": 0}, "embed_width must be a whole number of at least 1, not 0"),
        ({"text_heads": 5}, r"width \(12\) must divide by model.num_heads \(5\)"),
        ({"num_classes": 5}, "a clip model has no option num_classes"),
    ],
)
def test_wrong_options_are_refused(config: ModelConfig, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        clip(config, **changes)


def test_layers_that_the_weights_do_not_have_are_refused(config: ModelConfig, tmp_path: Path) -> None:
    clip(config).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    settings = json.loads(path.read_text())
    settings["heads"]["text_layers"] = 10**9
    path.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="describes 1000000000 layers, the weights hold 2"):
        beit3.load_model(tmp_path / "model")


def test_a_catalogue_name_makes_one() -> None:
    model: Any = beit3.create_model("beit3_tiny_patch16_224", task="clip", vocab_size=50, pooling="mean", **OPTIONS)
    assert (model.task, model.pooling, model.vision_head.weight.shape) == ("clip", "mean", (10, 192))
    with torch.device("meta"):
        base: Any = beit3.create_model("beit3_base_patch16_224", task="clip")
    text = base.text_backbone.config
    assert (text.width, text.num_layers, text.num_heads) == (512, 12, 8)
    assert base.vision_head.weight.shape == (512, 768)


def test_an_exported_tower_holds_no_weight_of_the_other(config: ModelConfig) -> None:
    model = clip(replace(config, image_size=(12, 8)))
    places = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
    for tower, other in (("image", "text_backbone."), ("text", "backbone.")):
        program = export_program(model, tower)  # type: ignore[arg-type]
        held = {places[tensor.data_ptr()] for tensor in program.state_dict.values()}
        assert not [name for name in held if name.startswith(other)]


def test_its_card_tells_both_towers(tiny: ModelConfig, tmp_path: Path) -> None:
    model = clip(tiny)
    model.save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "3 layers of 32, patches of 4, 2 layers of 12 for texts, shared attention" in card
    assert "predictor.embed_images" in card
    beit3.load_model(tmp_path / "model", parts="text").save_pretrained(tmp_path / "text")
    assert "text tower alone): " in (card := (tmp_path / "text" / "README.md").read_text())
    assert "2 layers of 12 for texts, shared" in card
    assert "3 layers" not in card
