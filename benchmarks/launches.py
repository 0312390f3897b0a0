"""What a layer asks of a GPU beside its matrix products, counted: kernels that are started, and bytes they move.

    python benchmarks/launches.py

One layer of base size, forward and backward, and the encoder of a visual tokenizer, on tensors without numbers that say
that they are on a GPU (`torch._subclasses.fake_tensor`); none is needed. Every operation of ATen that is no view counts
as one kernel (a few start two). Bytes are those that operations without products read and write, as if nothing stayed
in a cache, a third of forward and backward pass; what does not grow with the batch (copies of weights) is left out.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from beit3.model import attention
from beit3.model.attention import Plan
from beit3.model.multiway import MultiwayBlock
from beit3.model.packing import Layout
from beit3.model.presets import model_config
from beit3.tokenizer.vqkd import VQKD, vqkd_config

CONFIG = model_config("beit3_base_patch16_224")
WORDS = 64
"""Tokens of a text."""
PRODUCTS = ("mm", "attention")
"""In names of operations whose time the plan takes from their operations."""


class Counter(TorchDispatchMode):
    """Counts kernels, the bytes that those without products move, and the most bytes that live at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: int = 0
        self.moved: int = 0
        self.live: int = 0
        self.peak: int = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if name.startswith("prim::") or func.is_view or "empty" in name:
            return out
        written = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        self.kernels += 1
        if not any(word in name for word in PRODUCTS):
            read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            self.moved += sum(value.nbytes for value in read + written)
        for value in written:
            self._follow(value)
        return out

    def _follow(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.live -= size


def flash(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    """A GPU's kernel for sequences of any length, (rows, H, W)."""
    bounds = torch.empty(2, dtype=torch.int32, device=q.device)
    out: Tensor = torch.ops.aten._flash_attention_forward(q, k, v, bounds, bounds, 1, 1, 0.0, False, False)[0]
    return out


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """A GPU's kernel for equally long sequences, (n, H, T, W)."""
    assert mask is None
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return out


def like_query(q: Tensor, *_: object, **__: object) -> Tensor:
    """What a kernel of attention without gradients leaves, (n, H, T, W)."""
    return torch.zeros_like(q)


@contextmanager
def autocast(enabled: bool) -> Iterator[None]:
    """`torch.autocast("cuda")` to bf16, which refuses where there is no GPU."""
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def to_gpu(module: nn.Module) -> None:
    """Replace parameters and buffers by ones that say that they are on a GPU."""
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.empty(value.shape, device="cuda"), value.requires_grad))
        for name, buffer in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))


def backward(outputs: Sequence[Tensor]) -> None:
    """What autograd's engine does; it starts for no GPU that is not there."""
    waiting: dict[Any, list[Tensor | None]] = {}

    def give(node: Any, place: int, gradient: Tensor) -> None:
        slots = waiting.setdefault(node, [None] * len(node._input_metadata))
        shape = node._input_metadata[place].shape
        gradient = gradient if gradient.shape == shape else gradient.sum_to_size(shape)
        before = slots[place]
        slots[place] = gradient if before is None else before + gradient

    for output in outputs:
        assert output.grad_fn is not None
        give(output.grad_fn, output.output_nr, torch.empty_like(output))
    while waiting:
        node = max(waiting, key=lambda node: node._sequence_nr())
        found = node(*waiting.pop(node))
        gradients = found if isinstance(found, tuple) else (found,)
        for (after, place), gradient in zip(node.next_functions, gradients, strict=True):
            if after is not None and gradient is not None and "AccumulateGrad" not in after.name():
                give(after, place, gradient)


def count_layer(count: int, *, mixed: bool, bf16: bool, drop_path: float) -> tuple[int, int, int]:
    """Kernels and bytes of one layer's forward and backward pass, and tokens in it.

    Args:
        count: images, or pairs, images and texts of each.
        mixed: whether pairs, images and texts meet, as in masked data modeling, or there are images alone.
        bf16: whether autocast is on.
        drop_path: share of branches that are dropped.
    """
    block = MultiwayBlock(CONFIG, 0).train()
    to_gpu(block)
    block.drop_path = drop_path
    layout = Layout.build(2 * count, 197, (WORDS,) * 2 * count, count) if mixed else Layout.build(count, 197, (), 0)
    tokens = layout.num_images * 197, sum(layout.text_lengths)
    vision, text = (torch.empty(rows, CONFIG.width, device="cuda", requires_grad=True) for rows in tokens)
    rows = torch.empty(sum(tokens), dtype=torch.int64, device="cuda")
    plan = Plan(layout, "varlen", False, rows, rows, rows[:2].int(), 1) if mixed else Plan(layout, "sdpa")
    counter = Counter()
    with counter:
        with autocast(bf16):
            streams = block(vision.view_as(vision), text.view_as(text), plan, (rows[: tokens[0]], rows[: tokens[1]]))
        backward([stream for stream in streams if len(stream)])
    return counter.kernels, counter.moved, sum(tokens)


def print_layers() -> None:
    """A row for each kind of batch."""
    print("| batch | precision | drop path | kernels of a stream | bytes for a feature of a token |")
    print("|---|---|---|---|---|")
    for mixed, bf16 in ((False, True), (False, False), (True, True)):
        for drop_path in (0.0, 0.1):
            found = [count_layer(count, mixed=mixed, bf16=bf16, drop_path=drop_path) for count in (32, 64)]
            kernels, moved, tokens = (more - less for less, more in zip(*found, strict=True))
            assert not kernels
            batch, precision = "pairs, images, texts" if mixed else "images", "bf16" if bf16 else "fp32"
            launched, share = found[0][0] / (1 + mixed), moved / 3 / tokens / CONFIG.width
            print(f"| {batch} | {precision} | {drop_path or 'no'} | {launched:.0f} | {share:.0f} |")


def tokenizer_peak(count: int) -> int:
    """The most bytes that live at once while images get their codes, beside the weights and the images."""
    with torch.device("meta"):
        tokenizer = VQKD(vqkd_config("vqkd_base_clip", decoder_depth=3)).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_gpu(tokenizer)
        images = torch.empty(count, 3, *tokenizer.config.image_size, device="cuda")
        counter = Counter()
        with counter, autocast(True):
            tokenizer.tokenize(images)
    return counter.peak


def main() -> None:
    """Count layers, then the visual tokenizer."""
    import torch.nn.attention.varlen as kernels

    patched: tuple[Any, Any] = kernels, F
    patched[0].varlen_attn, attention._CORES["sdpa"], patched[1].scaled_dot_product_attention = flash, dense, like_query
    with FakeTensorMode(allow_non_fake_inputs=True):
        print_layers()
    share = (tokenizer_peak(64) - tokenizer_peak(32)) / 32 / 197 / 768
    print(f"\nvisual tokenizer: {share:.0f} bytes at once for a feature of a token")


if __name__ == "__main__":
    main()
