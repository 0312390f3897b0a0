"""Task models: what stands for an image and a text."""

from __future__ import annotations

from pathlib import Path

import torch

import beit3
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


def test_a_saved_model_embeds_as_before(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    loaded = beit3.load_model(tmp_path / "model")
    assert isinstance(loaded, RetrievalModel)
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(images), model.encode_image(images))
