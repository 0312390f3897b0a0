"""Detection: boxes and masks of objects (BEiT-3 on COCO and Objects365).

Shapes: B pictures, H, W sides of the canvas in pixels, n objects of a picture, m detections of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from beit3.config import Run, config, replace, require
from beit3.data.compose import ComposeConfig, Scene, Scenes
from beit3.data.dense_rows import DetectionRow, category_ids
from beit3.data.dense_views import DetectionExample, DetectionView, DetectionViewConfig
from beit3.data.index_files import Index, read_index, read_picture
from beit3.data.labels import find_labels, read_labels
from beit3.data.masks import encode_mask
from beit3.data.preprocess import Preprocess
from beit3.data.whole_pictures import canvases, view_on
from beit3.errors import BadSampleError
from beit3.finetune.common import Batch, FinetuneConfig, FinetuneTask, Predictions, count_classes
from beit3.metrics.detection import average_precision
from beit3.model.detection import DetectionModel, Detections, DetectionSettings, Target, paste_masks
from beit3.model.multi_scale import detect_views
from beit3.train.task import Loader


@config
class DetectionConfig(FinetuneConfig):
    """Classes, heads, views, and how pictures are evaluated."""

    num_classes: int | None = None
    """None: as many as `labels` names."""
    labels: Path | None = None
    """`labels.json` with the classes' names, in the data folder or elsewhere, for the export; None: numbered."""
    stages: int = 3
    """This and the following are those of `DetectionModel`."""
    pyramid_width: int = 256
    head_width: int = 1024
    window_size: int | None = None
    num_global_layers: int = 4
    boxes_per_image: int = 512
    """Boxes of each picture that the box heads are trained on."""
    view: DetectionViewConfig = DetectionViewConfig()
    """How training pictures are varied; a view is as large as the model's images."""
    compose: ComposeConfig | None = None
    """Train on scenes that are composed anew in the run, instead of pictures of `train`."""
    settings: DetectionSettings = DetectionSettings()
    """How pictures are looked at in evaluation, and what counts as found."""

    def __post_init__(self) -> None:
        FinetuneConfig.__post_init__(self)
        require(self.num_classes is not None or self.labels is not None, "give num_classes, or labels to count them")
        require(self.boxes_per_image >= 1, f"boxes_per_image must be at least 1, not {self.boxes_per_image}")

    def build(self) -> Detection:
        """Build the Task, with random or given weights."""
        return Detection(self)

    def in_folder(self, data: Path) -> Self:
        """With the labels that lie in the data folder."""
        return self if self.labels is None else replace(self, labels=find_labels(self.labels, data))


@dataclass(frozen=True, slots=True)
class DetectionBatch(Batch):
    """Training views with their objects."""

    sizes: Tensor
    """(B, 2) int64, the height and width that each picture fills of its view"""
    targets: tuple[Target, ...]

    def to(self, device: torch.device) -> Self:
        """Copy the tensors to a device."""
        moved = tuple(target.to(device) for target in self.targets)
        images = self.images.to(device, non_blocking=True)
        return type(self)(images, self.sizes, moved)


@dataclass(frozen=True, slots=True)
class WholePictures:
    """Pictures to evaluate, in each size that they are looked at."""

    rows: tuple[DetectionRow, ...]
    images: tuple[Tensor, ...]
    """uint8 (B, 3, H, W) for each canvas"""

    def to(self, device: torch.device) -> Self:
        """Copy the pictures to a device."""
        return type(self)(self.rows, tuple(x.to(device, non_blocking=True) for x in self.images))


class _TrainingExamples:
    """Views of the pictures of an index."""

    def __init__(self, index: Index[DetectionRow], view: DetectionView) -> None:
        self.index = index
        self._view = view

    def __len__(self) -> int:
        return len(self.index)

    def load(self, index: int) -> DetectionExample:
        """Draw a view of one picture."""
        row = self.index[index]
        image = read_picture(row.image_path)
        _check_size(row, (image.height, image.width))
        return self._view(image, row.objects)

    def collate(self, examples: list[DetectionExample]) -> DetectionBatch:
        """Lay views side by side."""
        return _side_by_side(examples)


