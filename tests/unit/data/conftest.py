"""Small prepared folders for the tests of the data layer."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from PIL import Image

from beit3.data.shard_writer import FolderWriter


def png(number: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
    """Draw a picture whose colour tells a number."""
    data = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 0)).save(data, "PNG")
    return data.getvalue()


BAD: dict[str, Callable[[dict[str, bytes]], dict[str, bytes]]] = {
    "unreadable_image": lambda parts: {**parts, "png": b"<html>not found</html>"},
    "missing_image": lambda parts: {"txt": parts["txt"]},
    "empty_caption": lambda parts: {**parts, "txt": b" \n"},
    "missing_caption": lambda parts: {"png": parts["png"]},
    "two_images": lambda parts: {**parts, "jpg": parts["png"]},
    "unreadable_json": lambda parts: {**parts, "json": b"{"},
}
"""What makes a pair bad, by the reason it is counted under."""


def write_pairs(
    folder: Path, count: int, *, prefix: str = "s", per_shard: int = 20, bad: Mapping[int, str] | None = None
) -> None:
    """Write pairs whose colour and caption tell their number, some bad in a way that preparation would leave out."""
    with FolderWriter(folder, "pairs", max_per_shard=per_shard) as writer:
        for number in range(count):
            meta = json.dumps({"n": number}).encode()
            parts = {"png": png(number), "txt": f"{prefix} {number}".encode(), "json": meta}
            change = BAD.get((bad or {}).get(number, ""))
            writer.add(f"{prefix}{number:04d}", change(parts) if change else parts)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `pairs` (100 in 5 shards), `more` (60), `useless` (30, all bad) and `text` (50)."""
    data = tmp_path_factory.mktemp("corpus")
    write_pairs(data / "pairs", 100)
    write_pairs(data / "more", 60, prefix="m")
    write_pairs(data / "useless", 30, prefix="u", bad=dict.fromkeys(range(30), "unreadable_image"))
    with FolderWriter(data / "text", "text") as writer:
        for number in range(50):
            writer.add_text(f"line {number}")
    return data
