"""Pictures with their classes, as every probe of an image tower reads them.

Shapes: B pictures, H, W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from beit3.config import require
from beit3.data.index_files import ClassificationRow, read_index, read_picture
from beit3.data.preprocess import Preprocess
from beit3.data.resize import crop, to_tensor

View = Callable[[Image.Image], Tensor]
"""From an RGB picture of any size to uint8 (3, H, W)."""


@dataclass(frozen=True, slots=True)
class LabelledBatch:
    """Pictures side by side."""

    images: Tensor
    """(B, 3, H, W) uint8"""
    labels: Tensor
    """(B,) int64"""

    def to(self, device: torch.device) -> LabelledBatch:
        """Copy to a device."""
        return LabelledBatch(self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True))


class LabelledPictures:
    """The pictures of a classification index, for loaders of examples.

    Args:
        paths: one index file, or several that are read as one.
        view: how a picture is prepared.
        num_classes: labels from there on are left out; None takes any.

    Raises:
        DataMissingError: a file does not exist, or holds no usable row.
    """

    def __init__(self, paths: Path | Sequence[Path], view: View, num_classes: int | None = None) -> None:
        self.index = read_index(paths, ClassificationRow, num_labels=num_classes)
        self._view = view

    def __len__(self) -> int:
        return len(self.index)

    def left_out(self) -> dict[str, float]:
        """Share of the rows that cannot be used, by reason."""
        return self.index.left_out()

    def load(self, index: int) -> tuple[Tensor, int]:
        """Read and prepare one picture."""
        row = self.index[index]
        return self._view(read_picture(row.image_path)), row.label

    def collate(self, examples: list[tuple[Tensor, int]]) -> LabelledBatch:
        """Lay pictures side by side."""
        images, labels = zip(*examples, strict=True)
        return LabelledBatch(torch.stack(images), torch.tensor(labels))


class CentralCrop:
    """The middle of a picture: its shorter side is fitted (bicubic) to more than is kept, and the rest cut off.

    Args:
        preprocess: names the size of what is kept.
        share: of the fitted side that is kept; 0.875 is the 224 of 256 pixels of the published protocols.
    """

    def __init__(self, preprocess: Preprocess, share: float) -> None:
        require(0 < share <= 1, f"the share of a central crop must lie in 0..1, not {share}")
        self._kept = preprocess.image_size
        self._fitted = round(self._kept[0] / share), round(self._kept[1] / share)

    def __call__(self, image: Image.Image) -> Tensor:
        """Prepare an RGB picture: uint8 (3, H, W)."""
        (height, width), (taller, wider) = self._kept, self._fitted
        top, left = (taller - height) // 2, (wider - width) // 2
        return to_tensor(crop(image, taller, wider))[:, top : top + height, left : left + width].contiguous()
