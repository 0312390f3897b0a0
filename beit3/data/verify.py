"""Reading a prepared folder from end to end, to name exactly what is damaged."""

from __future__ import annotations

import sqlite3
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from beit3.data.fingerprint import file_digest
from beit3.data.shard_reader import KEYS_FILE, ShardReader, split_name
from beit3.data.shard_writer import INDEX_FILES
from beit3.data.shards import REPORT_FILE, TEXT_FILE, expected_sizes, open_reader, read_record, to_sample
from beit3.errors import BadSampleError


def verify_folder(folder: Path) -> list[str]:
    """Read every byte of a prepared folder and compare it with what was recorded when it was written.

    Sizes and SHA-256 (where `prepare.json` has them). Where these do not prove that a file and its index are as they
    were written, also the number of its samples, and each sample at the place and under the key that the index gives
    it. Pictures are not decoded.

    Returns:
        a line for every file or sample that is damaged, `FILE: what` or `FILE: sample 'KEY': what`.

    Raises:
        DataMissingError: the folder does not exist, or holds no prepared data.
        ConfigError: what describes the folder is damaged.
    """
    sizes = expected_sizes(folder)
    report = folder / REPORT_FILE
    digests = read_record(report, "sha256", str) if report.is_file() else {}
    damage = {name: _damage(folder / name, name, size, digests.get(name)) for name, size in sizes.items()}
    found = [line for line in damage.values() if line is not None]
    is_text = (folder / TEXT_FILE).is_file()
    if is_text and not (folder / f"{TEXT_FILE}.idx").is_file():
        return found
    reader = open_reader(folder)
    index = () if is_text else INDEX_FILES
    damage |= {name: _damage(folder / name, name, None, digests.get(name)) for name in index}
    as_written = {name for name in digests if name in damage and damage[name] is None}
    if not is_text:
        found += _damage_of_keys(folder / KEYS_FILE, len(reader))
    start = 0
    for name, count in reader.counts.items():
        proven = as_written.issuperset({name, f"{name}.idx", *index})
        if not proven and (folder / name).is_file() and (folder / f"{name}.idx").is_file():
            found += _miscount(folder / name, name, count, is_text)
            found += _damaged_samples(reader, name, range(start, start + count))
        start += count
    return found


def _damage(path: Path, name: str, size: int | None, digest: str | None) -> str | None:
    """How a file differs from the record."""
    if not path.is_file():
        return f"{name}: missing"
    if size is not None and path.stat().st_size != size:
        return f"{name}: {path.stat().st_size:,} bytes instead of {size:,}"
    if digest is not None and file_digest(path) != digest:
        return f"{name}: not the contents that were written (SHA-256)"
    return None


def _damage_of_keys(path: Path, samples: int) -> Iterator[str]:
    """Whether the names of all samples can be read."""
    if not path.is_file():
        yield f"{KEYS_FILE}: missing, so that nobody can tell whether samples are in their places"
        return
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            (state,) = database.execute("PRAGMA quick_check(1)").fetchone()
            (known,) = database.execute("SELECT count(*) FROM samples").fetchone()
    except sqlite3.Error as error:
        state, known = str(error), samples
    if state != "ok":
        yield f"{KEYS_FILE}: damaged ({state})"
    elif known < samples:
        yield f"{KEYS_FILE}: names {known:,} samples of {samples:,}"


def _miscount(path: Path, name: str, count: int, is_text: bool) -> Iterator[str]:
    """Whether reading a file from its beginning gives as many samples as its index has."""
    if is_text:
        with path.open("rb") as file:
            found = sum(1 for line in file if line.strip())
    else:
        found = _count_samples(path)
    if found != count:
        yield f"{name}: {found:,} samples from its beginning on, {count:,} in the index"


def _count_samples(path: Path) -> int:
    """Runs of files with one key in a tar, up to its end or the first broken header."""
    count, last = 0, None
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                vars(tar)["members"].clear()  # else an archive of a million members fills the memory
                split = split_name(member.name) if member.isreg() else None
                if split is not None and split[0] != last:
                    count, last = count + 1, split[0]
    except (tarfile.TarError, OSError, EOFError):
        pass  # the samples behind it are missing in the count
    return count


def _damaged_samples(reader: ShardReader, name: str, numbers: range) -> Iterator[str]:
    """Samples that cannot be read from where the index has them."""
    for number in numbers:
        raw = reader[number]
        try:
            if raw is not None:
                to_sample(raw)
        except BadSampleError as error:
            yield f"{name}: sample '{reader.key_of(number)}': {error}"
