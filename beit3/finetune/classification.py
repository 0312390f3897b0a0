"""Image classification: mean of the patches, LayerNorm, linear map (BEiT-3 on ImageNet-1k).

Shapes: B images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

from beit3.config import Run, config, replace, require
from beit3.data.augment import ClassificationView, ClassificationViewConfig, erase_at_random
from beit3.data.index_files import ClassificationRow, Index, read_index, read_picture
from beit3.data.labels import find_labels, read_labels
from beit3.finetune.common import Batch, FinetuneConfig, FinetuneTask, Predictions, count_classes
from beit3.metrics.accuracy import class_ranks, topk_accuracy
from beit3.model.heads import ClassificationModel
from beit3.model.memory import BatchSizes, Head, Sequences
from beit3.train.task import Loader


@config
class ClassificationConfig(FinetuneConfig):
    """Classes, views and loss."""

    num_classes: int | None = None
    """None: as many as `labels` names."""
    labels: Path | None = None
    """`labels.json` with the classes' names, in the data folder or elsewhere, for the export; None: numbered."""
    view: ClassificationViewConfig = ClassificationViewConfig()
    """How training pictures are varied."""
    mixup: float = 0.8
    """Beta parameter of mixup; 0 mixes nothing."""
    cutmix: float = 1.0
    """Beta parameter of CutMix; 0 cuts nothing."""
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        FinetuneConfig.__post_init__(self)
        require(self.num_classes is not None or self.labels is not None, "give num_classes, or labels to count them")
        require(
            self.num_classes is None or self.num_classes >= 2, f"num_classes must be at least 2, not {self.num_classes}"
        )
        require(0 <= self.label_smoothing < 1, f"label_smoothing must lie in 0..1, not {self.label_smoothing}")
        for name in ("mixup", "cutmix"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, not {getattr(self, name)}")

    @property
    def sizes(self) -> BatchSizes:
        """A batch; 1,000 classes where only their names would tell."""
        images, classes = Sequences(self.batch_size, 1 + self.model.num_patches), self.num_classes or 1000
        head = Head(self.batch_size, self.model.width, classes)
        return self.sizes_with(ClassificationModel, (images,), (head,), num_classes=classes)

    def build(self) -> Classification:
        """Build the Task, with random or given weights."""
        return Classification(self)

    def in_folder(self, data: Path) -> Self:
        """With the labels that lie in the data folder."""
        return self if self.labels is None else replace(self, labels=find_labels(self.labels, data))


@dataclass(frozen=True, slots=True)
class ClassificationBatch(Batch):
    """Pictures with their classes."""

    labels: Tensor
    """(B,) int64"""


@dataclass(frozen=True, slots=True)
class _Example:
    image: Tensor
    label: int


class _Examples:
    def __init__(self, index: Index[ClassificationRow], view: Callable[[Image.Image], Tensor]) -> None:
        self.index = index
        self._view = view

    def __len__(self) -> int:
        return len(self.index)

    def load(self, index: int) -> _Example:
        """Read and prepare one example."""
        row = self.index[index]
        return _Example(self._view(read_picture(row.image_path)), row.label)

    def collate(self, examples: list[_Example]) -> ClassificationBatch:
        """Lay examples side by side."""
        images = torch.stack([example.image for example in examples])
        return ClassificationBatch(images, torch.tensor([example.label for example in examples]))


class Classification(FinetuneTask[ClassificationConfig, ClassificationBatch]):
    """Name what a picture shows."""

    kind = ClassificationModel

    def __init__(self, config: ClassificationConfig, model: ClassificationModel | None = None) -> None:
        labels = None if config.labels is None else read_labels(config.labels)
        self.num_classes = count_classes(config.num_classes, labels, config.labels, least=2)
        super().__init__(config, model, labels, num_classes=self.num_classes)
        self.model.backbone.freeze_unreached(images=True, texts=False, pairs=False)
        self._view = ClassificationView(config.view, self.preprocess)
        self._mix = None
        if config.mixup or config.cutmix:
            require(config.batch_size % 2 == 0, f"mixup needs an even batch_size, not {config.batch_size}")
            self._mix = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                label_smoothing=config.label_smoothing,
                num_classes=self.num_classes,
            )

    def examples(self, paths: Sequence[Path], *, training: bool) -> _Examples:
        """Pictures of index files."""
        index = read_index(paths, ClassificationRow, num_labels=self.num_classes)
        return _Examples(index, self._view if training else self.preprocess)

    def train_loader(self, run: Run, rank: int, world_size: int) -> Loader[ClassificationBatch]:
        """Endless batches in a new order each epoch; mixup mixes pairs of pictures of a rank."""
        size = self.config.batch_size
        require(
            self._mix is None or size % (2 * world_size) == 0,
            f"mixup needs an even number of pictures on each rank, so batch_size {size} on {world_size} ranks must be "
            f"a multiple of {2 * world_size}",
        )
        return super().train_loader(run, rank, world_size)

    def forward(self, batch: ClassificationBatch) -> dict[str, Tensor]:
        """Cross-entropy, in training with erased and mixed pictures."""
        images, labels = self.pixels(batch), batch.labels
        if self.training:
            images = erase_at_random(images, self.config.view.erase)
        if self.training and self._mix is not None:
            images, mixed = self._mix(images, labels)
            loss = SoftTargetCrossEntropy()(self.model(images).float(), mixed)
            return {"loss": loss}
        logits = self.model(images).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean()}

    def predict(self, batch: ClassificationBatch) -> Predictions:
        """The likeliest class, and how many go before the right one."""
        logits = self.model(self.pixels(batch)).float()
        columns = (batch.labels, logits.argmax(1), class_ranks(logits, batch.labels))
        return [
            {"label": label, "predicted": predicted, "rank": rank}
            for label, predicted, rank in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def measure(self, predictions: Predictions) -> dict[str, float]:
        """Accuracy of the first and of the first five guesses."""
        return topk_accuracy(torch.tensor([row["rank"] for row in predictions]))
