"""Batches with hidden parts: from samples of one stream to the joined batch of all three.

Shapes: Bi images, N patches, S and S' sides of a picture for the model and the visual tokenizer,
M hidden patches and Mw hidden words of a batch.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from beit3.data.images import decode_image
from beit3.data.shards import Sample, load_prepared
from beit3.data.texts import clean_text
from beit3.data.transforms import CropConfig, RandomCrop, Views
from beit3.data.visual_codes import CodeTable, draw_crop
from beit3.errors import BadSampleError
from beit3.model.packing import PackedBatch, concat
from beit3.pretrain.masking import MaskConfig, MaskedText, block_mask, mask_text
from beit3.tokenizer.text import TextTokenizer
from beit3.tokenizer.vqkd import VQKD

Kind = Literal["pairs", "images", "texts"]
KINDS: tuple[Kind, ...] = ("pairs", "images", "texts")
"""In the order of a joined batch: pairs lead."""
IGNORE = -100
"""Target of padding."""
_TENSORS = ("tokenizer_images", "codes", "patch_rows", "word_rows", "words")
_BUCKET = 64
"""Numbers of hidden words are rounded up to a multiple of this, so that shapes repeat."""


@dataclass(frozen=True, slots=True)
class MaskedBatch:
    """Sequences with hidden parts, and what is hidden."""

    packed: PackedBatch
    """Images are uint8 here."""
    tokenizer_images: Tensor | None
    """(Bi, 3, S', S') uint8, the same crops for the visual tokenizer; None: the model's own images."""
    codes: Tensor | None
    """(M,) int64 visual tokens of the hidden patches where they were recorded; None: the tokenizer makes them."""
    patch_rows: Tensor
    """(M,) int64, rows of the vision stream with hidden patches, equally many of every image."""
    word_rows: Tensor
    """(Mw,) int64, rows of the text stream with hidden words; padding points at row 0."""
    words: Tensor
    """(Mw,) int64 hidden words; -100 = padding."""
    pair_words: int
    """Hidden words, padding included, that belong to pairs: they come first."""
    hidden_words: tuple[int, int]
    """Hidden words of pairs, and of texts alone, without padding."""
    mean_words: tuple[float, float] | None = None
    """Hidden words of pairs, and of texts alone, of one batch of the step, on average over its batches and all ranks:
    then their losses add up to the mean over all words of the step. None: those of this batch."""

    def to(self, device: torch.device) -> MaskedBatch:
        """Copy the tensors to a device."""
        values = {name: value for name in _TENSORS if (value := getattr(self, name)) is not None}
        moved = {name: value.to(device) for name, value in values.items()}
        return dataclasses.replace(self, packed=self.packed.to(device), **moved)


@dataclass(frozen=True, slots=True)
class _Encoded:
    views: Views | None = None
    codes: Tensor | None = None
    mask: Tensor | None = None
    text: MaskedText | None = None


