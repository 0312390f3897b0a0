"""Training views of detection and segmentation; pictures for evaluation go through `beit3.data.preprocess.Preprocess`.

Shapes: H, W height and width of a view in pixels, (h, w) of the part of it that the picture fills, n objects. A view
is uint8 (3, H, W); the picture lies at its top left, the rest has the fill colour. Boxes are x1, y1, x2, y2 in pixels
of the view, float32. What is drawn at random comes from torch's global generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes

from beit3.config import config, require
from beit3.data.dense_rows import DetectedObject
from beit3.data.masks import decode_mask
from beit3.data.resize import around, inside, to_tensor
from beit3.errors import BadSampleError
from beit3.model.segmentation import IGNORED

T = TypeVar("T")
Color = tuple[int, int, int]

_BICUBIC, _NEAREST = v2.InterpolationMode.BICUBIC, v2.InterpolationMode.NEAREST
_TRIES = 10
"""Crops that are drawn until one shows classes enough."""


@dataclass(frozen=True, slots=True)
class DetectionExample:
    """A view and the objects that can be seen in it; crowd regions are not among them."""

    image: Tensor
    """uint8 (3, H, W)"""
    size: tuple[int, int]
    """h, w"""
    boxes: Tensor
    """float32 (n, 4)"""
    labels: Tensor
    """int64 (n,)"""
    masks: Tensor
    """uint8 (n, H, W); where only the box is known, the box."""
    has_mask: Tensor
    """bool (n,): False where only the box is known."""


@dataclass(frozen=True, slots=True)
class SegmentationExample:
    """A view and the label of each of its pixels."""

    image: Tensor
    """uint8 (3, H, W)"""
    labels: Tensor
    """uint8 (H, W); 255 is ignored."""


@config
class DetectionViewConfig:
    """Training views of detection: large-scale jitter (Ghiasi et al., "Simple Copy-Paste", arXiv 2012.07177)."""

    scale: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest size of the picture, as a factor of the size that fits into the view."""
    flip: float = 0.5
    """Probability of mirroring left and right."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter: factors from [1 - c, 1 + c]; 0 varies nothing."""
    min_box_size: float = 1.0
    """Shortest side in pixels of the view; what shows less of an object is not asked for."""

    def __post_init__(self) -> None:
        require(0 < self.scale[0] <= self.scale[1] < inf, f"scale must rise from above 0, not {self.scale}")
        require(0 <= self.flip <= 1, f"flip is a probability, not {self.flip}")
        require(0 <= self.color_jitter <= 1, f"color_jitter must lie in 0..1, not {self.color_jitter}")
        require(self.min_box_size > 0, f"min_box_size must be above 0, not {self.min_box_size}")


@dataclass(frozen=True, slots=True)
class _Placement:
    """How a picture comes to lie in a view: resized, cut, perhaps mirrored, filled up. The same for boxes and masks."""

    resized: tuple[int, int]
    top: int
    left: int
    size: tuple[int, int]
    """What is cut out, and the part of the view that it fills."""
    canvas: tuple[int, int]
    mirrored: bool

    @classmethod
    def draw(cls, resized: tuple[int, int], canvas: tuple[int, int], flip: float) -> _Placement:
        """Cut at random where the resized picture is larger than the view."""
        height, width = (min(side, limit) for side, limit in zip(resized, canvas, strict=True))
        top, left = (_below(side - kept + 1) for side, kept in zip(resized, (height, width), strict=True))
        return cls(resized, top, left, (height, width), canvas, bool(torch.rand(()) < flip))

    def cut(self, x: T, interpolation: v2.InterpolationMode = _NEAREST) -> T:
        """All but the filling, for a PIL picture or for boxes."""
        x = F.resize(x, list(self.resized), interpolation)
        x = F.crop(x, self.top, self.left, *self.size)
        return F.horizontal_flip(x) if self.mirrored else x

    def fill(self, image: Image.Image, color: int | Color) -> Image.Image:
        """Fill up a picture that was cut."""
        view = Image.new(image.mode, self.canvas[::-1], color)
        view.paste(image)
        return view


