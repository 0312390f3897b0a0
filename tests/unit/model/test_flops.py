"""FLOPs against hand-computed figures and against PyTorch's own counter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from beit3.model.flops import forward_flops
from beit3.model.packing import Layout, PackedBatch
from beit3.model.presets import ModelConfig, model_config
from beit3.model.transformer import MultiwayTransformer

IMAGE, PAIR, TEXT = (1, 197, (), 0), (1, 197, (64,), 1), (0, 0, (64,), 0)


@pytest.mark.parametrize(
    ("name", "shape", "masked_patches", "masked_words", "giga"),
    [
        ("beit3_base_patch16_224", IMAGE, 0, 0, 35.1),  # open_clip's profile of ViT-B/16
        ("beit3_base_patch16_224", IMAGE, 78, 0, 36.1),
        ("beit3_base_patch16_224", IMAGE, 196, 0, 37.6),
        ("beit3_base_patch16_224", TEXT, 0, 10, 12.0),
        ("beit3_base_patch16_224", PAIR, 78, 32, 51.2),
        ("beit3_large_patch16_224", IMAGE, 78, 0, 124.4),
        ("beit3_large_patch16_224", TEXT, 0, 10, 40.4),
        ("beit3_large_patch16_224", PAIR, 78, 32, 170.2),
    ],
)
def test_one_sequence_costs_what_the_formula_says(
    name: str, shape: tuple[int, int, tuple[int, ...], int], masked_patches: int, masked_words: int, giga: float
) -> None:
    flops = forward_flops(model_config(name), Layout.build(*shape), masked_patches, masked_words, codebook_size=8192)
    assert flops / 1e9 == pytest.approx(giga, abs=0.06)


def test_a_mixed_batch_costs_the_sum_of_its_sequences() -> None:
    config = model_config("beit3_tiny_patch16_224")
    mixed = Layout.build(2, 197, (9, 3, 30), 1)
    alone = [Layout.build(1, 197, (9,), 1), Layout.build(1, 197, (), 0)]
    alone += [Layout.build(0, 0, (length,), 0) for length in (3, 30)]
    assert forward_flops(config, mixed) == sum(forward_flops(config, layout) for layout in alone)


def test_the_count_equals_what_pytorch_counts(
    config: ModelConfig, batch: PackedBatch, make: Callable[..., MultiwayTransformer]
) -> None:
    model = make(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = model.forward_packed(batch, backend="matmul")
    assert forward_flops(config, out.layout) == counter.get_total_flops()


def test_masked_patches_need_a_codebook(tiny: ModelConfig) -> None:
    with pytest.raises(ValueError, match="codebook_size"):
        forward_flops(tiny, Layout.build(1, 7, (), 0), masked_patches=2)
