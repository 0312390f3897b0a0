"""The two kinds of `beit3 tokenize`: pictures to codes beside their shards, texts to ids on the screen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from beit3.config import require
from beit3.data.raw_sources import read_documents
from beit3.data.texts import clean_text
from beit3.data.write_codes import CodesConfig, write_codes
from beit3.errors import BadSampleError, DataMissingError
from beit3.tokenizer.text import TextTokenizer
from beit3.train.distributed import choose_device


def tokenize_images(
    pictures: Positional[Path],
    out: Positional[Path],
    settings: Annotated[CodesConfig, arg(name="")],
    *,
    workers: int = 1,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
) -> None:
    """Write the visual tokens of recorded crops beside the shards; finished shards are kept.

    Args:
        pictures: folder written by `beit3 prepare pairs` or `images`.
        out: folder of the codes; a source of a stream names it as `codes`.
        settings: tokenizer and crops; the crop must be the training run's.
        workers: processes.
        device: where the tokenizer runs.
    """
    report = write_codes(pictures, out, settings, device=choose_device(device), num_workers=workers)
    kept = f", {report.kept} kept" if report.kept else ""
    print(f"{out}: codes of {report.pictures:,} pictures, {report.shards} shards written{kept}")
    for reason, count in sorted(report.skipped.items()):
        print(f"  left out: {count:,} {reason}")


def tokenize_text(files: Positional[tuple[Path, ...]], *, tokenizer: Path, max_length: int = 1022) -> None:
    """Print the ids of every text, a line each; what holds no text is named on stderr.

    Args:
        files: .txt (a line a text) or .jsonl (field `text`).
        tokenizer: a `.spm` file.
        max_length: longest text in ids; longer ones are cut.
    """
    made = TextTokenizer.load(tokenizer)
    require(bool(files), "give at least one file of texts")
    for file in files:
        if not file.is_file():
            raise DataMissingError(f"{file} does not exist")
        for where, text in read_documents(file):
            try:
                print(*made.encode(clean_text(text), max_length))
            except BadSampleError as error:
                print(f"{where}: left out, {error.reason}", file=sys.stderr)
