"""Visual tokens of recorded crops, as training reads them: made once, kept beside the shards.

Shapes: n pictures of a shard, K crops of each, N patches.

A folder of codes holds `NAME.npy` for every `NAME.tar` of the pictures' folder, rows of the picture's key and its K
crops (seed, box, codes), and `codes.json`, which says what they were made from. A crop is drawn again from its seed, so
a training step decodes and crops as ever, and only the visual tokenizer's pass is saved. `write_codes.py` makes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from beit3.config import differences, require, to_plain
from beit3.data.streams import CODES_FILE, Stream
from beit3.data.transforms import CropConfig, Views
from beit3.errors import BadSampleError, ConfigError, DataMissingError
from beit3.tokenizer.official import load_visual_tokenizer

SETTINGS_FILE = CODES_FILE
_BEGINNING = 2**16
"""Bytes of a shard that tell it from others."""


def tokenizer_hash(source: Path) -> str:
    """Hash of the weights and heads of a visual tokenizer, whatever file they lie in."""
    tokenizer = load_visual_tokenizer(source)
    digest = hashlib.sha256(f"heads {tokenizer.config.num_heads}".encode())
    state = tokenizer.state_dict()
    for name in sorted(state):
        if name.startswith(("encoder.", "encode_task_layer.", "quantize.codebook")):
            digest.update(name.encode() + state[name].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def describe_codes(tokenizer_digest: str, crop: CropConfig, pictures: Path) -> dict[str, Any]:
    """What codes depend on: they are stale for a run in which any of it differs.

    Args:
        tokenizer_digest: result of `tokenizer_hash`.
        crop: how crops are drawn.
        pictures: prepared folder; each shard counts by its size and its beginning.
    """
    shards = {str(shard.relative_to(pictures)): _fingerprint(shard) for shard in list_shards(pictures)}
    return {"tokenizer": tokenizer_digest, "crop": to_plain(crop), "shards": shards}


def list_shards(pictures: Path) -> list[Path]:
    """The shards of a folder of pictures, in order."""
    return sorted(pictures.rglob("*.tar"))


def _fingerprint(shard: Path) -> str:
    with shard.open("rb") as file:
        return f"{shard.stat().st_size}-{hashlib.sha256(file.read(_BEGINNING)).hexdigest()[:16]}"


def read_settings(path: Path) -> dict[str, Any]:
    """Read `codes.json`."""
    try:
        settings: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no valid JSON ({error}): write the codes again") from error
    return settings


def draw_crop(draw: Callable[[Image.Image], Views], image: Image.Image, seed: int) -> Views:
    """Draw the crop of a seed, whatever was drawn before, and leave torch's generator as it was."""
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        return draw(image)
    finally:
        torch.default_generator.set_state(before)


def hash_key(key: str) -> int:
    """Number under which a picture's key is stored."""
    return number_of(f"key/{key}")


def number_of(text: str) -> int:
    """A number below 2^64 that depends on a text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


class CodeTable:
    """Codes of one folder of pictures, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Open a folder of codes.

        Raises:
            DataMissingError: there are none.
            ConfigError: a file is damaged, or two pictures have the same key.
        """
        self.folder = folder
        path = folder / SETTINGS_FILE
        files = sorted(folder.rglob("*.npy"))
        if not path.is_file() or not files:
            raise DataMissingError(f"{folder} holds no codes: write them with `beit3 tokenize images`")
        self.settings = read_settings(path)
        self._names = {str(file.relative_to(folder).with_suffix(".tar")) for file in files}
        self._shards = [_open_shard(file) for file in files]
        keys = np.concatenate([shard["key"] for shard in self._shards])
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        self._shard_of = np.searchsorted(starts, order, side="right") - 1
        self._row_of = order - starts[self._shard_of]
        require(
            len(self._keys) < 2 or bool((self._keys[1:] != self._keys[:-1]).all()),
            f"{folder}: two pictures have the same key; prepare the pictures again",
        )

    def __len__(self) -> int:
        return len(self._keys)

    def expect(self, tokenizer_digest: str, crop: CropConfig, pictures: Path) -> None:
        """Make sure that the codes are what this tokenizer would make of such crops of these pictures, and complete.

        Raises:
            ConfigError: they are stale; the message says what differs.
            DataMissingError: some shards have no codes yet.
        """
        wanted = json.loads(json.dumps(describe_codes(tokenizer_digest, crop, pictures)))
        changed = differences({name: self.settings.get(name) for name in wanted}, wanted)
        require(
            not changed,
            f"{self.folder} is stale: its codes were made with another {', '.join(changed)}; "
            "write them again with `beit3 tokenize images`",
        )
        missing = sorted(wanted["shards"].keys() - self._names)
        if missing:
            raise DataMissingError(
                f"{self.folder}: {len(missing)} of {len(wanted['shards'])} shards have no codes yet, such as "
                f"{missing[0]}; call `beit3 tokenize images` again"
            )

    def find(self, key: str) -> Any:
        """The K crops of a picture: fields `seed`, `box`, `codes`.

        Raises:
            BadSampleError: `no_codes`.
        """
        wanted = np.uint64(hash_key(key))
        place = int(np.searchsorted(self._keys, wanted))
        if place == len(self._keys) or self._keys[place] != wanted:
            raise BadSampleError("no_codes", key)
        return self._shards[self._shard_of[place]][self._row_of[place]]["crops"]


def open_codes(stream: Stream, data: Path, tokenizer: Path, crop: CropConfig) -> dict[str, CodeTable]:
    """Codes of a stream's sources by the sources' paths; empty if none has any.

    Raises:
        DataMissingError: a folder holds no codes.
        ConfigError: codes are stale.
    """
    recorded = {source.path: CodeTable(data / source.codes) for source in stream.sources if source.codes is not None}
    if recorded:
        digest = tokenizer_hash(tokenizer)
        for path, table in recorded.items():
            table.expect(digest, crop, data / path)
    return recorded


def _open_shard(file: Path) -> Any:
    try:
        table = np.load(file, mmap_mode="r")
        if not (isinstance(table, np.ndarray) and table.dtype.names):
            raise ValueError("it is no table")
        return table
    except ValueError as error:
        raise ConfigError(f"{file} is damaged ({error}): delete it and call `beit3 tokenize images` again") from error
