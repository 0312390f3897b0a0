"""Views of detection and segmentation: picture, boxes and masks move together; what is drawn follows the recipes.

Pictures are painted so that colours tell objects or places, and what a view says is compared with what it shows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from beit3.data import dense_views
from beit3.data.dense_rows import DetectedObject
from beit3.data.dense_views import (
    DetectionExample,
    DetectionView,
    DetectionViewConfig,
    SegmentationExample,
    SegmentationView,
    SegmentationViewConfig,
)
from beit3.data.masks import decode_mask, encode_mask
from beit3.data.randomness import seeded
from beit3.data.resize import letterbox, to_tensor
from beit3.errors import BadSampleError, ConfigError

FILL = (1, 250, 3)
GROUND = (255, 0, 255)
COLORS = [(255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 255, 255)]
CANVAS = (96, 128)
Shape = tuple[str, int, int, int, int]
SHAPES: list[Shape] = [
    ("ellipse", 10, 20, 90, 60),
    ("ellipse", 120, 5, 60, 120),
    ("box", 30, 100, 80, 40),
    ("box", 150, 130, 40, 15),
]


def scene(
    shapes: Sequence[Shape] = SHAPES, size: tuple[int, int] = (160, 200)
) -> tuple[Image.Image, list[DetectedObject]]:
    """Paint shapes, each in its own colour, and say where they are: boxes with a mask are ellipses."""
    pixels = np.empty((*size, 3), dtype=np.uint8)
    pixels[:] = GROUND
    row, column = np.mgrid[: size[0], : size[1]] + 0.5
    objects = []
    for number, (kind, x, y, wide, high) in enumerate(shapes):
        mask = (abs(column - x - wide / 2) <= wide / 2) & (abs(row - y - high / 2) <= high / 2)
        if kind == "ellipse":
            mask = ((column - x - wide / 2) / (wide / 2)) ** 2 + ((row - y - high / 2) / (high / 2)) ** 2 <= 1
        pixels[mask] = COLORS[number]
        box = (float(x), float(y), float(wide), float(high))
        shape = encode_mask(mask) if kind == "ellipse" else None
        objects.append(DetectedObject(box, number, False, float(mask.sum()), shape))
    return Image.fromarray(pixels), objects


def shows(view: Tensor, color: tuple[int, int, int], slack: int = 90) -> NDArray[np.bool_]:
    """Where a view (3, H, W) has a colour, edges blurred by resizing aside."""
    distance = np.abs(view.numpy().astype(int) - np.array(color)[:, None, None]).max(axis=0)
    return np.asarray(distance <= slack)


def detect(
    seed: object, *, config: DetectionViewConfig | None = None, canvas: tuple[int, int] = CANVAS
) -> DetectionExample:
    view = DetectionView(config or DetectionViewConfig(), canvas, FILL)
    with seeded(str(seed)):
        return view(*scene())


def bounds(mask: NDArray[Any]) -> list[int]:
    """Box around a mask, by looking at every pixel."""
    found = [(row, column) for row in range(mask.shape[0]) for column in range(mask.shape[1]) if mask[row, column]]
    rows, columns = zip(*found, strict=True)
    return [min(columns), min(rows), max(columns) + 1, max(rows) + 1]


@pytest.mark.parametrize("seed", range(40))
def test_masks_and_boxes_lie_where_the_view_shows_their_objects(seed: int) -> None:
    example = detect(seed)
    assert example.image.shape == (3, *CANVAS)
    assert example.image.dtype == example.masks.dtype == torch.uint8
    assert example.boxes.dtype == torch.float32
    assert example.masks.shape == (len(example.labels), *CANVAS)
    for box, label, mask, known in zip(
        example.boxes.tolist(), example.labels.tolist(), example.masks.numpy(), example.has_mask.tolist(), strict=True
    ):
        assert known == (label < 2)
        area = shows(example.image, COLORS[label])
        blurred = 2 * sum(1 + side for side in (box[2] - box[0], box[3] - box[1]))  # pixels along the outline
        assert np.logical_xor(area, mask > 0).sum() <= blurred
        if known:
            assert box == bounds(mask)
        elif area.any():
            assert np.abs(np.array(box) - bounds(area)).max() <= 1.5


@pytest.mark.parametrize("seed", range(40))
def test_an_object_that_is_not_among_them_cannot_be_seen(seed: int) -> None:
    example = detect(seed)
    missing = set(range(len(SHAPES))) - set(example.labels.tolist())
    for label in missing:
        assert shows(example.image, COLORS[label], 40).sum() <= 6


@pytest.mark.parametrize("seed", range(40))
def test_the_picture_fills_the_top_left_and_one_colour_the_rest(seed: int) -> None:
    example = detect(seed)
    height, width = example.size
    filled = (example.image == torch.tensor(FILL)[:, None, None]).all(0)
    assert filled[height:].all()
    assert filled[:, width:].all()
    assert not filled[:height, :width].any()
    assert not example.masks[:, height:].any()
    assert not example.masks[:, :, width:].any()
    if len(example.boxes):
        assert example.boxes[:, [0, 1]].min() >= 0
        assert (example.boxes[:, 2] <= width).all()
        assert (example.boxes[:, 3] <= height).all()


def test_a_view_of_fixed_scale_is_the_letterbox_of_evaluation() -> None:
    plain = DetectionViewConfig(scale=(1.0, 1.0), flip=0.0)
    example = detect(0, config=plain)
    image, objects = scene()
    assert torch.equal(example.image, to_tensor(letterbox(image, *CANVAS, FILL)))
    assert example.size == (96, 120)
    by_hand = np.array([[x, y, x + wide, y + high] for _, x, y, wide, high in SHAPES]) * 0.6
    np.testing.assert_allclose(example.boxes.numpy(), by_hand, atol=1.0)  # of masks: whole pixels
    np.testing.assert_allclose(example.boxes.numpy()[2:], by_hand[2:], atol=1e-4)
    assert example.labels.tolist() == [item.label for item in objects]


def test_mirroring_turns_everything_round_within_the_picture() -> None:
    def drawn(flip: float) -> DetectionExample:
        return detect(0, config=DetectionViewConfig(scale=(1.0, 1.0), flip=flip))

    plain, mirrored = drawn(0.0), drawn(1.0)
    width = plain.size[1]
    assert torch.equal(mirrored.image[:, :, :width], plain.image[:, :, :width].flip(-1))
    assert torch.equal(mirrored.masks[:2, :, :width], plain.masks[:2, :, :width].flip(-1))
    expected = plain.boxes.clone()
    expected[:, [0, 2]] = width - plain.boxes[:, [2, 0]]
    torch.testing.assert_close(mirrored.boxes, expected)


def test_sizes_are_drawn_evenly_between_the_limits() -> None:
    view = DetectionView(DetectionViewConfig(), (64, 64), FILL)
    image = Image.new("RGB", (100, 100))
    mirrored = 0
    marked = Image.fromarray(np.repeat(np.arange(100, dtype=np.uint8)[None, :, None], 100, 0).repeat(3, 2))
    with seeded("sizes"):
        factors = [view(image, []).size[0] / 64 for _ in range(400)]
        for _ in range(200):
            pixels = view(marked, [])
            mirrored += int(pixels.image[0, 0, 0]) > int(pixels.image[0, 0, pixels.size[1] - 1])
    assert min(factors) < 0.15
    assert max(factors) == 1.0
    assert np.mean(np.array(factors) == 1.0) == pytest.approx(1.0 / 1.9, abs=0.08)  # of 0.1..2, what fills the view
    assert 70 <= mirrored <= 130


def test_crowds_are_not_asked_for() -> None:
    image, objects = scene()
    crowd = DetectedObject((0.0, 0.0, 200.0, 160.0), 9, True, 1.0, None)
    view = DetectionView(DetectionViewConfig(scale=(1.0, 1.0)), CANVAS, FILL)
    assert 9 not in view(image, [crowd, *objects]).labels.tolist()


def test_what_is_too_small_to_see_is_not_asked_for() -> None:
    image, objects = scene([("ellipse", 10, 10, 100, 100), ("box", 150, 30, 8, 30)])
    boxes = {
        size: DetectionView(DetectionViewConfig(scale=(0.5, 0.5), min_box_size=size), (160, 200), FILL)(image, objects)
        for size in (1.0, 4.0, 5.0, 60.0)
    }
    assert [example.labels.tolist() for example in boxes.values()] == [[0, 1], [0, 1], [0], []]
    nothing = boxes[60.0]
    assert nothing.boxes.shape == (0, 4)
    assert nothing.masks.shape == (0, 160, 200)
    assert nothing.labels.dtype == torch.int64


def test_an_object_is_as_large_as_its_mask_not_as_its_stated_box() -> None:
    mask = np.zeros((160, 200), dtype=np.uint8)
    mask[40:43, 50:53] = 1
    stated = DetectedObject((20.0, 20.0, 100.0, 100.0), 0, False, 9.0, encode_mask(mask))
    for size, boxes in ((2.0, [[50, 40, 53, 43]]), (4.0, [])):
        view = DetectionView(DetectionViewConfig(scale=(1.0, 1.0), flip=0.0, min_box_size=size), (160, 200), FILL)
        assert view(Image.new("RGB", (200, 160)), [stated]).boxes.tolist() == boxes


def test_only_masks_that_can_be_seen_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []

    def counted(*args: Any) -> NDArray[np.uint8]:
        decoded.append(args)
        return decode_mask(*args)

    monkeypatch.setattr(dense_views, "decode_mask", counted)
    shape = encode_mask(np.ones((160, 200)))
    places = [(10.0 * column, 10.0 * row) for column in range(20) for row in range(16)]
    objects = [DetectedObject((*place, 8.0, 8.0), n, False, 64.0, shape) for n, place in enumerate(places)]
    view = DetectionView(DetectionViewConfig(scale=(8.0, 8.0)), CANVAS, FILL)
    view(Image.new("RGB", (200, 160)), objects)
    assert 4 <= len(decoded) <= 12, "of 320, in a window of 25 x 20 pixels"


def test_colours_are_varied_in_the_picture_but_not_around_it() -> None:
    config = DetectionViewConfig(scale=(0.5, 0.5), flip=0.0, color_jitter=0.8)
    first, second = detect(1, config=config), detect(2, config=config)
    assert not torch.equal(first.image, second.image)
    assert torch.equal(first.masks, second.masks)
    assert first.image[:, -1, -1].tolist() == list(FILL)


def test_a_broken_mask_names_its_reason() -> None:
    broken = DetectedObject((1.0, 1.0, 50.0, 50.0), 0, False, 1.0, {"size": [160, 200], "counts": "zz"})
    with pytest.raises(BadSampleError, match="invalid_segmentation"):
        DetectionView(DetectionViewConfig(scale=(1.0, 1.0)), CANVAS, FILL)(scene()[0], [broken])


@pytest.mark.parametrize("size", [(4, 4000), (4000, 4), (4, 4), (3000, 3000)])
def test_pictures_of_any_shape_give_views(size: tuple[int, int]) -> None:
    item = DetectedObject((0.0, 0.0, float(size[0]), float(size[1])), 0, False, 1.0, None)
    for seed in range(5):
        with seeded(str(seed)):
            example = DetectionView(DetectionViewConfig(), CANVAS, FILL)(Image.new("RGB", size), [item])
            labels = SegmentationView(SegmentationViewConfig(), (64, 64), FILL)(
                Image.new("RGB", size), np.zeros(size[::-1], dtype=np.uint8)
            )
        assert example.image.shape == (3, *CANVAS)
        assert labels.labels.shape == (64, 64)


# --- segmentation ---

PALETTE = np.array([(0, 0, 0), (255, 0, 0), (0, 0, 255), (255, 255, 255)], dtype=np.uint8)


def labelled(seed: int = 0, size: tuple[int, int] = (120, 180)) -> tuple[Image.Image, NDArray[np.uint8]]:
    """A picture whose colours tell the labels, in patches."""
    coarse = np.random.default_rng(seed).integers(0, 4, (5, 7), dtype=np.uint8)
    labels = np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.NEAREST))
    return Image.fromarray(PALETTE[labels]), labels


def segment(seed: object, size: tuple[int, int] = (64, 64), **options: Any) -> SegmentationExample:
    view = SegmentationView(SegmentationViewConfig(**options), size, FILL)
    with seeded(str(seed)):
        return view(*labelled())


@pytest.mark.parametrize("seed", range(30))
def test_labels_lie_where_the_view_shows_their_class(seed: int) -> None:
    example = segment(seed, distort=False)
    assert example.labels.dtype == example.image.dtype == torch.uint8
    labels = example.labels.numpy()
    wrong = 0
    for label in range(4):
        other = [number for number in range(4) if number != label]
        wrong += sum(
            int((shows(example.image, tuple(PALETTE[number]), 20) & (labels == label)).sum()) for number in other
        )
    assert wrong <= 0.02 * labels.size
    filled = shows(example.image, FILL, 0)
    np.testing.assert_array_equal(filled, labels == 255)


def test_a_small_picture_is_filled_up_and_what_is_around_it_is_ignored() -> None:
    example = segment(0, scale=(0.5, 0.5), distort=False)
    assert (example.labels[:32, :48] != 255).all()
    assert (example.labels[32:] == 255).all()
    assert (example.labels[:, 48:] == 255).all()


def test_the_shorter_side_is_fitted_and_the_longer_one_limited() -> None:
    """mmcv's `imrescale` to (4 c, c) times the factor, worked out for each shape."""
    for size in ((100, 100), (100, 250), (250, 100), (50, 1000)):
        expected = min(4 * 64 / max(size), 64 / min(size))
        view = SegmentationView(
            SegmentationViewConfig(scale=(0.25, 0.25), flip=0.0, distort=False, max_class_share=1.0), (64, 64), FILL
        )
        example = view(Image.new("RGB", size[::-1]), np.zeros(size, dtype=np.uint8))
        height, width = (int((example.labels[:, 0] == 0).sum()), int((example.labels[0] == 0).sum()))
        assert abs(height - 0.25 * expected * size[0]) <= 1
        assert abs(width - 0.25 * expected * size[1]) <= 1


