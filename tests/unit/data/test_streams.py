"""Streams: exact composition, exact resume, honest counting."""

from __future__ import annotations

import io
import itertools
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from beit3.config import LoopConfig, Run, TaskConfig, config
from beit3.data.images import decode_image
from beit3.data.shards import Sample
from beit3.data.streams import Source, Stream, StreamLoader
from beit3.data.texts import clean_text
from beit3.errors import BadSampleError, ConfigError, DataMissingError

Batch = tuple[list[str], Tensor]


class NoisyEncoder:
    """Decodes, and draws from all three generators in `encode` and in `collate`, as augmentation and masking do."""

    def encode(self, sample: Sample) -> tuple[str, Tensor]:
        if sample.image is not None:
            decode_image(sample.image)
        noise = [torch.rand(()).item(), float(np.random.rand()), random.random()]
        return clean_text(sample.text), torch.tensor(noise)

    def collate(self, samples: list[tuple[str, Tensor]]) -> Batch:
        return [text for text, _ in samples], torch.stack([noise for _, noise in samples]) + torch.rand(1)

    def join(self, units: list[Batch]) -> Batch:
        return [text for texts, _ in units for text in texts], torch.cat([noise for _, noise in units])


def make(
    data: Path, workers: int = 0, *, seed: int = 0, rank: int = 0, world: int = 1, **paths: str
) -> StreamLoader[Batch]:
    streams = {
        name: Stream(sources=tuple(Source(path=part) for part in path.split("+")), batch_size=8, shuffle_buffer=10)
        for name, path in (paths or {"pairs": "pairs+more", "images": "pairs", "text": "text"}).items()
    }
    encoders = dict.fromkeys(streams, NoisyEncoder())
    return StreamLoader(streams, encoders, data=data, seed=seed, rank=rank, world_size=world, num_workers=workers)


def take(loader: StreamLoader[Batch], count: int) -> list[dict[str, Batch]]:
    return list(itertools.islice(loader, count))


def same(left: list[dict[str, Batch]], right: list[dict[str, Batch]]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(a[n][0] == b[n][0] and torch.equal(a[n][1], b[n][1]) for n in a)
        for a, b in zip(left, right, strict=True)
    )


def saved(loader: StreamLoader[Batch]) -> Any:
    """Send a state through a file that holds nothing but plain data."""
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_resume_continues_bit_for_bit_across_epochs(corpus: Path, workers: int) -> None:
    whole = make(corpus, workers, pairs="pairs+more", text="text")
    take(whole, 17)  # odd, so that of two workers one has sent more; several epochs of the text stream
    state = saved(whole)
    rest = take(whole, 30)
    again = make(corpus, workers, pairs="pairs+more", text="text")
    again.load_state_dict([state])
    assert same(take(again, 30), rest)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("between", [0, 1, 3])
def test_a_state_saved_soon_after_a_resume_is_exact_too(corpus: Path, workers: int, between: int) -> None:
    whole = make(corpus, workers, pairs="pairs+more")
    take(whole, 7)
    state = saved(whole)
    rest = take(whole, between + 12)
    second = make(corpus, workers, pairs="pairs+more")
    second.load_state_dict([state])
    take(second, between)
    third = make(corpus, workers, pairs="pairs+more")
    third.load_state_dict([saved(second)])
    assert same(take(third, 12), rest[between:])


def test_resume_before_the_first_batch_is_the_beginning(corpus: Path) -> None:
    fresh = make(corpus, 2, pairs="pairs")
    again = make(corpus, 2, pairs="pairs")
    again.load_state_dict([saved(fresh)])
    assert same(take(again, 3), take(fresh, 3))


def test_a_state_of_another_layout_is_refused(corpus: Path) -> None:
    state = make(corpus).state_dict()
    with pytest.raises(ConfigError, match="seed 0, this run has 1"):
        make(corpus, seed=1).load_state_dict([state])
    smaller = StreamLoader(
        {"pairs": Stream(sources=(Source(path="pairs"),), batch_size=4)}, {"pairs": NoisyEncoder()}, data=corpus, seed=0
    )
    with pytest.raises(ConfigError, match=r"the data state was saved with batch_size .*, this run has"):
        smaller.load_state_dict([make(corpus, pairs="pairs").state_dict()])


def test_the_same_seed_repeats_and_another_seed_differs(corpus: Path) -> None:
    first = take(make(corpus), 5)
    assert same(take(make(corpus), 5), first)
    assert not same(take(make(corpus, seed=1), 5), first)


def test_streams_over_one_folder_differ_in_order(corpus: Path) -> None:
    batch = take(make(corpus, left="pairs", right="pairs"), 1)[0]
    assert batch["left"][0] != batch["right"][0]
    assert not torch.equal(batch["left"][1], batch["right"][1])


def test_loading_leaves_the_generators_of_the_process_alone(corpus: Path) -> None:
    loader = make(corpus)
    take(loader, 1)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = (torch.rand(1).item(), np.random.rand(), random.random())
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    take(loader, 2)
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected


def test_every_step_holds_one_full_batch_of_every_stream(corpus: Path) -> None:
    for batch in take(make(corpus), 20):
        assert {name: len(texts) for name, (texts, _) in batch.items()} == {"pairs": 8, "images": 8, "text": 8}
        assert all(text.startswith("line ") for text in batch["text"][0])


