"""Bytes that a training step keeps on its device, the counterpart of `flops.py`: what stays until the backward pass.

Symbols: T tokens that pass, D width, F feed-forward width, L layers, H heads, P patch side, N embedded patches,
R rows of a head, V its classes; c bytes of a value in matrix products, n of a value given to a norm.

A layer keeps, of every token,

    attention      n D + 8   input of the norm and its sums      c D        input of q, k, v     3 c D   q, k, v
                   c D + 4 H mixed values and their sums         n D + 8    input of the norm    c D     its result
    feed-forward   n D + 8   input of the norm                   c D        its result           c F     before GELU
                   n F + 8   input of the inner norm             c F        its result

Attention keeps no (T, T) scores: so it is with PyTorch's fused kernels, which `model/attention.py` takes on GPUs. Where
it runs group by group, sequences alone hold the q, k, v of their whole stream, and pairs a copy of theirs: 3 c D more
for a token of a pair whose stream has sequences alone as well. With activation checkpointing a layer keeps its input
alone, c D. Beside the layers: c 3 P^2 of every embedded patch, n D + 8 of the final norm, and of every head c R D and
the fp32 log-probabilities 4 R V.

What is there for a moment counts where memory is fullest: as the backward pass begins (the gradients of the largest
head's logits, or of the last layer; a visual tokenizer's pass just before), and as it ends (all gradients of weights).

`tests/unit/model/test_memory.py` compares this with what autograd really keeps, and `benchmarks/memory.py` with whole
training runs. Compiled blocks keep less; it is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from beit3.model.flops import forward_flops
from beit3.model.packing import Layout
from beit3.model.presets import ModelConfig

_TOKENIZER = 44
"""Bytes for each feature of each token that a visual tokenizer needs at once: `benchmarks/launches.py` counts 43 under
CUDA's autocast to bf16."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """Bytes of a value."""

    compute: int
    """c, in matrix products."""
    norms: int
    """n, what norms read: CUDA's autocast gives them fp32 copies, that of CPUs does not."""
    by_group: bool
    """Whether attention runs group by group, not all sequences in one kernel."""


FP32 = Numbers(4, 4, by_group=True)
BF16 = Numbers(2, 4, by_group=False)
BF16_CPU = Numbers(2, 2, by_group=True)


@dataclass(frozen=True, slots=True)
class Sequences:
    """Equally long sequences of a batch."""

    count: int
    vision: int = 0
    """Tokens of the image, class token included; 0: no image."""
    text: int = 0
    """Tokens of the text; 0: no text."""

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.count * (self.vision + self.text)

    @property
    def layout(self) -> Layout:
        """Rows of one of them."""
        texts = (self.text,) if self.text else ()
        return Layout.build(int(self.vision > 0), self.vision, texts, int(self.vision > 0 and self.text > 0))


@dataclass(frozen=True, slots=True)
class Pass:
    """A transformer, and what goes through it in one pass."""

    model: ModelConfig
    sequences: tuple[Sequences, ...]
    more_layers: int = 0
    """Layers behind the transformer's own that the same images pass."""

    @property
    def tokens(self) -> int:
        """T, of all sequences."""
        return sum(one.tokens for one in self.sequences)

    @property
    def num_layers(self) -> int:
        """L, all that tokens pass."""
        return self.model.num_layers + self.more_layers

    @property
    def flops(self) -> float:
        """Operations of the forward pass."""
        model = replace(self.model, num_layers=self.num_layers)
        return sum(one.count * forward_flops(model, one.layout) for one in self.sequences)

    def of_rank(self, ranks: int) -> Pass:
        """The share of one of so many ranks."""
        parts = tuple(replace(part, count=_share(part.count, ranks)) for part in self.sequences)
        return replace(self, sequences=parts)


@dataclass(frozen=True, slots=True)
class Head:
    """A linear map with a loss over its classes, at some rows of a batch."""

    rows: int
    width: int
    classes: int

    @property
    def flops(self) -> float:
        """Operations of the forward pass."""
        return 2.0 * self.rows * self.width * self.classes


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """What one batch is made of and what it meets; of all ranks together, or of one."""

    build: Callable[[], nn.Module]
    """Makes the trained networks, with what is frozen of them; called where tensors have no numbers."""
    passes: tuple[Pass, ...]
    heads: tuple[Head, ...]
    images: int = 0
    """Pictures that are read."""
    side: int = 0
    """Of a picture, in pixels."""
    words: int = 0
    """Tokens of the texts that are read."""
    gathered: int = 0
    """Values of the vectors that a contrastive loss collects from all ranks; not divided among them."""
    tokenizer: Pass | None = None
    """A frozen visual tokenizer, and the pictures that it turns into codes: none where these are recorded."""

    def of_rank(self, ranks: int) -> BatchSizes:
        """The share of one of so many ranks."""
        return replace(
            self,
            passes=tuple(one.of_rank(ranks) for one in self.passes),
            heads=tuple(replace(head, rows=_share(head.rows, ranks)) for head in self.heads),
            images=_share(self.images, ranks),
            words=_share(self.words, ranks),
            tokenizer=None if self.tokenizer is None else self.tokenizer.of_rank(ranks),
        )

    @property
    def recomputed(self) -> bool:
        """Whether layers are computed again in the backward pass."""
        return any(one.model.activation_checkpointing for one in self.passes)

    @property
    def flops(self) -> float:
        """Useful operations of the training step: three times the forward pass (`flops.py`)."""
        return 3 * (sum(one.flops for one in self.passes) + sum(head.flops for head in self.heads))