@pytest.mark.parametrize("ignored", [False, True], ids=["all_labelled", "every_other_row_ignored"])
def test_crops_of_one_class_are_drawn_again(ignored: bool) -> None:
    """Most of the picture is one class, and ignored pixels are no second one: a single draw would show nothing else."""
    labels = np.zeros((200, 800), dtype=np.uint8)
    labels[:, :80] = 1
    labels[::2] = 255 if ignored else labels[::2]
    image = Image.new("RGB", (800, 200))

    def share_of_others(limit: float) -> float:
        config = SegmentationViewConfig(scale=(3.125, 3.125), max_class_share=limit, distort=False)
        view = SegmentationView(config, (64, 64), FILL)
        with seeded("crops"):
            views = [view(image, labels).labels for _ in range(60)]
        return float(np.mean([float((seen[seen != 255] == 1).float().mean()) > 0.25 for seen in views]))

    single = share_of_others(1.0)
    assert single < 0.25
    assert share_of_others(0.75) > 2 * single


def test_where_no_crop_shows_two_classes_the_last_one_is_taken() -> None:
    view = SegmentationView(SegmentationViewConfig(scale=(1.0, 1.0), distort=False), (64, 64), FILL)
    labels = np.zeros((100, 100), dtype=np.uint8)
    assert view(Image.new("RGB", (100, 100)), labels).labels.eq(0).all()
    assert view(Image.new("RGB", (100, 100)), labels + np.uint8(255)).labels.eq(255).all()


