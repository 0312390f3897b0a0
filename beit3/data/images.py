"""Pictures as found in public data, decoded to plain RGB or refused with a reason.

The header is checked before a pixel is decoded, so a picture that unpacks to gigabytes costs nothing.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from beit3.errors import BadSampleError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats that are decoded; the others Pillow knows start external programs or are needless risk."""
MAX_PIXELS = 50_000_000
"""Largest picture that is decoded, in pixels (width times height)."""
MIN_SIDE = 4
"""Shortest side, in pixels, that still shows something."""

_ORIENTATION = 0x0112


def decode_image(data: bytes) -> Image.Image:
    """Decode one picture to RGB as a viewer would show it on a white page.

    EXIF orientation is applied, transparency is composited on white, 16-bit grey is rescaled (not clipped), CMYK and
    palettes are converted, and of an animation the first frame is taken.

    Args:
        data: the bytes of a JPEG, PNG, WebP, GIF or BMP file; the signature decides, not a name.

    Returns:
        A loaded picture of mode RGB.

    Raises:
        BadSampleError: `unreadable_image`, `too_many_pixels` or `too_small`.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadSampleError("too_many_pixels", str(error)) from error
    except Exception as error:  # Pillow's parsers answer broken bytes with many exception types
        raise BadSampleError("unreadable_image", str(error)) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadSampleError("too_many_pixels", f"{width} x {height}, more than {MAX_PIXELS:,}")
    if min(width, height) < MIN_SIDE:
        raise BadSampleError("too_small", f"{width} x {height}, a side below {MIN_SIDE}")
    try:
        image.load()
        return _to_rgb(image)
    except Exception as error:
        raise BadSampleError("unreadable_image", str(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded picture of any mode to RGB, upright and opaque."""
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # convert() would clip 16-bit values to white
        grey = np.asarray(image, dtype=np.float64) / 257.0
        return Image.fromarray(np.clip(grey + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        page = Image.new("RGB", rgba.size, "white")
        page.paste(rgba, mask=rgba.getchannel("A"))
        return page
    return image.convert("RGB")
