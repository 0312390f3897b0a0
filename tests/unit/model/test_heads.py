"""Task models: what stands for an image and a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import beit3
from beit3.config import replace
from beit3.errors import ConfigError
from beit3.model.build import build_model
from beit3.model.heads import RetrievalModel
from beit3.model.packing import PackedBatch, pack_texts
from beit3.model.presets import ModelConfig


def tiny() -> RetrievalModel:
    config = ModelConfig(
        width=32,
        num_layers=2,
        num_heads=2,
        ffn_width=64,
        patch_size=8,
        image_size=(16, 24),
        vocab_size=50,
        fusion_layers=1,
    )
    return RetrievalModel(config).eval()


def test_packed_and_padded_embeddings_are_equal_and_of_unit_length() -> None:
    model = tiny()
    images = torch.randn(3, 3, 16, 24)
    ids = torch.randint(0, 50, (4, 6))
    mask = torch.arange(6) < torch.tensor([2, 6, 3, 4])[:, None]
    packed_ids, positions, lengths, order = pack_texts(ids, mask)
    with torch.no_grad():
        batch = PackedBatch(images=images, text_ids=packed_ids, text_positions=positions, text_lengths=lengths)
        packed_images, packed_texts = model(batch)
        padded_images, padded_texts = model.encode_image(images), model.encode_text(ids, mask)
    torch.testing.assert_close(packed_images, padded_images, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed_texts, padded_texts[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(padded_texts.norm(dim=1), torch.ones(4))


def given(count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 50, (count, 6))
    mask = torch.arange(6) < torch.tensor([2, 6, 3])[:count, None]
    return torch.randn(count, 2, 3, 16, 24), ids, mask


def linear(state: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    centered = x - x.mean(-1, keepdim=True)
    scaled = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def random_heads(task: str, **options: int) -> Any:
    """A task model whose heads are random in every tensor, norms and biases too."""
    model = build_model(tiny().backbone.config, task, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone."):
                parameter.normal_(std=0.5)
    return model


@torch.no_grad()
def test_classes_come_from_the_mean_patch_against_the_plain_formula() -> None:
    model = random_heads("classification", num_classes=7)
    images, _, _ = given()
    state, vision = model.state_dict(), model.backbone(images[:, 0]).vision
    expected = linear(state, "head", norm(state, "fc_norm", vision[:, 1:].mean(1)))
    torch.testing.assert_close(model(images[:, 0]), expected, atol=1e-5, rtol=1e-5)
    assert expected.shape == (3, 7)


@torch.no_grad()
def test_answers_come_from_the_images_class_token_against_the_plain_formula() -> None:
    model = random_heads("vqa", num_answers=9)
    images, ids, mask = given()
    state, vision = model.state_dict(), model.backbone(images[:, 0], ids, mask).vision
    pooled = linear(state, "pooler.dense", norm(state, "pooler.norm", vision[:, 0])).tanh()
    hidden = F.gelu(norm(state, "head.1", linear(state, "head.0", pooled)))
    torch.testing.assert_close(model(images[:, 0], ids, mask), linear(state, "head.3", hidden), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_two_images_are_judged_against_the_plain_formula() -> None:
    model = random_heads("nlvr2")
    images, ids, mask = given()
    state, firsts = model.state_dict(), []
    for side in (0, 1):
        out = model.backbone(images[:, side], ids, mask)
        firsts += [out.vision[:, 0], out.text[:, 0]]
    hidden = linear(state, "head.dense1", norm(state, "head.norm1", torch.cat(firsts, dim=1)))
    expected = linear(state, "head.dense2", F.gelu(norm(state, "head.norm2", hidden)))
    torch.testing.assert_close(model(images, ids, mask), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(images.flip(1), ids, mask), expected, atol=1e-3), "left is not right"


@pytest.mark.parametrize(
    ("task", "options"), [("classification", {"num_classes": 7}), ("vqa", {"num_answers": 9}), ("nlvr2", {})]
)
def test_task_models_are_saved_and_loaded(task: str, options: dict[str, int], tmp_path: Path) -> None:
    model = random_heads(task, **options)
    model.save_pretrained(tmp_path / "model")
    loaded = beit3.load_model(tmp_path / "model")
    assert (loaded.task, type(loaded)) == (task, type(model))
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_an_option_of_another_task_is_refused() -> None:
    with pytest.raises(ConfigError, match="a vqa model has no option num_classes"):
        beit3.create_model("beit3_tiny_patch16_224", task="vqa", num_classes=3)


def test_a_saved_model_embeds_as_before(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    loaded = beit3.load_model(tmp_path / "model")
    assert isinstance(loaded, RetrievalModel)
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(images), model.encode_image(images))


def scattered(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def test_texts_that_begin_with_padding_are_refused_where_the_first_state_is_read() -> None:
    """It is zero at padding, so that all such texts had one embedding: zero."""
    model, judge = tiny(), random_heads("nlvr2")
    ids, images = torch.randint(0, 50, (2, 3)), torch.randn(2, 2, 3, 16, 24)
    for mask in (scattered([1, 1, 1], [0, 1, 1]), scattered([0, 0, 1], [1, 1, 0])):
        for call in (
            lambda mask=mask: model.encode_text(ids, mask),
            lambda mask=mask: judge(images, ids, mask),
        ):
            with pytest.raises(ValueError, match="begins with padding: pad texts on the right"):
                call()
    assert model.encode_text(ids, scattered([1, 0, 0], [1, 1, 0])).norm(dim=1).min() > 0.99
    assert model.encode_text(ids, scattered([0, 0, 0], [1, 1, 0])).norm(dim=1).tolist() == [0, pytest.approx(1)]
    assert not model.encode_text(ids[:, :0]).any(), "an empty text has no state"


@torch.no_grad()
@pytest.mark.parametrize("attention", ["shared", "decoupled"])
def test_no_images_and_no_texts_give_empty_outputs(attention: Any) -> None:
    options = {"classification": {"num_classes": 7}, "vqa": {"num_answers": 9}}
    changes = {"attention": attention, "fusion_layers": 0 if attention == "decoupled" else 1}

    def build(task: str | None) -> Any:
        return build_model(replace(tiny().backbone.config, **changes), task, **options.get(task or "", {})).eval()

    images, ids = torch.empty(0, 3, 16, 24), torch.empty(0, 6, dtype=torch.long)
    mask = torch.empty(0, 6, dtype=torch.bool)
    for given_mask in (None, mask):
        pair = build(None)(images, ids, given_mask)
        assert (pair.vision.shape, pair.text.shape) == ((0, 7, 32), (0, 6, 32))
        assert build(None)(text_ids=ids, text_mask=given_mask).text.shape == (0, 6, 32)
        assert build("retrieval").encode_text(ids, given_mask).shape == (0, 32)
        assert build("vqa")(images, ids, given_mask).shape == (0, 9)
        assert build("nlvr2")(images[:, None].expand(0, 2, 3, 16, 24), ids, given_mask).shape == (0, 2)
        assert build("captioning")(images, ids, given_mask).shape == (0, 6, 50)
    assert build(None)(images).vision.shape == (0, 7, 32)
    assert build(None)(images, image_mask=torch.empty(0, 6, dtype=torch.bool)).vision.shape == (0, 7, 32)
    assert build("retrieval").encode_image(images).shape == (0, 32)
    assert build("retrieval").encode_text(torch.empty(0, 0, dtype=torch.long)).shape == (0, 32)
    assert build("classification")(images).shape == (0, 7)
    captions = build("captioning").generate(images, max_length=9, mask_id=40)
    assert (captions.ids.shape, captions.ids.dtype) == ((0, 6), torch.int64)
    assert (captions.scores.shape, captions.scores.dtype) == ((0,), torch.float32)
    batch = PackedBatch(images=images, text_ids=ids.flatten(), text_positions=ids.flatten())
    assert [tuple(rows.shape) for rows in build("retrieval")(batch)] == [(0, 32), (0, 32)]
