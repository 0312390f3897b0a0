"""Masks in COCO's forms as pycocotools reads and writes them; maps of labels."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as reference

from beit3.data.masks import check_segmentation, decode_mask, encode_mask, read_label_map
from beit3.errors import BadSampleError, ConfigError

HEIGHT, WIDTH = 37, 53


def blob(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A random mask with runs of all lengths."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8), dtype=np.uint8)).resize((WIDTH, HEIGHT))
    return (np.asarray(coarse) > 140).astype(np.uint8)


def uncompressed(mask: np.ndarray[Any, np.dtype[np.uint8]]) -> dict[str, Any]:
    """Count runs down the columns in a plain loop, the first one outside."""
    counts, inside, length = [], 0, 0
    for column in range(mask.shape[1]):
        for row in range(mask.shape[0]):
            if mask[row, column] != inside:
                counts.append(length)
                inside, length = 1 - inside, 0
            length += 1
    return {"size": list(mask.shape), "counts": [*counts, length]}


@pytest.mark.parametrize("seed", range(8))
def test_polygons_are_drawn_as_pycocotools_draws_them(seed: int) -> None:
    generator = np.random.default_rng(seed)
    polygons = [(generator.uniform(-3, 56, 2 * points)).tolist() for points in (3, 4, 9)]
    expected = reference.decode(reference.merge(reference.frPyObjects(polygons, HEIGHT, WIDTH)))
    drawn = decode_mask(polygons, HEIGHT, WIDTH)
    assert drawn.dtype == np.uint8
    assert drawn.flags.c_contiguous
    assert expected.any()
    np.testing.assert_array_equal(drawn, expected)


@pytest.mark.parametrize("seed", range(4))
def test_run_lengths_are_read_in_both_forms(seed: int) -> None:
    mask = blob(seed)
    compressed = reference.encode(np.asfortranarray(mask))
    as_json = {"size": list(compressed["size"]), "counts": compressed["counts"].decode()}
    np.testing.assert_array_equal(decode_mask(as_json, HEIGHT, WIDTH), mask)
    np.testing.assert_array_equal(decode_mask(uncompressed(mask), HEIGHT, WIDTH), mask)


@pytest.mark.parametrize("seed", range(4))
def test_masks_are_written_as_pycocotools_writes_them(seed: int) -> None:
    mask = blob(seed)
    rle = json.loads(json.dumps(encode_mask(mask * 7)))
    assert rle["counts"].encode() == reference.encode(np.asfortranarray(mask))["counts"]
    np.testing.assert_array_equal(reference.decode(rle), mask)


@pytest.mark.parametrize("fill", [0, 1])
def test_masks_of_one_value_survive(fill: int) -> None:
    mask = np.full((HEIGHT, WIDTH), fill, dtype=np.bool_)
    np.testing.assert_array_equal(decode_mask(encode_mask(mask), HEIGHT, WIDTH), mask)


def test_a_polygon_of_two_points_is_left_out_of_the_others() -> None:
    triangle = [1.0, 1, 30, 1, 15, 30]
    assert check_segmentation([triangle, [1, 2, 3, 4]], HEIGHT, WIDTH) == [triangle]


SIZE = [HEIGHT, WIDTH]
BROKEN: list[Any] = [
    "polygon",
    [],
    [[]],
    [[1, 2, 3, 4]],
    [[1, 2, 3, 4, 5]],
    [[1, 2, 3, 4, 5, "6"]],
    [[1, 2, 3, 4, 5, float("nan")]],
    [[1, 2, 3, 4, 5, float("inf")]],
    [[1, 2, 3, 4, 5, 10**400]],
    [[1, 2, 3, 4, 5, 5e7]],
    [[1, 2, 3, 4, 5, True]],
    [1, 2, 3, 4, 5, 6],
    {},
    {"size": SIZE},
    {"size": SIZE, "counts": 5},
    {"size": SIZE, "counts": [1, 2]},
    {"size": SIZE, "counts": [HEIGHT * WIDTH + 5, -5]},
    {"size": SIZE, "counts": [float(HEIGHT * WIDTH)]},
    {"size": SIZE, "counts": "é"},
    {"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]},
]


@pytest.mark.parametrize("value", BROKEN, ids=lambda value: str(value)[:30])
def test_what_is_no_segmentation_is_refused_by_name(value: Any) -> None:
    with pytest.raises(BadSampleError) as caught:
        check_segmentation(value, HEIGHT, WIDTH)
    assert caught.value.reason == "invalid_segmentation"


@pytest.mark.parametrize(
    "counts", ["", "1", "zzz~~", "ZZZZ", "zzzzzzzzzz", "oooo1", "\x7f\x01~~", encode_mask(np.ones((9, 9)))["counts"]]
)
def test_a_broken_string_of_runs_is_refused_by_name(counts: str) -> None:
    """Before any library reads it: its overlaps with other masks would never end."""
    for refuse in (check_segmentation, decode_mask):
        with pytest.raises(BadSampleError) as caught:
            refuse({"size": SIZE, "counts": counts}, HEIGHT, WIDTH)
        assert caught.value.reason == "invalid_segmentation"


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    with pytest.raises(ConfigError, match=r"pip install 'beit3\[dense\]'"):
        decode_mask([[1, 1, 5, 1, 5, 5]], HEIGHT, WIDTH)
    with pytest.raises(ConfigError, match=r"pip install 'beit3\[dense\]'"):
        encode_mask(np.ones((3, 3)))


# --- maps of labels ---


def save(path: Path, image: Image.Image) -> Path:
    image.save(path)
    return path


LABELS = np.array([[0, 1, 2], [150, 254, 255]], dtype=np.uint8)
REDUCED = [[255, 0, 1], [149, 253, 255]]


def test_a_map_of_labels_is_read_as_it_is(tmp_path: Path) -> None:
    read = read_label_map(save(tmp_path / "a.png", Image.fromarray(LABELS)))
    assert read.dtype == np.uint8
    assert read.tolist() == LABELS.tolist()


def test_zero_becomes_ignored_and_the_others_move_down(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(LABELS))
    assert read_label_map(path, reduce_zero_label=True).tolist() == REDUCED


def test_sixteen_bits_hold_labels_and_their_own_ignored_one(tmp_path: Path) -> None:
    wide = LABELS.astype(np.uint16)
    wide[0, 2] = 65535
    path = save(tmp_path / "a.png", Image.fromarray(wide))
    with Image.open(path) as image:
        assert image.mode.startswith("I")
    assert read_label_map(path).tolist() == [[0, 1, 255], [150, 254, 255]]
    assert read_label_map(path, reduce_zero_label=True).tolist() == [[255, 0, 255], [149, 253, 255]]


def test_a_palette_counts_by_its_numbers_not_its_colours(tmp_path: Path) -> None:
    image = Image.fromarray(LABELS, mode="P")
    image.putpalette([value for number in range(256) for value in (255 - number, number // 2, 7)])
    assert read_label_map(save(tmp_path / "a.png", image)).tolist() == LABELS.tolist()


def test_two_labels_fit_into_one_bit(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(LABELS > 100).convert("1"))
    assert read_label_map(path).tolist() == [[0, 0, 0], [1, 1, 1]]


def test_what_is_no_map_of_labels_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"<html>")
    many = Image.fromarray(np.array([[300]], dtype=np.uint16))
    paths = {
        "picture_not_found": tmp_path / "absent.png",
        "unreadable_mask": tmp_path / "broken.png",
        "invalid_mask": save(tmp_path / "rgb.png", Image.new("RGB", (4, 4))),
        "label_out_of_range": save(tmp_path / "many.png", many),
        "too_many_pixels": save(tmp_path / "large.png", Image.new("1", (50_001, 1_000))),
    }
    for reason, path in paths.items():
        with pytest.raises(BadSampleError, match=path.name) as caught:
            read_label_map(path)
        assert caught.value.reason == reason
