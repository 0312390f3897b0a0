"""Preparing corpora: what is kept, what is counted, and that nothing half finished looks whole."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from beit3.data.prepare import load_prepared, prepare_images, prepare_pairs, prepare_text
from beit3.data.shards import Sample
from beit3.data.streams import Source, Stream, StreamLoader
from beit3.data.texts import MAX_CAPTION_CHARS
from beit3.errors import BeitError, ConfigError, DataMissingError
from tests.unit.data.conftest import png


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return data.getvalue()


def pairs(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    members = []
    for number in range(start, start + count):
        meta = {"split": "train" if number % 2 else "test", "n": number}
        members += [
            (f"{number:05d}.json", json.dumps(meta).encode()),
            (f"{number:05d}.png", png(number)),
            (f"{number:05d}.txt", f"picture {number}".encode()),
        ]
    return members


def keys(folder: Path) -> list[str]:
    return [sample.key for sample in load_prepared(folder)]


@pytest.mark.parametrize("name", ["in.tar", "in.tar.gz", "in.tgz"])
def test_tars_come_back_whole_packed_or_not(tmp_path: Path, name: str) -> None:
    data = tar_of(pairs(23))
    (tmp_path / name).write_bytes(data if name.endswith(".tar") else gzip.compress(data))
    report = prepare_pairs([tmp_path / name], tmp_path / "out", max_per_shard=10)
    assert (report.samples, report.shards, report.skipped, report.damaged) == (23, 3, {}, [])
    samples = list(load_prepared(tmp_path / "out"))
    assert [sample.meta["n"] for sample in samples] == list(range(23))
    assert all(sample.image == png(n) and sample.text == f"picture {n}".encode() for n, sample in enumerate(samples))
    assert report.lines()[0].startswith(f"{tmp_path / 'out'}: 23 pairs in 3 shards")
    assert json.loads((tmp_path / "out" / "prepare.json").read_text())["samples"] == 23


def test_prepared_data_trains_at_once(tmp_path: Path) -> None:
    class Keys:
        def encode(self, sample: Sample) -> str:
            return sample.key

        def collate(self, samples: list[str]) -> list[str]:
            return samples

        def join(self, units: list[list[str]]) -> list[str]:
            return [key for unit in units for key in unit]

    (tmp_path / "in.tar").write_bytes(tar_of(pairs(12)))
    prepare_pairs([tmp_path / "in.tar"], tmp_path / "out")
    loader = StreamLoader(
        {"x": Stream(sources=(Source(path="out"),), batch_size=12)}, {"x": Keys()}, data=tmp_path, seed=0
    )
    assert len(next(iter(loader))["x"]) == 12


def test_every_kind_of_bad_sample_is_counted_exactly(tmp_path: Path) -> None:
    members = [
        ("good.png", png()), ("good.txt", b"fine"),
        ("no_image.txt", b"text"),
        ("no_text.png", png()),
        ("empty.png", png()), ("empty.txt", b" \n"),
        ("html.jpg", b"<html>"), ("html.txt", b"a page"),
        ("cut.png", png()[:40]), ("cut.txt", b"cut"),
        ("dot.png", png(size=(1, 1))), ("dot.txt", b"dot"),
        ("good.png", png(1)), ("good.txt", b"second of that name"),
        ("number.png", png()), ("number.json", b'{"caption": 7}'),
        ("long.png", png()), ("long.txt", b"a " * 100_000),
        ("odd.PNG", png()), ("odd.json", b'{"caption": "from json", "x": NaN}'),
        ("broken_json.png", png()), ("broken_json.txt", b"kept"), ("broken_json.json", b"{"),
        ("a.b.png", png()), ("a.b.txt", b"dots"),
    ]  # fmt: skip
    (tmp_path / "in.tar").write_bytes(tar_of(members))
    report = prepare_pairs([tmp_path / "in.tar"], tmp_path / "out")
    assert report.skipped == {
        "duplicate_key": 1,
        "empty_caption": 1,
        "missing_caption": 1,
        "missing_image": 1,
        "not_text": 1,
        "too_small": 1,
        "unreadable_image": 2,
    }
    assert report.examples["unreadable_image"] == ["html", "cut"]
    samples = {sample.key: sample for sample in load_prepared(tmp_path / "out")}
    assert set(samples) == {"good", "long", "odd", "broken_json", "a"}
    assert samples["good"].text == b"fine"
    assert samples["odd"].text == b"from json"
    assert samples["a"].text == b"dots"
    assert len(samples["long"].text or b"") <= MAX_CAPTION_CHARS


@pytest.mark.parametrize(
    ("damage", "kept", "lost"),
    [
        ("mid_data", 3, 1), ("mid_header", 3, 0), ("boundary", 3, 0), ("no_end", 10, 0),
        ("flipped_header", 4, 1), ("zeroed_header", 4, 1), ("empty", 0, 0), ("html", 0, 0), ("cut_gzip", None, None),
    ],
)  # fmt: skip
def test_a_damaged_tar_gives_its_readable_part_and_is_named(
    tmp_path: Path, damage: str, kept: int | None, lost: int | None
) -> None:
    data = bytearray(tar_of(pairs(10)))
    step = 3 * 1024  # each of the three files of a sample takes a header and one block of data
    changes: dict[str, Any] = {
        "mid_data": lambda: data[: 3 * step + 1024 + 600],
        "mid_header": lambda: data[: 3 * step + 100],
        "boundary": lambda: data[: 3 * step],
        "no_end": lambda: data[: 10 * step],
        "flipped_header": lambda: data[: 4 * step + 1024 + 150] + b"\xff" + data[4 * step + 1024 + 151 :],
        "zeroed_header": lambda: data[: 4 * step + 1024] + bytes(512) + data[4 * step + 1536 :],
        "empty": lambda: b"",
        "html": lambda: b"<html>not found</html>" * 100,
        "cut_gzip": lambda: gzip.compress(bytes(data))[:-300],
    }
    name = "bad.tar.gz" if damage == "cut_gzip" else "bad.tar"
    (tmp_path / name).write_bytes(bytes(changes[damage]()))
    (tmp_path / "good.tar").write_bytes(tar_of(pairs(5, start=100)))
    report = prepare_pairs([tmp_path / name, tmp_path / "good.tar"], tmp_path / "out")
    assert len(report.damaged) == 1
    assert name in report.damaged[0]
    assert keys(tmp_path / "out")[-5:] == [f"{number:05d}" for number in range(100, 105)]
    if kept is not None:
        assert report.samples == kept + 5
        assert report.skipped == ({"damaged": lost} if lost else {})
    for number, sample in enumerate(load_prepared(tmp_path / "out")):
        assert sample.text == f"picture {sample.meta['n']}".encode(), number


def test_names_of_an_archive_are_only_names(tmp_path: Path) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name in ("../../evil", "/etc/evil"):
            for ending, body in (("png", png()), ("txt", b"evil")):
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (tmp_path / "in.tar").write_bytes(data.getvalue())
    report = prepare_pairs([tmp_path / "in.tar"], tmp_path / "deep" / "out")
    assert report.samples == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "in.tar"]
    assert all("/" not in key for key in keys(tmp_path / "deep" / "out"))


def test_a_declared_size_beyond_reason_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("huge.png")
    info.size = 10 * 2**30
    (tmp_path / "in.tar").write_bytes(tar_of(pairs(2))[: 2 * 3 * 1024] + info.tobuf() + bytes(1024))
    report = prepare_pairs([tmp_path / "in.tar"], tmp_path / "out")
    assert report.samples == 2
    assert len(report.damaged) == 1


def test_equal_names_of_two_sources_are_both_kept(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.tar").write_bytes(tar_of(pairs(3)))
    report = prepare_pairs([tmp_path / "one.tar", tmp_path / "two.tar"], tmp_path / "out")
    assert report.samples == 6
    assert report.skipped == {}
    assert keys(tmp_path / "out")[3:] == ["two-00000", "two-00001", "two-00002"]


def test_filters_keep_what_they_name(tmp_path: Path) -> None:
    (tmp_path / "in.tar").write_bytes(tar_of(pairs(10)))
    (tmp_path / "captions").write_text("Picture  3\nunrelated\n")
    report = prepare_pairs(
        [tmp_path / "in.tar"], tmp_path / "out", where={"split": "train"}, skip_captions=tmp_path / "captions"
    )
    assert keys(tmp_path / "out") == ["00001", "00005", "00007", "00009"]
    assert report.skipped == {"filtered": 6}


def test_folders_of_pictures_with_texts_beside_them(tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    (source / "cats").mkdir(parents=True)
    (source / "cats" / "tom.png").write_bytes(png())
    (source / "cats" / "tom.txt").write_text("a cat")
    (source / "dog.jpeg").write_bytes(png())
    (source / "dog.json").write_text('{"caption": "a dog"}')
    (source / "bare.png").write_bytes(png())
    report = prepare_pairs([source], tmp_path / "pairs")
    assert keys(tmp_path / "pairs") == ["cats-tom", "dog"]
    assert report.skipped == {"missing_caption": 1}
    report = prepare_images([source], tmp_path / "images")
    assert keys(tmp_path / "images") == ["bare", "cats-tom", "dog"]
    assert report.skipped == {}
    assert all(sample.text is None for sample in load_prepared(tmp_path / "images"))


def test_texts_are_lines_or_fields_and_long_ones_are_divided(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"first line\n\nbad \xff byte\n" + b"word " * 4000 + b"\n")
    (tmp_path / "b.jsonl").write_text('{"text": "from json"}\n{"other": 1}\nnot json\n')
    report = prepare_text([tmp_path / "a.txt", tmp_path / "b.jsonl"], tmp_path / "out")
    texts = [sample.text for sample in load_prepared(tmp_path / "out")]
    assert texts[:2] == ["first line", "bad \ufffd byte"]
    assert texts[-1] == "from json"
    assert " ".join(str(text) for text in texts[2:-1]) == " ".join(["word"] * 4000)
    assert report.skipped == {"empty_caption": 1, "not_text": 2}
    assert report.samples == len(texts) == 6


def test_a_folder_with_content_is_not_touched_unless_asked(tmp_path: Path) -> None:
    (tmp_path / "in.tar").write_bytes(tar_of(pairs(3)))
    prepare_pairs([tmp_path / "in.tar"], tmp_path / "out")
    before = keys(tmp_path / "out")
    with pytest.raises(ConfigError, match="is not empty"):
        prepare_pairs([tmp_path / "in.tar"], tmp_path / "out")
    (tmp_path / "in.tar").write_bytes(b"")
    with pytest.raises(BeitError, match="nothing to write"):
        prepare_pairs([tmp_path / "in.tar"], tmp_path / "out", overwrite=True)
    assert keys(tmp_path / "out") == before
    (tmp_path / "in.tar").write_bytes(tar_of(pairs(1, start=7)))
    prepare_pairs([tmp_path / "in.tar"], tmp_path / "out", overwrite=True)
    assert keys(tmp_path / "out") == ["00007"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.tar", "out"]


def test_a_killed_run_leaves_no_folder_that_looks_finished(tmp_path: Path) -> None:
    (tmp_path / "in.tar").write_bytes(tar_of(pairs(2000)))
    code = (
        "import sys; from pathlib import Path; from beit3.data.prepare import prepare_pairs; "
        "prepare_pairs([Path(sys.argv[1])], Path(sys.argv[2]), max_per_shard=100)"
    )
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, tmp_path / "in.tar", tmp_path / "out"])
    partial = tmp_path / ".out.partial" / "shard-00001.tar"
    deadline = time.monotonic() + 60
    while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    prepare_pairs([tmp_path / "in.tar"], tmp_path / "out", max_per_shard=1000)
    assert len(keys(tmp_path / "out")) == 2000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.tar", "out"]


def test_wrong_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match=r"nothing.tar: no such file"):
        prepare_pairs([tmp_path / "nothing.tar"], tmp_path / "out")
    with pytest.raises(DataMissingError, match="no source given"):
        prepare_images([], tmp_path / "out")
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(ConfigError, match="neither a folder nor a tar"):
        prepare_images([tmp_path / "x.zip"], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"neither .txt nor .jsonl"):
        prepare_text([tmp_path / "x.zip"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
