"""Making an index: all pictures below a folder through a model.

Shapes: n pictures, D width.

The index appears whole or not at all. While it is made, what is embedded lies in a hidden folder beside it, so that an
interrupted run is taken up by the same command.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import uuid
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from beit3 import __version__
from beit3.config import require
from beit3.errors import BadSampleError, DataMissingError
from beit3.predict import Predictor, load
from beit3.search.index import (
    FILES,
    LEFT_OUT_FILE,
    SETTINGS_FILE,
    Index,
    IndexSettings,
    Vectors,
    fingerprint,
    import_faiss,
    stamp,
    write_rows,
)
from beit3.search.pictures import LeftOut, Picture, find_pictures, printable, read_pictures

_BATCH = 64
_SECONDS_A_PART = 30.0
"""Longest work that a killed process loses."""


@dataclass(frozen=True)
class EmbedReport:
    """What a run over a folder did."""

    index: Index
    embedded: int
    """Pictures that went through the model, in this run or in an interrupted one before it."""
    kept: int
    """Pictures whose vectors were in the index already."""
    dropped: int
    """Pictures of the index that the folder no longer holds, or that can no longer be read."""
    left_out: Sequence[LeftOut]

    def lines(self, out: Path) -> list[str]:
        """Say it in a few lines for a terminal."""
        changes = f"{self.embedded:,} embedded, {self.kept:,} kept, {self.dropped:,} dropped"
        found = [f"{out}: {len(self.index):,} pictures, width {self.index.settings.width} ({changes})"]
        for reason, count in sorted(Counter(item.reason for item in self.left_out).items()):
            names = [printable(item.path) for item in self.left_out if item.reason == reason][:3]
            found.append(f"  left out: {count:,} {reason} (such as {', '.join(names)})")
        return [*found, f"  all of them: {out / LEFT_OUT_FILE}"] if self.left_out else found


def embed_folder(
    folder: Path | str,
    source: str | Path,
    out: Path | str,
    *,
    update: bool = False,
    image_size: int | None = None,
    tokenizer: str | Path | None = None,
    device: str = "auto",
) -> EmbedReport:
    """Embed all pictures below a folder and write the index.

    Links to pictures are followed, links to folders are not. If the call is interrupted, the same call goes on.

    Args:
        folder: of pictures in JPEG, PNG, WebP, GIF or BMP; their names end so.
        source: of the model, as `beit3.load` takes it.
        out: folder of the index.
        update: bring an existing index up to date: only new and changed pictures (by size and time) are embedded.
        image_size: side in pixels that pictures are seen at; None keeps the model's own.
        tokenizer: `.spm` file that queries are read with; None takes the model's own.
        device: where the model runs; `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        DataMissingError: folder or model do not exist, or there is no readable picture.
        ConfigError: `out` exists and may not be updated, or faiss is not installed.
    """
    folder, out = Path(folder), Path(out)
    import_faiss()  # if it is not there, nothing begins
    old = _claim(out, update)
    found, left_out = find_pictures(folder)
    mark = stamp(source)
    predictor = load(source, device=device, image_size=image_size, tokenizer=tokenizer)
    digest = fingerprint(predictor)
    if old is not None:
        _check_same(old, out, folder, digest, found)
    before = {} if old is None else dict(zip(old.pictures, old.vectors, strict=True))
    partial = _beside(out, "partial")
    known = {**before, **_read_parts(partial, digest)}
    _embed_rest(predictor, folder, found, known, left_out, partial, digest)
    pictures = [picture for picture in found if picture in known]
    if not pictures:
        raise DataMissingError(f"none of {len(found):,} pictures in {folder} can be read, such as {left_out[0].path}")
    index = _make_index(
        pictures,
        known,
        model=os.path.abspath(source) if os.path.exists(source) else str(source),
        fingerprint=digest,
        stamp=mark,
        image_size=image_size,
        tokenizer=None if tokenizer is None else os.path.abspath(tokenizer),
        folder=os.path.abspath(folder),
    )
    left_out.sort()
    _publish(out, index, left_out)
    shutil.rmtree(partial, ignore_errors=True)
    kept = sum(picture in before for picture in pictures)
    dropped = len({picture.path for picture in before} - {picture.path for picture in pictures})
    return EmbedReport(index, len(pictures) - kept, kept, dropped, left_out)


def _make_index(pictures: Sequence[Picture], known: Mapping[Picture, Vectors], **settings: Any) -> Index:
    vectors = np.stack([known[picture] for picture in pictures])
    inner_products = import_faiss().IndexFlatIP(vectors.shape[1])
    inner_products.add(vectors)
    made = IndexSettings(width=vectors.shape[1], count=len(pictures), beit3=__version__, **settings)
    return Index(made, pictures, vectors, inner_products)


def _beside(out: Path, what: str) -> Path:
    place = Path(os.path.abspath(out))
    return place.with_name(f".{place.name}.{what}")


def _claim(out: Path, update: bool) -> Index | None:
    """Open the index that is to be updated, if there is one; one that a killed run had put aside is put back."""
    aside = _beside(out, "old")
    if aside.is_dir() and not out.exists():
        os.replace(aside, out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    require((out / SETTINGS_FILE).is_file(), f"{out} exists and is no index: choose another folder")
    require(update, f"{out} is an index already: --update embeds what is new or changed, or choose another folder")
    return Index.load(out)


def _check_same(old: Index, out: Path, folder: Path, digest: str, found: Sequence[Picture]) -> None:
    """Refuse to mix vectors of two models, and to drop all pictures because another folder was named."""
    made = old.settings
    require(made.fingerprint == digest, f"{out} was made with another model ({made.model}): choose another folder")
    require(
        made.folder == os.path.abspath(folder) or not set(found).isdisjoint(old.pictures),
        f"{out} holds the pictures of {made.folder}, and {folder} has none of them: choose another folder",
    )


def _embed_rest(
    predictor: Predictor,
    folder: Path,
    found: Sequence[Picture],
    known: dict[Picture, Vectors],
    left_out: list[LeftOut],
    partial: Path,
    digest: str,
) -> None:
    """Embed the pictures that are not yet known, and keep what is done on disk, whatever happens."""
    todo = [picture for picture in found if picture not in known]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    part: dict[Picture, Vectors] = {}
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        line = progress.add_task(f"embedding {folder}", total=len(found), completed=len(found) - len(todo))
        try:
            for tried, embedded in _embed(predictor, folder, todo, left_out):
                part.update(embedded)
                progress.advance(line, tried)
                if time.monotonic() - started > _SECONDS_A_PART:
                    _write_part(partial, digest, part)
                    known.update(part)
                    part, started = {}, time.monotonic()
        finally:
            _write_part(partial, digest, part)
            known.update(part)


def _embed(
    predictor: Predictor, folder: Path, todo: Sequence[Picture], left_out: list[LeftOut]
) -> Iterator[tuple[int, dict[Picture, Vectors]]]:
    """Embed batch by batch, while threads read the next one; yields pictures tried, and vectors."""
    paths = {folder / picture.path: picture for picture in todo}
    for batch in read_pictures(list(paths), predictor.preprocess, _BATCH):
        images: dict[Picture, Tensor] = {}
        for path, read in batch:
            if isinstance(read, BadSampleError):
                left_out.append(LeftOut(paths[path].path, read.reason))
            else:
                images[paths[path]] = read
        vectors = predictor.embed_images(list(images.values())).numpy()
        require(bool(np.isfinite(vectors).all()), "the model's vectors are not finite: its weights are broken")
        yield len(batch), dict(zip(images, vectors, strict=True))


def _write_part(partial: Path, digest: str, part: Mapping[Picture, Vectors]) -> None:
    """Keep a part of an unfinished index; its name says which model made it."""
    if not part:
        return
    partial.mkdir(parents=True, exist_ok=True)
    name = f"{digest}-{uuid.uuid4().hex[:8]}.npz"
    with (partial / f"{name}.tmp").open("wb") as file:
        np.savez(file, pictures=np.array(json.dumps(list(part))), vectors=np.stack(list(part.values())))
    os.replace(partial / f"{name}.tmp", partial / name)


def _read_parts(partial: Path, digest: str) -> dict[Picture, Vectors]:
    """Read what interrupted runs of this model left; a damaged part is embedded again."""
    known: dict[Picture, Vectors] = {}
    for path in sorted(partial.glob(f"{digest}-*.npz")):
        try:
            with np.load(path) as part:
                pictures = [Picture(*fields) for fields in json.loads(str(part["pictures"]))]
                known.update(zip(pictures, part["vectors"], strict=True))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue
    return known


def _publish(out: Path, index: Index, left_out: Sequence[LeftOut]) -> None:
    """Write an index beside its place and rename it; what else lies in an older one's folder is carried over."""
    new, aside = _beside(out, "new"), _beside(out, "old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    index.write(new)
    if left_out:
        write_rows(new / LEFT_OUT_FILE, left_out)
    if out.exists():
        for path in out.iterdir():
            if path.name not in FILES:
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, new / path.name)
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(out, aside)
    os.replace(new, out)
    shutil.rmtree(aside, ignore_errors=True)
