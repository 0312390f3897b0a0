"""Multi-scale test of detection: one picture seen at several scales and mirrored, what was found merged.

Shapes: (H, W) canvas of a view in pixels, m detections.

Boxes of all views go into one suppression; the boxes that stay get the mean of their masks in all views.

Source: the idea of detectron2's `GeneralizedRCNNWithTTA`, which suppresses within each view first. BEiT-3's numbers on
COCO are of a multi-scale test (arXiv 2208.10442).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from beit3.model.detection import DetectionModel, Detections, DetectionSettings, suppress


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """One way to look at a picture: scaled, mirrored if so, and put at the top left of a canvas."""

    pixels: Tensor
    """(3, H, W) float, normalised; H and W divide by P."""
    size: tuple[int, int]
    """Height and width of the picture on the canvas."""
    scale: tuple[float, float]
    """Pixels of the canvas for one of the picture, downwards and across."""
    flipped: bool = False
    """Whether left and right were exchanged."""

    def mirror(self) -> View:
        """The same with left and right exchanged; the picture stays at the left."""
        width = self.size[1]
        pixels = torch.cat([self.pixels[..., :width].flip(2), self.pixels[..., width:]], dim=2)
        return replace(self, pixels=pixels, flipped=not self.flipped)

    def to_canvas(self, boxes: Tensor) -> Tensor:
        """Boxes (m, 4) of the picture on the canvas."""
        down, across = self.scale
        return self._mirrored(boxes * boxes.new_tensor([across, down, across, down]))

    def to_picture(self, boxes: Tensor) -> Tensor:
        """Boxes (m, 4) of the canvas in the picture."""
        down, across = self.scale
        return self._mirrored(boxes) / boxes.new_tensor([across, down, across, down])

    def _mirrored(self, boxes: Tensor) -> Tensor:
        """The same boxes if the view is not flipped."""
        if not self.flipped:
            return boxes
        left, top, right, bottom = boxes.unbind(dim=1)
        width = self.size[1]
        return torch.stack([width - right, top, width - left, bottom], dim=1)


@torch.no_grad()
def detect_views(
    model: DetectionModel,
    views: Sequence[View],
    picture_size: tuple[int, int],
    settings: DetectionSettings | None = None,
) -> Detections:
    """Find the objects of one picture in several views of it.

    The maps of all views are kept until the masks are made: about 85 C H W / P^2 bytes for each in fp32.

    Args:
        model: in eval mode.
        views: at least one.
        picture_size: height and width of the picture in pixels.
        settings: None: the default ones; what views there are is not looked up in them.

    Returns:
        detections in pixels of the picture.

    Raises:
        ValueError: no view.
    """
    from torchvision.ops.boxes import clip_boxes_to_image

    if not views:
        raise ValueError("give at least one view of the picture")
    settings = settings or DetectionSettings()
    seen = [model.features(view.pixels[None]) for view in views]
    found = []
    for view, features in zip(views, seen, strict=True):
        boxes, scores, labels = model.candidates(features, [view.size], settings)[0]
        found.append((clip_boxes_to_image(view.to_picture(boxes), picture_size), scores, labels))
    boxes, scores, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    boxes, scores, labels = suppress(boxes, scores, labels, settings)
    masks = []
    for view, features in zip(views, seen, strict=True):
        mask = model.masks(features, [view.to_canvas(boxes)], [labels], [view.size])[0]
        masks.append(mask.flip(2) if view.flipped else mask)
    return Detections(boxes, scores, labels, torch.stack(masks).mean(dim=0))
