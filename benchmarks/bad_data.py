"""Throughput of a stream in which five samples of a hundred are bad, against a clean one.

    python benchmarks/bad_data.py

Pairs of JPEG pictures (256 x 256) are decoded, cropped to 224 and collated in this process. The bad ones are of every
kind there is, in equal numbers; they stand for themselves, so good samples a second are compared. Both streams are
drawn in turn, and medians over the rounds are printed as a row of a table. Seconds are CPU seconds of this process,
so that other work on the machine does not count. Ends with an error if less than 95 % is left.
"""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import struct
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit3.data.images import decode_image
from beit3.data.shard_writer import FolderWriter
from beit3.data.shards import Sample
from beit3.data.streams import Source, Stream, StreamLoader
from beit3.data.texts import clean_text
from beit3.data.transforms import CropConfig, RandomCrop
from beit3.errors import BadSampleError

SAMPLES, BATCH, EVERY = 2000, 50, 20
"""Pairs of a folder, pairs of a batch, and of how many one is bad."""
LEAST = 0.95
"""Share of the clean throughput that must be left."""
Parts = dict[str, bytes]


class Pictures:
    """Pairs to crops; captions are cleaned and dropped."""

    def __init__(self) -> None:
        self._crop = RandomCrop(CropConfig(size=224))

    def encode(self, sample: Sample) -> Tensor:
        """Decode and crop."""
        if sample.image is None:
            raise BadSampleError("missing_image", sample.key)
        clean_text(sample.text)
        return self._crop(decode_image(sample.image)).image

    def collate(self, samples: list[Tensor]) -> Tensor:
        """Stack crops."""
        return torch.stack(samples)

    def join(self, units: list[Tensor]) -> Tensor:
        """Lay units one behind the other."""
        return torch.cat(units)


def picture(number: int) -> bytes:
    """A JPEG with structure at all scales, about as long as a photograph's."""
    noise = np.random.default_rng(number)
    coarse, middle, fine = (
        Image.fromarray(noise.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize((256, 256))
        for side in (4, 16, 64)
    )
    data = io.BytesIO()
    Image.blend(Image.blend(coarse, middle, 0.4), fine, 0.2).save(data, "JPEG", quality=85)
    return data.getvalue()


def png(width: int, height: int, extra: bytes = b"") -> bytes:
    """A PNG of one-bit pixels that says it has some size; `extra` chunks come before its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(height * (width // 8 + 1)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def chunk(name: bytes, body: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def deep_jpeg() -> bytes:
    """A progressive JPEG of 25 million pixels whose last scan is repeated 500 times."""
    data = io.BytesIO()
    Image.new("L", (5000, 5000), 128).save(data, "JPEG", progressive=True)
    whole = data.getvalue()
    return whole[:-2] + whole[whole.rindex(b"\xff\xda") : -2] * 500 + whole[-2:]


def kinds() -> dict[str, Callable[[Parts], Parts]]:
    """What is done to a pair to make it bad; the two last ones are done to the tar."""
    bomb, deep = png(20_000, 20_000), deep_jpeg()
    text_bomb = png(64, 64, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000), 9)))
    return {
        "HTML for a picture": lambda parts: {**parts, "jpg": b"<html>not found</html>"},
        "picture cut in half": lambda parts: {**parts, "jpg": parts["jpg"][: len(parts["jpg"]) // 2]},
        "empty picture": lambda parts: {**parts, "jpg": b""},
        "picture of 400 megapixels": lambda parts: {**parts, "jpg": bomb},
        "text that unpacks to 50 MB": lambda parts: {**parts, "jpg": text_bomb},
        "500 scans": lambda parts: {**parts, "jpg": deep},
        "no picture": lambda parts: {"txt": parts["txt"]},
        "two pictures": lambda parts: {**parts, "png": parts["jpg"]},
        "no caption": lambda parts: {"jpg": parts["jpg"]},
        "blank caption": lambda parts: {**parts, "txt": b" \n"},
        "broken json": lambda parts: {**parts, "json": b"{"},
        "flipped header": lambda parts: parts,
        "zeroed header": lambda parts: parts,
    }


def write(folder: Path, *, bad: bool) -> None:
    """Write pairs as prepared data."""
    changes = kinds()
    turn = itertools.cycle(changes)
    damage: dict[str, str] = {}
    with FolderWriter(folder, "pairs", max_per_shard=500) as writer:
        for number in range(SAMPLES):
            parts = {"jpg": picture(number % 200), "txt": b"some caption", "json": b"{}"}
            if bad and number % EVERY == EVERY // 2:
                kind = next(turn)
                parts = changes[kind](parts)
                if kind.endswith("header"):
                    damage[f"{number:05d}.txt"] = kind
            writer.add(f"{number:05d}", parts)
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            places = {member.name: member.offset for member in tar}
        with path.open("r+b") as file:
            for name in damage.keys() & places.keys():
                zeroed = damage[name] == "zeroed header"
                file.seek(places[name] + (0 if zeroed else 148))
                file.write(bytes(512) if zeroed else b"\xff")


def rounds(data: Path, name: str, batches: int) -> tuple[StreamLoader[Tensor], Iterator[float]]:
    """Seconds that each next round of batches takes."""
    stream = Stream(sources=(Source(path=name),), batch_size=BATCH, shuffle_buffer=200)
    loader = StreamLoader({"x": stream}, {"x": Pictures()}, data=data, seed=0)

    def measure() -> Iterator[float]:
        drawn = iter(loader)
        while True:
            start = time.process_time()
            for _ in range(batches):
                next(drawn)
            yield time.process_time() - start

    return loader, measure()


def main() -> None:
    """Write both folders, draw from them in turn, print a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=40, help="batches of a round; 40 are an epoch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        names = ("clean", "bad")
        for name in names:
            write(Path(place) / name, bad=name == "bad")
        loaders, timers = zip(*(rounds(Path(place), name, arguments.batches) for name in names), strict=True)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for number in range(arguments.rounds + 1):
            for name, timer in zip(names, timers, strict=True):
                taken = next(timer)
                if number:  # the first round fills caches
                    seconds[name].append(taken)
        speed = {name: arguments.batches * BATCH / statistics.median(seconds[name]) for name in names}
        skipped = loaders[1].skipped.total() / (loaders[1].skipped.total() + loaders[1].used)
    left = statistics.median(clean / bad for clean, bad in zip(seconds["clean"], seconds["bad"], strict=True))
    print("| clean, pairs/s | with bad ones, good pairs/s | share of bad samples | left |\n|---|---|---|---|")
    print(f"| {speed['clean']:,.0f} | {speed['bad']:,.0f} | {skipped:.1%} | {left:.3f} |")
    if left < LEAST:
        sys.exit(f"only {left:.1%} of the clean throughput is left, {LEAST:.0%} are promised")


if __name__ == "__main__":
    main()