class MaskedEncoder:
    """Turns samples of one stream into masked batches; draws crops and masks.

    Args:
        kind: which parts of a sample are used.
        tokenizer: for texts; None where there are none.
        view: picture to tensors.
        codes: recorded visual tokens by the path of the source; then crops are the recorded ones. Empty: none.
        masks: how much is hidden.
        grid: rows and columns of patches.
        max_text_length: most ids of a text.
    """

    def __init__(
        self,
        kind: Kind,
        tokenizer: TextTokenizer | None,
        view: Callable[[Image.Image], Views],
        *,
        codes: Mapping[str, CodeTable],
        masks: MaskConfig,
        grid: tuple[int, int],
        max_text_length: int,
    ) -> None:
        self._kind = kind
        self._tokenizer = tokenizer
        self._view = view
        self._codes = codes
        self._masks = masks
        self._grid = grid
        self._max_text_length = max_text_length

    def encode(self, sample: Sample) -> _Encoded:
        """Decode, crop, tokenize and mask one sample."""
        views = codes = mask = text = None
        masks, grid = self._masks, self._grid
        if self._kind != "texts":
            if sample.image is None:
                raise BadSampleError("missing_image", sample.key)
            views, codes = self._look(sample, decode_image(sample.image))
            hidden = block_mask(grid, masks.num_patches(grid), masks.smallest_block)
            mask = torch.from_numpy(hidden.reshape(-1))
        if self._kind != "images":
            assert self._tokenizer is not None
            ids = self._tokenizer.encode(clean_text(sample.text), self._max_text_length)
            text = mask_text(ids, masks.pair_words if self._kind == "pairs" else masks.words, self._tokenizer, masks)
        return _Encoded(views, codes, mask, text)

    def _look(self, sample: Sample, image: Image.Image) -> tuple[Views, Tensor | None]:
        """A new crop, or a recorded one with its codes (N,)."""
        if not self._codes:
            return self._view(image), None
        crops = self._codes[sample.source].find(sample.key)
        crop = crops[random.randrange(len(crops))]
        views = draw_crop(self._view, image, int(crop["seed"]))
        if views.box != tuple(crop["box"].tolist()):
            raise BadSampleError("stale_crop", f"{sample.key}: its seed gives {views.box}, recorded {crop['box']}")
        return views, torch.from_numpy(crop["codes"].astype(np.int64))

    def collate(self, samples: list[_Encoded]) -> MaskedBatch:
        """Pack samples, shortest text first."""
        if self._kind != "images":
            samples = sorted(samples, key=lambda sample: len(sample.text.ids) if sample.text else 0)
        images = mask = codes = tokenizer_images = None
        if self._kind != "texts":
            views = [sample.views for sample in samples if sample.views is not None]
            images = torch.stack([view.image for view in views])
            second = [view.tokenizer_image for view in views if view.tokenizer_image is not None]
            tokenizer_images = torch.stack(second) if second else None
            mask = torch.stack([sample.mask for sample in samples if sample.mask is not None])
            recorded = [sample.codes for sample in samples if sample.codes is not None]
            codes = torch.stack(recorded)[mask] if recorded else None
        texts = [sample.text for sample in samples if sample.text is not None]
        word_rows, words = _word_targets(texts)
        hidden = sum(len(text.places) for text in texts)
        packed = PackedBatch(
            images=images,
            image_mask=mask,
            text_ids=torch.tensor([i for text in texts for i in text.ids], dtype=torch.int64) if texts else None,
            text_positions=torch.cat([torch.arange(len(text.ids)) for text in texts]) if texts else None,
            text_lengths=tuple(len(text.ids) for text in texts),
            num_pairs=len(samples) if self._kind == "pairs" else 0,
        )
        return MaskedBatch(
            packed=packed,
            tokenizer_images=tokenizer_images,
            codes=codes,
            patch_rows=_patch_rows(mask),
            word_rows=word_rows,
            words=words,
            pair_words=len(words) if self._kind == "pairs" else 0,
            hidden_words=(hidden, 0) if self._kind == "pairs" else (0, hidden),
        )

    def join(self, units: list[MaskedBatch]) -> MaskedBatch:
        """Lay units one behind the other; each has its own texts shortest first."""
        return join_batches(units)


def training_crop(crop: CropConfig, codes: Mapping[str, CodeTable]) -> RandomCrop:
    """How a stream draws crops; where codes are recorded, nobody looks at the tokenizer's size."""
    return RandomCrop(dataclasses.replace(crop, tokenizer_size=None) if codes else crop)


def join_streams(batches: Mapping[str, MaskedBatch]) -> MaskedBatch:
    """Join one batch of each stream into one."""
    return join_batches([batches[kind] for kind in KINDS if kind in batches])


