"""Pictures as found in public data, decoded to plain RGB or refused with a reason.

The header is checked before a pixel is decoded, so a picture that unpacks to gigabytes costs nothing.
"""

from __future__ import annotations

import http.client
import io
import os
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from beit3.errors import BadSampleError, ConfigError, DataMissingError

ImageInput = Image.Image | str | Path | NDArray[Any] | Tensor
"""PIL picture, path or address, array (H, W), (H, W, 3) or (H, W, 4), tensor (3, H, W) or (1, H, W)."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats that are decoded; the others Pillow knows start external programs or are needless risk."""
MAX_PIXELS = 50_000_000
"""Largest picture that is decoded, in pixels (width times height)."""
MAX_SCANNED = 20 * MAX_PIXELS
"""Most work of a progressive JPEG, in pixels times scans. Encoders write about ten scans, a few bytes make one more."""
MIN_SIDE = 4
"""Shortest side, in pixels, that still shows something."""
MAX_FILE_BYTES = 256 * 2**20
"""Largest file that is read."""

_ORIENTATION = 0x0112
_SCAN = b"\xff\xda"
_MAX_DOWNLOAD = 64 * 2**20
_TIMEOUT = 20


def decode_image(data: bytes) -> Image.Image:
    """Decode one picture to RGB as a viewer would show it on a white page.

    EXIF orientation is applied, transparency is composited on white, 16-bit grey is rescaled (not clipped), CMYK and
    palettes are converted, and of an animation the first frame is taken. Colour profiles are not applied, as nowhere in
    the field.

    Args:
        data: the bytes of a JPEG, PNG, WebP, GIF or BMP file; the signature decides, not a name.

    Returns:
        A loaded picture of mode RGB.

    Raises:
        BadSampleError: `unreadable_image`, `too_many_pixels`, `too_many_scans` or `too_small`.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadSampleError("too_many_pixels", str(error)) from error
    except UnidentifiedImageError as error:
        raise BadSampleError("unreadable_image", f"no picture in {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's parsers answer broken bytes with many exception types
        raise BadSampleError("unreadable_image", str(error)) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadSampleError("too_many_pixels", f"{width} x {height}, more than {MAX_PIXELS:,}")
    if min(width, height) < MIN_SIDE:
        raise BadSampleError("too_small", f"{width} x {height}, a side below {MIN_SIDE}")
    if image.info.get("progressive") and data.count(_SCAN) * width * height > MAX_SCANNED:
        raise BadSampleError("too_many_scans", f"{data.count(_SCAN)} scans of {width} x {height}")
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
        if isinstance(see_through := image.info.get("transparency"), int):
            grey[np.asarray(image) == see_through] = 255.0
        return Image.fromarray(np.clip(grey + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        rgba = image.convert("RGBA")
        page = Image.new("RGB", rgba.size, "white")
        page.paste(rgba, mask=rgba.getchannel("A"))
        return page
    return image.convert("RGB")


def open_image(image: ImageInput, allow_urls: bool = False) -> Image.Image:
    """Turn whatever a caller holds into an RGB picture.

    Args:
        image: PIL picture; path; `http(s)://` address, if allowed; array (H, W), (H, W, 3) or (H, W, 4) or tensor
            (3, H, W) or (1, H, W), uint8 or float in 0..1, as also PIL pictures of mode `F`.
        allow_urls: whether addresses are downloaded; off, they are refused, so that no input makes a server call out.

    Raises:
        DataMissingError: no such file, or the address cannot be reached.
        ConfigError: it is no picture, or an address that was not allowed.
    """
    if isinstance(image, Image.Image):
        return _from_pil(image)
    if isinstance(image, Tensor):
        return _from_array(_as_array(image))
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if not isinstance(image, (str, Path)):
        raise ConfigError(
            f"a {type(image).__name__} is no picture: give a PIL picture, the path of a file, an array or a tensor"
        )
    name = str(image)
    data = _download(name, allow_urls) if "://" in name else _read_file(name)
    try:
        return decode_image(data)
    except BadSampleError as error:
        raise ConfigError(f"picture {name} cannot be read ({error})") from error


def _read_file(name: str) -> bytes:
    if not os.path.isfile(name):  # unlike pathlib's, this one answers for names of any length
        if os.path.exists(name):
            raise ConfigError(f"picture {name} is a {'folder' if os.path.isdir(name) else 'device'}: give a file")
        raise DataMissingError(f"picture {name if len(name) < 300 else name[:300] + '...'} does not exist")
    if os.path.getsize(name) > MAX_FILE_BYTES:
        raise ConfigError(f"picture {name} is larger than {MAX_FILE_BYTES // 2**20} MiB: give a smaller one")
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise ConfigError(f"picture {name} cannot be read ({error.strerror})") from error


def _from_pil(image: Image.Image) -> Image.Image:
    try:
        image.load()
        if image.mode in ("F", "I"):  # no range is agreed on for these: held to the same rule as arrays
            return _from_array(np.asarray(image))
        if not min(image.size):
            raise ConfigError(f"a picture of {image.width} x {image.height} pixels shows nothing")
        return _to_rgb(image)
    except ConfigError:
        raise
    except Exception as error:  # Pillow answers broken files, closed files and odd modes with many exception types
        raise ConfigError(f"a PIL picture of mode {image.mode} cannot be read ({error})") from error


def _as_array(tensor: Tensor) -> NDArray[Any]:
    try:
        values = tensor.detach().cpu()
        values = values.float() if values.is_floating_point() else values  # numpy knows no bfloat16
        return (values.movedim(0, -1) if values.ndim == 3 else values).numpy()
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"a tensor of {tensor.dtype}, {tensor.layout}, {tensor.device} is no picture") from error


def _from_array(values: NDArray[Any]) -> Image.Image:
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)) or not values.size:
        raise ConfigError(
            f"an array of shape {values.shape} is no picture: give (H, W), (H, W, 3) or (H, W, 4), a tensor (3, H, W)"
        )
    if np.issubdtype(values.dtype, np.floating):
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ConfigError("pixels as floats must lie in 0..1: scale them, or give uint8")
        values = (values * 255 + 0.5).astype(np.uint8)
    if values.dtype != np.uint8:
        raise ConfigError(f"pixels must be uint8 or floats in 0..1, not {values.dtype}")
    return _to_rgb(Image.fromarray(values[:, :, 0] if values.ndim == 3 and values.shape[2] == 1 else values))


def _download(address: str, allowed: bool) -> bytes:
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"{address} is no address of a picture: http and https are read")
    if not allowed:
        raise ConfigError(f"{address} is not downloaded: load the model with allow_urls=True, or give a file")
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT) as answer:
            data: bytes = answer.read(_MAX_DOWNLOAD + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise DataMissingError(f"{address} cannot be read ({reason})") from error
    if len(data) > _MAX_DOWNLOAD:
        raise ConfigError(f"{address} is larger than {_MAX_DOWNLOAD // 2**20} MiB: give a smaller picture")
    return data
