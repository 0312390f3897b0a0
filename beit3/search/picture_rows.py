"""Commands that say something about pictures: one picture, or folders of them with a file to go on from."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from beit3.config import require
from beit3.errors import BadSampleError, ConfigError, DataMissingError
from beit3.predict import Predictor
from beit3.search.pictures import find_pictures, printable, read_pictures

T = TypeVar("T")
_ROW = b'{"picture": '
Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True)
class Verb(Generic[T]):
    """What is done with pictures."""

    doing: str
    prepare: Callable[[Predictor, Image.Image], T]
    """What is kept of a picture until its batch is complete; called from several threads."""
    describe: Callable[[Predictor, Mapping[Path, T]], list[dict[str, Any]]]
    """A row for each picture."""
    show: Callable[[Mapping[str, Any]], str]
    results: tuple[str, ...]
    """Fields of a row that `describe` gives; the others say of what and how."""
    at_once: int = 16
    """Pictures of a batch."""


def at_model_size(predictor: Predictor, image: Image.Image) -> Tensor:
    """A picture as the model takes it, uint8 (3, H, W): large photographs do not fill the memory."""
    return predictor.preprocess(image)


def settings_of(**settings: Any) -> dict[str, Any]:
    """Settings as they stand in a row: those that were given, paths as text."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in settings.items() if value is not None
    }


def run(
    sources: Sequence[Path],
    start: Callable[[], Predictor],
    verb: Verb[T],
    settings: Mapping[str, Any],
    out: Path | None,
) -> None:
    """Describe all pictures in batches; rows go to the screen or, as soon as they are known, to a file."""
    files = _files(sources)
    done = _read_done(out, verb, settings) if out is not None else set()
    todo = [path for path in files if str(path) not in done]
    left_out = 0
    if todo:
        left_out = _describe(todo, start(), verb, settings, out, alone=len(files) == 1)
    if out is not None:
        kept = f", {len(files) - len(todo):,} were there" if len(todo) < len(files) else ""
        print(f"{out}: {len(todo) - left_out:,} pictures written{kept}")


def _describe(
    todo: Sequence[Path],
    predictor: Predictor,
    verb: Verb[T],
    settings: Mapping[str, Any],
    out: Path | None,
    *,
    alone: bool,
) -> int:
    """Describe pictures and write them; returns how many could not be read."""
    left_out = 0
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty() or len(todo) < 2) as progress:
        line = progress.add_task(verb.doing, total=len(todo))
        for batch in read_pictures(todo, functools.partial(verb.prepare, predictor), verb.at_once):
            images: dict[Path, T] = {}
            for path, read in batch:
                if not isinstance(read, BadSampleError):
                    images[path] = read
                    continue
                message = f"picture {printable(path)} cannot be read ({read})"
                require(not alone, message)
                print(f"left out: {message}", file=sys.stderr)
                left_out += 1
            rows = verb.describe(predictor, images) if images else []
            for path, row in zip(images, rows, strict=True):
                if out is not None:
                    with out.open("a", encoding="utf-8") as file:  # escapes keep names that are no UTF-8
                        file.write(json.dumps({"picture": str(path), **settings, **row}) + "\n")
                else:
                    print(verb.show(row) if alone else f"{printable(path)}: {verb.show(row)}")
            progress.advance(line, len(batch))
    return left_out


def _files(sources: Sequence[Path]) -> list[Path]:
    require(bool(sources), "give at least one picture or folder of pictures")
    files: list[Path] = []
    for source in sources:
        if os.path.isdir(source):
            found, left_out = find_pictures(source)
            files += [source / picture.path for picture in found]
            for item in left_out:
                print(f"left out: {printable(item.path)} ({item.reason})", file=sys.stderr)
        elif os.path.isfile(source):
            files.append(source)
        else:
            raise DataMissingError(f"picture {printable(source)} does not exist")
    return files


def _read_done(out: Path, verb: Verb[Any], settings: Mapping[str, Any]) -> set[str]:
    """Pictures that a file of rows holds already with these settings; a last line that was cut off is removed."""
    if not os.path.exists(out):
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{out} cannot be written ({error.strerror}): choose another file") from error
        return set()
    require(out.is_file(), f"{out} is no file: name one for the rows")
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    tail = content[len(whole) :]
    done: set[str] = set()
    try:
        require(tail[: len(_ROW)] == _ROW[: len(tail)], "its last line is another program's")
        for line in whole.splitlines():
            row = json.loads(line)
            picture = str(row.pop("picture"))
            for name in verb.results:
                del row[name]
            if row == settings:
                done.add(picture)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # ConfigError is a ValueError
        raise ConfigError(f"{out} holds other lines than this command writes: choose another file") from error
    if tail:
        out.write_bytes(whole)
    return done
