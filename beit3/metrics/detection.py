"""Average precision of boxes and masks as COCO measures it, by faster-coco-eval (tested equal to pycocotools).

Source: Lin et al., "Microsoft COCO", arXiv 1405.0312, and the detection challenge's evaluation code.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from beit3.errors import ConfigError
from beit3.metrics.run_lengths import check_run_lengths

Kind = Literal["bbox", "segm"]
_SUMMARY = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")
"""What COCO's summary lists, in its order: precision averaged over IoU .5 to .95, at .5, at .75, by area of the object
(below 32 x 32 pixels, up to 96 x 96, above), and recall with so many detections for each picture."""


def average_precision(
    truth: Mapping[str, Sequence[Mapping[str, Any]]], found: Sequence[Mapping[str, Any]], kind: Kind
) -> dict[str, float]:
    """Average precision and recall over a set of pictures.

    Args:
        truth: as in a COCO file: `images` (id, height, width), `annotations` (id, image_id, category_id, bbox, area,
            iscrowd, and segmentation for masks), `categories` (id, name). Crowd regions neither ask for detections nor
            make those inside them wrong.
        found: as in a COCO result: image_id, category_id, score, and bbox for boxes or segmentation, as RLE, for masks.
        kind: boxes or masks; the other one's size and place are not looked at.

    Returns:
        shares in 0..1 by the names of `_SUMMARY`, and `ap/NAME` for each category; what no object asks for is left out.

    Raises:
        ConfigError: faster-coco-eval is not installed, or a mask is broken.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise ConfigError("average precision is measured by faster-coco-eval: pip install 'beit3[dense]'") from error
    asked = [note for note in truth["annotations"] if not note.get("iscrowd")]
    if not asked:
        return {}
    if not found:
        return _nothing_found(truth, asked)
    if kind == "segm":
        _check_masks(truth["images"], [*truth["annotations"], *found])
        # With a box, the library would tell small from large by its area instead of the mask's.
        found = [{name: value for name, value in row.items() if name != "bbox"} for row in found]
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of its progress
        known = COCO({name: [dict(row) for row in rows] for name, rows in truth.items()})
        measured = COCOeval_faster(known, known.loadRes([dict(row) for row in found]), kind)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    summary = {name: float(value) for name, value in zip(_SUMMARY, measured.stats, strict=False)}
    precision = np.asarray(measured.eval["precision"])[:, :, :, 0, -1]  # (IoU, recall, category), all areas
    names = {row["id"]: row["name"] for row in truth["categories"]}
    of_classes = {
        f"ap/{names[category]}": float(precision[:, :, number].mean())
        for number, category in enumerate(measured.params.catIds)
    }
    return {name: value for name, value in (summary | of_classes).items() if value >= 0}


def _check_masks(images: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse run lengths that the library would loop over for ever, or crash at."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    for row in rows:
        mask = row.get("segmentation")
        if isinstance(mask, Mapping) and row["image_id"] in sizes:
            try:
                check_run_lengths(mask, *sizes[row["image_id"]])
            except ValueError as error:
                raise ConfigError(f"a mask of image {row['image_id']} is broken ({error}): write it anew") from error


def _nothing_found(
    truth: Mapping[str, Sequence[Mapping[str, Any]]], asked: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Zero for everything that some object asks for."""
    present = {note["category_id"] for note in asked}
    areas = [note["area"] for note in asked]
    sizes = {
        "ap_small": any(area <= 32**2 for area in areas),
        "ap_medium": any(32**2 <= area <= 96**2 for area in areas),
        "ap_large": any(area >= 96**2 for area in areas),
    }
    summary = {name: 0.0 for name in _SUMMARY if sizes.get(name, True)}
    return summary | {f"ap/{row['name']}": 0.0 for row in truth["categories"] if row["id"] in present}
