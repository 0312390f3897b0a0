"""Pictures decode as a viewer shows them, or are refused with a reason."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit3.data.images import decode_image
from beit3.errors import BadSampleError

SIZE = (16, 12)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def plain() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(SIZE, Image.Resampling.BICUBIC)


def bomb(width: int, height: int) -> bytes:
    """Build a valid, tiny PNG of one-bit pixels that unpacks to width x height."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = zlib.compress(b"\0" * (height * (width // 8 + 1)), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(("form", "tolerance"), [("PNG", 0), ("BMP", 0), ("WEBP", 0), ("JPEG", 12)])
def test_formats_decode_to_the_same_picture(form: str, tolerance: int) -> None:
    settings: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}
    options = settings.get(form, {})
    image = decode_image(encoded(plain(), form, **options))
    assert image.mode == "RGB"
    assert image.size == SIZE
    assert np.abs(pixels(image) - pixels(plain())).max() <= tolerance


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    form = "JPEG" if mode == "CMYK" else "PNG"
    image = decode_image(encoded(plain().convert(mode), form, **({"quality": 95} if mode == "CMYK" else {})))
    expected = plain().convert(mode).convert("RGB")
    assert image.mode == "RGB"
    assert np.abs(pixels(image) - pixels(expected)).mean() < 6


def test_sixteen_bit_grey_is_rescaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 16 * 12).reshape(12, 16).astype(np.uint16)
    image = pixels(decode_image(encoded(Image.fromarray(ramp))))
    assert np.abs(image[..., 0] - ramp / 257).max() <= 0.51
    assert (image[..., 0] == image[..., 2]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_shows_a_white_page(mode: str) -> None:
    image = Image.new(mode, SIZE, (200, 0, 0, 0) if mode == "RGBA" else (0, 0))
    image.putpixel((3, 3), (10, 10, 10, 255) if mode == "RGBA" else (10, 255))
    shown = decode_image(encoded(image))
    assert shown.getpixel((0, 0)) == (255, 255, 255)
    assert shown.getpixel((3, 3)) == (10, 10, 10)


def test_a_transparent_palette_colour_shows_white() -> None:
    image = Image.new("P", SIZE, 1)
    image.putpalette([0, 0, 0, 90, 90, 90])
    shown = decode_image(encoded(image, transparency=1))
    assert shown.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    steps = {
        2: [0], 3: [3], 4: [1], 5: [5], 6: [4], 7: [6], 8: [2],
    }  # fmt: skip
    expected = plain()
    for step in steps.get(orientation, []):
        expected = expected.transpose(Image.Transpose(step))
    image = decode_image(encoded(plain(), "PNG", exif=exif))
    assert image.size == expected.size
    assert (pixels(image) == pixels(expected)).all()


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(form: str) -> None:
    frames = [Image.new("RGB", SIZE, color) for color in ("red", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    image = decode_image(encoded(frames[0], form, save_all=True, append_images=frames[1:], **options))
    assert image.getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unreadable_image"),
        (b"<html>not found</html>", "unreadable_image"),
        (encoded(plain(), "JPEG")[:200], "unreadable_image"),
        (encoded(plain())[:60], "unreadable_image"),
        (encoded(plain(), "TIFF"), "unreadable_image"),
        (encoded(plain(), "PPM"), "unreadable_image"),
        (encoded(Image.new("RGB", (1, 1))), "too_small"),
        (encoded(Image.new("RGB", (4000, 1))), "too_small"),
        (bomb(8000, 8000), "too_many_pixels"),
        (bomb(20000, 20000), "too_many_pixels"),
    ],
    ids=["empty", "html", "cut_jpeg", "cut_png", "tiff", "ppm", "dot", "line", "64_megapixels", "400_megapixels"],
)
def test_what_cannot_be_shown_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadSampleError) as caught:
        decode_image(data)
    assert caught.value.reason == reason