def join_batches(batches: list[MaskedBatch]) -> MaskedBatch:
    """Join batches of one stream or of several into one, those of pairs first."""
    patch_rows: list[Tensor] = []
    word_rows: list[Tensor] = []
    vision = text = 0
    for batch in batches:
        patch_rows.append(batch.patch_rows + vision)
        word_rows.append(batch.word_rows + text)
        if batch.packed.image_mask is not None:
            vision += batch.packed.image_mask.numel() + len(batch.packed.image_mask)
        text += sum(batch.packed.text_lengths)
    seconds = [batch.tokenizer_images for batch in batches if batch.tokenizer_images is not None]
    codes = [batch.codes for batch in batches if batch.codes is not None]
    return MaskedBatch(
        packed=concat([batch.packed for batch in batches]),
        tokenizer_images=torch.cat(seconds) if seconds else None,
        codes=torch.cat(codes) if codes else None,
        patch_rows=torch.cat(patch_rows),
        word_rows=torch.cat(word_rows),
        words=torch.cat([batch.words for batch in batches]),
        pair_words=sum(batch.pair_words for batch in batches),
        hidden_words=_sum_words(batches),
    )


def average_words(batches: Sequence[MaskedBatch]) -> list[MaskedBatch]:
    """Note in all batches of an optimizer step how many hidden words they have on average, over all ranks."""
    counts = torch.tensor(_sum_words(batches))
    ranks = 1
    if dist.is_initialized():
        ranks = dist.get_world_size()
        dist.all_reduce(counts)
    pairs, texts = (float(count) / (ranks * len(batches)) for count in counts)
    return [dataclasses.replace(batch, mean_words=(pairs, texts)) for batch in batches]


def _sum_words(batches: Sequence[MaskedBatch]) -> tuple[int, int]:
    """Hidden words of pairs, and of texts alone."""
    pairs, texts = zip(*(batch.hidden_words for batch in batches), strict=True)
    return sum(pairs), sum(texts)


@torch.no_grad()
def hidden_codes(batch: MaskedBatch, tokenizer: VQKD) -> Tensor:
    """Visual tokens (M,) of the hidden patches: recorded ones, or the tokenizer's."""
    if batch.codes is not None:
        return batch.codes
    images = batch.packed.images if batch.tokenizer_images is None else batch.tokenizer_images
    assert images is not None
    codes = tokenizer.tokenize(images)
    image, row = batch.patch_rows // (codes.shape[1] + 1), batch.patch_rows % (codes.shape[1] + 1)
    return codes[image, row - 1]


def _patch_rows(mask: Tensor | None) -> Tensor:
    """Rows of hidden patches in the vision stream, where every image takes 1 + N rows; mask is (Bi, N) bool."""
    if mask is None:
        return torch.empty(0, dtype=torch.int64)
    image, patch = mask.nonzero(as_tuple=True)
    return image * (mask.shape[1] + 1) + 1 + patch


def _word_targets(texts: list[MaskedText]) -> tuple[Tensor, Tensor]:
    """Rows and targets of all hidden words of packed texts, padded to a multiple of the bucket."""
    rows: list[int] = []
    words: list[int] = []
    start = 0
    for text in texts:
        rows += [start + place for place in text.places]
        words += text.targets
        start += len(text.ids)
    padding = -len(rows) % _BUCKET if rows or not texts else _BUCKET  # texts without words keep the head in use
    return torch.tensor(rows + [0] * padding, dtype=torch.int64), torch.tensor(
        words + [IGNORE] * padding, dtype=torch.int64
    )


def fixed_batches(folder: Path, encoder: MaskedEncoder, size: int, seed: int) -> Iterable[MaskedBatch]:
    """Batches of a prepared folder in order, under masks that depend on the seed alone."""
    outer = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        encoded = [encoder.encode(sample) for sample in load_prepared(folder)]
        batches = [encoder.collate(encoded[start : start + size]) for start in range(0, len(encoded), size)]
    finally:
        random.setstate(outer[0])
        np.random.set_state(outer[1])
    return batches
