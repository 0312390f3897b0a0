"""Composed scenes: what boxes and masks say is what the picture shows; the embedded emoji need nothing else."""

from __future__ import annotations

import json
import random
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools.coco import COCO

from beit3.data.compose import (
    ComposeConfig,
    Composer,
    Scene,
    cut_out,
    hangs_together_with_border,
    read_cutout,
    soft_colors,
    write_composites,
)
from beit3.data.dense_rows import DetectionRow
from beit3.data.dense_views import DetectionView, DetectionViewConfig
from beit3.data.finetuning.coco_detection import prepare_coco_detection
from beit3.data.index_files import read_index, read_picture
from beit3.data.labels import read_labels
from beit3.data.masks import decode_mask
from beit3.data.randomness import seeded
from beit3.errors import BadSampleError, ConfigError, DataMissingError

COLORS = {"blue": (0, 0, 255), "green": (0, 200, 0), "red": (255, 0, 0), "yellow": (200, 200, 0)}


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    """A square of its own colour for each class, on transparent ground, and black backgrounds."""
    for name, color in COLORS.items():
        image = Image.new("RGBA", (40, 40), (255, 255, 255, 0))
        ImageDraw.Draw(image).rectangle((5, 5, 34, 34), fill=(*color, 255))
        (tmp_path / "stamps" / name).mkdir(parents=True)
        image.save(tmp_path / "stamps" / name / "square.png")
    (tmp_path / "grounds" / "deep").mkdir(parents=True)
    Image.new("RGB", (90, 60)).save(tmp_path / "grounds" / "deep" / "black.png")
    return tmp_path


def settings(stamps: Path, **more: Any) -> ComposeConfig:
    return ComposeConfig(size=(80, 100), cutouts=stamps / "stamps", backgrounds=stamps / "grounds", **more)


def compose(composer: Composer, seed: object) -> Scene:
    with seeded(f"scene {seed}"):
        return composer()


def bounds(mask: NDArray[Any]) -> list[float]:
    """Box around a mask, by looking at every pixel."""
    found = [(row, column) for row in range(mask.shape[0]) for column in range(mask.shape[1]) if mask[row, column]]
    rows, columns = zip(*found, strict=True)
    return [min(columns), min(rows), max(columns) + 1, max(rows) + 1]


@pytest.mark.parametrize("seed", range(15))
def test_masks_are_what_can_be_seen_of_each_object(seed: int, stamps: Path) -> None:
    composer = Composer(settings(stamps, max_overlap=0.7, objects=(3, 6)))
    assert composer.names == sorted(COLORS)
    scene = compose(composer, seed)
    pixels = np.asarray(scene.image)
    assert pixels.shape == (80, 100, 3)
    assert scene.masks.sum(axis=0).max() == 1, "no pixel belongs to two objects"
    assert ((pixels.max(axis=2) > 0) == (scene.masks.sum(axis=0) > 0)).all(), "what is not black is an object's"
    for label, mask, box in zip(scene.labels, scene.masks, scene.boxes, strict=True):
        assert (pixels[mask > 0] == COLORS[composer.names[label]]).all()
        assert box.tolist() == bounds(mask)
    assert [values.dtype.name for values in (scene.boxes, scene.labels, scene.masks)] == ["float32", "int64", "uint8"]


def test_objects_are_as_large_and_as_many_as_asked_for(stamps: Path) -> None:
    composer = Composer(settings(stamps, objects=(1, 3), object_size=(0.2, 0.4), max_overlap=0.0))
    scenes = [compose(composer, seed) for seed in range(60)]
    assert {len(scene.labels) for scene in scenes} == {1, 2, 3}
    sides = np.concatenate([scene.boxes[:, 2:] - scene.boxes[:, :2] for scene in scenes])
    assert sides.min() >= 15  # of a shorter side of 80: 16 to 32, and a pixel of rounding
    assert sides.max() <= 33
    assert sides.max() - sides.min() > 12
    labels = np.concatenate([scene.labels for scene in scenes])
    assert np.bincount(labels, minlength=4).min() > len(labels) / 8, "all classes are about equally frequent"


@pytest.mark.parametrize("limit", [0.0, 0.3])
def test_no_object_is_covered_beyond_the_limit(limit: float, stamps: Path) -> None:
    composer = Composer(settings(stamps, objects=(6, 6), object_size=(0.4, 0.4), max_overlap=limit))
    shown = np.concatenate([compose(composer, seed).masks.sum(axis=(1, 2)) for seed in range(25)])
    assert shown.max() == 32 * 32
    assert shown.min() >= (1 - limit) * 32 * 32
    assert (shown.min() < 32 * 32) == (limit > 0)


def test_what_is_wholly_hidden_is_no_object(stamps: Path) -> None:
    config = settings(stamps, objects=(5, 5), object_size=(1.0, 1.0), max_overlap=1.0)
    composer = Composer(ComposeConfig(size=(80, 80), **{name: getattr(config, name) for name in FIELDS}))
    scene = compose(composer, 0)
    assert len(scene.labels) == 1, "the last one covers all"
    assert scene.boxes.tolist() == [[0, 0, 80, 80]]


