"""Captioning by masked words under the sequence-to-sequence mask (BEiT-3 on COCO and NoCaps).

Shapes: B captions, M masked words of the batch, V vocabulary.

    q = 1 - e for the hidden word, e / (V - 1) for every other;   loss = mean KL(q || p)
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from beit3.config import config, require
from beit3.data.index_files import CaptioningRow, CaptioningTrainingRow, Index, encode_text, read_index, read_picture
from beit3.finetune.common import Predictions, TextBatch, TextFinetuneConfig, TextFinetuneTask, pad_texts
from beit3.metrics.caption_scores import caption_scores
from beit3.model.heads import CaptioningModel
from beit3.model.memory import BatchSizes, Head
from beit3.model.packing import PackedBatch, pack_texts
from beit3.model.presets import PAD, UNK
from beit3.tokenizer.text import TextTokenizer


@config
class CaptioningConfig(TextFinetuneConfig):
    """Masks, loss and search."""

    max_text_length: int = 32
    mask_probability: float = 0.7
    """Share of a caption's places that are hidden (`</s>` may be one of them, `<s>` never)."""
    label_smoothing: float = 0.1
    """Probability that the target spreads over all other words."""
    drop_worst: float = 0.2
    """Share of the hidden words, those of the largest loss, that are left out once `drop_worst_after` is over."""
    drop_worst_after: int = 12_000
    """Batches after which the worst words are left out."""
    num_beams: int = 3
    length_penalty: float = 0.6

    def __post_init__(self) -> None:
        TextFinetuneConfig.__post_init__(self)
        require(0 < self.mask_probability <= 1, f"mask_probability must lie in 0..1, not {self.mask_probability}")
        for name in ("label_smoothing", "drop_worst"):
            require(0 <= getattr(self, name) < 1, f"{name} must lie in 0..1, not {getattr(self, name)}")

    @property
    def sizes(self) -> BatchSizes:
        """A batch."""
        hidden = self.batch_size * max(1, round(self.mask_probability * self.pairs.text))
        head = Head(hidden, self.model.width, self.model.vocab_size)
        return self.sizes_with(CaptioningModel, (self.pairs,), (head,), "vision")

    def build(self) -> Captioning:
        """Build the Task, with random or given weights."""
        return Captioning(self)


@dataclass(frozen=True, slots=True)
class CaptionBatch(TextBatch):
    """Pictures with captions in which words are hidden; for evaluation the texts are empty."""

    hidden: Tensor
    """(B, T) bool, places to predict"""
    words: Tensor
    """(M,) int64, what stood there, row by row"""
    rows: tuple[CaptioningRow, ...] = ()
    """Pictures to be captioned."""


@dataclass(frozen=True, slots=True)
class _Example:
    image: Tensor
    ids: list[int]
    """As the model sees them."""
    hidden: dict[int, int]
    """Place and word."""


class _Captions:
    """Captions to train on."""

    def __init__(
        self,
        index: Index[CaptioningTrainingRow],
        view: Callable[[Image.Image], Tensor],
        tokenizer: TextTokenizer,
        max_length: int,
        mask_probability: float,
    ) -> None:
        self.index = index
        self._view = view
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._mask_probability = mask_probability

    def __len__(self) -> int:
        return len(self.index)

    def load(self, index: int) -> _Example:
        """Read and prepare one example."""
        row = self.index[index]
        ids = encode_text(row.text, self._tokenizer, self._max_length)
        seen, hidden = hide_words(ids, self._mask_probability, self._tokenizer.mask_id)
        return _Example(self._view(read_picture(row.image_path)), seen, hidden)

    def collate(self, examples: list[_Example]) -> CaptionBatch:
        """Lay examples side by side."""
        ids, mask = pad_texts([example.ids for example in examples])
        hidden = torch.zeros_like(mask)
        for row, example in zip(hidden, examples, strict=True):
            row[sorted(example.hidden)] = True
        words = [example.hidden[place] for example in examples for place in sorted(example.hidden)]
        images = torch.stack([example.image for example in examples])
        return CaptionBatch(images, ids, mask, hidden, torch.tensor(words))


class _Pictures:
    """Pictures to caption."""

    def __init__(self, index: Index[CaptioningRow], view: Callable[[Image.Image], Tensor]) -> None:
        self.index = index
        self._view = view

    def __len__(self) -> int:
        return len(self.index)

    def load(self, index: int) -> tuple[Tensor, CaptioningRow]:
        """Read and prepare one example."""
        row = self.index[index]
        return self._view(read_picture(row.image_path)), row

    def collate(self, examples: list[tuple[Tensor, CaptioningRow]]) -> CaptionBatch:
        """Lay examples side by side."""
        nothing = torch.zeros(len(examples), 0)
        images = torch.stack([image for image, _ in examples])
        rows = tuple(row for _, row in examples)
        return CaptionBatch(images, nothing.long(), nothing.bool(), nothing.bool(), torch.zeros(0).long(), rows)


