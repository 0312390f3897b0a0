"""Preparing corpora: check every sample once, write plain tars (or one text file) with an index, say what was left out.

`prepare_pairs` and `prepare_images` read img2dataset-style tars and folders of pictures, `prepare_text` reads texts;
`load_prepared` reads back what they wrote. What belongs to one sample is said in `raw_sources.py`. Left out and counted
are samples without a picture or caption (`missing_image`, `missing_caption`, `empty_caption`), with two pictures
(`two_images`), and a second one of a key in one source (`duplicate_key`); a key that another source has used before is
prefixed with the name of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from beit3.data.images import decode_image
from beit3.data.raw_sources import Damage, RawSample, find_sources, read_documents, read_source
from beit3.data.shard_writer import FolderWriter, PrepareReport
from beit3.data.shards import IMAGE_SUFFIXES, load_prepared
from beit3.data.texts import MAX_CAPTION_CHARS, clean_text
from beit3.errors import BadSampleError, ConfigError, DataMissingError

__all__ = ["PrepareReport", "load_prepared", "prepare_images", "prepare_pairs", "prepare_text"]

_EVERY = 50  # samples between two looks at the progress bar


def prepare_pairs(
    sources: Sequence[Path],
    out: Path,
    *,
    where: Mapping[str, str] | None = None,
    max_per_shard: int = 5000,
    skip_captions: Path | None = None,
    overwrite: bool = False,
) -> PrepareReport:
    """Write the pairs of tars or folders as prepared data.

    A sample is kept if its picture decodes and its caption is not empty. The caption is `KEY.txt`, or the field
    `caption` of `KEY.json`; picture and json are kept as they are.

    Args:
        sources: `.tar`, `.tar.gz`, `.tgz`, folders of such, or folders of pictures with `.txt` or `.json` beside them.
        out: folder to write; must be empty or absent.
        where: keep only samples whose json has these values.
        max_per_shard: samples of one tar.
        skip_captions: text file of captions, one a line; pairs with one of them are left out, whatever the case.
        overwrite: replace the folder.

    Returns:
        What was written and what was left out, also saved as `prepare.json`.

    Raises:
        ConfigError: the folder is not empty, or a source is neither tar nor folder.
        DataMissingError: a source does not exist.
    """
    unwanted = _read_lines(skip_captions) if skip_captions else frozenset()
    conditions = dict(where or {})

    def check(sample: RawSample) -> dict[str, bytes]:
        """The files of a pair; a sample that is not wanted, or no pair, is refused."""
        ending = _check_image(sample)
        meta = _read_json(sample)
        caption = _caption_of(sample, meta)
        if not _matches(meta, conditions) or caption.casefold() in unwanted:
            raise BadSampleError("filtered")
        return _parts(sample, ending, caption, meta)

    return _prepare("pairs", sources, out, check, max_per_shard, overwrite)


def prepare_images(
    sources: Sequence[Path],
    out: Path,
    *,
    where: Mapping[str, str] | None = None,
    max_per_shard: int = 5000,
    overwrite: bool = False,
) -> PrepareReport:
    """Write the pictures of tars or folders as prepared data; texts beside them are not needed and not kept.

    Args, Returns and Raises as `prepare_pairs`.
    """
    conditions = dict(where or {})

    def check(sample: RawSample) -> dict[str, bytes]:
        """The files of an image; a sample that is not wanted, or no image, is refused."""
        ending = _check_image(sample)
        meta = _read_json(sample)
        if not _matches(meta, conditions):
            raise BadSampleError("filtered")
        return _parts(sample, ending, None, meta)

    return _prepare("images", sources, out, check, max_per_shard, overwrite)


def prepare_text(sources: Sequence[Path], out: Path, *, overwrite: bool = False) -> PrepareReport:
    """Write the documents of text files as prepared data.

    Args:
        sources: `.txt` (a line a document), `.jsonl` (field `text`), or folders of such. A document longer than
            `MAX_CAPTION_CHARS` characters becomes several.
        out: folder to write; must be empty or absent.
        overwrite: replace the folder.

    Returns:
        What was written and what was left out, also saved as `prepare.json`.

    Raises:
        ConfigError: the folder is not empty, or a source is neither.
        DataMissingError: a source does not exist.
    """
    paths: list[Path] = []
    for source in sources:
        if not source.exists():
            raise DataMissingError(f"{source}: no such file or folder")
        inside = (path for path in sorted(source.rglob("*")) if path.suffix in (".txt", ".jsonl"))
        paths += list(inside) if source.is_dir() else [source]
    with FolderWriter(out, "text", overwrite=overwrite) as writer, _progress(out, len(paths)) as advance:
        for path in paths:
            for where, document in read_documents(path):
                try:
                    for piece in _pieces(document):
                        writer.add_text(piece)
                except BadSampleError as error:
                    writer.skip(error.reason, where)
                advance(writer.report, 0)
            advance(writer.report, 1)
    return writer.report


def _prepare(
    kind: str,
    sources: Sequence[Path],
    out: Path,
    check: Callable[[RawSample], dict[str, bytes]],
    max_per_shard: int,
    overwrite: bool,
) -> PrepareReport:
    """Read every source once, write the samples that pass `check` and count the others."""
    paths = find_sources(list(sources))
    opened = FolderWriter(out, kind, max_per_shard=max_per_shard, overwrite=overwrite)
    with opened as writer, _progress(out, len(paths)) as advance:
        for path in paths:
            name = path.name.partition(".")[0]
            for sample in read_source(path):
                if isinstance(sample, Damage):
                    writer.report.damaged.append(f"{path}: {sample.reason}")
                    if sample.lost_key is not None:
                        writer.skip("damaged", sample.lost_key)
                    continue
                try:
                    parts = check(sample)
                    key = writer.free_key(sample.key, name)
                    if key is None:
                        raise BadSampleError("duplicate_key")
                    writer.add(key, parts)
                except BadSampleError as error:
                    writer.skip(error.reason, sample.key)
                advance(writer.report, 0)
            advance(writer.report, 1)
    return writer.report


def _check_image(sample: RawSample) -> str:
    """Find the ending of the sample's picture and make sure that it decodes."""
    if sample.too_large:
        raise BadSampleError("too_large")
    ending = next((ending for ending in sample.parts if ending in IMAGE_SUFFIXES), None)
    if ending is None:
        raise BadSampleError("missing_image")
    if sample.num_images > 1:
        raise BadSampleError("two_images")
    decode_image(sample.parts[ending])
    return ending


