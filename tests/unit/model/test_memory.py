"""The memory model against what autograd keeps: unique storages of saved tensors, weights excluded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from beit3.config import replace
from beit3.model import transformer
from beit3.model.attention import Plan
from beit3.model.heads import PretrainingModel
from beit3.model.memory import (
    BF16,
    BF16_CPU,
    FP32,
    BatchSizes,
    Head,
    Numbers,
    Pass,
    Sequences,
    bytes_after_backward,
    bytes_before_backward,
    cast_bytes,
    kept_bytes,
    tokenizer_pass,
)
from beit3.model.packing import Layout, PackedBatch
from beit3.model.presets import ModelConfig, model_config
from beit3.tokenizer.vqkd import VQKD, vqkd_config

SMALL = ModelConfig(
    width=64,
    num_layers=3,
    num_heads=2,
    ffn_width=256,
    patch_size=8,
    image_size=(48, 48),
    vocab_size=400,
    fusion_layers=1,
)
MEDIUM = replace(SMALL, width=192, num_layers=4, num_heads=3, ffn_width=768, image_size=(64, 64), vocab_size=3000)
CODES = 128
MIXTURES = {
    "images": (0, 8, ()),
    "texts": (0, 0, (9, 9, 20, 31)),
    "pairs": (4, 0, (6, 6, 9, 14)),
    "all": (3, 4, (5, 7, 7, 12, 24, 24, 30)),
}
"""Pairs, images alone, lengths of all texts."""


class Kept:
    """Bytes of what autograd saves for the backward pass, each storage once."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._storages: dict[int, Any] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights:
            self._storages[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


def make_batch(config: ModelConfig, mixture: str, device: str = "cpu") -> PackedBatch:
    pairs, alone, lengths = MIXTURES[mixture]
    images = pairs + alone
    tokens = sum(lengths)
    return PackedBatch(
        images=torch.ones(images, 3, *config.image_size, device=device) if images else None,
        image_mask=torch.ones(images, config.num_patches, dtype=torch.bool, device=device) if images else None,
        text_ids=torch.ones(tokens, dtype=torch.int64, device=device) if tokens else None,
        text_positions=torch.ones(tokens, dtype=torch.int64, device=device) if tokens else None,
        text_lengths=lengths,
        num_pairs=pairs,
    )


def sizes_of(config: ModelConfig, mixture: str, heads: tuple[Head, ...] = ()) -> BatchSizes:
    pairs, alone, lengths = MIXTURES[mixture]
    patches = 1 + config.num_patches
    parts = [Sequences(1, patches, length) for length in lengths[:pairs]]
    parts += [Sequences(alone, patches)] if alone else []
    parts += [Sequences(1, text=length) for length in lengths[pairs:]]
    return BatchSizes(nn.Module, (Pass(config, tuple(parts)),), heads)


def make_model(config: ModelConfig, mixture: str) -> PretrainingModel:
    pairs, alone, lengths = MIXTURES[mixture]
    model = PretrainingModel(config, CODES).train()
    model.backbone.freeze_unreached(images=alone > 0, texts=len(lengths) > pairs, pairs=pairs > 0)
    return model


def losses(model: PretrainingModel, batch: PackedBatch, rows: int) -> Tensor:
    """Losses at the first rows of either stream; logits as the objectives compute them."""
    out = model.backbone.forward_packed(batch, backend="sdpa")
    found = []
    for states, head in ((out.vision, model.mim_head), (out.text, model.mlm_head)):
        if states.shape[0]:
            logits = head(states[torch.arange(rows)])
            found.append(F.cross_entropy(logits.float(), torch.zeros(rows, dtype=torch.int64)))
    return torch.stack(found).sum()


def kept_casts(model: PretrainingModel, heads: list[Head]) -> tuple[int, int]:
    """Copies of weights that the gradients of inputs need: pictures need none, and unused heads have none."""
    classes = [head.classes for head in heads]
    model.backbone.vision_embedding.patch.requires_grad_(False)
    for head in (model.mim_head, model.mlm_head):
        head.requires_grad_(head.out_features in classes)
    return cast_bytes(model)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("numbers", [FP32, BF16_CPU], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [SMALL, MEDIUM], ids=["small", "medium"])
def test_activations_are_what_autograd_keeps(size: ModelConfig, numbers: Numbers, mixture: str, again: bool) -> None:
    config, rows = replace(size, drop_path=0.2, activation_checkpointing=again), 16
    model, batch = make_model(config, mixture), make_batch(config, mixture)
    kept = Kept(model)
    narrow = numbers.compute == 2
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow), saved_tensors_hooks(kept.pack, lambda saved: saved):
        losses(model, batch, rows)
    heads = [Head(rows, config.width, CODES)] if batch.images is not None else []
    heads += [Head(rows, config.width, config.vocab_size)] if batch.text_ids is not None else []
    copies = kept_casts(model, heads)[1 if again else 0] if narrow else 0
    expected = kept_bytes(sizes_of(config, mixture, tuple(heads)), numbers) + copies
    assert expected == pytest.approx(kept.total, rel=0.03)


