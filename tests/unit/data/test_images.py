"""Pictures decode as a viewer shows them, or are refused with a reason."""

from __future__ import annotations

import functools
import http.server
import io
import resource
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from beit3.data.images import decode_image, open_image
from beit3.errors import BadSampleError, ConfigError, DataMissingError

SIZE = (16, 12)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def plain() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(SIZE, Image.Resampling.BICUBIC)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def bomb(width: int, height: int) -> bytes:
    """Build a valid, tiny PNG of one-bit pixels that unpacks to width x height."""
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


INDICES = np.random.default_rng(1).integers(0, 4, (12, 16))
COLORS = np.array([[10, 20, 30], [200, 0, 0], [0, 150, 0], [90, 90, 250]], np.uint8)
ALPHAS = np.array([0, 80, 255, 200], np.uint8)
GREYS = np.array([0, 60, 120, 180], np.uint8)
ONE = np.array([255, 0, 255, 255], np.uint8)
"""Alpha where colour 1 alone is see-through."""


def of_palette() -> Image.Image:
    image = Image.fromarray(INDICES.astype(np.uint8))
    image.putpalette(COLORS.tobytes())
    return image


def with_alpha(values: np.ndarray[Any, Any]) -> Image.Image:
    image = Image.fromarray(values)
    image.putalpha(Image.fromarray(ALPHAS[INDICES]))
    return image


@pytest.mark.parametrize(
    ("image", "form", "options", "colors", "alphas"),
    [
        (with_alpha(COLORS[INDICES]), "PNG", {}, COLORS, ALPHAS),
        (with_alpha(COLORS[INDICES]), "WEBP", {"lossless": True, "exact": True}, COLORS, ALPHAS),
        (with_alpha(GREYS[INDICES]), "PNG", {}, GREYS[:, None].repeat(3, 1), ALPHAS),
        (of_palette(), "PNG", {"transparency": ALPHAS.tobytes()}, COLORS, ALPHAS),
        (of_palette(), "PNG", {"transparency": 1}, COLORS, ONE),
        (of_palette(), "GIF", {"transparency": 1}, COLORS, ONE),
        (Image.fromarray(COLORS[INDICES]), "PNG", {"transparency": (200, 0, 0)}, COLORS, ONE),
        (Image.fromarray(GREYS[INDICES]), "PNG", {"transparency": 60}, GREYS[:, None].repeat(3, 1), ONE),
        (Image.fromarray(GREYS[INDICES].astype(np.uint16) * 257), "PNG", {"transparency": 60 * 257},
         GREYS[:, None].repeat(3, 1), ONE),
    ],
    ids=["RGBA", "WebP", "LA", "P+tRNS", "P+index", "GIF", "RGB+key", "L+key", "I;16+key"],
)  # fmt: skip
def test_alpha_of_every_kind_is_composited_on_white(
    image: Image.Image, form: str, options: dict[str, Any], colors: Any, alphas: Any
) -> None:
    share = alphas[INDICES][..., None] / 255
    expected = colors[INDICES] * share + 255 * (1 - share)
    assert np.abs(pixels(decode_image(encoded(image, form, **options))) - expected).max() <= 1


def test_one_bit_is_black_and_white() -> None:
    bits = INDICES % 2 == 1
    image = decode_image(encoded(Image.fromarray(bits)))
    assert np.array_equal(pixels(image), 255 * bits[..., None].repeat(3, 2))


def inked(size: tuple[int, int] = (32, 24)) -> tuple[Image.Image, np.ndarray[Any, Any]]:
    """A smooth picture in four inks, and its colours: what each ink and black let through."""
    inks = plain().resize(size, Image.Resampling.BICUBIC).split()
    black = Image.fromarray((np.mgrid[0 : size[1], 0 : size[0]][1] * 3).astype(np.uint8))
    image = Image.merge("CMYK", (*inks, black))
    values = pixels(image)
    return image, (255 - values[..., :3]) * (255 - values[..., 3:]) / 255


def test_four_inks_and_their_luminance_form_are_the_same_picture() -> None:
    """YCCK: the first three inks are stored as luminance and chrominance, and Adobe's marker says so."""
    image, expected = inked()
    options: dict[str, Any] = {"quality": 97, "subsampling": 0}
    assert np.abs(pixels(decode_image(encoded(image, "JPEG", **options))) - expected).max() <= 6
    *inks, black = image.split()
    stored = [part.point(lambda value: 255 - value) for part in Image.merge("RGB", inks).convert("YCbCr").split()]
    data = bytearray(encoded(Image.merge("CMYK", (*stored, black)), "JPEG", **options))
    data[data.index(b"Adobe") + 11] = 2  # the transform: 0 = four inks, 2 = YCCK
    assert np.abs(pixels(decode_image(bytes(data))) - expected).max() <= 6