class DetectionView:
    """Large-scale jitter: resize by a random factor of the size that fits, cut or fill up to the view, perhaps mirror.

    Masks are decoded one at a time at the picture's size: a picture of 4,000 x 4,000 pixels takes about 100 MB on the
    way, and n times H times W bytes for the result.
    """

    def __init__(self, config: DetectionViewConfig, canvas: tuple[int, int], fill: Color) -> None:
        """Build the transform.

        Args:
            config: how views vary.
            canvas: H, W.
            fill: colour of what the picture does not cover; `Preprocess.fill`.
        """
        self.config, self.canvas, self._fill = config, canvas, fill
        strength = config.color_jitter
        self._jitter = v2.ColorJitter(strength, strength, strength) if strength else None

    def __call__(self, image: Image.Image, objects: Sequence[DetectedObject]) -> DetectionExample:
        """Draw one view of an RGB picture of any size.

        Args:
            image: the picture.
            objects: what it shows, in its pixels; `DetectionRow.objects`.

        Raises:
            BadSampleError: `invalid_segmentation`.
            ConfigError: masks cannot be read without faster-coco-eval.
        """
        size = (image.height, image.width)
        factor = float(torch.empty(()).uniform_(*self.config.scale))
        limits = [max(1, round(side * factor)) for side in self.canvas]
        placement = _Placement.draw(inside(size, (limits[0], limits[1])), self.canvas, self.config.flip)
        view = placement.cut(image, _BICUBIC)
        if self._jitter is not None:
            view = self._jitter(view)
        objects = [item for item in objects if not item.is_crowd]
        boxes = _cut_boxes(objects, size, placement)
        found: list[tuple[Tensor, Tensor, DetectedObject]] = []
        for item, box in zip(objects, boxes, strict=True):
            if self._is_large(box):
                mask = _cut_mask(item, size, placement) if item.segmentation is not None else _box_mask(box, placement)
                box = _box_around(mask) if item.segmentation is not None else box
                if box is not None and self._is_large(box):
                    found.append((box, mask, item))
        return DetectionExample(
            to_tensor(placement.fill(view, self._fill)),
            placement.size,
            _stack([box for box, _, _ in found], (4,), torch.float32),
            torch.tensor([item.label for _, _, item in found], dtype=torch.int64),
            _stack([mask for _, mask, _ in found], self.canvas, torch.uint8),
            torch.tensor([item.segmentation is not None for _, _, item in found], dtype=torch.bool),
        )

    def _is_large(self, box: Tensor) -> bool:
        return bool((box[2:] - box[:2]).min() >= self.config.min_box_size)