def test_activations_on_a_gpu_are_what_autograd_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without numbers say that they are on a GPU, so that CUDA's autocast and kernels decide what is kept."""

    def one_kernel(layout: Layout, like: Tensor, *_: object) -> Plan:
        rows = torch.zeros(layout.num_images * layout.vision_length + sum(layout.text_lengths), dtype=torch.int64)
        return Plan(layout, "varlen", False, rows.to(like.device), rows.to(like.device), rows[:2].int(), 1)

    def flash(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        bounds = torch.zeros(2, dtype=torch.int32, device=q.device)
        out: Tensor = torch.ops.aten._flash_attention_forward(q, k, v, bounds, bounds, 1, 1, 0.0, False, False)[0]
        return out

    monkeypatch.setattr(transformer, "plan_attention", one_kernel)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash)
    with torch.device("meta"):
        model = make_model(MEDIUM, "all")
    copies = kept_casts(model, [])[0]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(value.shape, device="cuda"), value.requires_grad))
        kept = Kept(model)
        with cuda_autocast(), saved_tensors_hooks(kept.pack, lambda saved: saved):
            model.backbone.forward_packed(make_batch(MEDIUM, "all", "cuda"))
    assert kept_bytes(sizes_of(MEDIUM, "all"), BF16) + copies == pytest.approx(kept.total, rel=0.01)


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """`torch.autocast("cuda")`, which refuses where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if not torch.autocast_decrement_nesting():
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def test_recomputation_keeps_the_input_of_each_layer_alone() -> None:
    plain, again = (
        kept_bytes(sizes_of(replace(MEDIUM, activation_checkpointing=on), "all"), BF16) for on in (False, True)
    )
    tokens = sizes_of(MEDIUM, "all").passes[0].tokens
    per_layer = tokens * (26 * MEDIUM.width + 8 * MEDIUM.ffn_width + 4 * MEDIUM.num_heads + 32)
    assert plain - again == MEDIUM.num_layers * (per_layer - 2 * tokens * MEDIUM.width)


def test_the_share_of_a_rank_is_a_share_of_everything() -> None:
    config = model_config("beit3_base_patch16_224")
    parts = (Sequences(64, 197, 20), Sequences(32, 197), Sequences(16, text=50))
    whole = BatchSizes(
        build=nn.Module,
        passes=(Pass(config, parts),),
        heads=(Head(320, 768, 8192),),
        images=96,
        side=224,
        words=2080,
        tokenizer=tokenizer_pass(96, (14, 14), 224),
    )
    own = whole.of_rank(8)
    assert own.flops * 8 == pytest.approx(whole.flops)
    assert kept_bytes(own, BF16) * 8 == pytest.approx(kept_bytes(whole, BF16))
    assert (own.images, own.words) == (12, 260)
    assert own.tokenizer is not None
    assert own.tokenizer.sequences == (Sequences(12, 197),)


def test_the_fullest_moment_is_that_of_the_logits_or_of_a_tokenizer_or_of_a_layer() -> None:
    config = replace(MEDIUM, final_norm=False)
    none = sizes_of(config, "images")
    kept = kept_bytes(none, FP32)
    layer = bytes_before_backward(none, FP32) - kept
    tokens = none.passes[0].tokens
    assert layer == tokens * 4 * (config.width + config.ffn_width)  # gradients behind and within the feed-forward part
    head = Head(1000, config.width, 10_000)
    with_head = sizes_of(config, "images", (head,))
    assert bytes_before_backward(with_head, FP32) == kept_bytes(with_head, FP32) + 8 * 1000 * 10_000
    with_tokenizer = BatchSizes(nn.Module, none.passes, (), tokenizer=tokenizer_pass(100, (14, 14), 224))
    assert bytes_before_backward(with_tokenizer, FP32) == kept + 44 * 100 * 197 * 768
    assert bytes_after_backward(none, FP32) < kept


def test_a_visual_tokenizer_of_base_size_has_the_shape_that_is_counted() -> None:
    with torch.device("meta"):
        encoder = VQKD(vqkd_config("vqkd_base_clip", image_size=(256, 256))).encoder
    shape = tokenizer_pass(1, (16, 16), 256).model
    assert (encoder.embed_dim, len(encoder.blocks), shape.patch_size) == (shape.width, shape.num_layers, 16)
    assert encoder.blocks[0].mlp.fc1.out_features == shape.ffn_width
    assert encoder.patch_embed.num_patches == shape.num_patches == 256
