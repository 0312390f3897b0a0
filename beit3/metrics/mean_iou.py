"""Mean intersection over union of semantic segmentation, from a confusion matrix that sums over pictures and ranks.

Shapes: n pixels of any shape, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from beit3.config import require
from beit3.errors import ConfigError


def confusion(predicted: Tensor, labels: Tensor, num_classes: int, ignore: int = 255) -> Tensor:
    """Count pixels by label and prediction.

    Args:
        predicted: (...) integers in 0..K-1.
        labels: (...) integers in 0..K-1, or `ignore` for pixels that are left out.
        num_classes: K.
        ignore: label of pixels that are left out.

    Returns:
        (K, K) int64 on the same device; row: label, column: prediction.

    Raises:
        ConfigError: a label or a prediction is out of range.
    """
    kept = labels != ignore
    predicted, labels = predicted[kept].long(), labels[kept].long()
    for what, values in (("label", labels), ("prediction", predicted)):
        if values.numel():
            lowest, highest = map(int, values.aminmax())
            worst = lowest if lowest < 0 else highest
            require(
                0 <= worst < num_classes,
                f"mean IoU: {what} {worst} with {num_classes} classes: give 0..{num_classes - 1}",
            )
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, (K,) float64 in 0..1; NaN where it is neither labelled nor predicted."""
    counts = confusion.double()
    hits = counts.diagonal()
    return hits / (counts.sum(0) + counts.sum(1) - hits)


def mean_iou(confusion: Tensor) -> dict[str, float]:
    """Metrics of a whole set; shares in 0..1.

    Args:
        confusion: (K, K) int64, the sum over all pictures.

    Returns:
        `mean_iou` over the classes that are labelled or predicted somewhere, `mean_accuracy` over those that are
        labelled, `pixel_accuracy`; as mmseg computes them.

    Raises:
        ConfigError: no pixel has a label.
    """
    if not confusion.any():
        raise ConfigError("mean IoU: no labelled pixels; give at least one")
    counts = confusion.double()
    hits = counts.diagonal()
    return {
        "mean_iou": float(class_iou(confusion).nanmean()),
        "pixel_accuracy": float(hits.sum() / counts.sum()),
        "mean_accuracy": float((hits / counts.sum(1)).nanmean()),
    }