FIELDS = ("cutouts", "backgrounds", "objects", "object_size", "max_overlap")


def test_the_same_seeds_give_the_same_scene_and_others_another(stamps: Path) -> None:
    composer = Composer(settings(stamps))

    def drawn(seed: int) -> bytes:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return composer().image.tobytes()

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


# --- cut-outs ---


def reach(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Walk from the border, pixel by pixel."""
    height, width = region.shape
    reached = np.zeros_like(region)
    waiting = deque(
        (row, column)
        for row in range(height)
        for column in range(width)
        if region[row, column] and (row in (0, height - 1) or column in (0, width - 1))
    )
    while waiting:
        row, column = waiting.popleft()
        if 0 <= row < height and 0 <= column < width and region[row, column] and not reached[row, column]:
            reached[row, column] = True
            waiting += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
    return reached


@pytest.mark.parametrize("share", [0.0, 0.4, 0.6, 0.7, 0.9, 1.0])
def test_white_is_followed_from_the_border_on_all_ways(share: float) -> None:
    generator = np.random.default_rng(5)
    for size in ((1, 1), (1, 9), (9, 1), (2, 2), (3, 3), (23, 31), (40, 17)):
        region = generator.random(size) < share
        np.testing.assert_array_equal(hangs_together_with_border(region), reach(region))


def ring(size: int = 64) -> Image.Image:
    """A red ring on white with soft edges: white inside as well, of which the outer part alone is ground."""
    image = Image.new("RGB", (size * 8, size * 8), "white")
    ImageDraw.Draw(image).ellipse((96, 96, size * 8 - 96, size * 8 - 96), fill=(255, 0, 0))
    ImageDraw.Draw(image).ellipse((176, 176, size * 8 - 176, size * 8 - 176), fill="white")
    return image.resize((size, size), Image.Resampling.BOX)


def test_white_within_an_object_stays_and_white_around_it_goes() -> None:
    cut = cut_out(ring())
    assert cut.mode == "RGBA"
    assert cut.size == (40, 40), "empty borders are cut off"
    alpha = np.asarray(cut.getchannel("A"))
    assert alpha[0, 0] == 0
    assert alpha[20, 20] == 255
    assert cut.getpixel((20, 20)) == (255, 255, 255, 255)
    expected = np.pi * 20**2  # pixels of the whole disc
    assert abs(alpha.sum() / 255 - expected) < 0.02 * expected


def test_no_white_halo_is_left_on_dark_ground() -> None:
    cut = cut_out(ring())
    dark = Image.new("RGB", cut.size, (0, 0, 0))
    dark.paste(cut, (0, 0), cut)
    rim = np.hypot(*(np.mgrid[:40, :40] - 19.5)) > 17
    assert np.asarray(dark)[rim][:, 1:].max() <= 40, "green and blue would be white's"


def test_transparency_counts_where_there_is_any(tmp_path: Path) -> None:
    see_through = Image.new("RGBA", (20, 20), (255, 255, 255, 0))
    ImageDraw.Draw(see_through).rectangle((4, 6, 11, 15), fill=(255, 255, 255, 255))
    see_through.save(tmp_path / "white.png")
    cut = read_cutout(tmp_path / "white.png")
    assert cut.size == (8, 10)
    assert np.asarray(cut).min() == 255, "white stays where it is opaque"
    ring().convert("RGBA").save(tmp_path / "opaque.png")
    assert read_cutout(tmp_path / "opaque.png").tobytes() == cut_out(ring()).tobytes()
    ring().save(tmp_path / "plain.png")
    assert read_cutout(tmp_path / "plain.png").tobytes() == cut_out(ring()).tobytes()


def test_a_cutout_of_nothing_is_refused_by_name(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "white").save(tmp_path / "white.png")
    Image.new("RGBA", (20, 20), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    for name in ("white.png", "clear.png"):
        with pytest.raises(BadSampleError, match=rf"empty_cutout: .*{name}"):
            read_cutout(tmp_path / name)


def test_cutouts_may_be_listed_in_an_index_of_classification(stamps: Path) -> None:
    rows = [{"image_path": f"{name}/square.png", "label": number % 2} for number, name in enumerate(sorted(COLORS))]
    index = stamps / "stamps" / "cutouts.jsonl"
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ComposeConfig(size=(80, 100), cutouts=index, backgrounds=stamps / "grounds")
    assert Composer(config).names == ["0", "1"]
    (stamps / "stamps" / "labels.json").write_text('["even", "odd", "never"]')
    composer = Composer(config)
    assert composer.names == ["even", "odd", "never"]
    for seed in range(10):
        scene = compose(composer, seed)
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            color = tuple(np.asarray(scene.image)[mask > 0][0].tolist())
            assert label == list(COLORS.values()).index(color) % 2
    (stamps / "stamps" / "labels.json").write_text('["even"]')
    with pytest.raises(ConfigError, match="has label 1"):
        Composer(config)


# --- what there is without any file ---


def test_the_embedded_emoji_need_no_file() -> None:
    composer = Composer(ComposeConfig())
    assert len(composer.names) == 9
    assert "animals & nature" in composer.names
    scene = compose(composer, 3)
    assert scene.image.size == (256, 256)
    assert len(scene.labels) >= 1
    held_out = Composer(ComposeConfig(vendors=("twitter",), held_out=True, classes="subgroup"))
    assert len(held_out.names) == 95, "classes are numbered alike, whatever is held out"
    assert len(compose(held_out, 0).labels) >= 1
    with pytest.raises(ConfigError, match="no emoji vendor 'googel'"):
        Composer(ComposeConfig(vendors=("googel",)))


def test_grounds_without_photographs_are_soft_and_vary() -> None:
    with seeded("grounds"):
        grounds = [np.asarray(soft_colors(48, 64)).astype(int) for _ in range(20)]
    assert all(ground.shape == (48, 64, 3) for ground in grounds)
    assert np.median([np.abs(np.diff(ground, axis=1)).mean() for ground in grounds]) < 25, "neighbours are alike"
    assert np.std([ground.mean() for ground in grounds]) > 5


def test_scenes_go_through_the_views_of_detection(stamps: Path) -> None:
    scene = compose(Composer(settings(stamps)), 1)
    view = DetectionView(DetectionViewConfig(scale=(1.0, 1.0), flip=0.0), (80, 100), (9, 9, 9))
    example = view(scene.image, scene.objects)
    np.testing.assert_array_equal(example.masks.numpy(), scene.masks)
    np.testing.assert_array_equal(example.boxes.numpy(), scene.boxes)
    np.testing.assert_array_equal(example.labels.numpy(), scene.labels)
    assert example.has_mask.all()


def test_places_that_hold_nothing_are_named(stamps: Path) -> None:
    (stamps / "empty" / "cat").mkdir(parents=True)
    for cutouts, backgrounds in ((stamps / "empty", None), (stamps / "empty/cat", None), (None, stamps / "empty")):
        with pytest.raises(DataMissingError, match="empty"):
            Composer(ComposeConfig(cutouts=cutouts, backgrounds=backgrounds))
    with pytest.raises(DataMissingError, match="does not exist"):
        Composer(ComposeConfig(cutouts=stamps / "absent"))
    (stamps / "grounds" / "deep" / "black.png").write_bytes(b"<html>")
    with pytest.raises(BadSampleError, match=r"unreadable_image: .*black\.png"):
        compose(Composer(settings(stamps)), 0)


@pytest.mark.parametrize(
    "values",
    [
        {"size": (8, 64)},
        {"objects": (0, 3)},
        {"objects": (3, 2)},
        {"object_size": (0.5, 1.5)},
        {"max_overlap": 1.5},
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        ComposeConfig(**values)


# --- a fixed set ---


def test_a_written_set_is_one_in_cocos_form(stamps: Path, tmp_path: Path) -> None:
    path = write_composites(tmp_path / "set", settings(stamps, objects=(1, 5)), 6, seed=4)
    coco = COCO(str(path))
    assert len(coco.getImgIds()) == 6
    assert [item["name"] for item in coco.loadCats(coco.getCatIds())] == sorted(COLORS)
    for note in coco.loadAnns(coco.getAnnIds()):
        mask = coco.annToMask(note)
        left, top, right, bottom = bounds(mask)
        assert note["bbox"] == [left, top, right - left, bottom - top]
        assert note["area"] == mask.sum()
        (row,) = coco.loadImgs(note["image_id"])
        pixels = np.asarray(read_picture(path.parent / row["file_name"]))
        name = coco.loadCats(note["category_id"])[0]["name"]
        assert (pixels[mask > 0] == COLORS[name]).all()


def test_a_written_set_can_be_prepared_and_read(stamps: Path, tmp_path: Path) -> None:
    write_composites(tmp_path / "set", settings(stamps), 4, seed=0, split="test")
    report = prepare_coco_detection(tmp_path / "set")
    assert report.parts["test"].rows == 4
    assert not report.parts["test"].left_out.counts
    index = read_index(tmp_path / "set" / "coco_detection.test.jsonl", DetectionRow, num_labels=4)
    assert read_labels(tmp_path / "set" / "labels.json") == sorted(COLORS)
    for row in index:
        for item in row.objects:
            assert item.segmentation is not None
            assert decode_mask(item.segmentation, row.height, row.width).sum() == item.area


def test_a_scene_of_a_written_set_does_not_depend_on_the_others(stamps: Path, tmp_path: Path) -> None:
    for name, count, seed in (("short", 2, 1), ("long", 3, 1), ("other", 2, 2)):
        write_composites(tmp_path / name, settings(stamps), count, seed)
    files = {name: (tmp_path / name / "images" / "000001.png").read_bytes() for name in ("short", "long", "other")}
    assert files["short"] == files["long"]
    assert files["short"] != files["other"]


def test_a_written_set_replaces_nothing(stamps: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not empty: choose another folder"):
        write_composites(stamps, settings(stamps), 1, 0)
    with pytest.raises(ConfigError, match="count must be at least 1"):
        write_composites(tmp_path / "set", settings(stamps), 0, 0)
    assert not (tmp_path / "set").exists()