def _cut_boxes(objects: Sequence[DetectedObject], size: tuple[int, int], placement: _Placement) -> Tensor:
    """Boxes of objects in the view, float32 (n, 4); those outside have no extent."""
    boxes = torch.tensor([item.box for item in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    placed = placement.cut(BoundingBoxes(boxes, format="XYXY", canvas_size=size))
    plain: Tensor = F.clamp_bounding_boxes(placed).as_subclass(Tensor)
    return plain


def _cut_mask(item: DetectedObject, size: tuple[int, int], placement: _Placement) -> Tensor:
    """Mask of an object in the view, uint8 (H, W)."""
    assert item.segmentation is not None
    cut = placement.cut(Image.fromarray(decode_mask(item.segmentation, *size)))
    return torch.from_numpy(np.array(placement.fill(cut, 0)))


def _box_mask(box: Tensor, placement: _Placement) -> Tensor:
    """Pixels whose centres a box holds, uint8 (H, W): for objects of which only the box is known."""
    mask = torch.zeros(placement.canvas, dtype=torch.uint8)
    left, top, right, bottom = (box + 0.5).int().tolist()
    mask[top:bottom, left:right] = 1
    return mask


def _box_around(mask: Tensor) -> Tensor | None:
    """The smallest box around a mask (H, W), float32 (4,); None around nothing."""
    rows, columns = (mask.any(axis).nonzero() for axis in (1, 0))
    if not len(rows):
        return None
    return torch.cat([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


def _stack(tensors: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Stack tensors of one shape, of which there may be none."""
    return torch.stack(list(tensors)) if tensors else torch.zeros(0, *shape, dtype=dtype)


@config
class SegmentationViewConfig:
    """Training views of segmentation: mmsegmentation's for ADE20K, which BEiT uses.

    Resize to what `Preprocess` takes to evaluate (512 pixels, at most 2,048) times a random factor, crop, mirror, vary
    the colours.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest size of the picture, as a factor of the size that covers the view."""
    max_class_share: float = 0.75
    """Crops of which one class covers this share or more are drawn again, ten times at most; 1 takes any."""
    flip: float = 0.5
    """Probability of mirroring left and right."""
    distort: bool = True
    """Vary brightness, contrast, saturation and hue."""

    def __post_init__(self) -> None:
        require(0 < self.scale[0] <= self.scale[1] < inf, f"scale must rise from above 0, not {self.scale}")
        require(0 < self.max_class_share <= 1, f"max_class_share must lie in 0..1, not {self.max_class_share}")
        require(0 <= self.flip <= 1, f"flip is a probability, not {self.flip}")


class SegmentationView:
    """Resize by a random factor, crop and fill up to the view, perhaps mirror, vary the colours."""

    def __init__(self, config: SegmentationViewConfig, canvas: tuple[int, int], fill: Color) -> None:
        """Build the transform.

        Args:
            config: how views vary.
            canvas: H, W.
            fill: colour of what the picture does not cover, where the label is 255; `Preprocess.fill`.
        """
        self.config, self.canvas, self._fill = config, canvas, fill
        self._distort = _photometric_distortion() if config.distort else None

    def __call__(self, image: Image.Image, labels: NDArray[np.uint8]) -> SegmentationExample:
        """Draw one view of an RGB picture of any size.

        Args:
            image: the picture.
            labels: its map of labels, uint8 of the picture's height and width, 255 where ignored (`read_label_map`).

        Raises:
            BadSampleError: `mask_of_another_size`.
        """
        if labels.shape != (image.height, image.width):
            raise BadSampleError(
                "mask_of_another_size", f"labels {labels.shape} of a picture of {image.height} x {image.width}"
            )
        factor = float(torch.empty(()).uniform_(*self.config.scale))
        window = (max(1, int(self.canvas[0] * factor)), max(1, int(self.canvas[1] * factor)))
        placement = self._place(around((image.height, image.width), window), labels)
        view = placement.cut(image, _BICUBIC)
        if self._distort is not None:
            view = self._distort(view)
        cut = placement.fill(placement.cut(Image.fromarray(labels)), IGNORED)
        return SegmentationExample(to_tensor(placement.fill(view, self._fill)), torch.from_numpy(np.array(cut)))

    def _place(self, resized: tuple[int, int], labels: NDArray[np.uint8]) -> _Placement:
        """Draw a crop in which no class covers too much; the last of some tries is taken as it is."""
        whole = np.asarray(Image.fromarray(labels).resize(resized[::-1], Image.Resampling.NEAREST))
        for _ in range(_TRIES):
            place = _Placement.draw(resized, self.canvas, self.config.flip)
            seen = whole[place.top : place.top + place.size[0], place.left : place.left + place.size[1]]
            counts = np.bincount(seen.ravel(), minlength=IGNORED + 1)[:IGNORED]
            if counts.max() < self.config.max_class_share * counts.sum() or self.config.max_class_share == 1:
                break
        return place


def _photometric_distortion() -> Any:
    """mmsegmentation's photometric distortion in torchvision's terms: each step half the time, contrast first or last.

    torchvision's brightness is a factor (of 1 +- 32 / 255) where mmsegmentation adds up to 32, its contrast keeps the
    mean where the other keeps black, and its saturation mixes with grey where the other scales that of HSV.
    """
    steps = [{"brightness": 32 / 255}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.1}]
    brightness, contrast, saturation, hue = (v2.RandomApply([v2.ColorJitter(**step)], p=0.5) for step in steps)
    return v2.RandomChoice(
        [v2.Compose([brightness, contrast, saturation, hue]), v2.Compose([brightness, saturation, hue, contrast])]
    )


def _below(limit: int) -> int:
    """Draw a whole number from 0 on."""
    return int(torch.randint(limit, ()))