def test_a_progressive_jpeg_is_the_same_picture() -> None:
    assert b"\xff\xc2" in encoded(plain(), "JPEG", progressive=True)
    found = decode_image(encoded(plain(), "JPEG", quality=80, progressive=True))
    assert np.array_equal(pixels(found), pixels(decode_image(encoded(plain(), "JPEG", quality=80))))


@pytest.mark.parametrize("profile", [ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"no profile"])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_a_colour_profile_changes_nothing_whole_or_broken(profile: bytes, form: str) -> None:
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    found = decode_image(encoded(plain(), form, icc_profile=profile, **options))
    assert np.array_equal(pixels(found), pixels(decode_image(encoded(plain(), form, **options))))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0" + b"\xff" * 30, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1" * 20])
def test_broken_exif_costs_nothing_but_itself(exif: bytes) -> None:
    found = decode_image(encoded(plain(), "JPEG", exif=exif))
    assert np.array_equal(pixels(found), pixels(decode_image(encoded(plain(), "JPEG"))))


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


def spliced(name: bytes, body: bytes, at_end: bool) -> bytes:
    """A PNG with one more chunk, behind its header or before its end."""
    data = encoded(plain())
    place = len(data) - 12 if at_end else 33
    return data[:place] + chunk(name, body) + data[place:]


def deep() -> bytes:
    """A progressive JPEG of nine megapixels whose last scan is there 120 times."""
    data = encoded(Image.new("L", (3000, 3000), 128), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 120 + data[-2:]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: bomb(20000, 20000), "too_many_pixels"),
        (lambda: bomb(10000, 10000), "too_many_pixels"),
        (lambda: spliced(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8), 9), False), "unreadable_image"),
        (lambda: spliced(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8), 9), True), "unreadable_image"),
        (lambda: spliced(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(10**8), 9), False), "unreadable_image"),
        (lambda: spliced(b"iCCP", b"k\0\0" + zlib.compress(bytes(10**8), 9), False), "unreadable_image"),
        (deep, "too_many_scans"),
    ],
    ids=["400_megapixels", "100_megapixels", "zTXt", "zTXt_behind", "iTXt", "iCCP", "many_scans"],
)
def test_bombs_are_refused_before_they_cost_anything(make: Callable[[], bytes], reason: str) -> None:
    data = make()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with pytest.raises(BadSampleError) as caught:
        decode_image(data)
    assert caught.value.reason == reason
    assert time.process_time() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024, "KiB"


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
        (encoded(Image.new("RGB", (1, 4000))), "too_small"),
        (bomb(8000, 8000), "too_many_pixels"),
    ],
    ids=["empty", "html", "cut_jpeg", "cut_png", "tiff", "ppm", "dot", "line", "column", "64_megapixels"],
)
def test_what_cannot_be_shown_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadSampleError) as caught:
        decode_image(data)
    assert caught.value.reason == reason


def gradient() -> Image.Image:
    values = np.arange(12 * 10 * 3, dtype=np.int64).reshape(12, 10, 3) % 256
    return Image.fromarray(values.astype(np.uint8))


def test_all_forms_of_a_picture_are_the_same_picture(tmp_path: Path) -> None:
    image = gradient()
    values = np.asarray(image)
    image.save(tmp_path / "picture.png")
    tensor = torch.from_numpy(values.copy()).permute(2, 0, 1)
    for form in (
        image,
        tmp_path / "picture.png",
        str(tmp_path / "picture.png"),
        values,
        values / 255,
        (values / 255).astype(np.float32),
        tensor,
        tensor / 255,
        np.dstack([values, np.full((12, 10), 255, np.uint8)]),
    ):
        assert np.array_equal(np.asarray(open_image(form)), values), type(form)


