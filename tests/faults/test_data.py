"""Data that are damaged, changed, moved to other ranks, or none at all: what is lost is counted, nothing else changes.

Rows are those of the fault catalogue that the project keeps: each test names its promise.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import shutil
import signal
import tarfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.energon import CrudeWebdataset
from megatron.energon.epathlib import EPath
from torch import Tensor

from beit3.data import shard_reader
from beit3.data.example_loader import ExampleLoader
from beit3.data.fingerprint import fingerprint_files
from beit3.data.images import decode_image
from beit3.data.prepare import prepare_images, prepare_pairs
from beit3.data.shards import Sample, load_prepared
from beit3.data.streams import Source, Stream, StreamLoader
from beit3.data.texts import clean_text
from beit3.data.verify import verify_folder
from beit3.errors import BadDataError, BadSampleError, BeitError, ConfigError
from tests.unit.data.conftest import BAD, png, write_pairs

Batch = tuple[list[str], Tensor]
Loader = StreamLoader[Batch]


class Pairs:
    """Pairs whose colour and caption tell one number; draws random numbers, as augmentation does."""

    def encode(self, sample: Sample) -> tuple[str, float]:
        if sample.image is None:
            raise BadSampleError("missing_image", sample.key)
        picture = decode_image(sample.image)
        text = clean_text(sample.text)
        red, green, _ = np.asarray(picture)[0, 0].tolist()
        assert text.endswith(f" {red + 256 * green}"), "picture and caption of one sample"
        return text, torch.rand(()).item() + float(np.random.rand()) + random.random()

    def collate(self, samples: list[tuple[str, float]]) -> Batch:
        noise = torch.rand(1) + torch.tensor([noise for _, noise in samples])
        return [text for text, _ in samples], noise

    def join(self, units: list[Batch]) -> Batch:
        return [text for texts, _ in units for text in texts], torch.cat([noise for _, noise in units])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` (120 pairs in 6 shards) and `two` (50 in 3)."""
    data = tmp_path_factory.mktemp("corpus")
    write_pairs(data / "one", 120)
    write_pairs(data / "two", 50, prefix="t")
    return data


def make(
    data: Path,
    ranks: int = 1,
    workers: int = 0,
    *,
    batch: int = 48,
    buffer: int = 7,
    sources: Sequence[str] = ("one", "two"),
    **options: Any,
) -> list[Loader]:
    """The loaders of all ranks of a run."""
    stream = Stream(
        sources=tuple(Source(path=path, weight=1.0 + place) for place, path in enumerate(sources)),
        batch_size=batch,
        shuffle_buffer=buffer,
    )
    return [
        StreamLoader(
            {"x": stream},
            {"x": Pairs()},
            data=data,
            seed=5,
            rank=rank,
            world_size=ranks,
            num_workers=workers,
            **options,
        )
        for rank in range(ranks)
    ]


Step = tuple[list[str], list[float]]


def steps(loaders: Sequence[Loader], count: int) -> list[Step]:
    """Keys and random numbers of each step over all ranks."""
    found = []
    for _ in range(count):
        keys: list[str] = []
        noise: list[float] = []
        for loader in loaders:
            keys_and_noise = next(iter(loader))["x"][1].tolist()
            keys += loader.keys
            noise += keys_and_noise
        found.append((keys, noise))
    return found


def states(loaders: Sequence[Loader]) -> list[Any]:
    """The states of all ranks, sent through a file that holds nothing but plain data."""
    file = io.BytesIO()
    torch.save([loader.state_dict() for loader in loaders], file)
    file.seek(0)
    found: list[Any] = torch.load(file, weights_only=True)
    return found


def resumed(data: Path, saved: list[Any], ranks: int, workers: int, **options: Any) -> list[Loader]:
    loaders = make(data, ranks, workers, awaits_state=True, **options)
    for loader in loaders:
        loader.load_state_dict(saved)
    return loaders


def close(*groups: Sequence[Loader]) -> None:
    for loader in itertools.chain(*groups):
        loader.close()


GRID = [(ranks, workers) for ranks in (1, 2, 4) for workers in range(5)]


