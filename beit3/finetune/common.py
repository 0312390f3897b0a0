"""What the finetuning tasks share: index files in, a task model trained, predictions measured, an exchange folder out.

Shapes: B examples, H, W height and width in pixels, T longest text.
"""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from beit3.config import Run, TaskConfig, config, require
from beit3.data.augment import MultimodalView, MultimodalViewConfig
from beit3.data.example_loader import ExampleLoader, Examples, evaluation_batches
from beit3.data.index_files import Index
from beit3.data.labels import labels_file
from beit3.data.preprocess import Preprocess
from beit3.errors import ConfigError
from beit3.model.flops import forward_flops
from beit3.model.heads import TaskModel, build_model
from beit3.model.packing import Layout
from beit3.model.presets import PAD, ModelConfig
from beit3.model.store import fill_model
from beit3.tokenizer.text import TextTokenizer
from beit3.train.task import Loader, Task, Work

logger = logging.getLogger(__name__)

Predictions = list[dict[str, Any]]
"""One row for each example: plain values, or tensors on the CPU."""


@config
class FinetuneConfig(TaskConfig):
    """Model and data of a finetuning task."""

    model: ModelConfig
    init_from: Path | None = None
    """Exchange folder or released file to start from; heads of the same task and sizes are kept. None: random."""
    train: str = "train.jsonl"
    """Index file, relative to the run's data folder; several are separated by commas."""
    eval: str | None = None
    """Index file to evaluate on."""
    batch_size: int = 64
    """Examples of one batch of all ranks."""
    eval_batch_size: int = 64
    preprocess: Preprocess | None = None
    """How pictures are prepared; None: as released for the task."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_batch_size"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        require(
            self.preprocess is None or self.preprocess.image_size == self.model.image_size,
            f"preprocess.image_size must be the model's image_size {self.model.image_size}",
        )


@config
class TextFinetuneConfig(FinetuneConfig):
    """A task that reads texts as well."""

    text_tokenizer: Path
    """A `.spm` file."""
    view: MultimodalViewConfig = MultimodalViewConfig()
    """How training pictures are varied."""
    max_text_length: int = 64
    """Longest text in ids; longer ones are cut."""

    def __post_init__(self) -> None:
        FinetuneConfig.__post_init__(self)
        require(
            2 < self.max_text_length <= self.model.max_text_length,
            f"max_text_length must lie in 3..{self.model.max_text_length}, not {self.max_text_length}",
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples side by side; every tensor moves to the device."""

    images: Tensor
    """(B, 3, H, W) uint8; (B, 2, 3, H, W) for pairs of pictures."""

    def to(self, device: torch.device) -> Self:
        """Copy the tensors to a device."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved = {k: v.to(device, non_blocking=True) for k, v in fields.items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True, slots=True)
class TextBatch(Batch):
    """Pictures with a text each."""

    text_ids: Tensor
    """(B, T) int64"""
    text_mask: Tensor
    """(B, T) bool, True = real token"""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each text."""
        return tuple(self.text_mask.sum(1).tolist())


T = TypeVar("T")
B = TypeVar("B", bound=Batch)
B_co = TypeVar("B_co", covariant=True)
C = TypeVar("C", bound=FinetuneConfig)


class BatchedExamples(Examples[T], Protocol[T, B_co]):
    """Examples that know how they lie side by side. Data processes hold them, so no model is within."""

    index: Index[Any]
    """The rows that they are made of."""

    def collate(self, examples: list[T]) -> B_co:
        """Make a batch."""


