"""Evaluation that goes on after an interruption: a folder of its own, and a file for every batch that is done."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress

from beit3.config import differences, require
from beit3.data.example_loader import EvaluationBatches
from beit3.errors import ConfigError, DataMissingError
from beit3.model.exchange import CONFIG_FILE
from beit3.model.hub import local_path
from beit3.train.distributed import Ranks

B = TypeVar("B")
_SETTINGS = "settings.json"
_PLACES = ("checkpoint", "data", "train", "test", "labels", "tokenizer")
"""Settings that name a file or a folder: what lies there decides the result too."""
_STATES = "*_model_states.pt"
"""Weights in a folder of DeepSpeed's."""


def claim_folder(out: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Take a folder, or go on with what the same evaluation left in it.

    Args:
        out: made if need be.
        settings: plain data that decide the result. Of what `checkpoint`, `data`, `train`, `test`, `labels` and
            `tokenizer` name, the content is recorded and compared as well.
        overwrite: remove an earlier evaluation first.

    Raises:
        DataMissingError: one of those does not exist.
        ConfigError: the folder holds another evaluation, or something else.
    """
    places = {name: settings[name] for name in _PLACES if settings.get(name) is not None}
    settings = settings | {f"content of {name}": _content(local_path(place)) for name, place in places.items()}
    record = out / _SETTINGS
    if not record.is_file() and out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} exists and is no evaluation: choose another --out")
    if overwrite:
        shutil.rmtree(out, ignore_errors=True)
    elif record.is_file():
        try:
            changed = differences(json.loads(record.read_text()), settings)
        except ValueError as error:
            raise ConfigError(f"{record} is damaged: begin anew with --overwrite") from error
        require(not changed, f"{out} holds another evaluation ({', '.join(changed)} differ): --out or --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(settings, indent=1) + "\n")


def _content(place: Path) -> str:
    """Size and SHA-256 of a file, or of all files of an exchange folder but its card."""
    if not place.exists():
        raise DataMissingError(f"{place} does not exist")
    digest, size, files = hashlib.sha256(), 0, [place]
    if place.is_dir():
        found = place.iterdir() if (place / CONFIG_FILE).is_file() else place.rglob(_STATES)
        files = sorted(path for path in found if path.is_file() and path.suffix != ".md")
    for path in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        size += path.stat().st_size
    return f"{size} bytes, SHA-256 {digest.hexdigest()}"


def make_parts(
    batches: EvaluationBatches[Any, B], make: Callable[[B], Any], parts: Path, ranks: Ranks, title: str
) -> None:
    """Turn this rank's batches into files, one each; batches whose file is there already are left alone.

    Args:
        batches: of `evaluation_batches`, for this rank.
        make: what is kept of a batch: plain data and tensors on the CPU.
        parts: folder of the files; made if need be.
        ranks: names the files; the first one shows the progress.
        title: of the progress bar.
    """
    parts.mkdir(parents=True, exist_ok=True)
    own = range(len(batches))
    todo = [number for number in own if not (parts / _part(ranks.rank, number)).is_file()]
    quiet = not (ranks.is_main and sys.stderr.isatty())
    with Progress(console=Console(stderr=True), disable=quiet) as progress:
        line = progress.add_task(title, total=len(own), completed=len(own) - len(todo))
        for number, batch in zip(todo, batches.only(todo), strict=True):
            place = parts / _part(ranks.rank, number)
            torch.save(make(batch), place.with_suffix(".tmp"))
            place.with_suffix(".tmp").replace(place)
            progress.advance(line)


def read_parts(parts: Path, rank: int | None = None) -> Iterator[Any]:
    """What was made of each batch, of one rank or of all ranks one after the other, in order."""
    for path in sorted(parts.glob("*.pt" if rank is None else f"{rank:04d}-*.pt")):
        try:
            part = torch.load(path, weights_only=True)
        except Exception as error:  # damaged bytes raise nearly anything
            raise ConfigError(f"{path} is damaged: delete it, and the same command makes it again") from error
        yield part


def _part(rank: int, number: int) -> str:
    return f"{rank:04d}-{number:06d}.pt"
