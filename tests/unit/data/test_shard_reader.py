"""Samples read in place: the same as other readers find, or an error that names the place."""

from __future__ import annotations

import io
import json
import shutil
import sqlite3
import tarfile
from pathlib import Path

import pytest
from megatron.energon import CrudeWebdataset, WorkerConfig
from megatron.energon.epathlib import EPath

from beit3.data.shard_reader import (
    ERROR,
    KEYS_FILE,
    CachingReader,
    RawParts,
    TarReader,
    TextReader,
    group_members,
    split_members,
)
from beit3.data.shards import load_prepared, open_reader
from beit3.errors import BadSampleError, ConfigError

NAMES = ["a.png", "folder/b.txt", "x" * 90 + "/" + "y" * 90 + ".json", "z" * 300 + ".png", "caf\u00e9.txt", "big.jpg"]


def tar_of(names: list[str], form: int) -> tuple[bytes, int]:
    """A tar of files whose bodies tell their names, and where its last file ends."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=form) as tar:
        for place, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 700 * place + len(name)
            tar.addfile(info, io.BytesIO(name.encode().ljust(info.size, b".")[: info.size]))
        end = tar.offset
    return data.getvalue(), end


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_members_are_those_of_pythons_reader(form: int) -> None:
    names = NAMES if form != tarfile.USTAR_FORMAT else [name for name in NAMES if len(name) < 250]
    data, end = tar_of(names, form)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        bodies = {info.name: tar.extractfile(info) for info in tar}
        expected = [(name, body.read() if body else b"") for name, body in bodies.items()]
    assert split_members(data[:end]) == expected
    assert [name for name, _ in expected] == names
    plain, last = tar_of(names[:1], form)
    assert split_members(plain[:last]) == expected[:1]


@pytest.mark.parametrize("names", [["a.png", "a.txt"], ["a.png", "z" * 200 + ".txt"]])
def test_no_byte_of_a_header_can_change_what_is_read(names: list[str]) -> None:
    data, end = tar_of(names, tarfile.GNU_FORMAT)
    expected, second = split_members(data[:end]), 1024
    unnoticed = 0
    for place in (*range(512), *range(second, second + 512)):
        changed = bytearray(data[:end])
        changed[place] ^= 0xFF
        try:
            assert split_members(bytes(changed)) == expected
            unnoticed += 1
        except ValueError:
            pass
    assert unnoticed <= 2, "what fills up the checksum's own field"


@pytest.mark.parametrize("names", [["a.png", "a.txt"], ["a.png", "z" * 200 + ".txt"]])
def test_a_piece_that_is_cut_or_too_long_is_refused(names: list[str]) -> None:
    data, end = tar_of(names, tarfile.GNU_FORMAT)
    for length in (end - 1, end - 512, end - 600, 1024 + 511, end + 512):
        with pytest.raises(ValueError, match=r"."):
            split_members(data[:length])


def test_files_of_a_sample_are_joined_by_the_first_dot() -> None:
    found = group_members([("a/b.x.PNG", b"1"), ("__meta__/b.txt", b""), ("nothing", b""), ("a/b.txt", b"2")])
    assert found == ("a/b", {"x.PNG": b"1", "txt": b"2"})
    with pytest.raises(ValueError, match="files of 'a' and of 'b'"):
        group_members([("a.png", b""), ("b.txt", b"")])
    with pytest.raises(ValueError, match="no file of a sample"):
        group_members([("nothing", b"")])


def test_a_folder_reads_as_with_energons_own_reader(corpus: Path) -> None:
    factory = CrudeWebdataset(
        EPath(corpus / "pairs"),
        split_part="train",
        decoder=None,
        training=False,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
    )
    theirs = factory.build().dataset.join_readers[0]
    ours = open_reader(corpus / "pairs")
    assert len(ours) == len(theirs) == 100
    for index in (0, 1, 19, 20, 57, 99):
        expected, found = theirs[index], ours[index]
        assert found is not None
        for name in ("__key__", "__restore_key__", "png", "txt", "json"):
            assert found[name] == expected[name]


def test_lines_are_read_by_their_numbers(corpus: Path) -> None:
    reader = open_reader(corpus / "text")
    assert reader.counts == {"text.jsonl": 50}
    assert reader.read(7) == ("7", {"json": b'{"text": "line 7"}\n'})
    assert [sample.text for sample in load_prepared(corpus / "text")] == [f"line {number}" for number in range(50)]


@pytest.mark.parametrize("outside", ["../pairs/shard-000000.tar", "/etc/passwd", "a/../../b.tar"])
@pytest.mark.parametrize(("file", "field"), [(".nv-meta/.info.json", "shard_counts"), ("prepare.json", "files")])
def test_records_cannot_name_files_outside_their_folder(
    corpus: Path, tmp_path: Path, file: str, field: str, outside: str
) -> None:
    folder = shutil.copytree(corpus / "pairs", tmp_path / "other")
    record = json.loads((folder / file).read_text())
    record[field][outside] = 1
    (folder / file).write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="lies outside the folder"):
        next(load_prepared(folder))


def test_excluded_samples_are_none(corpus: Path) -> None:
    counts, numbers = {"shard-00001.tar": 20}, {"shard-00001.tar": 1}
    reader = TarReader(corpus / "pairs", counts, numbers, {"shard-00001.tar/s0021"})
    assert reader[1] is None
    assert [found["__key__"] for index in range(3) if (found := reader[index])] == ["s0020", "s0022"]


def test_without_an_index_of_keys_samples_are_read_all_the_same(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "shard-00000.tar").symlink_to(corpus / "pairs" / "shard-00000.tar")
    (tmp_path / "shard-00000.tar.idx").symlink_to(corpus / "pairs" / "shard-00000.tar.idx")
    counts, numbers = {"shard-00000.tar": 20}, {"shard-00000.tar": 0}
    assert TarReader(tmp_path, counts, numbers).read(3).key == "s0003"  # type: ignore[union-attr]
    (tmp_path / KEYS_FILE).parent.mkdir()
    (tmp_path / KEYS_FILE).write_bytes(b"no database" * 100)
    reader = TarReader(tmp_path, counts, numbers)
    assert reader.read(3).key == "s0003"  # type: ignore[union-attr]
    assert reader.key_of(3) == "shard-00000.tar#3"


def test_a_sample_in_anothers_place_is_named(corpus: Path, tmp_path: Path) -> None:
    for name in ("shard-00000.tar", "shard-00000.tar.idx"):
        (tmp_path / name).symlink_to(corpus / "pairs" / name)
    (tmp_path / KEYS_FILE).parent.mkdir()
    with sqlite3.connect(tmp_path / KEYS_FILE) as database:
        database.execute("CREATE TABLE samples (tar_file_id INTEGER, sample_key TEXT, sample_index INTEGER)")
        database.execute("INSERT INTO samples VALUES (0, 'other', 3)")
    reader = TarReader(tmp_path, {"shard-00000.tar": 20}, {"shard-00000.tar": 0})
    with pytest.raises(BadSampleError, match=r"'s0003' lies where the index has 'other'") as caught:
        reader.read(3)
    assert caught.value.reason == "unreadable_shard"
    raw = reader[3]
    assert raw is not None
    assert raw["__key__"] == "other"


def test_what_a_small_folder_gave_is_kept_and_what_failed_is_tried_again(corpus: Path) -> None:
    asked: list[int] = []

    class Failing(TextReader):
        def read(self, index: int) -> RawParts:
            asked.append(index)
            if len(asked) == 1:
                raise BadSampleError("unreadable_shard", "away")
            return super().read(index)

    reader = CachingReader(Failing(corpus / "text" / "text.jsonl"))
    first = reader[3]
    assert first is not None
    assert first[ERROR] == ("unreadable_shard", "away")
    second = reader[3]
    assert second is not None
    second["json"] = b"written over"
    assert reader[3] == {**second, "json": b'{"text": "line 3"}\n'}
    assert asked == [3, 3]
