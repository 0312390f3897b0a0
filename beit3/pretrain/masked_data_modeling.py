"""Masked data modeling: BEiT-3's one objective over images, texts and pairs (arXiv 2208.10442, section 3).

Shapes: Bi images, Bt texts, N patches, K codes, V vocabulary, Nv and Nt rows of the packed streams,
M hidden patches and Mw hidden words of the batch.

    loss = sum over parts p of  weight_p * mean over hidden positions of -log softmax(head(state))[target]
    parts: patches of images, patches of pairs (targets: VQ-KD codes), words of texts, words of pairs

Heads and losses touch hidden positions only. All three streams go through the model in one pass.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.config import Run, TaskConfig, config, require
from beit3.data.images import decode_image
from beit3.data.shards import Sample, load_prepared
from beit3.data.streams import Stream, StreamLoader
from beit3.data.texts import clean_text
from beit3.data.transforms import CropConfig, EvalResize, RandomCrop, Views, normalize
from beit3.errors import BadSampleError
from beit3.model.flops import forward_flops
from beit3.model.heads import PretrainingModel
from beit3.model.packing import PackedBatch, concat
from beit3.model.presets import ModelConfig
from beit3.pretrain.export import export_model
from beit3.pretrain.masking import MaskConfig, MaskedText, block_mask, mask_text
from beit3.tokenizer.text import TextTokenizer
from beit3.tokenizer.vqkd import VQKD
from beit3.train.task import Loader, Task, Work

Kind = Literal["pairs", "images", "texts"]
_ORDER: tuple[Kind, ...] = ("pairs", "images", "texts")
_IGNORE = -100
_BUCKET = 64
"""Numbers of hidden words are rounded up to a multiple of this, so that shapes repeat."""


@config
class MaskedDataModelingConfig(TaskConfig):
    """Model, tokenizers, streams and masks of masked data modeling."""

    model: ModelConfig
    visual_tokenizer: Path
    """Exchange folder of a VQ-KD tokenizer; its grid must be the model's."""
    text_tokenizer: Path
    """A `.spm` file."""
    pairs: Stream | None = None
    images: Stream | None = None
    texts: Stream | None = None
    crop: CropConfig
    pair_flip: float = 0.0
    """Probability of mirroring the image of a pair: captions may name sides, so 0."""
    max_text_length: int = 64
    """Longest text in ids; longer ones are cut."""
    mask: MaskConfig = MaskConfig()
    image_weight: float = 1.0
    text_weight: float = 1.0
    pair_image_weight: float = 1.0
    pair_text_weight: float = 1.0
    eval_pairs: str | None = None
    """Prepared folder of pairs to evaluate on, relative to the run's data folder."""
    eval_batch_size: int = 128

    def __post_init__(self) -> None:
        require(
            any((self.pairs, self.images, self.texts)),
            "masked data modeling needs at least one of pairs, images, texts",
        )
        require(
            (self.crop.size, self.crop.size) == self.model.image_size,
            f"crop.size ({self.crop.size}) must be the model's image_size {self.model.image_size}",
        )
        require(
            2 < self.max_text_length <= self.model.max_text_length,
            f"max_text_length must lie in 3..{self.model.max_text_length}, not {self.max_text_length}",
        )

    def build(self, run: Run) -> MaskedDataModeling:
        """Build the Task with random weights."""
        return MaskedDataModeling(self)


@dataclass(frozen=True, slots=True)
class MaskedBatch:
    """Sequences with hidden parts, and what is hidden."""

    packed: PackedBatch
    """Images are uint8 here."""
    tokenizer_images: Tensor | None
    """(Bi, 3, S', S') uint8, the same crops for the visual tokenizer; None: the model's own images."""
    patch_rows: Tensor
    """(M,) int64, rows of the vision stream with hidden patches, equally many of every image."""
    word_rows: Tensor
    """(Mw,) int64, rows of the text stream with hidden words; padding points at row 0."""
    words: Tensor
    """(Mw,) int64 hidden words; -100 = padding."""
    pair_words: int
    """Hidden words, padding included, that belong to pairs: they come first."""


@dataclass(frozen=True, slots=True)
class _Encoded:
    views: Views | None
    mask: Tensor | None
    text: MaskedText | None


