"""A tiny model and a mixed batch: 3 pairs, 2 lone images, 3 lone texts, with masked patches and ragged lengths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from beit3.config import replace
from beit3.model.packing import PackedBatch
from beit3.model.presets import ModelConfig
from beit3.model.transformer import MultiwayTransformer

TINY = ModelConfig(
    width=32,
    num_layers=3,
    num_heads=4,
    ffn_width=48,
    patch_size=4,
    image_size=(12, 8),
    vocab_size=40,
    max_text_positions=20,
    fusion_layers=2,
)


@pytest.fixture
def tiny() -> ModelConfig:
    return TINY


@pytest.fixture(params=["shared", "decoupled"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """The tiny model in both attention styles."""
    if request.param == "decoupled":
        return replace(TINY, attention="decoupled", fusion_layers=0)
    return TINY


@pytest.fixture
def make() -> Callable[..., MultiwayTransformer]:
    """Build a model whose every parameter is random, LayerNorms and biases included."""

    def build(config: ModelConfig, **changes: object) -> MultiwayTransformer:
        torch.manual_seed(1)
        model = MultiwayTransformer(replace(config, **changes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    return build


@pytest.fixture
def batch() -> PackedBatch:
    return make_batch((2, 5, 5), 5, (1, 4, 4))


@pytest.fixture
def ragged() -> Callable[..., PackedBatch]:
    return make_batch


@pytest.fixture
def close() -> Callable[[Tensor, Tensor, str], None]:
    """Assert equality within 1e-5 of the largest value."""

    def check(actual: Tensor, expected: Tensor, what: str = "") -> None:
        assert actual.shape == expected.shape, what
        if expected.numel():
            error, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
            assert error <= 1e-5 * largest, f"{what}: error {error:.2e}, largest value {largest:.2e}"

    return check


def make_batch(pairs: tuple[int, ...], num_images: int, alone: tuple[int, ...]) -> PackedBatch:
    """Draw pairs with these text lengths, more images up to `num_images`, then lone texts."""
    generator = torch.Generator().manual_seed(2)
    lengths = pairs + alone
    return PackedBatch(
        images=torch.randn(num_images, 3, 12, 8, generator=generator) if num_images else None,
        image_mask=torch.rand(num_images, 6, generator=generator) < 0.4 if num_images else None,
        text_ids=torch.randint(0, 40, (sum(lengths),), generator=generator) if lengths else None,
        text_positions=torch.cat([torch.arange(length) for length in lengths]) if lengths else None,
        text_lengths=lengths,
        num_pairs=len(pairs),
    )
