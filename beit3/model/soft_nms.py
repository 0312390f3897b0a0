"""Soft non-maximum suppression: boxes that overlap a better one lose score instead of being dropped.

Shapes: n boxes of one picture, k of them kept.

Source: Bodla et al., "Soft-NMS: improving object detection with one line of code", arXiv 1704.04503.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Method = Literal["linear", "gaussian"]


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    method: Method = "linear",
    iou_threshold: float = 0.5,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    max_detections: int = 100,
) -> tuple[Tensor, Tensor]:
    """Pick boxes one after the other, the best first; each lowers the scores of those of its class that overlap it.

    Scores only fall, so the picks come in the order of their final scores, whatever their class: the first
    `max_detections` are the best, and nothing behind them need be looked at.

    Args:
        boxes: (n, 4) float, x1, y1, x2, y2.
        scores: (n,) float.
        labels: (n,) int64; boxes of different labels leave each other alone.
        method: "linear" multiplies by 1 - IoU where that is at least `iou_threshold`, "gaussian" by
            exp(-IoU^2 / sigma) everywhere (section 3 of the paper).
        iou_threshold: for "linear" alone.
        sigma: for "gaussian" alone.
        score_threshold: what falls to this or below is dropped.
        max_detections: most boxes kept.

    Returns:
        places of the boxes kept, (k,) int64, best first, and their lowered scores (k,).
    """
    from torchvision.ops import box_iou

    left, kept, lowered = scores.clone(), [], []
    for _ in range(min(max_detections, len(boxes))):
        best = left.argmax()
        kept.append(best)
        lowered.append(left[best])
        overlap = box_iou(boxes[best][None], boxes)[0].nan_to_num()  # two boxes without area: 0 / 0
        if method == "linear":
            factor = torch.where(overlap >= iou_threshold, 1 - overlap, 1.0)
        else:
            factor = torch.exp(-(overlap**2) / sigma)
        left = torch.where(labels == labels[best], left * factor, left)
        left[best] = -torch.inf
    if not kept:
        return torch.zeros(0, dtype=torch.int64, device=scores.device), scores
    found = torch.stack(lowered)
    enough = found > score_threshold
    return torch.stack(kept)[enough], found[enough]
