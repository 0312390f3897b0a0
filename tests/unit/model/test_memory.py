"""The memory model against what autograd keeps: unique storages of saved tensors, weights excluded."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
Mixture = tuple[int, int, tuple[int, ...]]
MIXTURES: dict[str, Mixture] = {
    "images": (0, 8, ()),
    "texts": (0, 0, (9, 9, 20, 31)),
    "pairs": (4, 0, (6, 6, 9, 14)),
    "all": (3, 4, (5, 7, 7, 12, 24, 24, 30)),
}
"""Pairs, images alone, lengths of all texts."""
GUIDE: Mixture = (32, 32, (64,) * 64)
"""That of the table in docs/scaling.md."""


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


class Peak(TorchDispatchMode):
    """The most bytes that tensors took at once, each storage once; weights that were there before are left out."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = self._now = 0
        self._sizes = {weight.untyped_storage()._cdata: 0 for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor) and (place := value.untyped_storage()._cdata) not in self._sizes:
                self._sizes[place] = value.untyped_storage().nbytes()
                self._now += self._sizes[place]
                self.total = max(self.total, self._now)
                weakref.finalize(value.untyped_storage(), self._free, place)
        return found

    def _free(self, place: int) -> None:
        self._now -= self._sizes.pop(place)


def make_batch(config: ModelConfig, mixture: Mixture, device: str = "cpu") -> PackedBatch:
    pairs, alone, lengths = mixture
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


def sizes_of(config: ModelConfig, mixture: Mixture, heads: tuple[Head, ...] = ()) -> BatchSizes:
    pairs, alone, lengths = mixture
    patches = 1 + config.num_patches
    parts = [Sequences(1, patches, length) for length in lengths[:pairs]]
    parts += [Sequences(alone, patches)] if alone else []
    parts += [Sequences(1, text=length) for length in lengths[pairs:]]
    return BatchSizes(nn.Module, (Pass(config, tuple(parts)),), heads)


def make_model(config: ModelConfig, mixture: Mixture) -> PretrainingModel:
    pairs, alone, lengths = mixture
    model = PretrainingModel(config, CODES).train()
    model.backbone.freeze_unreached(images=alone > 0, texts=len(lengths) > pairs, pairs=pairs > 0)
    return model


def losses(model: PretrainingModel, batch: PackedBatch, rows: int) -> Tensor:
    """Losses at some rows of either stream, some again where it is short; logits as the objectives compute them."""
    out = model.backbone.forward_packed(batch, backend="sdpa")
    found = []
    for states, head in ((out.vision, model.mim_head), (out.text, model.mlm_head)):
        if states.shape[0]:
            logits = head(states[torch.arange(rows) % len(states)])
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
@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("numbers", [FP32, BF16_CPU], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [SMALL, MEDIUM], ids=["small", "medium"])
def test_activations_are_what_autograd_keeps(
    size: ModelConfig, numbers: Numbers, mixture: Mixture, again: bool
) -> None:
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


def counted_and_kept(config: ModelConfig, mixture: Mixture, monkeypatch: pytest.MonkeyPatch) -> tuple[float, int]:
    """Bytes that the memory model says a forward pass on a GPU keeps, and those that autograd keeps.

    Tensors without numbers say that they are on a GPU, so that CUDA's autocast and kernels decide what is kept.
    """

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
        model = make_model(config, mixture).backbone
    copies = cast_bytes(model)[config.activation_checkpointing]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(value.shape, device="cuda"), value.requires_grad))
        kept = Kept(model)
        with cuda_autocast(), saved_tensors_hooks(kept.pack, lambda saved: saved):
            model.forward_packed(make_batch(config, mixture, "cuda"))
    return kept_bytes(sizes_of(config, mixture), BF16) + copies, kept.total


def test_activations_of_ragged_texts_on_a_gpu_are_what_autograd_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, kept = counted_and_kept(MEDIUM, MIXTURES["all"], monkeypatch)
    assert counted == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("name", ["base_patch16", "large_patch16", "giant_patch14"])
def test_activations_on_a_gpu_are_those_of_the_guide_and_what_autograd_keeps(
    name: str, again: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = model_config(f"beit3_{name}_224", activation_checkpointing=again)
    counted, kept = counted_and_kept(config, GUIDE, monkeypatch)
    assert counted == pytest.approx(kept, rel=0.01)
    row = f"{name.partition('_')[0]} | {'computed again' if again else 'kept'}"
    figures = f"{counted / 2**20:,.0f} | {kept / 2**20:,.0f} | {counted / kept:.3f}"
    assert f"| {row} | {figures} |\n" in (root / "docs" / "scaling.md").read_text(encoding="utf-8")


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


@pytest.mark.parametrize(
    ("name", "rows", "again", "tolerance"),
    [("texts", 2000, False, 0.03), ("images", 16, False, 0.03), ("images", 16, True, 0.1)],
    ids=["logits", "a layer", "a layer computed again"],
)
def test_the_fullest_moment_of_a_step_is_the_one_that_is_counted(
    name: str, rows: int, again: bool, tolerance: float
) -> None:
    config, mixture = replace(MEDIUM, activation_checkpointing=again), MIXTURES[name]
    model, batch = make_model(config, mixture), make_batch(config, mixture)
    with Peak(model.parameters()) as peak:
        losses(model, batch, rows).backward()
    gradients = sum(4 * parameter.numel() for parameter in model.parameters() if parameter.grad is not None)
    head = Head(rows, config.width, CODES if name == "images" else config.vocab_size)
    sizes = sizes_of(config, mixture, (head,))
    counted = max(bytes_before_backward(sizes, FP32), bytes_after_backward(sizes, FP32) + gradients)
    assert counted == pytest.approx(peak.total, rel=tolerance)


def test_a_visual_tokenizer_needs_what_is_counted_while_it_makes_codes() -> None:
    """One layer of twelve: they need their memory one after the other."""
    tokenizer = VQKD(vqkd_config("vqkd_base_clip", depth=1, decoder_depth=1)).eval()
    pictures = torch.zeros(8, 3, 224, 224)
    weights = (*tokenizer.parameters(), *tokenizer.buffers())
    with Peak(weights) as peak, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tokenizer.tokenize(pictures)
    empty = BatchSizes(nn.Module, (Pass(MEDIUM, ()),), ())
    counted = dataclasses.replace(empty, tokenizer=tokenizer_pass(8, (14, 14), 224))
    casts = cast_bytes(tokenizer.encoder)
    assert bytes_before_backward(counted, BF16, casts) == pytest.approx(peak.total, rel=0.03)


def test_a_visual_tokenizer_of_base_size_has_the_shape_that_is_counted() -> None:
    with torch.device("meta"):
        encoder = VQKD(vqkd_config("vqkd_base_clip", image_size=(256, 256))).encoder
    shape = tokenizer_pass(1, (16, 16), 256).model
    assert (encoder.embed_dim, len(encoder.blocks), shape.patch_size) == (shape.width, shape.num_layers, 16)
    assert encoder.blocks[0].mlp.fc1.out_features == shape.ffn_width
    assert encoder.patch_embed.num_patches == shape.num_patches == 256