def tokenizer_pass(images: int, grid: tuple[int, int], side: int) -> Pass:
    """What official recipes make codes with: the encoder of a VQ-KD of base size.

    Args:
        images: pictures of a batch that it sees.
        grid: rows and columns of codes.
        side: of its pictures, in pixels.
    """
    patch = side // grid[0]
    size = (grid[0] * patch, grid[1] * patch)
    shape = ModelConfig(width=768, num_layers=12, num_heads=12, ffn_width=3072, patch_size=patch, image_size=size)
    return Pass(shape, (Sequences(images, 1 + shape.num_patches),))


def _share(count: int, ranks: int) -> int:
    return -(-count // ranks)


def kept_bytes(sizes: BatchSizes, numbers: Numbers) -> float:
    """Bytes of one rank's batch that stay until the backward pass; copies of weights are not among them."""
    total = 0.0
    for one in sizes.passes:
        model, layer = one.model, _kept_by_layer(one, numbers)
        if model.activation_checkpointing:
            total += one.tokens * numbers.compute * model.width * model.num_layers + layer * one.more_layers
        else:
            total += layer * one.num_layers
        patches = sum(part.count * (part.vision - 1) for part in one.sequences if part.vision)
        total += patches * numbers.compute * 3 * model.patch_size**2
        if model.final_norm:
            total += one.tokens * (numbers.norms * model.width + 8) * (2 if one.more_layers else 1)
    for head in sizes.heads:
        total += head.rows * (numbers.compute * head.width + 4 * head.classes)
    return total


def bytes_before_backward(sizes: BatchSizes, numbers: Numbers, casts: tuple[int, int] = (0, 0)) -> float:
    """Bytes that one rank's batch takes as the backward pass begins, gradients of weights not counted.

    Args:
        sizes: of one rank's batch.
        numbers: bytes of a value.
        casts: of `cast_bytes`.
    """
    forward, backward = casts[0], casts[1] if sizes.recomputed else casts[0]  # layers computed again cast again
    logits = [head.rows * head.classes for head in sizes.heads] or [0]
    copies = numbers.compute + (4 if numbers.compute < 4 else 0)  # of logits: as computed, and in fp32
    tokenizer = 0 if sizes.tokenizer is None else _TOKENIZER * sizes.tokenizer.tokens * sizes.tokenizer.model.width
    layer = max(_passing_through_layer(one, numbers) for one in sizes.passes)
    moments = (
        forward + copies * max(logits),
        forward + tokenizer - 4 * sum(logits),  # before the losses
        backward + 8 * max(logits),
        backward + layer - 4 * sum(logits),  # after their gradients
    )
    return kept_bytes(sizes, numbers) + max(moments)


def bytes_after_backward(sizes: BatchSizes, numbers: Numbers) -> float:
    """Bytes that one rank's batch takes as the backward pass ends, beside all gradients of weights."""
    return max(_kept_by_layer(one, numbers) for one in sizes.passes)


def cast_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the copies that autocast makes of trained matrices in a forward pass: of all, and outside of blocks."""
    copied = {
        name: 2 * part.weight.numel()
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and part.weight.requires_grad
    }
    return sum(copied.values()), sum(size for name, size in copied.items() if "blocks." not in name)


def _kept_by_layer(one: Pass, numbers: Numbers) -> float:
    """Bytes that one layer keeps of all tokens, without activation checkpointing."""
    c, n, width, hidden = numbers.compute, numbers.norms, one.model.width, one.model.ffn_width
    attention = (2 * n + 6 * c) * width + 4 * one.model.num_heads + 16
    if n == c and len(one.sequences) == 1 and not one.sequences[0].text:
        attention -= c * width  # images alone: the norm reads the mixed values where attention left them
    feed_forward = (n + c) * width + (2 * c + n) * hidden + 16
    return float(one.tokens * (attention + feed_forward)) + (
        3 * c * width * _held_twice(one) if numbers.by_group else 0
    )


def _held_twice(one: Pass) -> int:
    """Tokens of pairs in streams that have sequences alone as well."""
    images = any(part.count and not part.text for part in one.sequences)
    texts = any(part.count and not part.vision for part in one.sequences)
    pairs = [part for part in one.sequences if part.vision and part.text]
    return sum(part.count * (part.vision * images + part.text * texts) for part in pairs)


def _passing_through_layer(one: Pass, numbers: Numbers) -> float:
    """Bytes of the gradients within one layer, and of the layer itself where it is computed again."""
    c, n = numbers.compute, numbers.norms
    gradients = one.tokens * (c * one.model.width + (n + (c if n != c else 0)) * one.model.ffn_width)
    return gradients + (_kept_by_layer(one, numbers) if one.model.activation_checkpointing else 0)
