"""The commands `beit3 caption` and `beit3 answer`: one picture, or folders of them with a file to go on from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from rich.console import Console
from rich.progress import Progress
from tyro.conf import Positional

from beit3.config import require
from beit3.data.images import ImageInput, open_image
from beit3.errors import ConfigError, DataMissingError
from beit3.predict import load
from beit3.search.pictures import find_pictures, printable

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
    image_size: int | None = None,
    tokenizer: Path | None = None,
    device: Device = "auto",
) -> None:
    """Describe pictures in a sentence each.

    Args:
        pictures: files and folders.
        model: exchange folder, hf-hub:organisation/name, or released .pth file of a captioning model.
        out: file of JSON lines instead of the screen; pictures that are in it already are left alone.
        num_beams: beams of the search.
        max_length: places of a text; a caption has three words less at most.
        length_penalty: power of the length that scores are divided by.
        image_size: side in pixels; left out, the model's own.
        tokenizer: `.spm` file of a released model; left out, `beit3.spm` beside it.
        device: where the model runs.
    """
    predictor = load(model, device, image_size=image_size, tokenizer=tokenizer)

    def describe(batch: list[ImageInput]) -> list[dict[str, Any]]:
        texts = predictor.caption(batch, num_beams=num_beams, max_length=max_length, length_penalty=length_penalty)
        return [{"caption": text} for text in texts]

    _run(pictures, describe, lambda row: str(row["caption"]), out, "captioning")


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
        out: file of JSON lines instead of the screen; pictures that are in it already are left alone.
        image_size: side in pixels; left out, the model's own.
        tokenizer: `.spm` file of a released model; left out, `beit3.spm` beside it.
        labels: names of the answers: `labels.json` or the released `answer2label.txt`.
        device: where the model runs.
    """
    require(top >= 1, f"--top must be at least 1, not {top}")
    predictor = load(model, device, image_size=image_size, tokenizer=tokenizer, labels=labels)

    def ask(batch: list[ImageInput]) -> list[dict[str, Any]]:
        rankings = predictor.answer(batch, [question] * len(batch), top)
        return [{"question": question, "answers": ranking} for ranking in rankings]

    def show(row: dict[str, Any]) -> str:
        return ", ".join(f"{name} ({score:.2f})" for name, score in row["answers"])

    _run(pictures, ask, show, out, "answering")


def _run(
    sources: Sequence[Path],
    describe: Callable[[list[ImageInput]], list[dict[str, Any]]],
    show: Callable[[dict[str, Any]], str],
    out: Path | None,
    doing: str,
) -> None:
    """Describe all pictures in batches; rows go to the screen or, as soon as they are known, to a file."""
    files = _files(sources)
    done = _read_done(out) if out is not None else set()
    todo = [path for path in files if str(path) not in done]
    left_out = 0
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty() or len(todo) < 2) as progress:
        line = progress.add_task(doing, total=len(todo))
        for start in range(0, len(todo), _AT_ONCE):
            batch = todo[start : start + _AT_ONCE]
            images = _open(batch, alone=len(files) == 1)
            left_out += len(batch) - len(images)
            for path, row in zip(images, describe(list(images.values())) if images else [], strict=True):
                if out is not None:
                    with out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"picture": str(path), **row}, ensure_ascii=False) + "\n")
                else:
                    print(show(row) if len(files) == 1 else f"{printable(path)}: {show(row)}")
            progress.advance(line, len(batch))
    if out is not None:
        kept = f", {len(files) - len(todo):,} were there" if len(todo) < len(files) else ""
        print(f"{out}: {len(todo) - left_out:,} pictures written{kept}")


def _open(batch: Sequence[Path], *, alone: bool) -> dict[Path, Image.Image]:
    """Read pictures; a broken one among many is named and left out."""
    images: dict[Path, Image.Image] = {}
    for path in batch:
        try:
            images[path] = open_image(path)
        except (ConfigError, DataMissingError) as error:
            if alone:
                raise
            print(f"left out: {error}", file=sys.stderr)
    return images


def _files(sources: Sequence[Path]) -> list[Path]:
    require(bool(sources), "give at least one picture or folder of pictures")
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            found, left_out = find_pictures(source)
            files += [source / picture.path for picture in found]
            for item in left_out:
                print(f"left out: {printable(item.path)} ({item.reason})", file=sys.stderr)
        elif source.is_file():
            files.append(source)
        else:
            raise DataMissingError(f"picture {source} does not exist")
    return files


def _read_done(out: Path) -> set[str]:
    """Pictures that a file of rows holds already; a last line that was cut off is removed."""
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        return set()
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    tail = content[len(whole) :]
    try:
        require(tail[: len(_ROW)] == _ROW[: len(tail)], "its last line is another program's")
        done = {str(json.loads(line)["picture"]) for line in whole.splitlines()}
    except (ValueError, KeyError, TypeError) as error:  # ConfigError is a ValueError
        raise ConfigError(f"{out} holds other lines than this command writes: choose another file") from error
    if tail:
        out.write_bytes(whole)
    return done
