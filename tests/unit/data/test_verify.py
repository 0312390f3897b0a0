"""Verification finds what tests/faults does to shards, and what may happen to the files beside them."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from beit3.data.shard_reader import KEYS_FILE
from beit3.data.verify import verify_folder
from beit3.errors import ConfigError, DataMissingError


@pytest.fixture
def copied(corpus: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(corpus / name, tmp_path / name))

    return copy


@pytest.mark.parametrize("name", ["pairs", "text", "useless"])
def test_a_folder_as_it_was_written_is_whole(copied: Callable[[str], Path], name: str) -> None:
    assert verify_folder(copied(name)) == []


def test_missing_files_are_named_and_the_others_read_all_the_same(copied: Callable[[str], Path]) -> None:
    folder = copied("pairs")
    (folder / "shard-00001.tar").unlink()
    (folder / "shard-00003.tar.idx").unlink()
    shard = folder / "shard-00004.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    found = verify_folder(folder)
    assert found[:2] == ["shard-00001.tar: missing", f"shard-00004.tar: {shard.stat().st_size:,} bytes instead of "
                         f"{shard.stat().st_size + 512:,}"]  # fmt: skip
    assert found[2:] == ["shard-00003.tar.idx: missing"]


def test_an_index_of_places_that_was_changed_is_named(copied: Callable[[str], Path]) -> None:
    folder = copied("pairs")
    index = folder / "shard-00002.tar.idx"
    places = bytearray(index.read_bytes())
    places[8 * 5 + 1] ^= 2
    index.write_bytes(places)
    found = verify_folder(folder)
    assert found[0] == "shard-00002.tar.idx: not the contents that were written (SHA-256)"
    assert [line.split(": ")[1] for line in found[1:]] == ["sample 's0044'", "sample 's0045'"]


def test_an_index_of_fewer_samples_than_the_tar_is_named(copied: Callable[[str], Path]) -> None:
    folder = copied("pairs")
    other = folder / "shard-00003.tar"
    longer = (folder / "shard-00000.tar").read_bytes()
    end = int.from_bytes((folder / "shard-00000.tar.idx").read_bytes()[-8:], "little")
    other.write_bytes(longer[:end] + other.read_bytes())
    (folder / "prepare.json").unlink()
    assert "shard-00003.tar: 40 samples from its beginning on, 20 in the index" in verify_folder(folder)


@pytest.mark.parametrize("damage", ["missing", "no database", "short"])
def test_an_index_of_keys_that_cannot_serve_is_named(copied: Callable[[str], Path], damage: str) -> None:
    folder = copied("pairs")
    path = folder / KEYS_FILE
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        path.write_bytes(b"no database" * 1000)
    (line,) = verify_folder(folder)
    assert line.startswith(f"{KEYS_FILE}: {'missing' if damage == 'missing' else 'damaged'}")


def test_a_damaged_line_is_named_by_its_number(copied: Callable[[str], Path]) -> None:
    folder = copied("text")
    path = folder / "text.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"line 7"', b'"line 7 '))
    assert [line.split(": ")[1] for line in verify_folder(folder)] == [
        "not the contents that were written (SHA-256)",
        "sample '7'",
    ]


def test_what_is_no_prepared_folder_is_refused(copied: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="no such folder"):
        verify_folder(tmp_path / "nowhere")
    folder = copied("pairs")
    (folder / "prepare.json").write_text("{")
    with pytest.raises(ConfigError, match=r"prepare.json is damaged .*: run `beit3 prepare` again"):
        verify_folder(folder)


def test_samples_are_read_one_by_one_only_where_hashes_do_not_speak_for_them(
    copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def note(reader: object, name: str, numbers: range) -> list[str]:
        read.append(name)
        return []

    monkeypatch.setattr("beit3.data.verify._damaged_samples", note)
    folder = copied("pairs")
    assert verify_folder(folder) == []
    assert verify_folder(copied("text")) == []
    assert read == []
    (folder / "shard-00001.tar").write_bytes((folder / "shard-00001.tar").read_bytes()[:-512])
    verify_folder(folder)
    assert read == ["shard-00001.tar"]
    report = folder / "prepare.json"
    record = json.loads(report.read_text())
    del record["sha256"][KEYS_FILE]  # as earlier versions wrote it
    report.write_text(json.dumps(record))
    verify_folder(folder)
    assert read[1:] == [f"shard-{number:05d}.tar" for number in range(5)]


def test_keys_of_other_samples_are_named(copied: Callable[[str], Path]) -> None:
    folder = copied("pairs")
    with closing(sqlite3.connect(folder / KEYS_FILE)) as database, database:
        database.execute("UPDATE samples SET sample_key = 'another' WHERE sample_key = 's0047'")
    assert verify_folder(folder) == [
        "shard-00002.tar: sample 'another': unreadable_shard: "
        f"{folder / 'shard-00002.tar'}: 's0047' lies where the index has 'another'"
    ]
