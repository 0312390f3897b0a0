"""Masks of objects in COCO's forms, and maps of labels.

Shapes: H, W height and width in pixels. A mask is uint8 (H, W), 1 inside the object. A polygon is a list x, y, x, y,
... in pixels from the top left corner of the picture. A run-length encoding (RLE) is a dict: `size` [H, W] and
`counts`, the lengths of runs outside and inside, down the columns from the left; a list, or a string in COCO's
compressed form.

Source: Lin et al., "Microsoft COCO", arXiv 1405.0312, and the mask API of its evaluation code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from beit3.data.images import FORMATS, MAX_PIXELS
from beit3.errors import BadSampleError, ConfigError
from beit3.metrics.run_lengths import check_run_lengths
from beit3.model.segmentation import IGNORED

Polygons = list[list[float]]
Rle = dict[str, Any]
Segmentation = Polygons | Rle
"""What a COCO file holds of an object's shape."""

_ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
_IGNORED_16_BIT = 65535


def check_segmentation(value: object, height: int, width: int) -> Segmentation:
    """Check the form of a segmentation; what encloses nothing, a polygon of two points, is left out of it.

    Args:
        value: anything that JSON holds.
        height: of the picture.
        width: of the picture.

    Raises:
        BadSampleError: `invalid_segmentation`.
    """
    if isinstance(value, dict):
        return _check_rle(value, height, width)
    if not isinstance(value, list):
        raise BadSampleError("invalid_segmentation", "neither polygons nor a run-length encoding")
    polygons = [_check_polygon(polygon, max(height, width)) for polygon in value]
    polygons = [polygon for polygon in polygons if len(polygon) >= 6]
    if not polygons:
        raise BadSampleError("invalid_segmentation", "no polygon of three points")
    return polygons


def _check_rle(rle: Rle, height: int, width: int) -> Rle:
    try:
        check_run_lengths(rle, height, width)
    except ValueError as error:
        raise BadSampleError("invalid_segmentation", str(error)) from error
    return {"size": rle["size"], "counts": rle["counts"]}


def _check_polygon(polygon: object, side: int) -> list[float]:
    """A list of coordinates; far from the picture there can be none, and drawing them would take memory."""
    if not isinstance(polygon, list) or len(polygon) % 2:
        raise BadSampleError("invalid_segmentation", "a polygon is no list of x, y, x, y, ...")
    if not all(type(value) in (int, float) and -side <= value <= 2 * side for value in polygon):
        raise BadSampleError("invalid_segmentation", "a polygon leaves the picture or holds no numbers")
    return polygon


def decode_mask(segmentation: Segmentation, height: int, width: int) -> NDArray[np.uint8]:
    """Draw a segmentation as a mask, uint8 (H, W); several polygons are one object.

    Raises:
        BadSampleError: `invalid_segmentation`.
        ConfigError: faster-coco-eval is not installed.
    """
    api = _mask_api()
    segmentation = check_segmentation(segmentation, height, width)
    try:
        if isinstance(segmentation, list):
            rle = api.merge(api.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            rle = api.frPyObjects(segmentation, height, width)
        else:
            rle = segmentation
        return np.ascontiguousarray(api.decode(rle), dtype=np.uint8)
    except Exception as error:  # what the library refuses it answers with many exception types
        raise BadSampleError("invalid_segmentation", str(error)) from error


def encode_mask(mask: NDArray[Any]) -> Rle:
    """Write a mask (H, W) as a compressed RLE that JSON can hold; whatever is not 0 is inside.

    Raises:
        ConfigError: faster-coco-eval is not installed.
    """
    rle = _mask_api().encode(np.asfortranarray(mask != 0, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def read_label_map(path: str | Path, *, reduce_zero_label: bool = False) -> NDArray[np.uint8]:
    """Read a map of labels: a one-channel picture of 8 or 16 bits, or a palette's, whose values are the labels.

    Args:
        path: a PNG, or another format without loss.
        reduce_zero_label: 0 stands for everything without a class (ADE20K): it becomes 255, and 1 becomes 0.

    Returns:
        uint8 (H, W): labels 0..254; 255 is ignored, as are 65535 in 16 bits.

    Raises:
        BadSampleError: `picture_not_found`, `unreadable_mask`, `too_many_pixels`, `invalid_mask` (several channels) or
            `label_out_of_range`; the detail names the file.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadSampleError("too_many_pixels", f"{path}: {image.width} x {image.height}")
            if image.mode not in _ONE_CHANNEL:
                raise BadSampleError("invalid_mask", f"{path} is {image.mode}, not one channel of labels")
            values = np.asarray(image).astype(np.int32)
    except FileNotFoundError as error:
        raise BadSampleError("picture_not_found", str(path)) from error
    except BadSampleError:
        raise
    except Exception as error:  # Pillow's parsers answer broken bytes with many exception types
        raise BadSampleError("unreadable_mask", f"{path} ({error})") from error
    ignored = (values == IGNORED) | (values == _IGNORED_16_BIT)
    if reduce_zero_label:
        ignored |= values == 0
        values -= 1
    values[ignored] = IGNORED
    if values.max() > IGNORED or values.min() < 0:
        raise BadSampleError("label_out_of_range", f"{path} holds a label above {IGNORED - 1}")
    return values.astype(np.uint8)


def _mask_api() -> Any:
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise ConfigError("masks of objects are read by faster-coco-eval: pip install 'beit3[dense]'") from error
    return mask