def test_sources_are_blended_by_weight(corpus: Path) -> None:
    sources = (Source(path="pairs", weight=3.0), Source(path="more", weight=1.0))
    loader = StreamLoader({"x": Stream(sources=sources, batch_size=50)}, {"x": NoisyEncoder()}, data=corpus, seed=0)
    texts = [text for batch in take(loader, 20) for text in batch["x"][0]]
    assert 0.70 < sum(text.startswith("s") for text in texts) / len(texts) < 0.80


def test_a_fault_of_the_encoder_is_not_taken_for_bad_data(corpus: Path) -> None:
    class Broken(NoisyEncoder):
        def encode(self, sample: Sample) -> tuple[str, Tensor]:
            raise ZeroDivisionError("a bug")

    loader = StreamLoader(
        {"x": Stream(sources=(Source(path="pairs"),), batch_size=2)}, {"x": Broken()}, data=corpus, seed=0
    )
    with pytest.raises(ZeroDivisionError):
        take(loader, 1)


def test_missing_or_cut_files_are_named_before_training(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="nowhere: no such folder"):
        make(corpus, pairs="nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataMissingError, match="holds no prepared data"):
        make(tmp_path, pairs="empty")
    shutil.copytree(corpus / "pairs", tmp_path / "pairs")
    shard = tmp_path / "pairs" / "shard-00003.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataMissingError, match=r"shard-00003.tar: \d+ bytes instead of \d+"):
        make(tmp_path, pairs="pairs")
    shard.unlink()
    with pytest.raises(DataMissingError, match=r"shard-00003.tar: file missing"):
        make(tmp_path, pairs="pairs")


def test_streams_without_encoders_or_weights_are_refused(corpus: Path) -> None:
    with pytest.raises(ConfigError, match="same names"):
        StreamLoader({"a": Stream(sources=(Source(path="pairs"),), batch_size=2)}, {}, data=corpus, seed=0)
    with pytest.raises(ConfigError, match="weight"):
        Source(path="pairs", weight=0)


def test_the_console_stays_quiet(corpus: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loader = make(corpus, 1, pairs="pairs+more")
    take(loader, 2)
    loader.close()
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""


def test_samples_hold_what_was_written(corpus: Path) -> None:
    class Whole:
        def encode(self, sample: Sample) -> Sample:
            if sample.key == "s0000":
                raise BadSampleError("unwanted")
            return sample

        def collate(self, samples: list[Sample]) -> list[Sample]:
            return samples

        def join(self, units: list[list[Sample]]) -> list[Sample]:
            return [sample for unit in units for sample in unit]

    streams = {name: Stream(sources=(Source(path=name),), batch_size=30) for name in ("pairs", "text")}
    encoders: dict[str, Any] = dict.fromkeys(streams, Whole())
    loader: Iterator[dict[str, list[Sample]]] = iter(StreamLoader(streams, encoders, data=corpus, seed=0))
    batch = next(loader)
    for sample in batch["pairs"]:
        assert sample.image is not None
        assert isinstance(sample.text, bytes)
        assert sample.meta == {"n": int(sample.key[1:])}
        assert sample.text == f"s {sample.meta['n']}".encode()
        assert decode_image(sample.image).getpixel((0, 0)) == (sample.meta["n"], 0, 0)
    assert all(sample.image is None and sample.text == f"line {sample.key}" for sample in batch["text"])


def test_a_loader_knows_what_it_drew(corpus: Path) -> None:
    loader = make(corpus, pairs="pairs+more", text="text")
    assert (loader.used, loader.keys) == (0, [])
    batch = take(loader, 3)[-1]
    assert loader.used == 3 * 16
    texts = batch["pairs"][0] + batch["text"][0]
    assert [key.split("/")[0] for key in loader.keys] == ["pairs"] * 8 + ["text"] * 8
    for key, text in zip(loader.keys, texts, strict=True):
        _, source, name = key.split("/")
        prefix, number = text.split()
        assert source == {"s": "pairs", "m": "more", "line": "text"}[prefix]
        assert name == (number if source == "text" else f"{prefix}{int(number):04d}")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_closed_loader_goes_on_where_it_stood(corpus: Path, workers: int) -> None:
    expected = take(make(corpus, workers), 40)
    loader = make(corpus, workers)
    found = take(loader, 21)
    loader.close()
    assert same(found + take(loader, 19), expected)


def test_a_state_is_the_same_however_fast_processes_ran_ahead(corpus: Path) -> None:
    loaders = [make(corpus, 2, pairs="pairs") for _ in range(2)]
    take(loaders[0], 20)
    for _ in range(20):
        take(loaders[1], 1)
        time.sleep(0.01)
    assert loaders[0].state_dict() == loaders[1].state_dict()


@config
class Nothing(TaskConfig):
    """A Task that is never built."""

    def build(self) -> Any:
        raise NotImplementedError


def test_a_run_makes_its_loader_in_one_call(corpus: Path) -> None:
    streams = {"pairs": Stream(sources=(Source(path="pairs"),), batch_size=8)}
    run = Run(name="x", task=Nothing(), data=corpus, seed=3, loop=LoopConfig(num_workers=2), allow_data_change=True)
    loader = StreamLoader.for_run(streams, {"pairs": NoisyEncoder()}, run, 1, 2)
    other = StreamLoader(streams, {"pairs": NoisyEncoder()}, data=corpus, seed=3, rank=1, world_size=2, num_workers=2)
    assert same(take(loader, 3), take(other, 3))