@pytest.mark.parametrize(("ranks", "workers"), GRID)
def test_a_step_depends_on_the_number_of_data_workers_not_on_where_they_run(
    corpus: Path, ranks: int, workers: int
) -> None:
    """Rows 34 and 36: any ranks x workers gives the steps of as many ranks without data processes, over epochs."""
    loaders = make(corpus, ranks, workers)
    expected = steps(make(corpus, ranks * max(1, workers)), 6)
    assert steps(loaders, 6) == expected
    assert [len(keys) for keys, _ in expected] == [48] * 6
    close(loaders)


@pytest.mark.parametrize("cuts", [(0, 0), (1, 2), (3, 1), (17, 4), (5, 20)])
def test_a_run_that_goes_from_one_rank_to_two_and_back_loses_and_repeats_nothing(
    corpus: Path, cuts: tuple[int, int]
) -> None:
    """Row 34, within epochs, with a blend, a shuffle buffer and bad samples' counts."""
    whole = make(corpus, 1, 2, batch=8)
    expected = steps(whole, 40)
    first = make(corpus, 1, 2, batch=8)
    found = steps(first, cuts[0])
    second = resumed(corpus, states(first), 2, 3, batch=8)
    found += steps(second, cuts[1])
    third = resumed(corpus, states(second), 1, 0, batch=8)
    found += steps(third, 40 - sum(cuts))
    assert found == expected
    assert third[0].used == whole[0].used == 320
    close(whole, first, second, third)


@pytest.mark.parametrize("shares", [(1, 3), (3, 0), (3, 1)])
def test_within_an_epoch_every_sample_comes_once_whoever_resumes(corpus: Path, shares: tuple[int, int]) -> None:
    """Row 34: three data workers on one rank or on three, changed in the middle of each epoch."""
    loaders = make(corpus, *shares, batch=12, buffer=1, sources=["one"])
    for _ in range(2):
        keys = [key for step, _ in steps(loaders, 4) for key in step]
        other = resumed(corpus, states(loaders), 4 - len(loaders), 0, batch=12, buffer=1, sources=["one"])
        close(loaders)
        loaders = other
        keys += [key for step, _ in steps(loaders, 6) for key in step]
        assert Counter(keys) == Counter(f"x/one/s{number:04d}" for number in range(120))
    close(loaders)