class Captioning(TextFinetuneTask[CaptioningConfig, CaptionBatch]):
    """Describe pictures."""

    kind = CaptioningModel

    def __init__(self, config: CaptioningConfig, model: CaptioningModel | None = None) -> None:
        super().__init__(config, model)
        self.model.backbone.freeze_unreached(images=False, texts=False, pairs=True)
        self.model.backbone.freeze_unread("vision")
        self.batches: Tensor
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def examples(self, paths: Sequence[Path], *, training: bool) -> _Captions | _Pictures:
        """Captions of index files to train on, or pictures to caption."""
        if not training:
            return _Pictures(read_index(paths, CaptioningRow), self.preprocess)
        config = self.config
        index = read_index(paths, CaptioningTrainingRow)
        return _Captions(
            index, self.training_view, self.text_tokenizer, config.max_text_length, config.mask_probability
        )

    def forward(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Smoothed cross-entropy of the hidden words alone."""
        ids, positions, lengths, order = pack_texts(batch.text_ids, batch.text_mask)
        packed = PackedBatch(
            images=self.pixels(batch)[order],
            text_ids=ids,
            text_positions=positions,
            text_lengths=lengths,
            num_pairs=len(batch.images),
        )
        states = self.model.backbone.forward_packed(packed, causal_text=True).text
        words = torch.zeros_like(batch.text_ids).masked_scatter(batch.hidden, batch.words)
        rows = batch.hidden[order][batch.text_mask[order]]  # (Nt,)
        targets = words[order][batch.text_mask[order]][rows]
        logits = self.model.mlm_head(states[rows]).float()  # (M, V)
        losses = smoothed_loss(logits, targets, self.config.label_smoothing)
        if self.training:
            self.batches += 1
        if self.config.drop_worst and int(self.batches) > self.config.drop_worst_after:
            kept = max(1, int(len(losses) * (1 - self.config.drop_worst)))
            losses = losses.topk(kept, largest=False).values
        return {"loss": losses.mean(), "accuracy": (logits.argmax(1) == targets).float().mean()}

    def predict(self, batch: CaptionBatch) -> Predictions:
        """A caption for each picture."""
        found = self.model.generate(
            self.pixels(batch),
            num_beams=self.config.num_beams,
            max_length=self.config.max_text_length,
            length_penalty=self.config.length_penalty,
            mask_id=self.text_tokenizer.mask_id,
        )
        captions = [self.text_tokenizer.decode(word for word in words if word != PAD) for words in found.ids.tolist()]
        return [
            {"image_id": row.image_id, "caption": caption}
            | ({"references": list(row.captions)} if row.captions else {})
            for row, caption in zip(batch.rows, captions, strict=True)
        ]

    def measure(self, predictions: Predictions) -> dict[str, float]:
        """`measure_captions` of a whole set."""
        return measure_captions(predictions)

    def submission(self, predictions: Predictions) -> list[dict[str, Any]]:
        """What the servers of COCO's captions and of NoCaps take."""
        return [{"image_id": row["image_id"], "caption": row["caption"]} for row in predictions]


def measure_captions(predictions: Predictions) -> dict[str, float]:
    """CIDEr-D, BLEU and ROUGE-L of rows with a `caption` and, where people wrote some, `references`.

    Where that is not all of them, `judged` is their share.
    """
    judged = [row for row in predictions if row.get("references")]
    if not judged:
        return {}
    scores = caption_scores([row["caption"] for row in judged], [row["references"] for row in judged])
    return scores if len(judged) == len(predictions) else {**scores, "judged": len(judged) / len(predictions)}


def hide_words(ids: Sequence[int], probability: float, mask_id: int) -> tuple[list[int], dict[int, int]]:
    """Hide places of a caption: 80 % become `<mask>`, 10 % stay, 10 % become a random word (beit3, `datasets.py`).

    Args:
        ids: `<s>` words `</s>`; `<s>` is never hidden.
        probability: share of all places that is hidden, at least one.
        mask_id: of `<mask>`, the last id.

    Returns:
        The ids as the model sees them, and the hidden places with what stood there.
    """
    count = max(1, min(int(len(ids) * probability + 0.5), len(ids) - 1))
    seen = list(ids)
    hidden = {place: ids[place] for place in random.sample(range(1, len(ids)), count)}
    for place in hidden:
        draw = random.random()
        if draw < 0.8:
            seen[place] = mask_id
        elif draw < 0.9:
            seen[place] = random.randint(UNK, mask_id)
    return seen, hidden


def smoothed_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Kullback-Leibler divergence from the smoothed target, without writing that target down.

    Args:
        logits: (M, V).
        targets: (M,) int64.
        smoothing: e, spread evenly over the V - 1 other words.

    Returns:
        (M,).
    """
    rest = logits.shape[1] - 1
    total = logits.logsumexp(1)
    right = logits.gather(1, targets[:, None])[:, 0] - total  # log p of the word
    others = logits.sum(1) - total * logits.shape[1] - right  # sum of log p of all others
    spread = smoothing / rest
    entropy = (1 - smoothing) * math.log(1 - smoothing) + (smoothing * math.log(spread) if smoothing else 0.0)
    return entropy - (1 - smoothing) * right - spread * others
