"""Evaluation that goes on after an interruption: a folder of its own, and a file for every batch that is done."""

from __future__ import annotations

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
from beit3.errors import ConfigError
from beit3.train.distributed import Ranks

B = TypeVar("B")
_SETTINGS = "settings.json"


def claim_folder(out: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Take a folder, or go on with what the same evaluation left in it.

    Args:
        out: made if need be.
        settings: plain data that decide the result.
        overwrite: remove what is there first.

    Raises:
        ConfigError: the folder holds another evaluation, or something else.
    """
    if overwrite:
        shutil.rmtree(out, ignore_errors=True)
    record = out / _SETTINGS
    if record.is_file():
        changed = differences(json.loads(record.read_text()), settings)
        require(not changed, f"{out} holds another evaluation ({', '.join(changed)} differ): --out or --overwrite")
    elif out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} exists and is no evaluation: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(settings, indent=1) + "\n")


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
        yield torch.load(path, weights_only=True)


def _part(rank: int, number: int) -> str:
    return f"{rank:04d}-{number:06d}.pt"
