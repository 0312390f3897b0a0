"""Semantic segmentation: a class for every pixel (BEiT-3 on ADE20K).

Shapes: B images, H, W height and width in pixels, K classes, k pairs of classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from beit3.config import Run, config, replace, require
from beit3.data.compose import ComposeConfig, Scene, Scenes
from beit3.data.dense_rows import SegmentationRow
from beit3.data.dense_views import SegmentationExample, SegmentationView, SegmentationViewConfig
from beit3.data.index_files import Index, read_index, read_picture
from beit3.data.label_maps import BACKGROUND
from beit3.data.labels import find_labels, read_labels
from beit3.data.masks import read_label_map
from beit3.data.preprocess import Preprocess
from beit3.data.whole_pictures import sizes_to_slide_over
from beit3.errors import BadSampleError
from beit3.finetune.common import Batch, FinetuneConfig, FinetuneTask, Predictions, count_classes
from beit3.metrics.mean_iou import class_iou, confusion, mean_iou
from beit3.model.segmentation import IGNORED, SegmentationHead, SegmentationModel, UPerNet
from beit3.model.sliding_window import SlidingConfig, segment_views
from beit3.train.task import Loader


@config
class SegmentationConfig(FinetuneConfig):
    """Classes, head, views, and how pictures are evaluated."""

    num_classes: int | None = None
    """None: as many as `labels` names."""
    labels: Path | None = None
    """`labels.json` with the classes' names, in the data folder or elsewhere, for the export; None: numbered."""
    head: SegmentationHead = "upernet"
    """This and the following are those of `SegmentationModel`."""
    pyramid_width: int = 256
    head_width: int = 512
    num_queries: int = 100
    num_maps: int = 4
    window_size: int | None = None
    num_global_layers: int = 4
    view: SegmentationViewConfig = SegmentationViewConfig()
    """How training pictures are varied."""
    compose: ComposeConfig | None = None
    """Train on scenes that are composed anew in the run, instead of pictures of `train`; the first class is then
    "background"."""
    slide: SlidingConfig = SlidingConfig()
    """How pictures are looked at to be evaluated; a window is as large as a training view."""

    def __post_init__(self) -> None:
        FinetuneConfig.__post_init__(self)
        require(self.num_classes is not None or self.labels is not None, "give num_classes, or labels to count them")

    def build(self) -> Segmentation:
        """Build the Task, with random or given weights."""
        return Segmentation(self)

    def in_folder(self, data: Path) -> Self:
        """With the labels that lie in the data folder."""
        return self if self.labels is None else replace(self, labels=find_labels(self.labels, data))


@dataclass(frozen=True, slots=True)
class SegmentationBatch(Batch):
    """Training views with the label of every pixel."""

    labels: Tensor
    """(B, H, W) uint8, 255 where ignored"""


@dataclass(frozen=True, slots=True)
class WholePicture:
    """A picture to evaluate."""

    name: str
    views: tuple[Tensor, ...]
    """The picture in each size that it is looked at, uint8 (3, h, w)."""
    labels: Tensor
    """uint8 (H, W) at its own size, 255 where ignored"""


@dataclass(frozen=True, slots=True)
class WholePictures:
    """Pictures of different sizes."""

    pictures: tuple[WholePicture, ...]

    def to(self, device: torch.device) -> Self:
        """Copy the tensors to a device."""
        moved = (
            WholePicture(
                one.name,
                tuple(view.to(device, non_blocking=True) for view in one.views),
                one.labels.to(device, non_blocking=True),
            )
            for one in self.pictures
        )
        return type(self)(tuple(moved))


class _Pictures:
    """Pictures of an index with their maps of labels."""

    def __init__(self, paths: Sequence[Path], num_classes: int) -> None:
        self.index: Index[SegmentationRow] = read_index(paths, SegmentationRow)
        self._num_classes = num_classes

    def __len__(self) -> int:
        return len(self.index)

    def read(self, index: int) -> tuple[str, Image.Image, Any]:
        """Path, picture, and labels uint8 (H, W)."""
        row = self.index[index]
        image = read_picture(row.image_path)
        labels = read_label_map(row.mask_path, reduce_zero_label=row.reduce_zero_label)
        if labels.shape != (image.height, image.width):
            raise BadSampleError("mask_of_another_size", f"{row.mask_path}: {labels.shape}, not {image.size[::-1]}")
        worst = labels[labels != IGNORED].max(initial=0)
        if worst >= self._num_classes:
            raise BadSampleError(
                "label_out_of_range", f"{row.mask_path} holds {worst}, with {self._num_classes} classes"
            )
        return row.image_path, image, labels


class _TrainingExamples(_Pictures):
    def __init__(self, view: SegmentationView, *of: Any) -> None:
        super().__init__(*of)
        self._view = view

    def load(self, index: int) -> SegmentationExample:
        """Draw a view of one picture."""
        _, image, labels = self.read(index)
        return self._view(image, labels)

    def collate(self, examples: list[SegmentationExample]) -> SegmentationBatch:
        """Lay views side by side."""
        return _side_by_side(examples)


