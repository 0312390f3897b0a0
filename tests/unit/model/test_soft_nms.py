"""Soft suppression is the paper's algorithm, read line by line, and hard suppression in its limit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from beit3.model.soft_nms import Method, soft_nms

Row = list[float]


def iou(a: Row, b: Row) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inside = max(0.0, width) * max(0.0, height)
    return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)


def as_in_the_paper(boxes: list[Row], scores: Row, method: Method, limit: float, sigma: float) -> dict[int, float]:
    """Figure 2 of arXiv 1704.04503 for boxes of one class: final score by number."""
    left, final = dict(enumerate(scores)), {}
    while left:
        best = max(left, key=lambda number: left[number])
        final[best] = left.pop(best)
        for number in left:
            overlap = iou(boxes[best], boxes[number])
            if method == "gaussian":
                left[number] *= math.exp(-overlap * overlap / sigma)
            elif overlap >= limit:
                left[number] *= 1 - overlap
    return final


def crowd(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of three classes that overlap a lot."""
    corner, side = torch.rand(count, 2) * 30, 10 + torch.rand(count, 2) * 20
    return torch.cat([corner, corner + side], dim=1), torch.rand(count), torch.randint(0, 3, (count,))


@pytest.mark.parametrize(
    ("method", "limit", "sigma"), [("linear", 0.3, 0.5), ("linear", 0.6, 0.5), ("gaussian", 0, 0.4)]
)
def test_it_is_the_algorithm_of_the_paper_for_each_class(method: Method, limit: float, sigma: float) -> None:
    boxes, scores, labels = crowd(50)
    wanted: dict[int, float] = {}
    for label in range(3):
        numbers = torch.where(labels == label)[0].tolist()
        one = as_in_the_paper(boxes[numbers].tolist(), scores[numbers].tolist(), method, limit, sigma)
        wanted |= {numbers[place]: score for place, score in one.items()}
    best = sorted(((score, number) for number, score in wanted.items() if score > 0.05), reverse=True)
    assert 10 < len(best) < 50
    kept, lowered = soft_nms(
        boxes,
        scores,
        labels,
        method=method,
        iou_threshold=limit,
        sigma=sigma,
        score_threshold=0.05,
        max_detections=50,
    )
    assert kept.tolist() == [number for _, number in best]
    torch.testing.assert_close(lowered, torch.tensor([score for score, _ in best]))


def test_a_gaussian_without_width_is_hard_suppression_of_whatever_overlaps() -> None:
    boxes, scores, labels = crowd(60)
    kept, lowered = soft_nms(boxes, scores, labels, method="gaussian", sigma=1e-9, score_threshold=1e-6)
    hard = batched_nms(boxes, scores, labels, 0.0)
    assert 3 < len(hard) < 40
    assert kept.tolist() == hard.tolist()
    torch.testing.assert_close(lowered, scores[hard])


def test_copies_of_a_box_are_dropped_as_by_hard_suppression() -> None:
    first = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [0, 20, 10, 30]])
    boxes, scores, labels = first.repeat(4, 1), torch.rand(12), torch.arange(3).repeat(4)
    kept, _ = soft_nms(boxes, scores, labels, score_threshold=0.0)
    assert kept.tolist() == batched_nms(boxes, scores, labels, 0.5).tolist()


def test_the_best_few_are_the_first_of_all() -> None:
    boxes, scores, labels = crowd(60)
    kept, lowered = soft_nms(boxes, scores, labels, max_detections=60)
    assert lowered.tolist() == sorted(lowered.tolist(), reverse=True)
    few, few_lowered = soft_nms(boxes, scores, labels, max_detections=7)
    assert (few.tolist(), few_lowered.tolist()) == (kept[:7].tolist(), lowered[:7].tolist())


def test_what_is_given_stays_as_it_is() -> None:
    boxes, scores, labels = crowd(20)
    before = scores.clone()
    soft_nms(boxes, scores, labels)
    assert torch.equal(scores, before)


def test_nothing_gives_nothing_and_boxes_without_area_no_nan() -> None:
    kept, lowered = soft_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert (kept.shape, kept.dtype, lowered.shape) == ((0,), torch.int64, (0,))
    for method in ("linear", "gaussian"):
        kept, lowered = soft_nms(torch.ones(3, 4), torch.tensor([0.2, 0.9, 0.4]), torch.zeros(3), method=method)
        assert kept.tolist() == [1, 2, 0]
        torch.testing.assert_close(lowered, torch.tensor([0.9, 0.4, 0.2]))
