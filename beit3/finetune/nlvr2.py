"""Natural language for visual reasoning: is a sentence true of two pictures (BEiT-3 on NLVR2)?

Shapes: B sentences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from beit3.config import config
from beit3.data.index_files import Index, NLVR2Row, encode_text, read_index, read_picture
from beit3.finetune.common import Predictions, TextBatch, TextFinetuneConfig, TextFinetuneTask, pad_texts
from beit3.metrics.accuracy import nlvr2_accuracy
from beit3.model.heads import NLVR2Model
from beit3.model.memory import BatchSizes
from beit3.model.packing import Layout
from beit3.tokenizer.text import TextTokenizer


@config
class NLVR2Config(TextFinetuneConfig):
    """Nothing beyond what all tasks with texts have."""

    @property
    def sizes(self) -> BatchSizes:
        """A batch: each sentence goes with either picture."""
        return self.sizes_with(NLVR2Model, (dataclasses.replace(self.pairs, count=2 * self.batch_size),))

    def build(self) -> NLVR2:
        """Build the Task, with random or given weights."""
        return NLVR2(self)


@dataclass(frozen=True, slots=True)
class NLVR2Batch(TextBatch):
    """Sentences about two pictures each; images are (B, 2, 3, H, W), left and right."""

    labels: Tensor
    """(B,) int64, 1 = true"""
    identifiers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Example:
    images: Tensor
    ids: list[int]
    row: NLVR2Row


class _Examples:
    def __init__(
        self,
        index: Index[NLVR2Row],
        view: Callable[[Image.Image], Tensor],
        tokenizer: TextTokenizer,
        max_length: int,
    ) -> None:
        self.index = index
        self._view = view
        self._tokenizer = tokenizer
        self._max_length = max_length

    def __len__(self) -> int:
        return len(self.index)

    def load(self, index: int) -> _Example:
        """Read and prepare one example."""
        row = self.index[index]
        images = [self._view(read_picture(path)) for path in (row.image_path, row.image2_path)]
        return _Example(torch.stack(images), encode_text(row.text, self._tokenizer, self._max_length), row)

    def collate(self, examples: list[_Example]) -> NLVR2Batch:
        """Lay examples side by side."""
        ids, mask = pad_texts([example.ids for example in examples])
        images = torch.stack([example.images for example in examples])
        labels = torch.tensor([example.row.label for example in examples])
        return NLVR2Batch(images, ids, mask, labels, tuple(example.row.identifier for example in examples))


class NLVR2(TextFinetuneTask[NLVR2Config, NLVR2Batch]):
    """Judge sentences about two pictures."""

    kind = NLVR2Model

    def __init__(self, config: NLVR2Config, model: NLVR2Model | None = None) -> None:
        super().__init__(config, model)
        self.model.backbone.freeze_unreached(images=False, texts=False, pairs=True)

    def examples(self, paths: Sequence[Path], *, training: bool) -> _Examples:
        """Sentences of index files."""
        view = self.training_view if training else self.preprocess
        return _Examples(read_index(paths, NLVR2Row), view, self.text_tokenizer, self.config.max_text_length)

    def forward(self, batch: NLVR2Batch) -> dict[str, Tensor]:
        """Cross-entropy of true and false."""
        logits = self.model(self.pixels(batch), batch.text_ids, batch.text_mask).float()
        accuracy = (logits.argmax(1) == batch.labels).float().mean()
        return {"loss": F.cross_entropy(logits, batch.labels), "accuracy": accuracy}

    def layout(self, batch: NLVR2Batch) -> Layout:
        """Each sentence goes twice, with either picture."""
        count = 2 * len(batch.images)
        return Layout.build(count, 1 + self.config.model.num_patches, batch.lengths * 2, count)

    def predict(self, batch: NLVR2Batch) -> Predictions:
        """The probability that each sentence is true."""
        chances = self.model(self.pixels(batch), batch.text_ids, batch.text_mask).float().softmax(1)[:, 1]
        return [
            {"identifier": identifier, "label": label, "probability": chance}
            for identifier, label, chance in zip(
                batch.identifiers, batch.labels.tolist(), chances.tolist(), strict=True
            )
        ]

    def measure(self, predictions: Predictions) -> dict[str, float]:
        """Accuracy, and the share of sentences judged right with all their pictures."""
        right = [(row["probability"] > 0.5) == bool(row["label"]) for row in predictions]
        return nlvr2_accuracy(right, [row["identifier"] for row in predictions])
