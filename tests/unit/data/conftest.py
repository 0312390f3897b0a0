"""Small prepared folders for the tests of the data layer."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from beit3.data.shard_writer import FolderWriter


def png(color: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (16, 16)) -> bytes:
    """Draw a picture of one colour."""
    data = io.BytesIO()
    Image.new("RGB", size, color).save(data, "PNG")
    return data.getvalue()


def write_pairs(
    out: Path, count: int, *, prefix: str = "s", per_shard: int = 20, bad: frozenset[int] = frozenset()
) -> None:
    """Write pairs whose colour and caption tell their number; those in `bad` hold no picture but HTML."""
    with FolderWriter(out, "pairs", max_per_shard=per_shard) as writer:
        for number in range(count):
            image = b"<html>" if number in bad else png((number % 256, number // 256, 0))
            parts = {"png": image, "txt": f"{prefix} {number}".encode(), "json": json.dumps({"n": number}).encode()}
            writer.add(f"{prefix}{number:04d}", parts)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `pairs` (100 in 5 shards), `more` (60), `bad` (40, every fourth broken), `useless` and `text` (50)."""
    data = tmp_path_factory.mktemp("corpus")
    write_pairs(data / "pairs", 100)
    write_pairs(data / "more", 60, prefix="m")
    write_pairs(data / "bad", 40, prefix="b", bad=frozenset(range(0, 40, 4)))
    write_pairs(data / "useless", 30, prefix="u", bad=frozenset(range(30)))
    with FolderWriter(data / "text", "text") as writer:
        for number in range(50):
            writer.add_text(f"line {number}")
    return data
