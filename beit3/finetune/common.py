"""What the finetuning tasks share: index files in, a task model trained, predictions measured, an exchange folder out.

Shapes: B examples, H, W height and width in pixels, T longest text.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, cast

import torch
from torch import Tensor

from beit3.config import config, require
from beit3.data.augment import MultimodalView, MultimodalViewConfig
from beit3.data.labels import labels_file, read_labels
from beit3.data.preprocess import Preprocess
from beit3.data.source import find_source
from beit3.errors import ConfigError
from beit3.finetune.index_task import IndexConfig, IndexTask
from beit3.model.build import build_model
from beit3.model.flops import forward_flops, unseen_flops
from beit3.model.memory import BatchSizes, Head, Pass, Sequences
from beit3.model.packing import Layout
from beit3.model.presets import PAD, ModelConfig
from beit3.model.store import fill_model
from beit3.model.task_model import TaskModel
from beit3.tokenizer.text import TextTokenizer
from beit3.train.task import Work

Predictions = list[dict[str, Any]]
"""One row for each example: plain values, or tensors on the CPU."""


@config
class FinetuneConfig(IndexConfig):
    """Model and data of a finetuning task."""

    model: ModelConfig
    init_from: Path | None = None
    """Exchange folder or released file to start from; heads of the same task and sizes are kept, but for the layers of
    classes if its `labels.json` names others. None: random."""
    preprocess: Preprocess | None = None
    """How pictures are prepared; None: as released for the task."""

    def __post_init__(self) -> None:
        IndexConfig.__post_init__(self)
        require(
            self.preprocess is None or self.preprocess.image_size == self.model.image_size,
            f"preprocess.image_size must be the model's image_size {self.model.image_size}",
        )

    def sizes_with(
        self,
        kind: type[TaskModel],
        sequences: tuple[Sequences, ...],
        heads: tuple[Head, ...] = (),
        unread: str | None = None,
        **options: int,
    ) -> BatchSizes:
        """A batch of such sequences.

        Args:
            kind: of the task model.
            sequences: pictures with a text are pairs.
            heads: where losses are computed.
            unread: the modality whose last states no head reads.
            **options: of the task model's head.
        """

        def network() -> TaskModel:
            """The task model with random weights, what no sequence reaches frozen."""
            model: Any = build_model(self.model, kind.task, **options)
            model.backbone.vision_embedding.mask_token.requires_grad_(False)
            kinds = {(one.vision > 0, one.text > 0) for one in sequences}
            reached = {"images": (True, False), "texts": (False, True), "pairs": (True, True)}
            model.backbone.freeze_unreached(**{name: has in kinds for name, has in reached.items()})
            if unread is not None:
                model.backbone.freeze_unread(unread)
            return cast(TaskModel, model)

        return BatchSizes(
            build=network,
            passes=(Pass(self.model, sequences),),
            heads=heads,
            images=sum(one.count for one in sequences if one.vision),
            side=self.model.image_size[0],
            words=sum(one.count * one.text for one in sequences),
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

    @property
    def pairs(self) -> Sequences:
        """Pictures with their texts, which are taken to fill half of `max_text_length`."""
        return Sequences(self.batch_size, 1 + self.model.num_patches, self.max_text_length // 2)

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


B = TypeVar("B", bound=Batch)
C = TypeVar("C", bound=FinetuneConfig)


class FinetuneTask(IndexTask[B], ABC, Generic[C, B]):
    """A task model, its examples, its loss and its metric.

    Args:
        config: model and data.
        model: a trained model to evaluate; None builds one, started from `config.init_from`.
        labels: names of its outputs, for the export.
        options: of the model's head.
    """

    kind: type[TaskModel]
    config: C

    def __init__(self, config: C, model: TaskModel | None, labels: Sequence[str] | None = None, **options: int) -> None:
        super().__init__()
        self.config = config
        self.model: Any
        self.model = build_model(config.model, self.kind.task, **options) if model is None else model
        self.labels = labels
        self.preprocess = config.preprocess or Preprocess.of_task(config.model, self.kind.task)
        if model is None and config.init_from is not None:
            fill_model(self.model, config.init_from, same_classes=_same_classes(labels, config.init_from))
        self.model.backbone.vision_embedding.mask_token.requires_grad_(False)  # nothing is hidden

    @abstractmethod
    def predict(self, batch: B) -> Predictions:
        """What the model says of each example, with what `measure` compares it to."""

    @abstractmethod
    def measure(self, predictions: Predictions) -> dict[str, float]:
        """Metrics of the predictions of a whole set; shares in 0..1."""

    def evaluate(self, loader: Iterable[B]) -> dict[str, float]:
        """Metrics of all batches, and the share of the rows that `eval_loader` left out."""
        return self.measure([row for batch in loader for row in self.predict(batch)]) | self.left_out()

    def readable(self, predictions: Predictions) -> Iterable[dict[str, Any]]:
        """The predictions of a whole set as they are written down: rows of plain values."""
        return predictions

    def submission(self, predictions: Predictions) -> list[dict[str, Any]] | None:
        """The predictions of a whole set in the form that a test server takes; None where there is no such form."""
        return None

    def pixels(self, batch: Batch) -> Tensor:
        """The pictures as the model takes them, float32."""
        return self.preprocess.normalize(batch.images)

    def work(self, batch: B) -> Work:
        """Images, tokens and useful operations of a step: the transformer's, with its windows; none of the heads'."""
        layout = self.layout(batch)
        tokens = layout.num_images * layout.vision_length + sum(layout.text_lengths)
        unseen = layout.num_images * unseen_flops(self.config.model, getattr(self.model, "windows", None))
        return Work(layout.num_images, tokens, 3 * (forward_flops(self.config.model, layout) - unseen))

    def layout(self, batch: B) -> Layout:
        """Which sequences a batch makes: a pair for each picture and text, or pictures alone."""
        vision_length = 1 + self.config.model.num_patches
        if isinstance(batch, TextBatch):
            return Layout.build(len(batch.images), vision_length, batch.lengths, len(batch.images))
        return Layout.build(len(batch.images), vision_length, (), 0)

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


def _same_classes(labels: Sequence[str] | None, source: Path) -> bool:
    """Whether outputs stand for the classes or answers of a saved model, as far as the names of both are known."""
    known = None if labels is None else find_source(source).labels
    return known is None or read_labels(known) == labels


def count_classes(given: int | None, labels: Sequence[str] | None, path: Path | None, least: int = 1) -> int:
    """How many classes there are, by number or by name; both must agree.

    Args:
        given: their number, if it is known.
        labels: their names, if they are known; one of the two must be.
        path: where the names are from, for errors.
        least: fewest that make sense.

    Raises:
        ConfigError: names and number disagree, or there are too few.
    """
    named = None if labels is None else len(labels)
    require(named is None or named >= least, f"{path} names {named} classes: {least} are needed")
    require(named is None or given is None or named == given, f"{path} names {named} classes, num_classes is {given}")
    count = named or given
    assert count is not None
    return count