def test_bad_samples_and_used_ones_are_counted_over_changes_of_ranks(tmp_path: Path) -> None:
    write_pairs(tmp_path / "one", 120, bad=dict.fromkeys(range(0, 120, 10), "empty_caption"))
    whole = make(tmp_path, 1, 2, batch=8, sources=["one"])
    steps(whole, 30)
    first = make(tmp_path, 1, 2, batch=8, sources=["one"])
    steps(first, 11)
    second = resumed(tmp_path, states(first), 2, 0, batch=8, sources=["one"])
    steps(second, 9)
    third = resumed(tmp_path, states(second), 1, 0, batch=8, sources=["one"])
    steps(third, 10)
    assert third[0].skipped == whole[0].skipped
    assert set(third[0].skipped) == {"x/empty_caption"}
    assert sum(loader.used for loader in second) == 8 * 20
    assert third[0].used == 8 * 30
    close(whole, first, second, third)


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0), (0, 3), (3, 0), (3, 1), (2, 4)])
def test_the_number_of_data_processes_may_change_between_runs(
    corpus: Path, before: int, after: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 36."""
    whole = make(corpus, 1, before)
    steps(whole, 5)
    saved = states(whole)
    capsys.readouterr()
    again = resumed(corpus, saved, 1, after)
    said = capsys.readouterr().err
    assert steps(again, 6) == steps(whole, 6)
    workers = max(1, before)
    assert said.count("\n") == (workers > 1 or after > 1), "a line if the number is not the one asked for"
    if said:
        assert f"data processes on each of 1 ranks, not {after}" in said
    close(whole, again)


def test_batches_that_cannot_be_shared_out_are_refused_with_one_that_can(corpus: Path) -> None:
    """Row 35."""
    with pytest.raises(
        ConfigError, match=r"batch_size 18 is not divisible by 4 data workers \(4 ranks x 1\): use 16 or 20"
    ):
        make(corpus, 4, batch=18)
    with pytest.raises(ConfigError, match=r"batch_size 2 is not divisible by 6 data workers \(2 ranks x 3\): use 6"):
        make(corpus, 2, 3, batch=2)


def test_ranks_that_cannot_share_the_data_workers_are_refused_with_those_that_can(corpus: Path) -> None:
    loaders = make(corpus, 1, 2)
    with pytest.raises(ConfigError, match=r"2 data workers, which 3 ranks cannot share: resume with 1 or 2 ranks"):
        resumed(corpus, states(loaders), 3, 0)
    close(loaders)


def test_a_batch_need_not_fit_the_processes_asked_for_if_a_state_brings_others(corpus: Path) -> None:
    loaders = make(corpus, 2, 2, batch=12)
    expected = make(corpus, 2, 2, batch=12)
    again = resumed(corpus, states(loaders), 1, 5, batch=12)
    assert steps(again, 3) == steps(expected, 3)
    close(loaders, again, expected)
    with pytest.raises(ConfigError, match="not divisible by 5"):
        steps(make(corpus, 1, 5, batch=12, awaits_state=True), 1)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 4), (4, 0), (2, 4)])
def test_more_data_workers_than_shards_still_see_every_sample_once(tmp_path: Path, ranks: int, workers: int) -> None:
    """Row 38."""
    write_pairs(tmp_path / "one", 48, per_shard=24)
    loaders = make(tmp_path, ranks, workers, batch=8, buffer=1, sources=["one"])
    keys = [key for step, _ in steps(loaders, 6) for key in step]
    assert Counter(keys) == Counter(f"x/one/s{number:04d}" for number in range(48))
    close(loaders)
    with pytest.raises(ConfigError, match="48 samples for 64 data workers: use fewer"):
        make(tmp_path, 4, 16, batch=64, sources=["one"])


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_with_uneven_shares_never_run_out_and_give_equal_batches(tmp_path: Path, ranks: int) -> None:
    """Row 39: 101 samples; every rank has a full batch in every step of five epochs."""
    write_pairs(tmp_path / "one", 101)
    loaders = make(tmp_path, ranks, batch=12, buffer=1, sources=["one"])
    seen = steps(loaders, 45)
    assert all(len(keys) == 12 for keys, _ in seen)
    counts = Counter(key for keys, _ in seen for key in keys)
    assert len(counts) == 101
    assert max(counts.values()) - min(counts.values()) <= 1, "no sample more than one epoch ahead of another"


def reorder(folder: Path) -> None:
    """Let energon's own list name the shards in another order."""
    path = folder / ".nv-meta" / "split.yaml"
    text = path.read_text()
    assert "shard-{00000..00005}.tar" in text
    path.write_text(text.replace("shard-{00000..00005}.tar", "shard-{00001,00000,00002,00003,00004,00005}.tar"))


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "added": (lambda data: rewrite(data, 140), "x/one/shard-00006.tar added"),
    "removed": (lambda data: rewrite(data, 100), "x/one/shard-00005.tar removed"),
    "edited": (lambda data: rewrite(data, 120, prefix="S"), r"x/one/shard-00000.tar edited \(other contents\)"),
    "lengthened": (
        lambda data: rewrite(data, 119),
        r"x/one/shard-00005.tar edited \(samples 20 -> 19, bytes \d+ -> \d+, other contents\)",
    ),
    "reordered": (lambda data: reorder(data / "one"), "x/one/shard-00001.tar stands where x/one/shard-00000.tar did"),
}


