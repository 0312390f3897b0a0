"""Drawings show what was found where it is, with names that can be read and colours that can be told apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from beit3.drawing import colors_of, draw_objects, draw_regions
from beit3.predict import FoundObject

Pixels = NDArray[np.uint8]


def found(name: str, box: tuple[float, float, float, float], size: tuple[int, int], score: float = 0.9) -> FoundObject:
    """An object that fills the left half of its box."""
    shape = torch.zeros(28, 28)
    shape[:, :14] = 1
    return FoundObject(name, score, box, shape, size)


def black(height: int, width: int) -> Image.Image:
    return Image.new("RGB", (width, height))


def is_color(pixels: Pixels, color: tuple[int, int, int]) -> NDArray[np.bool_]:
    same: NDArray[np.bool_] = (pixels == np.array(color, np.uint8)).all(axis=2)
    return same


def test_an_object_is_framed_tinted_and_named() -> None:
    drawn = draw_objects(black(400, 600), [found("cat", (100, 200, 300, 280), (400, 600))])
    assert drawn.size == (600, 400)
    pixels = np.asarray(drawn)
    color = colors_of(["cat"])["cat"]
    framed = is_color(pixels, color)
    assert framed[200, 100:300].all()
    assert framed[279, 100:300].all()
    assert framed[200:280, 100].all()
    assert framed[200:280, 299].all()
    assert not pixels[282:].any(), "nothing below the box"
    assert not pixels[200:, 302:].any(), "nothing beside it"
    tint = pixels[240, 120].astype(float)
    assert tint == pytest.approx(np.array(color) * 0.45, abs=2)
    assert not pixels[240, 220].any(), "the other half is not the object"
    label = framed[170:200, 100:180]
    assert label.any()
    assert not label.all(), "letters on the ground of the label"


def test_objects_at_the_edges_and_without_extent_are_drawn() -> None:
    size = (40, 50)
    boxes = [(0.0, 0.0, 50.0, 40.0), (-5.0, -5.0, 3.0, 3.0), (10.0, 10.0, 10.0, 10.0), (45.2, 35.7, 60.0, 70.0)]
    drawn = draw_objects(black(*size), [found("cat", box, size) for box in boxes])
    assert drawn.size == (350, 280)


def test_small_pictures_are_enlarged_and_boxes_with_them() -> None:
    drawn = draw_objects(black(32, 64), [found("cat", (8, 16, 40, 30), (32, 64))])
    assert drawn.size == (320, 160)
    framed = is_color(np.asarray(drawn), colors_of(["cat"])["cat"])
    assert framed[80, 40:200].all()
    assert framed[149, 40:200].all()
    assert not framed[151:].any()
    assert draw_objects(black(500, 320), []).size == (320, 500)


def test_a_picture_without_objects_is_left_as_it_is() -> None:
    image = Image.effect_noise((400, 330), 60).convert("RGB")
    assert np.array_equal(np.asarray(draw_objects(image, [])), np.asarray(image))


def test_names_of_objects_at_one_place_can_all_be_read() -> None:
    """Labels make room for each other as long as there is some."""
    box, size = (200.0, 200.0, 400.0, 300.0), (500, 600)
    names = ["cat", "dog", "cow"]
    pixels = np.asarray(draw_objects(black(*size), [found(name, box, size) for name in names]))
    shown = [int(is_color(pixels, color).sum()) for color in colors_of(names).values()]
    assert min(shown) > 400, "the frames of two are hidden, their names are not"


def test_colors_are_distinct_and_stable() -> None:
    names = [f"class {number}" for number in range(24)]
    colors = colors_of(names)
    assert len(set(colors.values())) == 24
    apart = [
        np.abs(np.array(one, int) - np.array(other, int)).sum()
        for number, one in enumerate(colors.values())
        for other in list(colors.values())[:number]
    ]
    assert min(apart) > 40
    assert colors_of(["cat"]) == colors_of(["cat", "cat"])
    assert colors_of(["cat", "dog"])["cat"] == colors_of(["cat"])["cat"]
    assert len(colors_of([str(number) for number in range(150)])) == 150


def test_regions_are_tinted_outlined_and_listed() -> None:
    labels = np.zeros((400, 500), np.int64)
    labels[100:200, 100:300] = 2
    labels[300:, 400:] = 7  # no name: left as it is
    drawn = draw_regions(black(400, 500), labels, ["background", "sky", "tree"])
    assert drawn.height == 400
    assert drawn.width > 560
    pixels, color = np.asarray(drawn)[:, :500], colors_of(["tree"])["tree"]
    assert pixels[150, 200].astype(float) == pytest.approx(np.array(color) * 0.45, abs=2)
    outline = is_color(pixels, color)
    assert outline[100, 100:300].all()
    assert outline[199, 100:300].all()
    assert not outline[105:195, 105:295].any()
    assert not pixels[labels != 2].any(), "the background and what has no name stay as they are"
    legend = np.asarray(drawn)[:, 500:]
    assert is_color(legend, color).any()
    assert (legend[80:] == 255).all(), "two rows: background and tree"


def test_many_and_long_names_fit() -> None:
    labels = np.arange(40, dtype=np.int64).repeat(20)[:, None].repeat(400, axis=1)
    names = [f"{number} {'long ' * 40}" for number in range(40)]
    drawn = draw_regions(black(800, 400), labels, names)
    assert drawn.height == 800
    assert drawn.width < 800
    shown = np.asarray(drawn)[:, 400:]
    swatches = {tuple(color) for color in shown[:, 12].tolist()} - {(255, 255, 255)}
    assert len(swatches) >= 24
    objects = [found(names[0], (10, 10, 60, 60), (800, 400))]
    pixels = np.asarray(draw_objects(black(800, 400), objects))
    assert not pixels[:, 300:].any(), "the name is cut"


def test_a_whole_picture_of_one_region_and_an_untold_one() -> None:
    for labels in (np.ones((330, 330), np.int64), np.full((330, 330), 255, np.int64)):
        drawn = draw_regions(black(330, 330), labels, ["a", "b"])
        assert drawn.height == 330
        assert bool(np.asarray(drawn)[:, :330].any()) == bool(labels[0, 0] == 1)
