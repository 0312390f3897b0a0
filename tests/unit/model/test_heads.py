"""Task models: what stands for an image and a text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import beit3
from beit3.model.heads import Pool, RetrievalModel
from beit3.model.packing import PackedBatch, pack_texts
from beit3.model.presets import ModelConfig


def tiny(pool: Pool) -> RetrievalModel:
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
    return RetrievalModel(config, pool).eval()


@pytest.mark.parametrize("pool", ["first", "mean"])
def test_packed_and_padded_embeddings_are_equal_and_of_unit_length(pool: Pool) -> None:
    model = tiny(pool)
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


def test_mean_pooling_averages_patches_without_the_class_token_and_real_words_alone() -> None:
    model = tiny("mean")
    images = torch.randn(2, 3, 16, 24)
    ids = torch.randint(0, 50, (1, 5))
    mask = torch.tensor([[True, True, True, False, False]])
    with torch.no_grad():
        vision = model.backbone(images).vision
        text = model.backbone(text_ids=ids[:, :3]).text
        expected_image = model.vision_head(sum(vision[:, 1 + place] for place in range(6)) / 6)
        expected_text = model.language_head((text[:, 0] + text[:, 1] + text[:, 2]) / 3)
        found_image, found_text = model.encode_image(images), model.encode_text(ids, mask)
    for found, expected in ((found_image, expected_image), (found_text, expected_text)):
        torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pool", ["first", "mean"])
def test_the_choice_of_pooling_is_saved_with_the_model(pool: Pool, tmp_path: Path) -> None:
    model = tiny(pool)
    model.save_pretrained(tmp_path / "model")
    loaded = beit3.load_model(tmp_path / "model")
    assert isinstance(loaded, RetrievalModel)
    assert loaded.pool == pool
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(images), model.encode_image(images))