class _HeldOutExamples:
    """Whole pictures of an index, in every size that they are looked at."""

    def __init__(self, index: Index[DetectionRow], canvases: Sequence[Preprocess]) -> None:
        self.index = index
        self._canvases = canvases

    def __len__(self) -> int:
        return len(self.index)

    def load(self, index: int) -> tuple[DetectionRow, list[Tensor]]:
        """Read one picture."""
        row = self.index[index]
        image = read_picture(row.image_path)
        _check_size(row, (image.height, image.width))
        return row, [canvas(image) for canvas in self._canvases]

    def collate(self, examples: list[tuple[DetectionRow, list[Tensor]]]) -> WholePictures:
        """Lay pictures side by side, canvas by canvas."""
        rows, images = zip(*examples, strict=True)
        return WholePictures(rows, tuple(torch.stack(views) for views in zip(*images, strict=True)))


class Detection(FinetuneTask[DetectionConfig, Any]):
    """Find the objects of a picture."""

    kind = DetectionModel

    def __init__(self, config: DetectionConfig, model: DetectionModel | None = None) -> None:
        labels = None if config.labels is None else read_labels(config.labels)
        self.num_classes = count_classes(config.num_classes, labels, config.labels)
        options: dict[str, int] = {"num_classes": self.num_classes, "stages": config.stages}
        options |= {"pyramid_width": config.pyramid_width, "head_width": config.head_width}
        if config.window_size is not None:
            options |= {"window_size": config.window_size, "num_global_layers": config.num_global_layers}
        super().__init__(config, model, labels, **options)
        self.model.sample_boxes(config.boxes_per_image)
        self._canvases = canvases(self.preprocess, config.model.patch_size, config.settings)
        self._view = DetectionView(config.view, self.preprocess.image_size, self.preprocess.fill)
        self._categories: list[int] = list(range(1, self.num_classes + 1))
        """Number of each class in the set's own files."""

    def examples(self, paths: Sequence[Path], *, training: bool) -> Any:
        """Pictures of index files."""
        index = read_index(paths, DetectionRow, num_labels=self.num_classes)
        if training:
            return _TrainingExamples(index, self._view)
        self._categories = category_ids(paths[0], self.num_classes)
        return _HeldOutExamples(index, self._canvases)

    def train_loader(self, run: Run, rank: int, world_size: int) -> Loader[DetectionBatch]:
        """Endless batches, of the pictures of an index or of composed scenes."""
        if self.config.compose is None:
            return super().train_loader(run, rank, world_size)
        scenes = Scenes(self.config.compose, partial(_view_scene, self._view), self.num_classes)
        return self.loader_of(scenes, _side_by_side, run, rank, world_size)

    def forward(self, batch: DetectionBatch) -> dict[str, Tensor]:
        """The sum of all losses, and each of them."""
        parts: dict[str, Tensor] = self.model(self.pixels(batch), batch.sizes, batch.targets)
        return {
            "loss": torch.stack(list(parts.values())).sum(),
            **{name: part.detach() for name, part in parts.items()},
        }

    def predict(self, batch: WholePictures) -> Predictions:
        """What was found in each picture, beside what is there."""
        return [
            {
                "picture": row.image_path,
                "image_id": row.image_id,
                "height": row.height,
                "width": row.width,
                "found": _written(found, (row.height, row.width)),
                "objects": [_as_annotation(item) for item in row.objects],
            }
            for row, found in zip(batch.rows, self._find(batch), strict=True)
        ]

    def measure(self, predictions: Predictions) -> dict[str, float]:
        """COCO's average precision and recall of boxes (`box_...`) and, where all objects have masks, of these."""
        names = self.labels or [str(number) for number in range(self.num_classes)]
        truth = {
            "images": [{"id": row["image_id"], "height": row["height"], "width": row["width"]} for row in predictions],
            "annotations": [
                {**note, "id": number, "image_id": image, "category_id": note["label"]}
                for number, (image, note) in enumerate(_each(predictions, "objects"), start=1)
            ],
            "categories": [{"id": label, "name": name} for label, name in enumerate(names)],
        }
        found = [
            {**item, "image_id": image, "category_id": item["label"]} for image, item in _each(predictions, "found")
        ]
        metrics = {f"box_{name}": value for name, value in average_precision(truth, found, "bbox").items()}
        if all("segmentation" in note for note in truth["annotations"]):
            metrics |= {f"mask_{name}": value for name, value in average_precision(truth, found, "segm").items()}
        return metrics

    def submission(self, predictions: Predictions) -> list[dict[str, Any]]:
        """COCO's results, with the numbers that its own files give classes (`categories.json` beside the index)."""
        return [
            {
                "image_id": image,
                "category_id": self._categories[item["label"]],
                **{name: item[name] for name in ("bbox", "score", "segmentation")},
            }
            for image, item in _each(predictions, "found")
        ]

    def _find(self, batch: WholePictures) -> Iterable[Detections]:
        """Detections of each picture, in its own pixels."""
        settings = self.config.settings
        pixels = [self.preprocess.normalize(images) for images in batch.images]
        sizes = [(row.height, row.width) for row in batch.rows]
        views = [
            [view_on(canvas, images[number], size) for canvas, images in zip(self._canvases, pixels, strict=True)]
            for number, size in enumerate(sizes)
        ]
        if len(pixels) == 1 and not settings.flip:  # all pictures in one pass
            placed = torch.tensor([view.size for (view,) in views])
            for (view,), one in zip(views, self.model.detect(pixels[0], placed, settings), strict=True):
                yield Detections(view.to_picture(one.boxes), one.scores, one.labels, one.masks)
            return
        for size, seen in zip(sizes, views, strict=True):
            mirrored = [view.mirror() for view in seen] if settings.flip else []
            yield detect_views(self.model, seen + mirrored, size, settings)


