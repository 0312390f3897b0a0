"""Visual question answering as classification over frequent answers (BEiT-3 on VQAv2).

Shapes: B questions, A answers.

    loss = A * mean BCE(logits, soft targets)        (sum over answers, mean over questions)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from beit3.config import Run, config, replace, require
from beit3.data.index_files import Index, VQARow, VQATrainingRow, encode_text, read_index, read_picture
from beit3.data.labels import find_labels, labels_beside, read_labels
from beit3.finetune.common import Predictions, TextBatch, TextFinetuneConfig, TextFinetuneTask, pad_texts
from beit3.metrics.vqa_accuracy import vqa_accuracy
from beit3.model.heads import VQAModel
from beit3.model.memory import BatchSizes, Head
from beit3.tokenizer.text import TextTokenizer
from beit3.train.task import Loader


@config
class VQAConfig(TextFinetuneConfig):
    """Answers."""

    labels: Path
    """`labels.json` (or the released `answer2label.txt`) with the answers, in the order of the index files' labels; in
    the data folder or elsewhere."""

    @property
    def sizes(self) -> BatchSizes:
        """A batch, with the 3,129 answers of VQAv2."""
        head = Head(self.batch_size, 2 * self.model.width, 3129)
        return self.sizes_with(VQAModel, (self.pairs,), (head,), "text", num_answers=3129)

    def build(self) -> VQA:
        """Build the Task, with random or given weights."""
        return VQA(self)

    def in_folder(self, data: Path) -> Self:
        """With the labels that lie in the data folder."""
        return replace(self, labels=find_labels(self.labels, data))


@dataclass(frozen=True, slots=True)
class VQABatch(TextBatch):
    """Questions about pictures."""

    targets: Tensor
    """(B, A) float32 soft scores"""
    rows: tuple[VQARow, ...]
    """What the index says of each question."""


@dataclass(frozen=True, slots=True)
class _Example:
    image: Tensor
    ids: list[int]
    row: VQARow


class _Examples:
    def __init__(
        self,
        index: Index[VQARow],
        view: Callable[[Image.Image], Tensor],
        tokenizer: TextTokenizer,
        max_length: int,
        num_answers: int,
    ) -> None:
        self.index = index
        self._view = view
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._num_answers = num_answers

    def __len__(self) -> int:
        return len(self.index)

    def load(self, index: int) -> _Example:
        """Read and prepare one example."""
        row = self.index[index]
        ids = encode_text(row.text, self._tokenizer, self._max_length)
        return _Example(self._view(read_picture(row.image_path)), ids, row)

    def collate(self, examples: list[_Example]) -> VQABatch:
        """Lay examples side by side."""
        ids, mask = pad_texts([example.ids for example in examples])
        targets = torch.zeros(len(examples), self._num_answers)
        for target, example in zip(targets, examples, strict=True):
            target[list(example.row.labels)] = torch.tensor(example.row.scores)
        images = torch.stack([example.image for example in examples])
        return VQABatch(images, ids, mask, targets, tuple(example.row for example in examples))


class VQA(TextFinetuneTask[VQAConfig, VQABatch]):
    """Answer questions about pictures."""

    kind = VQAModel

    def __init__(self, config: VQAConfig, model: VQAModel | None = None) -> None:
        answers = read_labels(config.labels)
        super().__init__(config, model, answers, num_answers=len(answers))
        self.answers = answers
        self.model.backbone.freeze_unreached(images=False, texts=False, pairs=True)
        self.model.backbone.freeze_unread("text")

    def examples(self, paths: Sequence[Path], *, training: bool) -> _Examples:
        """Questions of index files; those for training need an answer of the vocabulary."""
        kind = VQATrainingRow if training else VQARow
        index: Index[VQARow] = read_index(paths, kind, num_labels=len(self.answers))
        view = self.training_view if training else self.preprocess
        return _Examples(index, view, self.text_tokenizer, self.config.max_text_length, len(self.answers))

    def train_loader(self, run: Run, rank: int, world_size: int) -> Loader[VQABatch]:
        """Endless batches in a new order each epoch, of index files that came with the run's answers."""
        names = [*self.config.train.split(","), *([self.config.eval] if self.config.eval else [])]
        for path in (run.data / name for name in names):
            beside = labels_beside(path)
            require(
                beside is None or read_labels(beside) == self.answers,
                f"{path.name} numbers the answers of {beside}, which are others than those of {self.config.labels}: "
                f"use --task.labels {beside}",
            )
        return super().train_loader(run, rank, world_size)

    def forward(self, batch: VQABatch) -> dict[str, Tensor]:
        """Binary cross-entropy of every answer."""
        logits = self.model(self.pixels(batch), batch.text_ids, batch.text_mask).float()
        loss = F.binary_cross_entropy_with_logits(logits, batch.targets) * batch.targets.shape[1]
        score = batch.targets.gather(1, logits.argmax(1, keepdim=True)).mean()
        return {"loss": loss, "score": score}

    def predict(self, batch: VQABatch) -> Predictions:
        """The likeliest answer; the soft score it gets, and what people said, where either is known."""
        best = self.model(self.pixels(batch), batch.text_ids, batch.text_mask).float().argmax(1)
        scores = batch.targets.gather(1, best[:, None])[:, 0]
        rows: Predictions = []
        for row, number, score in zip(batch.rows, best.tolist(), scores.tolist(), strict=True):
            rows.append({"question_id": row.qid, "answer": self.answers[number]})
            if row.labels:
                rows[-1]["score"] = score
            if row.answers:
                rows[-1] |= {"answers": list(row.answers), "answer_type": row.answer_type}
        return rows

    def measure(self, predictions: Predictions) -> dict[str, float]:
        """Mean soft score; and the consensus accuracy, by type of answer too, where what people answered is known.

        A question none of whose answers is in the vocabulary scores 0. Answers without names have no accuracy.
        """
        metrics: dict[str, float] = {}
        if any("score" in row for row in predictions):
            metrics["score"] = fmean(row.get("score", 0.0) for row in predictions)
        return metrics if self.labels is None else metrics | measure_consensus(predictions)

    def submission(self, predictions: Predictions) -> list[dict[str, Any]] | None:
        """What the VQA challenge takes; answers without names are of no use there."""
        if self.labels is None:
            return None
        return [{"question_id": row["question_id"], "answer": row["answer"]} for row in predictions]


def measure_consensus(predictions: Predictions) -> dict[str, float]:
    """Consensus accuracy, by type of answer too, of rows with an `answer` where people's `answers` are known."""
    judged = [row for row in predictions if row.get("answers")]
    if not judged:
        return {}
    types = [row["answer_type"] for row in judged]
    accuracy = vqa_accuracy([row["answer"] for row in judged], [row["answers"] for row in judged], types)
    by_type = {f"accuracy_{name}": value for name, value in accuracy.by_answer_type.items() if name}
    return {"accuracy": accuracy.overall, **by_type}