class _HeldOutExamples(_Pictures):
    def __init__(self, preprocess: Preprocess, slide: SlidingConfig, *of: Any) -> None:
        super().__init__(*of)
        self._preprocess, self._slide = preprocess, slide

    def load(self, index: int) -> WholePicture:
        """Resize one picture; its labels keep their size."""
        name, image, labels = self.read(index)
        return WholePicture(
            name, tuple(sizes_to_slide_over(self._preprocess, image, self._slide)), torch.from_numpy(labels)
        )

    def collate(self, examples: list[WholePicture]) -> WholePictures:
        """Keep pictures together."""
        return WholePictures(tuple(examples))


class Segmentation(FinetuneTask[SegmentationConfig, Any]):
    """Name what every pixel shows. Trains on `SegmentationBatch`, predicts `WholePictures`."""

    kind = SegmentationModel

    def __init__(self, config: SegmentationConfig, model: SegmentationModel | None = None) -> None:
        labels = None if config.labels is None else read_labels(config.labels)
        self.num_classes = count_classes(config.num_classes, labels, config.labels)
        names = ("head", "pyramid_width", "head_width", "num_queries", "num_maps", "window_size", "num_global_layers")
        given = {name: getattr(config, name) for name in names}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        super().__init__(config, model, labels, num_classes=self.num_classes, **options)
        resize = self.preprocess.resize
        require(resize == "slide", f"preprocess.resize must be slide for segmentation, not {resize}")
        self._view = SegmentationView(config.view, self.preprocess.image_size, self.preprocess.fill)

    def examples(self, paths: Sequence[Path], *, training: bool) -> Any:
        """Pictures of index files."""
        of = (paths, self.num_classes)
        if training:
            return _TrainingExamples(self._view, *of)
        return _HeldOutExamples(self.preprocess, self.config.slide, *of)

    def train_loader(self, run: Run, rank: int, world_size: int) -> Loader[SegmentationBatch]:
        """Endless batches in a new order each epoch.

        UPerNet's batch norms take their statistics over all ranks on CUDA devices. On others torch cannot: each rank
        goes by its own pictures, and the running statistics of rank 0 are the ones that are evaluated and saved.
        """
        if isinstance(self.model.head, UPerNet):
            shared = world_size > 1 and next(self.parameters()).is_cuda
            if shared:
                self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            size, least = self.config.batch_size, 2 if shared else 2 * world_size
            require(size >= least, f"upernet's batch norm needs a batch_size of at least {least}, not {size}")
        if self.config.compose is None:
            return super().train_loader(run, rank, world_size)
        view = partial(_view_scene, self._view)
        scenes = Scenes(self.config.compose, view, self.num_classes, first=[BACKGROUND])
        return self.loader_of(scenes, _side_by_side, run, rank, world_size)

    def forward(self, batch: SegmentationBatch) -> dict[str, Tensor]:
        """Losses of `SegmentationModel.loss`."""
        losses: dict[str, Tensor] = self.model.loss(self.pixels(batch), batch.labels.long())
        return losses

    def predict(self, batch: WholePictures) -> Predictions:
        """For each picture the counts of its pixels by label and prediction, int64 (k, 3), of pairs that occur."""
        rows: Predictions = []
        for one in batch.pictures:
            views = [self.preprocess.normalize(view[None])[0] for view in one.views]
            size = (one.labels.shape[0], one.labels.shape[1])
            found = segment_views(self.model, views, size, self.preprocess.image_size, self.config.slide)
            counts = confusion(found, one.labels, self.num_classes, IGNORED).cpu()
            pairs = counts.nonzero()
            counted = torch.cat([pairs, counts[pairs[:, 0], pairs[:, 1], None]], dim=1)
            rows.append({"image": one.name, "confusion": counted})
        return rows

    def measure(self, predictions: Predictions) -> dict[str, float]:
        """Mean IoU, accuracies, and `iou/NAME` of every class that is labelled or predicted somewhere."""
        counts = self._counts(predictions)
        names = self.labels or [str(number) for number in range(self.num_classes)]
        each = zip(names, class_iou(counts).tolist(), strict=True)
        return mean_iou(counts) | {f"iou/{name}": value for name, value in each if value == value}

    def readable(self, predictions: Predictions) -> Iterable[dict[str, Any]]:
        """Mean IoU and accuracy of each picture alone; None where no pixel of it has a label."""
        for row in predictions:
            counts = self._counts([row])
            values: dict[str, float | None] = dict(mean_iou(counts)) if counts.any() else {}
            yield {"image": row["image"], **{name: values.get(name) for name in ("mean_iou", "pixel_accuracy")}}

    def _counts(self, predictions: Predictions) -> Tensor:
        """Add up pixels by label and prediction: (K, K) int64."""
        counts = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64)
        for row in predictions:
            label, predicted, count = row["confusion"].unbind(1)
            counts[label, predicted] += count  # no pair comes twice in a row
        return counts


def _view_scene(view: SegmentationView, scene: Scene) -> SegmentationExample:
    return view(scene.image, scene.label_map)


def _side_by_side(examples: list[SegmentationExample]) -> SegmentationBatch:
    images = torch.stack([example.image for example in examples])
    return SegmentationBatch(images, torch.stack([example.labels for example in examples]))