def test_distortion_changes_colours_half_the_time_each_and_no_label() -> None:
    grey = Image.new("RGB", (64, 64), (120, 60, 30))
    labels = np.zeros((64, 64), dtype=np.uint8)
    view = SegmentationView(SegmentationViewConfig(scale=(1.0, 1.0), flip=0.0), (64, 64), FILL)
    with seeded("distort"):
        views = [view(grey, labels) for _ in range(200)]
    unchanged = sum(example.image[:, 0, 0].tolist() == [120, 60, 30] for example in views)
    assert 3 <= unchanged <= 45  # 200 / 16 where none of four steps acts, more where contrast finds nothing to vary
    assert len({tuple(example.image[:, 0, 0].tolist()) for example in views}) > 100
    assert not any(example.labels.any() for example in views)


def test_a_map_of_another_size_is_refused() -> None:
    with pytest.raises(BadSampleError, match="mask_of_another_size"):
        SegmentationView(SegmentationViewConfig(), (64, 64), FILL)(
            Image.new("RGB", (20, 10)), np.zeros((20, 10), np.uint8)
        )


@pytest.mark.parametrize("kind", ["detection", "segmentation"])
def test_views_follow_from_torchs_generator_alone(kind: str) -> None:
    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        if kind == "segmentation":
            return SegmentationView(SegmentationViewConfig(), (64, 64), FILL)(*labelled()).image
        return DetectionView(DetectionViewConfig(color_jitter=0.4), CANVAS, FILL)(*scene()).image

    first = drawn(3)
    random.seed(99)
    np.random.seed(99)
    assert torch.equal(drawn(3), first)
    assert not torch.equal(drawn(4), first)


@pytest.mark.parametrize(
    "values",
    [
        {"scale": (0.0, 1.0)},
        {"scale": (2.0, 1.0)},
        {"scale": (1.0, inf)},
        {"flip": 1.5},
        {"color_jitter": 2.0},
        {"min_box_size": 0.0},
    ],
)
def test_impossible_detection_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        DetectionViewConfig(**values)


@pytest.mark.parametrize(
    "values", [{"scale": (2.0, 1.0)}, {"scale": (1.0, inf)}, {"flip": -1.0}, {"max_class_share": 0.0}]
)
def test_impossible_segmentation_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        SegmentationViewConfig(**values)
