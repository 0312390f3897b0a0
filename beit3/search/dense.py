"""The commands `beit3 detect` and `beit3 segment`: overlays drawn, and what was found as JSON lines."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from tyro.conf import Positional

from beit3.config import require
from beit3.data.masks import encode_mask
from beit3.drawing import draw_objects, draw_regions
from beit3.predict import Predictor, load
from beit3.search.picture_rows import Device, Verb, run, settings_of

ROWS = "rows.jsonl"
_AT_ONCE = 4
"""Pictures of a batch: they are kept at their own size."""
_LONGEST_NAME = 200
"""Bytes of a picture's name in that of its drawing."""


def detect(
    pictures: Positional[tuple[Path, ...]],
    *,
    model: str,
    out: Path | None = None,
    score_threshold: float = 0.5,
    max_detections: int = 100,
    soft_nms: bool = False,
    scales: tuple[float, ...] = (1.0,),
    flip: bool = False,
    image_size: int | None = None,
    labels: Path | None = None,
    device: Device = "auto",
) -> None:
    """Find objects in pictures: names, boxes and masks.

    Args:
        pictures: files and folders.
        model: exchange folder or hf-hub:organisation/name of a detection model.
        out: folder for a drawing of each picture and rows.jsonl with boxes (left, top, right, bottom, in pixels) and
            masks (COCO's RLE); pictures that are in it already, with the same model and settings, are left alone.
            Left out, boxes go to the screen.
        score_threshold: least score.
        max_detections: most objects of a picture.
        soft_nms: lower the scores of overlapping boxes instead of dropping them.
        scales: sizes at which a picture is looked at, relative to the model's; what is found is merged.
        flip: look at mirror images as well.
        image_size: side of the model's canvas in pixels; left out, its own.
        labels: `labels.json` with names of the classes; left out, those beside the model.
        device: where the model runs.
    """
    settings: dict[str, Any] = {"score_threshold": score_threshold, "max_detections": max_detections}
    settings |= {"soft_nms": soft_nms, "scales": tuple(scales), "flip": flip}
    folder = _folder(out, pictures)
    run(
        pictures,
        lambda: load(model, device, image_size=image_size, labels=labels),
        Verb(
            "detecting",
            _as_it_is,
            partial(_detect_all, folder, settings),
            _objects_in_words,
            ("height", "width", "objects", "drawing"),
            _AT_ONCE,
        ),
        settings_of(model=model, **{**settings, "scales": list(scales)}, image_size=image_size, labels=labels),
        None if folder is None else folder / ROWS,
    )


def segment(
    pictures: Positional[tuple[Path, ...]],
    *,
    model: str,
    out: Path | None = None,
    scales: tuple[float, ...] = (1.0,),
    flip: bool = False,
    image_size: int | None = None,
    labels: Path | None = None,
    device: Device = "auto",
) -> None:
    """Name every pixel of pictures.

    Args:
        pictures: files and folders.
        model: exchange folder or hf-hub:organisation/name of a segmentation model.
        out: folder for a drawing and a map of each picture (a grey PNG of label numbers) and rows.jsonl with each
            label's share of the pixels; pictures that are in it already, with the same model and settings, are left
            alone. Left out, the shares go to the screen.
        scales: sizes at which a picture is looked at, relative to the usual one; probabilities are averaged.
        flip: look at mirror images as well.
        image_size: side of the sliding window in pixels; left out, the model's own.
        labels: `labels.json` with names of the classes; left out, those beside the model.
        device: where the model runs.
    """
    settings: dict[str, Any] = {"scales": tuple(scales), "flip": flip}
    folder = _folder(out, pictures)
    run(
        pictures,
        lambda: load(model, device, image_size=image_size, labels=labels),
        Verb(
            "segmenting",
            _as_it_is,
            partial(_segment_all, folder, settings),
            _shares_in_words,
            ("height", "width", "shares", "map", "drawing"),
            _AT_ONCE,
        ),
        settings_of(model=model, **{**settings, "scales": list(scales)}, image_size=image_size, labels=labels),
        None if folder is None else folder / ROWS,
    )


def _detect_all(
    folder: Path | None, settings: Mapping[str, Any], predictor: Predictor, images: Mapping[Path, Image.Image]
) -> list[dict[str, Any]]:
    """A row for each picture; masks and drawings where there is a folder for them."""
    rows = []
    for (path, image), found in zip(images.items(), predictor.detect(images.values(), **settings), strict=True):
        objects: list[dict[str, Any]] = [
            {"name": item.name, "score": round(item.score, 4), "box": [round(side, 2) for side in item.box]}
            for item in found
        ]
        row: dict[str, Any] = {"height": image.height, "width": image.width, "objects": objects, "drawing": ""}
        if folder is not None:
            for item, written in zip(found, objects, strict=True):
                written["segmentation"] = encode_mask(item.mask.numpy())
            row["drawing"] = _save(draw_objects(image, found), folder, path, ".png")
        rows.append(row)
    return rows


def _objects_in_words(row: Mapping[str, Any]) -> str:
    named = [f"{item['name']} ({item['score']:.2f}) at {item['box']}" for item in row["objects"]]
    return ", ".join(named) or "nothing"


def _segment_all(
    folder: Path | None, settings: Mapping[str, Any], predictor: Predictor, images: Mapping[Path, Image.Image]
) -> list[dict[str, Any]]:
    """A row for each picture; maps and drawings where there is a folder for them."""
    rows, names = [], predictor.output_names()
    for (path, image), regions in zip(images.items(), predictor.segment(images.values(), **settings), strict=True):
        row: dict[str, Any] = {"height": image.height, "width": image.width, "shares": _shares(regions, names)}
        row |= {"map": "", "drawing": ""}
        if folder is not None:
            depth = np.uint8 if len(names) <= 256 else np.uint16
            row["map"] = _save(Image.fromarray(regions.numpy().astype(depth)), folder, path, ".labels.png")
            row["drawing"] = _save(draw_regions(image, regions.numpy(), names), folder, path, ".png")
        rows.append(row)
    return rows


def _shares_in_words(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({100 * share:.0f} %)" for name, share in row["shares"].items())


def _as_it_is(_: Predictor, image: Image.Image) -> Image.Image:
    return image


def _folder(out: Path | None, pictures: Sequence[Path]) -> Path | None:
    """The folder of drawings, which is made when rows are looked for in it."""
    if out is None:
        return None
    require(not out.exists() or out.is_dir(), f"{out} is no folder: name one for drawings and {ROWS}")
    around = [source for source in pictures if out.resolve().is_relative_to(source.resolve())]
    require(not around, f"{out} lies in {around[0] if around else ''}: drawings would be taken for pictures")
    return out


def _save(drawing: Image.Image, folder: Path, picture: Path, ending: str) -> str:
    """Save a drawing under the picture's name, and a mark that tells pictures of one name apart."""
    mark = hashlib.sha256(str(picture).encode(errors="surrogateescape")).hexdigest()[:6]
    stem = picture.stem.encode(errors="replace")[:_LONGEST_NAME].decode(errors="ignore")
    name = f"{stem}-{mark}{ending}"
    drawing.save(folder / name)
    return name


def _shares(regions: Tensor, names: list[str]) -> dict[str, float]:
    """Share of the pixels that each label has, the largest first."""
    counts = regions.flatten().bincount(minlength=len(names)).tolist()
    ordered = sorted(((count, number) for number, count in enumerate(counts) if count), reverse=True)
    return {names[number]: round(count / regions.numel(), 4) for count, number in ordered}