def test_grey_arrays_and_tensors_become_rgb() -> None:
    grey = np.asarray(gradient().convert("L"))
    for form in (grey, grey[..., None], torch.from_numpy(grey.copy())[None], torch.from_numpy(grey.copy())):
        assert np.array_equal(np.asarray(open_image(form)), np.dstack([grey] * 3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((3, 4, 5), np.uint8), r"shape \(3, 4, 5\) is no picture"),
        (np.zeros((0, 4, 3), np.uint8), "is no picture"),
        (np.zeros((2, 3, 4, 3), np.uint8), "is no picture"),
        (np.full((4, 4, 3), 200.0), r"floats must lie in 0\.\.1"),
        (np.full((4, 4, 3), -0.5), r"floats must lie in 0\.\.1"),
        (np.full((4, 4, 3), np.nan), r"floats must lie in 0\.\.1"),
        (np.zeros((4, 4, 3), np.int32), "must be uint8 or floats"),
        (torch.zeros(5, 4, 6), r"shape \(4, 6, 5\) is no picture"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_image(values)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server on this machine with one picture and one page."""
    gradient().save(tmp_path / "picture.png")
    (tmp_path / "page.html").write_text("<html>")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_addresses_are_read_only_if_asked(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = open_image(f"{server}/picture.png", allow_urls=True)
    assert np.array_equal(np.asarray(found), np.asarray(gradient()))
    with pytest.raises(ConfigError, match="is not downloaded: load the model with allow_urls=True"):
        open_image(f"{server}/picture.png")
    with pytest.raises(ConfigError, match="cannot be read"):
        open_image(f"{server}/page.html", allow_urls=True)
    with pytest.raises(DataMissingError, match="404"):
        open_image(f"{server}/none.png", allow_urls=True)
    monkeypatch.setattr("beit3.data.images._MAX_DOWNLOAD", 50)
    with pytest.raises(ConfigError, match="is larger than"):
        open_image(f"{server}/picture.png", allow_urls=True)


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://host/a.png", "data://x"])
def test_other_addresses_are_never_read(address: str) -> None:
    with pytest.raises(ConfigError, match="http and https are read"):
        open_image(address, allow_urls=True)


def test_a_picture_without_a_format_is_named_by_its_formats_alone() -> None:
    with pytest.raises(BadSampleError) as caught:
        decode_image(b"<html>")
    assert str(caught.value) == "unreadable_image: no picture in JPEG, PNG, WEBP, GIF, BMP"


def cut_picture() -> Image.Image:
    return Image.open(io.BytesIO(encoded(Image.effect_noise((64, 64), 90))[:900]))


def closed_picture() -> Image.Image:
    image = Image.open(io.BytesIO(encoded(plain())))
    image.close()
    return image


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (cut_picture, "a PIL picture of mode L cannot be read"),
        (closed_picture, "a PIL picture of mode RGB cannot be read"),
        (lambda: Image.new("RGB", (0, 5)), "0 x 5 pixels shows nothing"),
        (lambda: Image.new("I", (5, 5), 200), "must be uint8 or floats"),
        (lambda: Image.new("F", (5, 5), 200.0), r"floats must lie in 0\.\.1"),
        (lambda: None, "a NoneType is no picture: give a PIL picture, the path of a file"),
        (lambda: b"png", "a bytes is no picture"),
        (lambda: io.BytesIO(encoded(plain())), "a BytesIO is no picture"),
        (lambda: [plain()], "a list is no picture"),
        (lambda: torch.zeros(3, 4, 4, device="meta"), "is no picture"),
        (lambda: torch.zeros(3, 4, 4).to_sparse(), "is no picture"),
    ],
)
def test_what_is_no_picture_is_one_line(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_image(make())
    assert "\n" not in str(caught.value)
    assert " at 0x" not in str(caught.value)


def test_premultiplied_grey_and_floats_are_seen_as_they_are() -> None:
    assert open_image(Image.new("LA", (5, 5), (90, 255)).convert("La")).getpixel((0, 0)) == (90, 90, 90)
    assert open_image(Image.new("F", (5, 5), 0.5)).getpixel((0, 0)) == (128, 128, 128)
    values = torch.from_numpy(np.asarray(gradient()).copy()).permute(2, 0, 1) / 255
    rounded = (values.bfloat16().float() * 255 + 0.5).to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(open_image(values.bfloat16().requires_grad_())), rounded)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".png", "a\0b.png", "none.png"])
def test_no_name_of_a_missing_file_is_too_odd(name: str) -> None:
    with pytest.raises(DataMissingError, match="does not exist"):
        open_image(name)


def test_a_folder_a_locked_file_and_an_endless_one_say_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="is a folder: give a file"):
        open_image(tmp_path)
    with pytest.raises(ConfigError, match="is a device: give a file"):
        open_image("/dev/zero")
    gradient().save(tmp_path / "picture.png")

    def locked(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", locked)
    with pytest.raises(ConfigError, match=r"picture\.png cannot be read \(Permission denied\)"):
        open_image(tmp_path / "picture.png")
    monkeypatch.setattr("beit3.data.images.MAX_FILE_BYTES", 50)
    with pytest.raises(ConfigError, match="is larger than"):
        open_image(tmp_path / "picture.png")


def test_broken_addresses_and_servers_are_one_line() -> None:
    with pytest.raises(DataMissingError, match="http://a b/ cannot be read"):
        open_image("http://a b/", allow_urls=True)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def babble() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"no http at all\r\n\r\n")

        threading.Thread(target=babble, daemon=True).start()
        with pytest.raises(DataMissingError, match="cannot be read"):
            open_image(f"http://127.0.0.1:{listening.getsockname()[1]}/a.png", allow_urls=True)
