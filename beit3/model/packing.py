"""Sequences without padding: a mixed batch is two packed streams, and a layout that says which rows belong together.

Shapes: B sequences, Bi images, Bt texts, N patches of an image, T longest text, H, W image sides,
Nv = Bi (1 + N) rows of the vision stream, Nt = sum of text lengths = rows of the text stream.

Order is the contract: the first `num_pairs` images and the first `num_pairs` texts form pairs, image i with text i.
Pairs therefore lead both streams, and fusion experts take one slice of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

_TENSORS = ("images", "image_mask", "kept_patches", "text_ids", "text_positions")


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Image-only, text-only and paired sequences of one batch, without padding."""

    images: Tensor | None = None
    """(Bi, 3, H, W) float, normalised."""
    image_mask: Tensor | None = None
    """(Bi, N) bool, True = masked patch; None masks nothing."""
    kept_patches: Tensor | None = None
    """(Bi, n) int64, the patches that enter the model, equally many of each image; None: all N. The others cost
    nothing (FLIP, arXiv 2212.00794)."""
    text_ids: Tensor | None = None
    """(Nt,) int64, the texts one after the other."""
    text_positions: Tensor | None = None
    """(Nt,) int64, place of each token in its own text, from 0."""
    text_lengths: tuple[int, ...] = ()
    """Bt lengths; equal lengths side by side make attention cheaper."""
    num_pairs: int = 0
    """Images and texts that lead their streams and belong together."""

    def __post_init__(self) -> None:
        num_images = 0 if self.images is None else self.images.shape[0]
        if self.num_pairs > min(num_images, len(self.text_lengths)):
            raise ValueError(
                f"num_pairs is {self.num_pairs}, but there are {num_images} images and {len(self.text_lengths)} texts"
            )

    def to(self, device: torch.device) -> PackedBatch:
        """Copy the tensors to a device."""
        tensors = {name: value for name in _TENSORS if (value := getattr(self, name)) is not None}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})

    def layout(self, patch_size: int) -> Layout:
        """Which rows the sequences will take under a patch size."""
        num_images = vision_length = 0
        if self.images is not None:
            num_images = self.images.shape[0]
            per_image = (self.images.shape[2] // patch_size) * (self.images.shape[3] // patch_size)
            vision_length = 1 + (per_image if self.kept_patches is None else self.kept_patches.shape[1])
        return Layout.build(num_images, vision_length, self.text_lengths, self.num_pairs)


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring sequences of equal shape: `count` times `vision_length` and `text_length` rows."""

    count: int
    vision_length: int
    text_length: int
    vision_start: int
    text_start: int

    @property
    def vision_rows(self) -> slice:
        """Rows of the vision stream."""
        return slice(self.vision_start, self.vision_start + self.count * self.vision_length)

    @property
    def text_rows(self) -> slice:
        """Rows of the text stream."""
        return slice(self.text_start, self.text_start + self.count * self.text_length)


@dataclass(frozen=True, slots=True)
class Layout:
    """Which rows of the two streams form sequences. Plain numbers: shared by all layers, built once a forward pass."""

    num_images: int
    vision_length: int
    """1 + N rows of each image; 0 without images."""
    text_lengths: tuple[int, ...]
    num_pairs: int
    groups: tuple[Group, ...]

    @classmethod
    def build(cls, num_images: int, vision_length: int, text_lengths: Sequence[int], num_pairs: int) -> Layout:
        """Join neighbouring sequences of equal lengths into groups: pairs, then images alone, then texts alone."""
        groups: list[Group] = []
        vision, text = 0, 0

        def add(count: int, vision_rows: int, text_rows: int) -> None:
            """Lay sequences behind the ones before; those without rows make no group."""
            nonlocal vision, text
            if count and vision_rows + text_rows:
                groups.append(Group(count, vision_rows, text_rows, vision, text))
            vision, text = vision + count * vision_rows, text + count * text_rows

        for length, run in groupby(text_lengths[:num_pairs]):
            add(len(list(run)), vision_length, length)
        add(num_images - num_pairs, vision_length, 0)
        for length, run in groupby(text_lengths[num_pairs:]):
            add(len(list(run)), 0, length)
        return cls(num_images, vision_length, tuple(text_lengths), num_pairs, tuple(groups))

    @property
    def pair_rows(self) -> tuple[int, int]:
        """Leading rows of the vision and the text stream that belong to pairs."""
        return self.num_pairs * self.vision_length, sum(self.text_lengths[: self.num_pairs])

    @property
    def num_sequences(self) -> int:
        """B, pairs counted once."""
        return self.num_images + len(self.text_lengths) - self.num_pairs

    def sequence_ids(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Number of the sequence each row belongs to: (Nv,) and (Nt,) int64; pairs share theirs."""
        images = torch.arange(self.num_images, device=device)
        texts = torch.arange(len(self.text_lengths), device=device)
        texts = torch.where(texts < self.num_pairs, texts, texts - self.num_pairs + self.num_images)
        lengths = torch.tensor(self.text_lengths, dtype=torch.int64, device=device)
        return images.repeat_interleave(self.vision_length), texts.repeat_interleave(lengths)


def pack_texts(text_ids: Tensor, text_mask: Tensor | None) -> tuple[Tensor, Tensor, tuple[int, ...], Tensor]:
    """Pack padded texts, shortest first.

    Args:
        text_ids: (B, T) int.
        text_mask: (B, T) bool, True = real token; None: all are real.

    Returns:
        ids (Nt,), positions (Nt,), lengths in packed order, and `order` (B,): packed text i is row order[i].
    """
    if text_mask is None:
        text_mask = torch.ones_like(text_ids, dtype=torch.bool)
    lengths = text_mask.sum(1)
    order = lengths.argsort(stable=True)
    rows, positions = text_mask[order].nonzero(as_tuple=True)
    return text_ids[order][rows, positions], positions, tuple(lengths[order].tolist()), order


def concat(batches: Sequence[PackedBatch]) -> PackedBatch:
    """Join packed batches into one: pairs of all lead, then lone images, then lone texts, in order.

    Images must have one size; no lone image or text may come before a pair.
    """
    paired = [bool(batch.num_pairs) for batch in batches]
    before = batches[: max(0, sum(paired) - 1)]  # all but the last batch with pairs must hold nothing else
    alone = any(len(b.text_lengths) != b.num_pairs or len(_images(b)) != b.num_pairs for b in before)
    if alone or paired != sorted(paired, reverse=True):
        raise ValueError("concat takes batches with pairs first, and lone images and texts behind all pairs")

    def join(name: str) -> Tensor | None:
        """The fields of all batches that have one, behind each other; None if none has."""
        tensors = [value for batch in batches if (value := getattr(batch, name)) is not None]
        return torch.cat(tensors) if tensors else None

    masks = [batch.image_mask is not None for batch in batches if batch.images is not None]
    if any(masks) and not all(masks):
        raise ValueError("either all batches with images have an image_mask or none")
    return PackedBatch(
        images=join("images"),
        image_mask=join("image_mask"),
        text_ids=join("text_ids"),
        text_positions=join("text_positions"),
        text_lengths=tuple(length for batch in batches for length in batch.text_lengths),
        num_pairs=sum(batch.num_pairs for batch in batches),
    )


def _images(batch: PackedBatch) -> Tensor:
    return torch.empty(0) if batch.images is None else batch.images
