"""Windows over pictures: averages against loops that count pixel by pixel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from beit3.data.preprocess import Preprocess
from beit3.data.whole_pictures import segment_image, sizes_to_slide_over
from beit3.errors import ConfigError
from beit3.model import sliding_window
from beit3.model.sliding_window import SlidingConfig, label_map, segment_views, slide

Close = Callable[..., None]


class Scorer(nn.Module):
    """Scores that depend on where a pixel lies in its window; softmax as `probabilities`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, padding=1)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape))
        ramp = torch.linspace(0, 1, images.shape[-1]).expand(images.shape[-2:])
        found: Tensor = self.layer(images) + ramp
        return found

    def probabilities(self, scores: Tensor) -> Tensor:
        return scores.softmax(1)


@pytest.fixture
def scorer() -> Any:
    return Scorer().eval()


@torch.no_grad()
def test_one_window_is_the_plain_pass(scorer: Any, close: Close) -> None:
    images = torch.randn(3, 3, 8, 12)
    assert torch.equal(slide(scorer, images, (8, 12), (5, 7)), scorer(images))


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 12), (9, 12), (17, 30), (8, 41)])
@pytest.mark.parametrize("stride", [(5, 7), (8, 12), (3, 1), (1, 11)])
def test_windows_are_averaged_where_they_overlap(
    size: tuple[int, int], stride: tuple[int, int], scorer: Any, close: Close
) -> None:
    """Windows as mmseg lays them: by steps from the top left, the last one moved back inside."""
    images = torch.randn(2, 3, *size)
    window = (8, 12)
    total, count = torch.zeros(2, 4, *size), torch.zeros(size)
    grid = [(size[axis] - window[axis] + stride[axis] - 1) // stride[axis] + 1 for axis in (0, 1)]
    for row in range(grid[0]):
        for column in range(grid[1]):
            bottom, right = min(row * stride[0] + 8, size[0]), min(column * stride[1] + 12, size[1])
            top, left = bottom - 8, right - 12
            total[:, :, top:bottom, left:right] += scorer(images[:, :, top:bottom, left:right])
            count[top:bottom, left:right] += 1
    assert count.min() >= 1
    close(slide(scorer, images, window, stride), total / count)


@torch.no_grad()
@pytest.mark.parametrize("size", [(5, 12), (8, 3), (1, 1), (5, 20)])
def test_a_picture_smaller_than_the_window_is_filled_up(size: tuple[int, int], scorer: Any, close: Close) -> None:
    images = torch.randn(2, 3, *size)
    padded = F.pad(images, (0, max(0, 12 - size[1]), 0, 8 - size[0]))
    wanted = slide(scorer, padded, (8, 12), (8, 4))[..., : size[0], : size[1]]
    close(slide(scorer, images, (8, 12), (8, 4)), wanted)
    assert {shape[-2:] for shape in scorer.seen} == {(8, 12)}


@torch.no_grad()
def test_windows_pass_a_few_at_a_time(scorer: Any, close: Close) -> None:
    images = torch.randn(2, 3, 20, 12)
    wanted = slide(scorer, images, (8, 12), (5, 12), windows_at_once=1)
    assert len(scorer.seen) == 8
    scorer.seen.clear()
    close(slide(scorer, images, (8, 12), (5, 12), windows_at_once=3), wanted)
    assert [shape[0] for shape in scorer.seen] == [3, 3, 2]


@torch.no_grad()
@pytest.mark.parametrize("size", [(7, 9), (14, 23), (3, 50), (1, 1), (100, 4)])
def test_labels_at_full_size_are_those_of_resized_scores(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.randn(6, 7, 9)
    wanted = F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]
    for strip in (1, 400, 2**20):
        monkeypatch.setattr(sliding_window, "_STRIP", strip)
        found = label_map(scores, size)
        assert found.dtype == torch.int64
        assert found.shape == size
        best = wanted.gather(0, found[None])[0]
        assert torch.allclose(best, wanted.amax(0), atol=1e-5)  # equal but for ties within rounding


def test_a_large_picture_needs_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resized scores of 3000 x 4000 pixels and 150 classes would take 7 GB; no tensor here takes a hundredth of it."""
    made: list[int] = []
    plain = F.interpolate

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = plain(*args, **kwargs)
        made.append(out.nbytes)
        return out

    monkeypatch.setattr(F, "interpolate", watched)
    label_map(torch.zeros(150, 4, 5), (300, 4000))
    assert max(made) <= 4 * 2**22
    assert sum(made) == 4 * 150 * 300 * 4000


@torch.no_grad()
def test_probabilities_of_views_and_mirror_images_are_averaged(scorer: Any) -> None:
    """As mmseg tests with augmentation: scores resized to the picture, mirrored back, softmax, mean."""
    size, views = (12, 14), [torch.randn(3, 10, 12), torch.randn(3, 15, 18)]
    settings = SlidingConfig(stride_share=0.5, flip=True)
    total = torch.zeros(4, *size)
    for view in views:
        for mirrored in (False, True):
            seen = view.flip(2) if mirrored else view
            scores = slide(scorer, seen[None], (8, 8), (4, 4))
            scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
            shares = scores.softmax(1)[0]
            total += shares.flip(2) if mirrored else shares
    found = segment_views(scorer, views, size, (8, 8), settings)
    assert torch.equal(found, total.argmax(0))
    alone = segment_views(scorer, views[:1], size, (8, 8), SlidingConfig(stride_share=0.5))
    assert not torch.equal(found, alone)


@torch.no_grad()
def test_views_of_a_picture_larger_than_all_of_them_are_averaged_at_the_largest(scorer: Any) -> None:
    views = [torch.randn(3, 8, 8), torch.randn(3, 12, 12)]
    total = torch.zeros(4, 12, 12)
    for view in views:
        scores = slide(scorer, view[None], (8, 8), (5, 5))
        total += F.interpolate(scores, (12, 12), mode="bilinear", align_corners=False).softmax(1)[0]
    wanted = F.interpolate(total[None], (30, 30), mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(segment_views(scorer, views, (30, 30), (8, 8), SlidingConfig()), wanted)


@torch.no_grad()
@pytest.mark.parametrize("size", [(30, 40), (9, 8), (4, 100), (5, 5)])
def test_a_picture_gets_labels_at_its_own_size(size: tuple[int, int], scorer: Any) -> None:
    """Of a picture in two colours, scored by its red and blue channels alone, every pixel's class is known."""
    nn.init.zeros_(scorer.layer.weight)
    nn.init.zeros_(scorer.layer.bias)
    scorer.layer.weight[1, 0, 1, 1] = scorer.layer.weight[2, 2, 1, 1] = 10
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[:, : size[1] // 2, 0] = pixels[:, size[1] // 2 :, 2] = 255
    preprocess = Preprocess(image_size=(16, 16), resize="slide")
    for settings in (None, SlidingConfig(scales=(0.5, 1.0, 1.5), flip=True)):
        found = segment_image(scorer, preprocess, Image.fromarray(pixels), settings)
        wanted = torch.from_numpy(np.where(pixels[..., 0] > 0, 1, 2))
        near = abs(np.arange(size[1]) - size[1] // 2 + 0.5) > max(1, size[1] / 16)  # the colours mix at the edge
        assert found.shape == size
        assert torch.equal(found[:, near], wanted[:, near])


def test_views_have_the_sizes_asked_for() -> None:
    preprocess = Preprocess(image_size=(16, 16), resize="slide")
    image = Image.new("RGB", (60, 40))
    views = sizes_to_slide_over(preprocess, image, SlidingConfig(scales=(0.5, 1.0, 1.75)))
    assert [tuple(view.shape) for view in views] == [(3, 8, 12), (3, 16, 24), (3, 28, 42)]
    assert {view.dtype for view in views} == {torch.uint8}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"stride_share": 0.0}, "slide.stride_share must lie in 0..1, not 0.0"),
        ({"scales": ()}, "slide.scales must be one or more within 0.1..4"),
        ({"scales": (1.0, 9.0)}, "slide.scales must be one or more within 0.1..4"),
        ({"flip": "no"}, "slide.flip must be true or false, not 'no'"),
        ({"windows_at_once": 1.5}, "slide.windows_at_once must be a whole number, not 1.5"),
        ({"scales": 1.0}, "slide.scales must be "),
        ({"stride_share": float("nan")}, "slide.stride_share must be "),
        ({"windows_at_once": 0}, "slide.windows_at_once must be at least 1, not 0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SlidingConfig(**wrong)