class _HeldOut:
    """What a run evaluates on. The moving average of a Task is a copy of the Task, and shares it."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.examples: BatchedExamples[Any, Any] | None = None

    def __deepcopy__(self, memo: object) -> Self:
        return self


class FinetuneTask(Task[B], ABC, Generic[C, B]):
    """A task model, its examples, its loss and its metric.

    Args:
        config: model and data.
        model: a trained model to evaluate; None builds one, started from `config.init_from`.
        labels: names of its outputs, for the export.
        options: of the model's head.
    """

    kind: type[TaskModel]

    def __init__(self, config: C, model: TaskModel | None, labels: Sequence[str] | None = None, **options: int) -> None:
        super().__init__()
        self.config = config
        self.model: Any
        self.model = build_model(config.model, self.kind.task, **options) if model is None else model
        self.labels = labels
        self._held_out = _HeldOut()
        self.preprocess = config.preprocess or Preprocess.of_task(config.model, self.kind.task)
        if model is None and config.init_from is not None:
            fill_model(self.model, config.init_from)
        self.model.backbone.vision_embedding.mask_token.requires_grad_(False)  # nothing is hidden

    @abstractmethod
    def examples(self, paths: Sequence[Path], *, training: bool) -> BatchedExamples[Any, B]:
        """What index files name, with the view of training or of evaluation."""

    @abstractmethod
    def predict(self, batch: B) -> Predictions:
        """What the model says of each example, with what `measure` compares it to."""

    @abstractmethod
    def measure(self, predictions: Predictions) -> dict[str, float]:
        """Metrics of the predictions of a whole set; shares in 0..1."""

    def train_loader(self, run: Run, rank: int, world_size: int) -> Loader[B]:
        """Endless batches in a new order each epoch.

        Rank 0 reads what it will evaluate on as well: whatever is wrong there is said now, not after the training.
        """
        paths = [run.data / name for name in self.config.train.split(",")]
        examples = self.examples(paths, training=True)
        if rank == 0 and self.config.eval is not None:
            held_out = run.data / self.config.eval
            self._examples_to_evaluate(held_out)
            if held_out.resolve() in (path.resolve() for path in paths):
                logger.warning("%s is trained on and evaluated on: metrics will not tell of unseen examples", held_out)
        return ExampleLoader(
            examples,
            examples.collate,
            batch_size=self.config.batch_size,
            seed=run.seed,
            rank=rank,
            world_size=world_size,
            num_workers=run.loop.num_workers,
        )

    def eval_loader(self, run: Run) -> Iterable[B] | None:
        """Held-out examples in order."""
        if self.config.eval is None:
            return None
        examples = self._examples_to_evaluate(run.data / self.config.eval)
        return evaluation_batches(examples, examples.collate, batch_size=self.config.eval_batch_size)

    def _examples_to_evaluate(self, path: Path) -> BatchedExamples[Any, B]:
        """Examples of an index file, which is read once."""
        held_out = self._held_out
        if held_out.examples is None or held_out.path != path:
            held_out.path, held_out.examples = path, self.examples([path], training=False)
        return held_out.examples

    def evaluate(self, loader: Iterable[B]) -> dict[str, float]:
        """Metrics of all batches, and the share of the rows that `eval_loader` left out."""
        metrics = self.measure([row for batch in loader for row in self.predict(batch)])
        held_out = self._held_out.examples
        return metrics if held_out is None else metrics | held_out.index.left_out()

    def readable(self, predictions: Predictions) -> Iterable[dict[str, Any]]:
        """The predictions of a whole set as they are written down: rows of plain values."""
        return predictions

    def pixels(self, batch: Batch) -> Tensor:
        """The pictures as the model takes them, float32."""
        return self.preprocess.normalize(batch.images)

    def work(self, batch: B) -> Work:
        """Images, tokens and useful operations of a step."""
        layout = self.layout(batch)
        tokens = layout.num_images * layout.vision_length + sum(layout.text_lengths)
        return Work(layout.num_images, tokens, 3 * forward_flops(self.config.model, layout))

    def layout(self, batch: B) -> Layout:
        """Which sequences a batch makes: a pair for each picture and text, or pictures alone."""
        vision_length = 1 + self.config.model.num_patches
        if isinstance(batch, TextBatch):
            return Layout.build(len(batch.images), vision_length, batch.lengths, len(batch.images))
        return Layout.build(len(batch.images), vision_length, (), 0)

    def move(self, batch: B, device: torch.device) -> B:
        """Copy a batch to the device."""
        return batch.to(device)

    def save(self, folder: Path) -> None:
        """Write the model with everything that `beit3.load` needs."""
        labels = {} if self.labels is None else labels_file(self.labels)
        self.model.save_pretrained(folder, files={**self.preprocess.file(), **labels})


class TextFinetuneTask(FinetuneTask[C, B], ABC, Generic[C, B]):
    """A task that reads texts as well."""

    def __init__(
        self, config: Any, model: TaskModel | None, labels: Sequence[str] | None = None, **options: int
    ) -> None:
        super().__init__(config, model, labels, **options)
        self.text_tokenizer = TextTokenizer.load(config.text_tokenizer)
        if len(self.text_tokenizer) > config.model.vocab_size:
            raise ConfigError(
                f"{config.text_tokenizer} has {len(self.text_tokenizer)} ids, the model {config.model.vocab_size}"
            )
        self.preprocess = dataclasses.replace(self.preprocess, max_text_length=config.max_text_length)
        self.training_view = MultimodalView(config.view, self.preprocess)

    def save(self, folder: Path) -> None:
        """Write the model with everything that `beit3.load` needs."""
        labels = {} if self.labels is None else labels_file(self.labels)
        tokenizer = {"tokenizer.spm": self.text_tokenizer.model}
        self.model.save_pretrained(folder, files={**self.preprocess.file(), **labels, **tokenizer})


def pad_texts(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pad ids to the longest text: (B, T) int64 and (B, T) bool, True = real token."""
    if not texts:
        return torch.empty(0, 0, dtype=torch.int64), torch.empty(0, 0, dtype=torch.bool)
    rows = [torch.tensor(text, dtype=torch.int64) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]