def rewrite(data: Path, count: int, prefix: str = "s") -> None:
    shutil.rmtree(data / "one")
    write_pairs(data / "one", count, prefix=prefix)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_data_are_refused_with_the_difference_unless_allowed(
    corpus: Path, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 37."""
    data = tmp_path / "data"
    shutil.copytree(corpus, data)
    loaders = make(data)
    steps(loaders, 3)
    saved = states(loaders)
    edit, difference = CHANGES[change]
    edit(data)
    with pytest.raises(ConfigError, match=f"the data changed since the state was saved: {difference}") as caught:
        resumed(data, saved, 1, 0)
    assert "--allow-data-change" in str(caught.value)
    assert "\n" not in str(caught.value)
    capsys.readouterr()
    again = resumed(data, saved, 1, 0, allow_data_change=True)
    assert "All streams begin anew" in capsys.readouterr().err
    assert again[0].used == 0
    assert steps(again, 3) == steps(make(data), 3)


def test_data_that_lie_elsewhere_are_the_same_data(corpus: Path, tmp_path: Path) -> None:
    loaders = make(corpus)
    steps(loaders, 3)
    shutil.copytree(corpus, tmp_path / "moved")
    assert steps(resumed(tmp_path / "moved", states(loaders), 1, 0), 3) == steps(loaders, 3)


class Numbers:
    """Fifty examples."""

    def __len__(self) -> int:
        return 50

    def load(self, index: int) -> int:
        return index


def test_an_edited_index_file_is_refused_by_its_name(tmp_path: Path) -> None:
    """Row 37, for index files."""
    index = tmp_path / "train.jsonl"

    def build(**options: Any) -> ExampleLoader[int, list[int]]:
        return ExampleLoader(Numbers(), list, batch_size=4, seed=0, data=fingerprint_files([index]), **options)

    index.write_text('{"label": 0}\n' * 50)
    loader = build()
    next(iter(loader))
    saved = [loader.state_dict()]
    index.write_text('{"label": 1}\n' * 50)
    with pytest.raises(ConfigError, match=r"train.jsonl edited \(other contents\)"):
        build().load_state_dict(saved)
    again = build(allow_data_change=True)
    again.load_state_dict(saved)
    assert again.used == 0
    index.write_text('{"label": 0}\n' * 50)
    whole = build()
    whole.load_state_dict(saved)
    assert next(iter(whole)) == next(iter(loader)) == [int(key) for key in whole.keys]


def test_examples_of_a_step_are_the_same_on_any_number_of_ranks() -> None:
    """Row 34, for index files: one rank, then two, then four."""

    def build(rank: int, ranks: int) -> ExampleLoader[int, list[int]]:
        return ExampleLoader(Numbers(), list, batch_size=8, seed=0, rank=rank, world_size=ranks)

    def draw(loaders: list[ExampleLoader[int, list[int]]]) -> set[str]:
        for loader in loaders:
            next(iter(loader))
        return {key for loader in loaders for key in loader.keys}

    alone = [build(0, 1)]
    expected = [draw(alone) for _ in range(21)]
    loaders, found = [build(0, 1)], []
    for ranks in (1, 2, 4):
        saved = [loader.state_dict() for loader in loaders]
        loaders = [build(rank, ranks) for rank in range(ranks)]
        for loader in loaders:
            loader.load_state_dict(saved)
        found += [draw(loaders) for _ in range(7)]
    assert found == expected
    assert sum(loader.used for loader in loaders) == alone[0].used == 21 * 8


HEADER = 512


def member(folder: Path, key: str, ending: str) -> tuple[Path, int]:
    """The tar that holds a file, and where its header is."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                if info.name == f"{key}.{ending}":
                    return path, info.offset
    raise KeyError(key)


def overwrite(path: Path, place: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(data)


def invert(path: Path, place: int) -> None:
    overwrite(path, place, bytes([path.read_bytes()[place] ^ 0xFF]))


def damage(kind: str, folder: Path) -> list[str]:
    """Damage a shard of twenty; returns the keys that can be read no more."""
    path, place = member(folder, "s0045", "txt")
    first = member(folder, "s0045", "png")[1]
    if kind == "flipped_header":
        invert(path, place + 150)
    elif kind == "zeroed_header":
        overwrite(path, place, bytes(HEADER))
    elif kind == "renamed":
        overwrite(path, first, path.read_bytes()[: 3 * 2 * HEADER])  # the first sample of the shard, once more
    elif kind == "cut":
        os.truncate(path, place)
        return [f"s{number:04d}" for number in range(45, 60)]
    elif kind == "cut_in_data":
        os.truncate(path, place + HEADER + 3)
        return [f"s{number:04d}" for number in range(45, 60)]
    else:
        whole = {"empty": b"", "html": b"<html>" * 9999, "gzip": b"\x1f\x8b\x08" * 9999}[kind]
        path.write_bytes(whole)
        return [f"s{number:04d}" for number in range(40, 60)]
    return ["s0045"]


DAMAGE = ["flipped_header", "zeroed_header", "renamed", "cut", "cut_in_data", "empty", "html", "gzip"]


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_costs_the_samples_that_are_damaged_and_no_others(
    tmp_path: Path, kind: str, workers: int
) -> None:
    """Row 40, while training: the damage comes once the folder was found whole."""
    write_pairs(tmp_path / "one", 100)
    loaders = make(tmp_path, 1, workers, batch=1, buffer=1, sources=["one"])
    lost = damage(kind, tmp_path / "one")
    good = {f"x/one/s{number:04d}" for number in range(100)} - {f"x/one/{key}" for key in lost}
    keys = [step[0][0] for step in steps(loaders, len(good))]
    assert Counter(keys) == Counter(good)
    (again,) = [step[0][0] for step in steps(loaders, 1)]
    assert again in good
    assert set(loaders[0].skipped) == {"x/unreadable_shard"}
    count = loaders[0].skipped["x/unreadable_shard"]
    assert count == len(lost) or (len(lost) == 20 and count == 40), "a shard lost whole may begin the next epoch"
    close(loaders)


@pytest.mark.parametrize("kind", [*DAMAGE, "flipped_data"])
def test_verification_names_the_damaged_file_and_every_lost_key(tmp_path: Path, kind: str) -> None:
    """Row 40, before training: flipped data too, which no reader of tars notices."""
    write_pairs(tmp_path / "one", 100)
    assert verify_folder(tmp_path / "one") == []
    if kind == "flipped_data":
        path, place = member(tmp_path / "one", "s0045", "png")
        invert(path, place + HEADER + 40)
        lost = []
    else:
        lost = damage(kind, tmp_path / "one")
    found = verify_folder(tmp_path / "one")
    assert all(line.startswith("shard-00002.tar: ") for line in found)
    named = [line for line in found if ": sample '" in line]
    assert [line.split("'")[1] for line in named] == lost
    assert found[0].endswith("(SHA-256)") or "bytes instead of" in found[0]
    report = tmp_path / "one" / "prepare.json"
    old = json.loads(report.read_text())
    del old["sha256"]
    report.write_text(json.dumps(old))
    assert [line for line in verify_folder(tmp_path / "one") if ": sample '" in line] == named, "also of old folders"


Member = tuple[tarfile.TarInfo, bytes]


def tar_of(members: Sequence[Member], *, ended: bool = True) -> bytes:
    """A tar as people make them, or its members without the two empty blocks that end it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for info, body in members:
            tar.addfile(info, io.BytesIO(body))
        end = tar.offset
    return data.getvalue() if ended else data.getvalue()[:end]


def foreign(folder: Path, members: Sequence[Member]) -> None:
    """A tar indexed with energon's own tool, by whoever has it."""
    folder.mkdir(parents=True)
    (folder / "in.tar").write_bytes(tar_of(members))
    CrudeWebdataset.prepare_dataset(EPath(folder), ["in.tar"], split_parts_ratio=[("train", 1.0)], shuffle_seed=None)


def entry(name: str, body: bytes = b"", **fields: Any) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(body)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, body


def pair(key: str, number: int, endings: tuple[str, str] = ("png", "txt")) -> list[Member]:
    return [entry(f"{key}.{endings[0]}", png(number)), entry(f"{key}.{endings[1]}", f"x {number}".encode())]


ODD_MEMBERS = [
    entry("b.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    entry("b.jpg", type=tarfile.LNKTYPE, linkname="a.png"),
    entry("c.png", type=tarfile.CHRTYPE),
    entry("d.png", type=tarfile.FIFOTYPE),
    entry("folder.png", type=tarfile.DIRTYPE),
]


def test_links_devices_and_names_outside_are_neither_followed_nor_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Row 41, prepared and read as it is."""
    members = [*pair("a", 1), *ODD_MEMBERS, *pair("/etc/e", 2), *pair("../../f", 3), *pair("x" * 300, 4)]
    foreign(tmp_path / "deep" / "data" / "raw", members)
    data = tmp_path / "deep" / "data"
    report = prepare_pairs([data / "raw" / "in.tar"], data / "one")
    assert (report.samples, report.skipped, report.damaged) == (4, {}, [])
    for folder in ("raw", "one"):
        texts = [clean_text(sample.text) for sample in load_prepared(data / folder)]
        assert texts == ["x 1", "x 2", "x 3", "x 4"]
        assert verify_folder(data / folder) == []
        loaders = make(data, batch=4, buffer=1, sources=[folder])
        assert len(set(steps(loaders, 1)[0][0])) == 4
        assert not loaders[0].skipped
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["data"]


def sparse(name: str, size: int) -> bytes:
    """Header of an old GNU sparse file that claims a size."""
    info = tarfile.TarInfo(name)
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"%011o\0" % size
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def long_name(size: int) -> bytes:
    """Header that says that a name of some size follows."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", ["sparse", "declared", "long_name"])
def test_sizes_that_are_only_declared_cost_no_memory(tmp_path: Path, kind: str) -> None:
    """Row 41: ten gigabytes that are not there."""
    size = 10 * 2**30
    declared = tarfile.TarInfo("b.png")
    declared.size = size
    odd = {"sparse": sparse("b.png", size), "declared": declared.tobuf(), "long_name": long_name(size)}[kind]
    (tmp_path / "in.tar").write_bytes(tar_of(pair("a", 1), ended=False) + odd + bytes(2 * HEADER))
    started = time.monotonic()
    report = prepare_pairs([tmp_path / "in.tar"], tmp_path / "out")
    assert time.monotonic() - started < 10
    assert report.samples == 1
    assert len(report.damaged) == (kind != "sparse")


def test_a_sample_beyond_the_cap_is_counted_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 41, while training."""
    monkeypatch.setattr(shard_reader, "MAX_SAMPLE_BYTES", 20_000)
    foreign(tmp_path / "raw", [*pair("a", 1), entry("b.png", bytes(30_000)), *pair("c", 3)])
    loaders = make(tmp_path, batch=2, buffer=1, sources=["raw"])
    assert set(steps(loaders, 1)[0][0]) == {"x/raw/a", "x/raw/c"}
    assert loaders[0].skipped == {"x/too_large": 1}


def test_an_archive_of_very_many_members_is_read_in_little_memory(tmp_path: Path) -> None:
    """Row 41: 40,000 members that belong to no sample, between two that do."""
    filler = b"".join(tarfile.TarInfo(f"noise{number}.bin").tobuf() for number in range(40_000))
    (tmp_path / "in.tar").write_bytes(tar_of(pair("a", 1), ended=False) + filler + tar_of(pair("b", 2)))
    tracemalloc.start()
    report = prepare_pairs([tmp_path / "in.tar"], tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (report.samples, report.skipped, report.damaged) == (2, {}, [])
    assert peak < 4e6, "the headers alone would take 40 MB"


def test_samples_without_their_parts_are_counted_by_reason(tmp_path: Path) -> None:
    """Row 42, prepared and read as they are; one half of a split sample lacks what the other has (row 43)."""
    members = [
        *pair("a", 1),
        entry("b.png", png(2)),
        entry("c.txt", b"x 3"),
        *pair("d", 4), entry("d.jpg", png(4)),
        *pair("e.left", 5), entry("e.right.png", png(5)),
        entry("f.png", png(6)), *pair("g", 7),
        entry("h.txt", b" "), entry("h.png", png(8)),
    ]  # fmt: skip
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "in.tar").write_bytes(tar_of([*members, entry("f.txt", b"x 6")]))
    report = prepare_pairs([tmp_path / "raw" / "in.tar"], tmp_path / "one")
    assert [sample.key for sample in load_prepared(tmp_path / "one")] == ["a", "g"]
    expected = {"missing_caption": 2, "missing_image": 2, "two_images": 2, "empty_caption": 1}
    assert report.skipped == expected
    foreign(tmp_path / "foreign", members)
    loaders = make(tmp_path, batch=1, buffer=1, sources=["foreign"])
    assert [keys[0] for keys, _ in steps(loaders, 3)] == ["x/foreign/a", "x/foreign/g", "x/foreign/a"]
    counted = {reason.removeprefix("x/"): count for reason, count in loaders[0].skipped.items()}
    assert counted == {"missing_caption": 2, "missing_image": 1, "two_images": 2, "empty_caption": 1}


def test_equal_keys_of_two_shards_dots_and_upper_case_follow_the_rule(tmp_path: Path) -> None:
    """Row 43: no merge across shards, a key ends at the first dot, endings have no case."""
    odd = [*pair("a.b/c.d", 4, ("PNG", "Txt")), *pair("e.x.y", 5)]
    (tmp_path / "00000.tar").write_bytes(tar_of([*pair("000", 1), entry("001.png", png(2))]))
    (tmp_path / "00001.tar").write_bytes(tar_of([entry("001.txt", b"x 2"), *pair("000", 3), *odd]))
    report = prepare_pairs([tmp_path], tmp_path / "one")
    assert report.skipped == {"missing_caption": 1, "missing_image": 1}
    found = {sample.key: sample.text for sample in load_prepared(tmp_path / "one")}
    assert found == {"000": b"x 1", "00001-000": b"x 3", "a_b-c": b"x 4", "e": b"x 5"}
    pictures = prepare_images([tmp_path / "00001.tar"], tmp_path / "images")
    assert (pictures.samples, pictures.skipped) == (3, {"missing_image": 1})
    foreign(tmp_path / "foreign", odd)
    loaders = make(tmp_path, batch=2, buffer=1, sources=["foreign"])
    assert sorted(steps(loaders, 1)[0][0]) == ["x/foreign/a.b/c", "x/foreign/e"]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that readers make, which pass at once."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[Path, int], bool]) -> None:
    """Let reads fail, by the file and how often it was read."""
    tries: Counter[Path] = Counter()
    read = shard_reader._Files._read_once

    def read_or_fail(self: Any, path: Path, start: int, size: int) -> bytes:
        tries[path] += 1
        if fails(path, tries[path]):
            raise OSError(5, "Input/output error")
        return read(self, path, start, size)

    monkeypatch.setattr(shard_reader._Files, "_read_once", read_or_fail)


def test_errors_of_the_disk_that_pass_cost_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    """Row 44: every third read of every file fails."""
    write_pairs(tmp_path / "one", 60)
    expected = steps(make(tmp_path, batch=5, sources=["one"]), 24)
    failing(monkeypatch, lambda path, tries: tries % 3 == 0)
    loaders = make(tmp_path, batch=5, sources=["one"])
    assert steps(loaders, 24) == expected
    assert not loaders[0].skipped
    assert waits


def test_errors_of_the_disk_that_stay_cost_their_shard_and_one_short_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    """Row 44: a shard cannot be read, then it can again."""
    write_pairs(tmp_path / "one", 60)
    loaders = make(tmp_path, batch=1, buffer=1, sources=["one"])
    broken = True
    failing(monkeypatch, lambda path, tries: broken and path.name == "shard-00001.tar")
    keys = [key for step, _ in steps(loaders, 80) for key in step]
    assert set(keys) == {f"x/one/s{number:04d}" for number in range(60) if not 20 <= number < 40}
    assert loaders[0].skipped["x/unreadable_shard"] == 40, "two epochs"
    assert sum(waits) < 2, "its other samples are not waited for"
    broken = False
    keys = [key for step, _ in steps(loaders, 60) for key in step]
    assert Counter(keys) == Counter(f"x/one/s{number:04d}" for number in range(60))
    assert loaders[0].skipped["x/unreadable_shard"] == 40


def test_a_shard_that_vanishes_is_counted_and_the_others_go_on(tmp_path: Path) -> None:
    """Row 44, without patches: the waits are real, and short."""
    write_pairs(tmp_path / "one", 60)
    loaders = make(tmp_path, 1, 1, batch=4, buffer=1, sources=["one"])
    (tmp_path / "one" / "shard-00001.tar").unlink()
    started = time.monotonic()
    keys = {key for step, _ in steps(loaders, 20) for key in step}
    assert time.monotonic() - started < 15
    assert keys == {f"x/one/s{number:04d}" for number in range(60) if not 20 <= number < 40}
    close(loaders)


def test_every_injected_bad_sample_is_counted_under_its_reason(tmp_path: Path) -> None:
    """Row 51: five in a hundred are bad, of every kind; each shard ends with a good one."""
    kinds = [*BAD, "unreadable_shard"]
    numbers = random.Random(3).sample([number for number in range(700) if number % 20 != 19], 35)
    bad = {number: kinds[place % len(kinds)] for place, number in enumerate(numbers)}
    write_pairs(tmp_path / "one", 700, bad=bad)
    places = {
        info.name: (path, info.offset)
        for path in (tmp_path / "one").glob("*.tar")
        for info in tarfile.open(path)  # noqa: SIM115
    }
    for number, kind in bad.items():
        if kind == "unreadable_shard":
            path, place = places[f"s{number:04d}.txt"]
            overwrite(path, place + 148, b"0000000")
    loaders = make(tmp_path, batch=1, buffer=1, sources=["one"])
    keys = [key for step, _ in steps(loaders, 665) for key in step]
    assert Counter(keys) == Counter(f"x/one/s{number:04d}" for number in range(700) if number not in bad)
    counted = {reason.removeprefix("x/"): count for reason, count in loaders[0].skipped.items()}
    assert counted == Counter(bad.values())
    assert loaders[0].used == 665


def test_a_shard_that_is_bad_throughout_does_not_end_a_stream(tmp_path: Path) -> None:
    """Row 51."""
    write_pairs(tmp_path / "one", 100, bad=dict.fromkeys(range(20, 40), "unreadable_image"))
    loaders = make(tmp_path, batch=8, sources=["one"])
    assert len({key for step, _ in steps(loaders, 40) for key in step}) == 80
    assert loaders[0].skipped["x/unreadable_image"] > 20


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_is_bad_throughout_ends_with_a_report(tmp_path: Path, workers: int) -> None:
    """Row 51: which stream, where it reads, how many were left out and why; in one line, in time."""
    write_pairs(tmp_path / "one", 40, bad=dict.fromkeys(range(20), "unreadable_image"))
    write_pairs(tmp_path / "two", 40, bad=dict.fromkeys(range(40), "empty_caption"))
    damaged = tmp_path / "one" / "shard-00001.tar"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    loaders = make(tmp_path, 1, workers, batch=4)
    with pytest.raises(BadDataError) as caught:
        steps(loaders, 1)
    text = str(caught.value)
    assert text.startswith("stream 'x' gives no usable sample (")
    assert "\n" not in text
    for part in ("unreadable_image", "empty_caption", "unreadable_shard", str(tmp_path / "one"), str(tmp_path / "two")):
        assert part in text
    assert loaders[0].skipped.total() == 320, "four times all"
    close(loaders)


def test_a_killed_data_process_ends_the_run_with_one_line(corpus: Path) -> None:
    loaders = make(corpus, 1, 2)
    steps(loaders, 1)
    (victim, _) = loaders[0]._units["x"]._iterator._workers
    os.kill(victim.pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(BeitError, match="a data process ended unexpectedly") as caught:
        steps(loaders, 50)
    assert time.monotonic() - started < 30
    assert "\n" not in str(caught.value)
    assert states(loaders)[0]["drawn"] >= 1, "what was drawn can still be saved"
    close(loaders)
