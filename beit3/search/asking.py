"""The commands `beit3 caption` and `beit3 answer`: one picture, or folders of them with a file to go on from."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from tyro.conf import Positional

from beit3.config import require
from beit3.errors import BadSampleError, ConfigError, DataMissingError
from beit3.predict import Predictor, load
from beit3.search.pictures import find_pictures, printable, read_pictures

_AT_ONCE = 16
_ROW = b'{"picture": '
Device = Literal["auto", "cpu", "cuda", "mps"]


def caption(
    pictures: Positional[tuple[Path, ...]],
    *,
    model: str,
    out: Path | None = None,
    num_beams: int = 3,
    max_length: int = 32,
    length_penalty: float = 0.6,
    official: bool = False,
    image_size: int | None = None,
    tokenizer: Path | None = None,
    device: Device = "auto",
) -> None:
    """Describe pictures in a sentence each.

    Args:
        pictures: files and folders.
        model: exchange folder, hf-hub:organisation/name, or released .pth file of a captioning model.
        out: file of JSON lines (with scores) instead of the screen; pictures that are in it already, with the same
            model and settings, are left alone.
        num_beams: beams of the search.
        max_length: places of a text; a caption has three words less at most.
        length_penalty: power of the length that scores are divided by.
        official: search exactly as the released code, which may write `<unk>` and `<mask>`.
        image_size: side in pixels; left out, the model's own.
        tokenizer: `.spm` file of a released model; left out, `beit3.spm` beside it.
        device: where the model runs.
    """
    search: dict[str, Any] = {"num_beams": num_beams, "max_length": max_length, "length_penalty": length_penalty}
    search["official"] = official

    def describe(predictor: Predictor, images: list[Tensor]) -> list[dict[str, Any]]:
        return [{"caption": text, "score": score} for text, score in predictor.caption_scores(images, **search)]

    _run(
        pictures,
        lambda: load(model, device, image_size=image_size, tokenizer=tokenizer),
        _Verb("captioning", describe, lambda row: str(row["caption"]), ("caption", "score")),
        _set(model=model, **search, image_size=image_size, tokenizer=tokenizer),
        out,
    )


def answer(
    pictures: Positional[tuple[Path, ...]],
    *,
    question: str,
    model: str,
    top: int = 1,
    out: Path | None = None,
    image_size: int | None = None,
    tokenizer: Path | None = None,
    labels: Path | None = None,
    device: Device = "auto",
) -> None:
    """Answer a question about pictures.

    Args:
        pictures: files and folders.
        question: asked of each of them.
        model: exchange folder, hf-hub:organisation/name, or released .pth file of a VQA model.
        top: answers for each.
        out: file of JSON lines instead of the screen; pictures that are in it already, with the same question, model
            and settings, are left alone.
        image_size: side in pixels; left out, the model's own.
        tokenizer: `.spm` file of a released model; left out, `beit3.spm` beside it.
        labels: names of the answers: `labels.json` or the released `answer2label.txt`.
        device: where the model runs.
    """
    require(top >= 1, f"--top must be at least 1, not {top}")

    def ask(predictor: Predictor, images: list[Tensor]) -> list[dict[str, Any]]:
        return [{"answers": ranking} for ranking in predictor.answer(images, [question] * len(images), top)]

    def show(row: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} ({score:.2f})" for name, score in row["answers"])

    _run(
        pictures,
        lambda: load(model, device, image_size=image_size, tokenizer=tokenizer, labels=labels),
        _Verb("answering", ask, show, ("answers",)),
        _set(question=question, model=model, top=top, image_size=image_size, tokenizer=tokenizer, labels=labels),
        out,
    )


@dataclass(frozen=True)
class _Verb:
    """What is done with pictures."""

    doing: str
    describe: Callable[[Predictor, list[Tensor]], list[dict[str, Any]]]
    show: Callable[[Mapping[str, Any]], str]
    results: tuple[str, ...]
    """Fields of a row that `describe` gives; the others say of what and how."""


def _set(**settings: Any) -> dict[str, Any]:
    """Settings as they stand in a row: those that were given, paths as text."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in settings.items() if value is not None
    }


def _run(
    sources: Sequence[Path],
    start: Callable[[], Predictor],
    verb: _Verb,
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
    verb: _Verb,
    settings: Mapping[str, Any],
    out: Path | None,
    *,
    alone: bool,
) -> int:
    """Describe pictures and write them; returns how many could not be read."""
    left_out = 0
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty() or len(todo) < 2) as progress:
        line = progress.add_task(verb.doing, total=len(todo))
        for batch in read_pictures(todo, predictor.preprocess, _AT_ONCE):
            images: dict[Path, Tensor] = {}
            for path, read in batch:
                if not isinstance(read, BadSampleError):
                    images[path] = read
                    continue
                message = f"picture {printable(path)} cannot be read ({read})"
                require(not alone, message)
                print(f"left out: {message}", file=sys.stderr)
                left_out += 1
            rows = verb.describe(predictor, list(images.values())) if images else []
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


def _read_done(out: Path, verb: _Verb, settings: Mapping[str, Any]) -> set[str]:
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
