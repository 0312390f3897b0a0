"""Segmentation of pictures of any size: windows over them, several sizes and mirror images, and labels at full size.

Shapes: B images, K classes, H, W sides in pixels, (h, w) those of a window or of a smaller map.

Averages are mmseg's: scores as they are (logits, of UPerNet) where windows overlap, probabilities over views. Scores
are float32, so a resized picture takes 4 K H W bytes: 210 MB for 512 x 683 pixels and 150 classes, at most 630 MB for a
window of 512 (no side is longer than four windows). Several views take as much again as the largest of them. Labels
at the picture's own size are found some rows at a time, with some 64 MB beside the labels, however large it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.config import check_types, config, require

if TYPE_CHECKING:
    from beit3.model.segmentation import SegmentationModel

_STRIP = 2**22
"""Scores that are resized at a time."""


@config
class SlidingConfig:
    """How a picture is looked at to be segmented."""

    stride_share: float = 2 / 3
    """Step of the window, as a share of its side (BEiT's)."""
    scales: tuple[float, ...] = (1.0,)
    """Sizes of the picture, relative to the usual one; probabilities are averaged. BEiT's test with several: 0.5,
    0.75, 1, 1.25, 1.5, 1.75."""
    flip: bool = False
    """Look at the mirror image of every size as well."""
    windows_at_once: int = 4
    """Windows of one pass through the model; memory against speed."""

    def __post_init__(self) -> None:
        check_types(self, "slide")
        require(0 < self.stride_share <= 1, f"slide.stride_share must lie in 0..1, not {self.stride_share}")
        fits = bool(self.scales) and all(0.1 <= scale <= 4 for scale in self.scales)
        require(fits, f"slide.scales must be one or more within 0.1..4, not {self.scales}")
        require(self.windows_at_once >= 1, f"slide.windows_at_once must be at least 1, not {self.windows_at_once}")


def slide(
    score: Callable[[Tensor], Tensor],
    images: Tensor,
    window: tuple[int, int],
    stride: tuple[int, int],
    windows_at_once: int = 4,
) -> Tensor:
    """Score images window by window, and average the scores where windows overlap.

    The last window of a row or column is moved inside the image. An image smaller than a window is filled up with zeros
    (the mean colour) on the right and below, and the scores there are cut off.

    Args:
        score: turns (n, 3, h, w) into (n, K, h, w).
        images: (B, 3, H, W) normalised.
        window: (h, w).
        stride: steps down and across.
        windows_at_once: largest n.

    Returns:
        (B, K, H, W) float32.
    """
    size = images.shape[-2:]
    bottom, right = (max(0, side - own) for side, own in zip(window, size, strict=True))
    images = F.pad(images, (0, right, 0, bottom))
    tops, lefts = (
        [min(step * number, length - side) for number in range(-(-(length - side) // step) + 1)]
        for length, side, step in zip(images.shape[-2:], window, stride, strict=True)
    )
    places = [(image, top, left) for image in range(len(images)) for top in tops for left in lefts]
    total: Tensor | None = None
    for start in range(0, len(places), windows_at_once):
        now = places[start : start + windows_at_once]
        cuts = torch.stack([images[i, :, y : y + window[0], x : x + window[1]] for i, y, x in now])
        scores = score(cuts).float()
        if total is None:
            total = scores.new_zeros(len(images), scores.shape[1], *images.shape[-2:])
        for (i, y, x), values in zip(now, scores, strict=True):
            total[i, :, y : y + window[0], x : x + window[1]] += values
    assert total is not None, "no images"
    for axis, (starts, side) in enumerate(((tops, window[0]), (lefts, window[1])), start=2):
        covered = total.new_zeros(total.shape[axis])
        for first in starts:
            covered[first : first + side] += 1
        total /= covered.view(-1, *[1] * (3 - axis))
    return total[..., : size[0], : size[1]]


@torch.no_grad()
def segment_views(
    model: SegmentationModel,
    views: Sequence[Tensor],
    size: tuple[int, int],
    window: tuple[int, int],
    settings: SlidingConfig,
) -> Tensor:
    """Name the class of every pixel of one picture.

    Args:
        model: in eval mode.
        views: the picture in one or more sizes, (3, h, w) each, normalised, on the model's device.
        size: (H, W) of the picture itself.
        window: sides of what the model reads at once.
        settings: of `SlidingConfig`; its scales are not looked at again.

    Returns:
        (H, W) int64 on the same device.
    """
    stride = (max(1, int(settings.stride_share * window[0])), max(1, int(settings.stride_share * window[1])))
    looks = [(view, mirrored) for view in views for mirrored in ((False, True) if settings.flip else (False,))]
    largest = max(((view.shape[1], view.shape[2]) for view in views), key=lambda sides: sides[0] * sides[1])
    canvas = size if size[0] * size[1] <= largest[0] * largest[1] else largest  # finer scores would tell no more
    total: Tensor | None = None
    for view, mirrored in looks:
        seen = view.flip(-1) if mirrored else view
        scores = slide(model, seen[None], window, stride, settings.windows_at_once)
        scores = scores.flip(-1) if mirrored else scores
        if len(looks) == 1:
            return label_map(scores[0], size)
        total = scores.new_zeros(scores.shape[1], *canvas) if total is None else total
        for rows, strip in _resized(scores[0], canvas):
            total[:, rows] += model.probabilities(strip[None])[0]
    assert total is not None, "no views"
    return label_map(total, size)


def label_map(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The class with the largest score after resizing (bilinear) scores (K, h, w) to (H, W): (H, W) int64."""
    labels = torch.empty(size, dtype=torch.int64, device=scores.device)  # a list of strips would leave memory in pieces
    for rows, strip in _resized(scores, size):
        labels[rows] = strip.argmax(0)
    return labels


def _resized(scores: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Resize scores (K, h, w) to (H, W), bilinear, a strip of rows at a time: which rows, and (K, n, W)."""
    (height, width), rows = size, scores.shape[1]
    places = ((torch.arange(height, device=scores.device) + 0.5) * (rows / height) - 0.5).clamp(0, rows - 1)
    above = places.long()
    below = (above + 1).clamp(max=rows - 1)
    weights = (places - above)[:, None]
    step = max(1, _STRIP // (len(scores) * max(width, scores.shape[2])))
    for start in range(0, height, step):
        own = slice(start, start + step)
        mixed = torch.lerp(scores[:, above[own]], scores[:, below[own]], weights[own])
        yield own, F.interpolate(mixed[None], (mixed.shape[1], width), mode="bilinear", align_corners=False)[0]