def _read_json(sample: RawSample) -> dict[str, Any] | None:
    """Parse the sample's json; None where there is none or it is broken."""
    try:
        meta = json.loads(sample.parts.get("json", b"null"))
    except (ValueError, RecursionError):
        return None
    return meta if isinstance(meta, dict) else None


def _caption_of(sample: RawSample, meta: dict[str, Any] | None) -> str:
    """Take the caption from the text file, or else from the json."""
    if "txt" in sample.parts:
        return clean_text(sample.parts["txt"])
    if meta is None or meta.get("caption") is None:
        raise BadSampleError("missing_caption")
    return clean_text(meta["caption"])


def _matches(meta: dict[str, Any] | None, conditions: dict[str, str]) -> bool:
    """Compare fields of the json, as text, with the values wanted."""
    return all(str((meta or {}).get(name)) == value for name, value in conditions.items())


def _parts(sample: RawSample, ending: str, caption: str | None, meta: dict[str, Any] | None) -> dict[str, bytes]:
    """Choose the files that are written for a sample."""
    parts = {ending: sample.parts[ending]}
    if caption is not None:
        parts["txt"] = caption.encode()
    if meta is not None:
        parts["json"] = sample.parts["json"]
    return parts


def _pieces(document: object) -> Iterator[str]:
    """Clean a document and divide it, at white space if there is any, into pieces of at most `MAX_CAPTION_CHARS`."""
    if isinstance(document, bytes):
        document = document.decode("utf-8", errors="replace")
    if not isinstance(document, str):
        raise BadSampleError("not_text")
    rest = " ".join(document.split())
    while len(rest) > MAX_CAPTION_CHARS:
        cut = rest.rfind(" ", 1, MAX_CAPTION_CHARS)
        cut = cut if cut > 0 else MAX_CAPTION_CHARS
        yield clean_text(rest[:cut])
        rest = rest[cut:].lstrip()
    yield clean_text(rest)


def _read_lines(path: Path) -> frozenset[str]:
    """Read the captions that are to be left out."""
    if not path.is_file():
        raise DataMissingError(f"{path}: no such file of captions to leave out")
    try:
        return frozenset(" ".join(line.split()).casefold() for line in path.read_text("utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error


@contextmanager
def _progress(out: Path, total: int) -> Iterator[Callable[[PrepareReport, int], None]]:
    """Show sources done and samples written on a terminal; elsewhere stay silent."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} sources"))
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(str(out), total=total)
        calls = 0

        def advance(report: PrepareReport, sources: int) -> None:
            """Move the bar on by whole sources, and show now and then how many samples were written."""
            nonlocal calls
            calls += 1
            if sources or calls % _EVERY == 0:
                bar.update(task, advance=sources, description=f"{out}: {report.samples:,} {report.kind}")

        yield advance