class MaskedEncoder:
    """Turns samples of one stream into masked batches; draws crops and masks.

    Args:
        kind: which parts of a sample are used.
        config: of the Task.
        tokenizer: for texts.
        view: picture to tensors.
    """

    def __init__(
        self,
        kind: Kind,
        config: MaskedDataModelingConfig,
        tokenizer: TextTokenizer,
        view: Callable[[Any], Views],
    ) -> None:
        self._kind = kind
        self._config = config
        self._tokenizer = tokenizer
        self._view = view

    def encode(self, sample: Sample) -> _Encoded:
        """Decode, crop, tokenize and mask one sample."""
        views = mask = text = None
        masks, grid = self._config.mask, self._config.model.grid
        if self._kind != "texts":
            if sample.image is None:
                raise BadSampleError("missing_image", sample.key)
            views = self._view(decode_image(sample.image))
            hidden = block_mask(grid, masks.num_patches(grid), masks.smallest_block)
            mask = torch.from_numpy(hidden.reshape(-1))
        if self._kind != "images":
            ids = self._tokenizer.encode(clean_text(sample.text), self._config.max_text_length)
            text = mask_text(ids, masks.pair_words if self._kind == "pairs" else masks.words, self._tokenizer, masks)
        return _Encoded(views, mask, text)

    def collate(self, samples: list[_Encoded]) -> MaskedBatch:
        """Pack samples, shortest text first."""
        if self._kind != "images":
            samples = sorted(samples, key=lambda sample: len(sample.text.ids) if sample.text else 0)
        images = mask = tokenizer_images = None
        if self._kind != "texts":
            views = [sample.views for sample in samples if sample.views is not None]
            images = torch.stack([view.image for view in views])
            second = [view.tokenizer_image for view in views if view.tokenizer_image is not None]
            tokenizer_images = torch.stack(second) if second else None
            mask = torch.stack([sample.mask for sample in samples if sample.mask is not None])
        texts = [sample.text for sample in samples if sample.text is not None]
        word_rows, words = _word_targets(texts)
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
            patch_rows=_patch_rows(mask),
            word_rows=word_rows,
            words=words,
            pair_words=len(words) if self._kind == "pairs" else 0,
        )