def _view_scene(view: DetectionView, scene: Scene) -> DetectionExample:
    return view(scene.image, scene.objects)


def _side_by_side(examples: list[DetectionExample]) -> DetectionBatch:
    targets = (Target(one.boxes, one.labels, one.masks, one.has_mask) for one in examples)
    sizes = torch.tensor([one.size for one in examples])
    return DetectionBatch(torch.stack([one.image for one in examples]), sizes, tuple(targets))


def _check_size(row: DetectionRow, size: tuple[int, int]) -> None:
    if size != (row.height, row.width):
        raise BadSampleError("picture_of_another_size", f"{row.image_path}: {size}, not {(row.height, row.width)}")


def _written(found: Detections, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Detections as rows; masks are pasted one at a time, for a hundred of a large picture are gigabytes."""
    rows = []
    boxes, scores, labels = found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()
    for number, (box, score, label) in enumerate(zip(boxes, scores, labels, strict=True)):
        one = slice(number, number + 1)
        mask = paste_masks(found.masks[one], found.boxes[one], size)[0]
        left, top, right, bottom = (round(side, 2) for side in box)
        rows.append(
            {
                "label": label,
                "bbox": [left, top, round(right - left, 2), round(bottom - top, 2)],
                "score": round(score, 5),
                "segmentation": encode_mask(mask.cpu().numpy()),
            }
        )
    return rows


def _as_annotation(item: Any) -> dict[str, Any]:
    """An object as COCO's files have it, its class by label."""
    note = {"label": item.label, "bbox": list(item.box), "area": item.area, "iscrowd": int(item.is_crowd)}
    return note if item.segmentation is None else {**note, "segmentation": item.segmentation}


def _each(predictions: Predictions, what: str) -> Iterable[tuple[int, dict[str, Any]]]:
    """Objects or detections of all pictures, each with its picture's number."""
    return chain.from_iterable(((row["image_id"], item) for item in row[what]) for row in predictions)
