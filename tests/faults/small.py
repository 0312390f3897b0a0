"""The smallest model that has every part; nothing of training is imported, for programs that measure their memory."""

from __future__ import annotations

from beit3.model.presets import ModelConfig


def small_config(vocab_size: int) -> ModelConfig:
    return ModelConfig(
        width=16,
        num_layers=1,
        num_heads=2,
        ffn_width=16,
        patch_size=8,
        image_size=(16, 16),
        vocab_size=vocab_size,
        fusion_layers=1,
    )
