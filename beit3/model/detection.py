"""Detection: Mask R-CNN and Cascade Mask R-CNN on the image tower with a pyramid.

Shapes: B images, (H, W) canvas in pixels, C channels of the pyramid, n objects of an image, m detections of an image.

Images are canvases: each holds a picture at its top left, of the `sizes` given, and filling right and below. Boxes are
x1, y1, x2, y2 in pixels of the canvas. Labels are 0..K-1.

Sources: ViTDet (arXiv 2203.16527), with whose Cascade Mask R-CNN BEiT-3 (arXiv 2208.10442) detects.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.config import check_types, config, require
from beit3.model.dense import DenseModel
from beit3.model.presets import ModelConfig
from beit3.model.soft_nms import soft_nms

_MAX_STAGES = 3


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """Objects of one image."""

    boxes: Tensor
    """(n, 4) float; parts outside the picture are cut off, and what is then empty is left out."""
    labels: Tensor
    """(n,) int64."""
    masks: Tensor
    """(n, H, W) uint8 or bool, 1 on the object; an empty mask teaches that its box holds nothing of the object."""
    has_mask: Tensor | None = None
    """(n,) bool, False where only the box is known, and nothing is learned of the mask; None: all masks are known."""

    def __post_init__(self) -> None:
        count = len(self.labels)
        if self.has_mask is not None and self.has_mask.shape != (count,):
            raise ValueError(f"has_mask must be {(count,)}, not {tuple(self.has_mask.shape)}")
        if self.boxes.shape != (count, 4) or self.labels.ndim != 1 or self.masks.ndim != 3 or len(self.masks) != count:
            shapes = ", ".join(str(tuple(x.shape)) for x in (self.boxes, self.labels, self.masks))
            raise ValueError(f"boxes, labels and masks must be (n, 4), (n,) and (n, H, W), not {shapes}")

    def to(self, device: torch.device | str) -> Target:
        """The same on another device."""
        has_mask = None if self.has_mask is None else self.has_mask.to(device)
        return Target(self.boxes.to(device), self.labels.to(device), self.masks.to(device), has_mask)


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """What was found in one image, best first."""

    boxes: Tensor
    """(m, 4) float."""
    scores: Tensor
    """(m,) float, 0..1."""
    labels: Tensor
    """(m,) int64."""
    masks: Tensor
    """(m, 28, 28) float, probabilities over each box; `paste_masks` puts them into the image."""

    def __len__(self) -> int:
        return len(self.boxes)

    def to(self, device: torch.device | str) -> Detections:
        """The same on another device."""
        return Detections(*(x.to(device) for x in (self.boxes, self.scores, self.labels, self.masks)))


@config
class DetectionSettings:
    """What counts as found, and how often a picture is looked at."""

    score_threshold: float = 0.05
    """Least score, itself excluded; with `soft_nms` also of scores that were lowered, so that 0.001 suits it better."""
    nms_threshold: float = 0.5
    """Of two boxes of a class that overlap more, the worse one is dropped, or loses score with `soft_nms`."""
    soft_nms: bool = False
    """Lower scores linearly instead of dropping boxes (arXiv 1704.04503)."""
    max_detections: int = 100
    """Most detections of an image."""
    max_proposals: int = 1000
    """Most boxes of an image that the box heads look at; what they cost grows with it."""

    scales: tuple[float, ...] = (1.0,)
    """Sizes of the canvas at which a picture is looked at, relative to the usual one; what is found is merged."""
    flip: bool = False
    """Look at the mirror image of every size as well."""

    def __post_init__(self) -> None:
        check_types(self, "detection")
        fits = bool(self.scales) and all(0.1 <= scale <= 4 for scale in self.scales)
        require(fits, f"detection.scales must be one or more within 0.1..4, not {self.scales}")
        for name in ("score_threshold", "nms_threshold"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"detection.{name} must lie in 0..1, not {value}")
        for name in ("max_detections", "max_proposals"):
            require(getattr(self, name) >= 1, f"detection.{name} must be at least 1, not {getattr(self, name)}")


class DetectionModel(DenseModel):
    """Finds objects with their classes, boxes and masks.

    Proposals come from five maps, the four of the pyramid and a coarser one; boxes and masks are pooled from the four.

    Args:
        config: of the transformer.
        num_classes: K.
        stages: of the box head: 1 is Mask R-CNN, with a box for each class; 2 and 3 are its cascade.
        pyramid_width: C, also of the heads' convolutions.
        head_width: features of the hidden layer of the box heads.
        window_size: side in patches of the windows that patches see; None: they always see the whole image.
        num_global_layers: layers that see the whole image nevertheless.
    """

    task = "detection"

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int = 80,
        stages: int = 3,
        pyramid_width: int = 256,
        head_width: int = 1024,
        window_size: int | None = None,
        num_global_layers: int = 4,
    ) -> None:
        require(1 <= stages <= _MAX_STAGES, f"stages must lie in 1..{_MAX_STAGES}, not {stages}")
        super().__init__(config, pyramid_width, 1, window_size, num_global_layers)
        from beit3.model.cascade import CascadeHeads, region_proposals  # torchvision: only detectors wait for it

        self._head_options = {"num_classes": num_classes, "stages": stages, "head_width": head_width}
        self.num_classes = num_classes
        self.rpn = region_proposals((*self.strides, 2 * self.strides[-1]), pyramid_width)
        self.roi_heads = CascadeHeads.build(self.strides, pyramid_width, num_classes, stages, head_width)

    def sample_boxes(self, per_image: int) -> None:
        """Train the box heads on so many boxes of each image; 512 is usual, and most of what small models cost."""
        first: Any = self.roi_heads.stages[0]
        first.fg_bg_sampler.batch_size_per_image = per_image

    @property
    def head_options(self) -> dict[str, Any]:
        """What rebuilding this model needs besides the transformer's configuration."""
        options = super().head_options
        del options["num_maps"]  # one, always
        return {**self._head_options, **options}

    def forward(
        self, images: Tensor, sizes: Tensor | None = None, targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Losses with targets (`losses`), detections at default settings without (`detect`), in either mode.

        Args:
            images: (B, 3, H, W) float, normalised; H and W divide by P.
            sizes: (B, 2) int, height and width of each picture on its canvas; None: they fill it.
            targets: of each image; on any device.
        """
        return self.detect(images, sizes) if targets is None else self.losses(images, sizes, targets)

    def losses(self, images: Tensor, sizes: Tensor | None, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Parts of the loss, to be added up; each is finite, and reaches its parameters, also without any object.

        Args:
            images: as for `forward`.
            sizes: as for `forward`.
            targets: as for `forward`.

        Returns:
            `rpn_objectness`, `rpn_box`; `class_1`, `box_1` and so on for each stage; `mask`.

        Raises:
            ValueError: shapes or labels that do not fit.
        """
        valid = _valid_sizes(images, sizes)
        prepared = self._prepared(targets, images, valid)
        features = self.features(images)
        proposals, of_proposals = self._propose(features, valid, prepared)
        return {
            "rpn_objectness": of_proposals["loss_objectness"],
            "rpn_box": of_proposals["loss_rpn_box_reg"],
            **self.roi_heads.losses(features, proposals, valid, prepared),
        }

    @torch.no_grad()
    def detect(
        self, images: Tensor, sizes: Tensor | None = None, settings: DetectionSettings | None = None
    ) -> list[Detections]:
        """Find objects.

        Args:
            images: as for `forward`.
            sizes: as for `forward`; no box reaches beyond.
            settings: None: the default ones.

        Returns:
            detections of each image, in pixels of its canvas.
        """
        settings = settings or DetectionSettings()
        valid = _valid_sizes(images, sizes)
        features = self.features(images)
        found = [suppress(*x, settings) for x in self.candidates(features, valid, settings)]
        boxes, scores, labels = (list(x) for x in zip(*found, strict=True))
        masks = self.masks(features, boxes, labels, valid)
        return [Detections(*parts) for parts in zip(boxes, scores, labels, masks, strict=True)]

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Maps (B, C, h, w) that the heads look at: "0" to "3" of the pyramid, and "pool" at twice the last stride."""
        maps = self.maps(images)
        return {**{str(level): x for level, x in enumerate(maps)}, "pool": F.max_pool2d(maps[-1], 1, stride=2)}

    def candidates(
        self, features: Mapping[str, Tensor], sizes: list[tuple[int, int]], settings: DetectionSettings
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Boxes (m, 4), scores (m,) and labels (m,) of each image, before suppression.

        Args:
            features: as `features` makes them.
            sizes: height and width of each picture on its canvas.
            settings: what counts as found.
        """
        proposals, _ = self._propose(features, sizes, None)  # best first
        proposals = [x[: settings.max_proposals] for x in proposals]
        found = self.roi_heads.candidates(features, proposals, sizes, settings.score_threshold)
        return [(boxes, scores, labels - 1) for boxes, scores, labels in found]

    def masks(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], labels: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[Tensor]:
        """Probabilities (m, 28, 28) over the boxes (m, 4), for labels (m,), of each image."""
        return self.roi_heads.masks(features, boxes, [x + 1 for x in labels], sizes)

    def _propose(
        self, features: Mapping[str, Tensor], sizes: list[tuple[int, int]], targets: list[dict[str, Tensor]] | None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals (m, 4) of each image, and the losses if there are targets."""
        from torchvision.models.detection.image_list import ImageList

        self.rpn.train(targets is not None)  # its mode says this and nothing else: no layer of it depends on it
        proposals, losses = self.rpn(ImageList(features["0"], sizes), features, targets)
        return proposals, losses

    def _prepared(
        self, targets: Sequence[Target], images: Tensor, sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Targets as torchvision wants them, labels from 1.

        This is where boxes are cut at the edge of the picture, and where those are dropped that are empty then: of a
        side below a hundredth of a pixel, turned inside out or not a number. Nothing behind it meets such a box.
        """
        from torchvision.ops.boxes import clip_boxes_to_image, remove_small_boxes

        from beit3.model.cascade import MIN_SIDE

        if len(targets) != len(images):
            raise ValueError(f"{len(images)} images need as many targets, not {len(targets)}")
        made = []
        for given, size in zip(targets, sizes, strict=True):
            if given.masks.shape[1:] != images.shape[2:]:
                found, wanted = tuple(given.masks.shape[1:]), tuple(images.shape[2:])
                raise ValueError(f"masks must be as large as the canvas, {wanted}, not {found}")
            if len(given.labels) and not 0 <= int(given.labels.min()) <= int(given.labels.max()) < self.num_classes:
                raise ValueError(f"labels must lie in 0..{self.num_classes - 1}, not {given.labels.tolist()}")
            boxes = clip_boxes_to_image(given.boxes.float(), size)
            kept = remove_small_boxes(boxes, MIN_SIDE)
            known = torch.ones(len(boxes), dtype=torch.bool) if given.has_mask is None else given.has_mask
            target = {
                "boxes": boxes[kept],
                "labels": given.labels[kept].long() + 1,
                "masks": given.masks[kept],
                "has_mask": known.to(kept.device)[kept],
            }
            made.append({name: value.to(images.device) for name, value in target.items()})
        return made


def suppress(
    boxes: Tensor, scores: Tensor, labels: Tensor, settings: DetectionSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Non-maximum suppression within each class.

    Args:
        boxes: (n, 4) of one image.
        scores: (n,).
        labels: (n,).
        settings: how.

    Returns:
        boxes (m, 4), scores (m,) and labels (m,), best first.
    """
    from torchvision.ops import batched_nms

    if settings.soft_nms:
        kept, scores = soft_nms(
            boxes,
            scores,
            labels,
            iou_threshold=settings.nms_threshold,
            score_threshold=settings.score_threshold,
            max_detections=settings.max_detections,
        )
        return boxes[kept], scores, labels[kept]
    kept = batched_nms(boxes, scores, labels, settings.nms_threshold)[: settings.max_detections]
    return boxes[kept], scores[kept], labels[kept]


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Put masks into the image at their boxes.

    The inverse of how targets of the mask head are cut out (torchvision's RoIAlign, which counts from the middle of the
    first pixel), and nothing beyond the box. torchvision's own pasting rounds boxes and adds a pixel: of a disk of 10
    pixels it gives back 0.80 (intersection over union), this all of it.

    Args:
        masks: (m, 28, 28) probabilities.
        boxes: (m, 4).
        size: height and width of the image in pixels.

    Returns:
        (m, height, width) bool, True where the probability is above one half and the pixel's middle lies in the box.
    """
    pasted = torch.zeros(len(masks), *size, dtype=torch.bool, device=masks.device)
    for mask, (left, top, right, bottom), image in zip(masks, boxes.tolist(), pasted, strict=True):
        rows = _pixels(top, bottom, size[0])
        columns = _pixels(left, right, size[1])
        if not rows or not columns:
            continue
        places = torch.meshgrid(
            (torch.tensor(columns, device=masks.device) - left) / (right - left) * 2 - 1,
            (torch.tensor(rows, device=masks.device) - top) / (bottom - top) * 2 - 1,
            indexing="xy",
        )
        values = F.grid_sample(
            mask[None, None], torch.stack(places, dim=2)[None], padding_mode="border", align_corners=False
        )
        image[rows.start : rows.stop, columns.start : columns.stop] = values[0, 0] > 0.5
    return pasted


def _pixels(start: float, stop: float, length: int) -> range:
    """Pixels of a line whose middle lies between two places."""
    return range(max(0, math.ceil(start - 0.5)), min(length, math.ceil(stop - 0.5)))


def _valid_sizes(images: Tensor, sizes: Tensor | None) -> list[tuple[int, int]]:
    """Height and width of each picture on its canvas."""
    height, width = images.shape[2:]
    if sizes is None:
        return [(height, width)] * len(images)
    if sizes.shape != (len(images), 2):
        raise ValueError(f"sizes must be {(len(images), 2)}, height and width of each image, not {tuple(sizes.shape)}")
    given = [(int(tall), int(wide)) for tall, wide in sizes.tolist()]
    for tall, wide in given:
        if not (1 <= tall <= height and 1 <= wide <= width):
            raise ValueError(f"a picture of {tall}x{wide} does not lie on a canvas of {height}x{width}")
    return given