class MaskedDataModeling(Task[MaskedBatch]):
    """Predict visual tokens and words that are hidden."""

    def __init__(self, config: MaskedDataModelingConfig) -> None:
        super().__init__()
        self.config = config
        self.text_tokenizer = TextTokenizer.load(config.text_tokenizer)
        visual_tokenizer = VQKD.load(config.visual_tokenizer)
        grid = visual_tokenizer.config.grid
        require(
            grid == config.model.grid,
            f"the visual tokenizer {config.visual_tokenizer} has a grid of {grid} codes, the model one of "
            f"{config.model.grid} patches: choose crop.tokenizer_size and model sizes that agree",
        )
        require(
            visual_tokenizer.config.image_size[0] == (config.crop.tokenizer_size or config.crop.size),
            f"crop.tokenizer_size must be the visual tokenizer's image size {visual_tokenizer.config.image_size}",
        )
        require(
            len(self.text_tokenizer) <= config.model.vocab_size,
            f"{config.text_tokenizer} has {len(self.text_tokenizer)} ids, the model {config.model.vocab_size}",
        )
        self.model = PretrainingModel(config.model, visual_tokenizer.config.codebook_size)
        _freeze_unreached(self.model, config)
        # Outside the module tree: frozen, with a file of its own, it belongs in no checkpoint.
        self._outside = (visual_tokenizer,)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedDataModeling:
        """Let the visual tokenizer follow to another device."""
        self._outside[0]._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def visual_tokenizer(self) -> VQKD:
        """The frozen tokenizer that makes the targets."""
        return self._outside[0]

    def train_loader(self, run: Run, rank: int, world_size: int) -> Loader[MaskedBatch]:
        """One batch of every stream for each step, joined."""
        streams = {kind: stream for kind in _ORDER if (stream := getattr(self.config, kind)) is not None}
        crop = self.config.crop
        pair_crop = dataclasses.replace(crop, flip=self.config.pair_flip)
        encoders: dict[str, MaskedEncoder] = {
            kind: MaskedEncoder(
                kind, self.config, self.text_tokenizer, RandomCrop(pair_crop if kind == "pairs" else crop)
            )
            for kind in streams
        }
        loader: StreamLoader[MaskedBatch] = StreamLoader(
            {str(kind): stream for kind, stream in streams.items()},
            encoders,
            data=run.data,
            seed=run.seed,
            rank=rank,
            world_size=world_size,
            num_workers=run.loop.num_workers,
        )
        return Joined(loader)

    def forward(self, batch: MaskedBatch) -> dict[str, Tensor]:
        """Losses and accuracies of all parts of the batch."""
        packed = batch.packed
        states = self.model.backbone.forward_packed(
            packed if packed.images is None else dataclasses.replace(packed, images=normalize(packed.images))
        )
        values: dict[str, Tensor] = {}
        if packed.images is not None:
            codes = self.hidden_codes(batch)
            logits = self.model.mim_head(states.vision[batch.patch_rows])  # (M, K)
            paired = packed.num_pairs * (len(codes) // packed.images.shape[0])
            values |= _part("pair_mim", logits[:paired], codes[:paired])
            values |= _part("mim", logits[paired:], codes[paired:])
        if packed.text_ids is not None:
            logits = self.model.mlm_head(states.text[batch.word_rows])
            values |= _part("pair_mlm", logits[: batch.pair_words], batch.words[: batch.pair_words])
            values |= _part("mlm", logits[batch.pair_words :], batch.words[batch.pair_words :])
        weights = {
            "mim_loss": self.config.image_weight,
            "mlm_loss": self.config.text_weight,
            "pair_mim_loss": self.config.pair_image_weight,
            "pair_mlm_loss": self.config.pair_text_weight,
        }
        parts = [weight * values[name] for name, weight in weights.items() if name in values]
        return {"loss": torch.stack(parts).sum(), **values}

    @torch.no_grad()
    def hidden_codes(self, batch: MaskedBatch) -> Tensor:
        """Visual tokens (M,) of the hidden patches."""
        images = batch.packed.images if batch.tokenizer_images is None else batch.tokenizer_images
        assert images is not None
        codes = self.visual_tokenizer.tokenize(images.float() / 255)
        image, row = batch.patch_rows // (codes.shape[1] + 1), batch.patch_rows % (codes.shape[1] + 1)
        return codes[image, row - 1]

    def work(self, batch: MaskedBatch) -> Work:
        """Images, tokens and useful operations of a step; the visual tokenizer's are not counted."""
        packed, model = batch.packed, self.config.model
        num_images = 0 if packed.images is None else packed.images.shape[0]
        layout = packed.layout(model.patch_size)
        flops = 3 * forward_flops(
            model,
            layout,
            masked_patches=num_images * self.config.mask.num_patches(model.grid),
            masked_words=len(batch.words),
            codebook_size=self.visual_tokenizer.config.codebook_size,
        )
        return Work(num_images, num_images * layout.vision_length + sum(packed.text_lengths), flops)

    def move(self, batch: MaskedBatch, device: torch.device) -> MaskedBatch:
        """Copy a batch to the device."""
        tokenizer_images = batch.tokenizer_images
        return dataclasses.replace(
            batch,
            packed=batch.packed.to(device),
            tokenizer_images=None if tokenizer_images is None else tokenizer_images.to(device),
            patch_rows=batch.patch_rows.to(device),
            word_rows=batch.word_rows.to(device),
            words=batch.words.to(device),
        )

    def save(self, folder: Path) -> None:
        """Write the model with its text tokenizer and preprocessing."""
        export_model(self.model, self.text_tokenizer, self.config.max_text_length, folder)

    def eval_loader(self, run: Run) -> Iterable[MaskedBatch] | None:
        """Held-out pairs under fixed masks."""
        if self.config.eval_pairs is None:
            return None
        size = self.config.crop.tokenizer_size
        first, second = EvalResize(self.config.model.image_size), EvalResize(size or 1)
        encoder = MaskedEncoder(
            "pairs",
            self.config,
            self.text_tokenizer,
            lambda image: Views(first(image), second(image) if size else None),
        )
        return _fixed_batches(run.data / self.config.eval_pairs, encoder, self.config.eval_batch_size, run.seed)

    def evaluate(self, loader: Iterable[MaskedBatch]) -> dict[str, float]:
        """Masked patches and words of held-out pairs, with the right picture, a wrong one, and none.

        Returns:
            `mim_accuracy` and `mim_loss` beside `commonest_code` (what always naming the commonest hidden code
            scores); `mlm_loss_right_picture`, `_wrong_picture`, `_no_picture` and the accuracies of the same names.
        """
        sums: dict[str, float] = {}
        hidden_codes: list[Tensor] = []
        words = 0

        def add(name: str, value: Tensor) -> None:
            sums[name] = sums.get(name, 0.0) + float(value)

        for batch in loader:
            packed = batch.packed
            assert packed.images is not None
            hidden_codes.append(self.hidden_codes(batch))
            turned = packed.images.roll(max(1, len(packed.images) // 2), dims=0)
            kinds = {
                "right_picture": packed,
                "wrong_picture": dataclasses.replace(packed, images=turned),
                "no_picture": dataclasses.replace(packed, images=None, image_mask=None, num_pairs=0),
            }
            real = batch.words != _IGNORE
            words += int(real.sum())
            for name, view in kinds.items():
                if view.images is not None:
                    view = dataclasses.replace(view, images=normalize(view.images))
                states = self.model.backbone.forward_packed(view)
                logits = self.model.mlm_head(states.text[batch.word_rows[real]]).float()
                add(f"mlm_loss_{name}", F.cross_entropy(logits, batch.words[real], reduction="sum"))
                add(f"mlm_accuracy_{name}", (logits.argmax(-1) == batch.words[real]).sum())
                if name == "right_picture":
                    logits = self.model.mim_head(states.vision[batch.patch_rows]).float()
                    add("mim_loss", F.cross_entropy(logits, hidden_codes[-1], reduction="sum"))
                    add("mim_accuracy", (logits.argmax(-1) == hidden_codes[-1]).sum())
        codes = torch.cat(hidden_codes)
        means = {name: value / (words if name.startswith("mlm") else len(codes)) for name, value in sums.items()}
        return {**means, "commonest_code": float(codes.bincount().max()) / len(codes)}


class Joined:
    """A StreamLoader whose streams become one batch."""

    def __init__(self, loader: StreamLoader[MaskedBatch]) -> None:
        self._loader = loader

    @property
    def skipped(self) -> Counter[str]:
        """Samples left out so far, by stream and reason."""
        return self._loader.skipped

    def __iter__(self) -> Iterator[MaskedBatch]:
        for batches in self._loader:
            yield join_batches([batches[kind] for kind in _ORDER if kind in batches])

    def state_dict(self) -> dict[str, Any]:
        """The streams' position."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position."""
        self._loader.load_state_dict(state)


def join_batches(batches: list[MaskedBatch]) -> MaskedBatch:
    """Join the batches of the streams into one, pairs first."""
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
    return MaskedBatch(
        packed=concat([batch.packed for batch in batches]),
        tokenizer_images=torch.cat(seconds) if seconds else None,
        patch_rows=torch.cat(patch_rows),
        word_rows=torch.cat(word_rows),
        words=torch.cat([batch.words for batch in batches]),
        pair_words=sum(batch.pair_words for batch in batches),
    )


def _freeze_unreached(model: PretrainingModel, config: MaskedDataModelingConfig) -> None:
    """Parts that no stream reaches keep their weights; several ranks would wait for their gradients in vain."""
    backbone, pairs = model.backbone, config.pairs is not None
    for name, alone, head in (("vision", config.images, model.mim_head), ("text", config.texts, model.mlm_head)):
        used = pairs or alone is not None
        parts = [] if used else [head, getattr(backbone, f"{name}_embedding"), *_part_of(backbone.norm, name)]
        for block in backbone.layers():
            if not used:
                parts += [*_part_of(block.attention_in, name), *_part_of(block.attention_out, name)]
            if alone is None and (not pairs or "fusion" in block.ffn):
                parts.append(block.ffn[name])
            if not pairs:
                parts += _part_of(block.ffn, "fusion")
        for part in parts:
            part.requires_grad_(False)


def _part_of(experts: nn.ModuleDict, name: str) -> list[nn.Module]:
    return [experts[name]] if name in experts else []


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
        words + [_IGNORE] * padding, dtype=torch.int64
    )


def _part(name: str, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Mean loss and accuracy over one part's hidden positions; nothing for an empty part."""
    if not targets.numel():
        return {}
    real = (targets != _IGNORE).sum().clamp_min(1)
    loss = F.cross_entropy(logits.float(), targets, ignore_index=_IGNORE, reduction="sum") / real
    accuracy = (logits.detach().argmax(-1) == targets).sum() / real
    return {f"{name}_loss": loss, f"{name}_accuracy": accuracy}


def _fixed_batches(folder: Path, encoder: MaskedEncoder, size: int, seed: int) -> Iterable[MaskedBatch]:
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
    return [batch for batch in batches if batch.packed.num_pairs > 1]
