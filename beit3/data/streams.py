"""Endless streams of training batches over prepared shards, with exact resume.

megatron-energon reads, shuffles, blends and remembers its place; this module turns its samples into batches of the
Task and draws one batch of every stream for each step. Whatever an encoder draws from the generators of torch, numpy
and python depends only on (seed, stream, rank, worker, number of the batch), so a restored run sees the same crops and
masks, and the generators of the training process are left as they were.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from megatron.energon import BlendDataset, RepeatDataset, SavableDataset, ShuffleBufferDataset, WorkerConfig
from megatron.energon.wrappers.base import BaseWrapperDataset

from beit3.config import config, require
from beit3.data.randomness import seeded
from beit3.data.shards import Sample, build_quietly, check_folder, make_loader, open_folder, to_sample
from beit3.data.stream_state import from_plain, to_plain
from beit3.errors import BadSampleError, BeitError, ConfigError

__all__ = ["BatchEncoder", "Encoder", "Sample", "Source", "Stream", "StreamLoader"]

T_sample = TypeVar("T_sample")
T_batch = TypeVar("T_batch")
T_batch_co = TypeVar("T_batch_co", covariant=True)

MAX_BAD_IN_A_ROW = 10_000
"""Samples refused one after the other before a stream is given up."""


@config
class Source:
    """One prepared folder of a stream."""

    path: str
    """Folder written by `beit3 prepare`, relative to the run's data folder."""
    weight: float = 1.0
    """Share of this source among the sources of its stream, in samples; the sum need not be 1."""
    codes: str | None = None
    """Folder of recorded visual tokens (`beit3 tokenize images`), relative to the run's data folder; None makes them
    while training. For tasks that hide patches."""

    def __post_init__(self) -> None:
        require(bool(self.path), "a source needs the path of a prepared folder")
        require(self.weight > 0, f"the weight of source '{self.path}' must be above 0, not {self.weight}")


@config
class Stream:
    """Samples of one kind (images, texts or pairs), drawn endlessly and shuffled."""

    sources: tuple[Source, ...]
    """Blended by weight."""
    batch_size: int
    """Samples of one step over all ranks."""
    shuffle_buffer: int = 1000
    """Samples held by each worker to draw from at random."""

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "a stream needs at least one source")
        require(
            len({source.codes is not None for source in self.sources}) == 1,
            "either all sources of a stream have `codes`, or none has",
        )
        require(self.batch_size >= 1, f"batch_size must be at least 1, not {self.batch_size}")
        require(self.shuffle_buffer >= 1, f"shuffle_buffer must be at least 1, not {self.shuffle_buffer}")

    @property
    def recorded(self) -> bool:
        """Whether visual tokens are read, not made."""
        return self.sources[0].codes is not None


class BatchEncoder(Protocol[T_batch_co]):
    """Turns samples as stored into batches of a Task, whatever lies between them."""

    def encode(self, sample: Sample) -> Any:
        """Prepare one sample; `BadSampleError` counts and skips it."""

    def collate(self, samples: list[Any]) -> T_batch_co:
        """Join encoded samples into a batch."""


class Encoder(Protocol[T_sample, T_batch_co]):
    """A `BatchEncoder` that names the type of its encoded samples. Both methods may draw random numbers."""

    def encode(self, sample: Sample) -> T_sample:
        """Prepare one sample (decode, crop, tokenize, mask); `BadSampleError` counts and skips it."""

    def collate(self, samples: list[T_sample]) -> T_batch_co:
        """Join encoded samples into a batch."""


class _EncodedBatches(BaseWrapperDataset[Any, dict[str, Any]]):  # type: ignore[misc]  # energon has no types
    """Draws samples, encodes and collates them under generators seeded once per batch.

    Energon's own `@stateless(restore_seeds=True)` seeds once per sample, which costs more than reading a small one,
    and remembers one seed per process, so that streams loaded in the training process would share it.
    Yields dicts: the batch, the reasons of skipped samples, and the message of an error that ends the stream.
    """

    _savable_fields = ("_batch_index",)

    def __init__(self, dataset: SavableDataset[Any], encoder: BatchEncoder[Any], size: int, seed: str) -> None:
        super().__init__(dataset, worker_config=dataset.worker_config)
        self._encoder = encoder
        self._size = size
        self._seed = seed
        self.reset_state_own()

    def reset_state_own(self) -> None:
        """Start at the first batch."""
        self._batch_index = 0

    def len_worker(self, worker_idx: int | None = None) -> int:
        """Count the full batches that one pass over the data gives."""
        return int(self.dataset.len_worker(worker_idx)) // self._size

    def config(self) -> dict[str, Any]:
        """Describe the dataset for energon."""
        return {"type": type(self).__qualname__, "size": self._size, "dataset": self.dataset.config()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield one item per batch, for ever or until the stream is given up."""
        raws = iter(self.dataset)
        patience = min(MAX_BAD_IN_A_ROW, max(100, 4 * self.dataset.len_worker()))
        while True:
            worker = self.worker_config.global_worker_id() if self.worker_config.num_workers else 0
            with seeded(f"{self._seed}/{self.worker_config.rank}/{worker}/{self._batch_index}"):
                item = self._make_batch(raws, patience)
            self._batch_index += 1
            yield item

    def _make_batch(self, raws: Iterator[Any], patience: int) -> dict[str, Any]:
        """Encode samples until a batch is full."""
        samples: list[Any] = []
        skipped: Counter[str] = Counter()
        bad_in_a_row = 0
        while len(samples) < self._size:
            try:
                samples.append(self._encoder.encode(to_sample(next(raws))))
                bad_in_a_row = 0
            except BadSampleError as error:
                skipped[error.reason] += 1
                bad_in_a_row += 1
                if bad_in_a_row >= patience:
                    return {"batch": None, "skipped": dict(skipped), "error": f"the last was '{error}'"}
        return {"batch": self._encoder.collate(samples), "skipped": dict(skipped), "error": None}


class StreamLoader(Generic[T_batch]):
    """Draws one batch of every stream for each step, for ever, and knows its exact position.

    The order of the samples depends on (seed, world size, workers); a state is refused where these differ.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        encoders: Mapping[str, BatchEncoder[T_batch]],
        *,
        data: Path,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        """Check the streams and open them.

        Args:
            streams: what is drawn, by name.
            encoders: how each stream becomes batches; same names.
            data: folder that the sources' paths are relative to.
            seed: decides order, augmentation and masks.
            rank: this process among `world_size`.
            world_size: processes that share the streams.
            num_workers: data processes per rank and stream; 0 loads in this process.

        Raises:
            ConfigError: names differ, a batch is not divisible, or there are more workers than samples.
            DataMissingError: a folder or shard is missing.
        """
        require(bool(streams), "a StreamLoader needs at least one stream")
        if streams.keys() != encoders.keys():
            raise ConfigError(f"streams {sorted(streams)} and encoders {sorted(encoders)} must have the same names")
        for name, stream in streams.items():
            require(
                stream.batch_size % world_size == 0,
                f"stream '{name}': batch_size {stream.batch_size} is not divisible by {world_size} ranks",
            )
            for source in stream.sources:
                check_folder(data / source.path)
        self.skipped: Counter[str] = Counter()
        """Samples left out so far on this rank, by 'stream/reason'."""
        self._streams = dict(streams)
        self._encoders = dict(encoders)
        self._data = data
        self._seed = seed
        self._layout = {"rank": rank, "world_size": world_size, "num_workers": num_workers}
        self._iterators: dict[str, Iterator[dict[str, Any]]] = {}
        self._loaders = {name: self._open(name) for name in self._streams}

    def _open(self, name: str) -> Any:
        """Build energon's pipeline of one stream: read, repeat, blend, shuffle, encode, batch."""
        stream = self._streams[name]
        seed = f"{self._seed}/{name}"
        offset = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big")
        worker = WorkerConfig(seed_offset=offset, **self._layout)
        factories = [
            open_folder(self._data / source.path, worker, training=True, source=source.path)
            for source in stream.sources
        ]
        num_workers = worker.world_size * max(1, worker.num_workers)
        total = sum(len(factory) for factory in factories)
        require(
            total >= num_workers,
            f"stream '{name}' has {total} samples for {num_workers} data workers: use fewer ranks or workers",
        )
        weighted: list[tuple[SavableDataset[Any], float]] = []
        before = 0
        for source, factory in zip(stream.sources, factories, strict=True):
            part = RepeatDataset(build_quietly(factory, before % num_workers), worker_config=worker)
            weighted.append((part, source.weight))
            before += len(factory)
        dataset = weighted[0][0] if len(weighted) == 1 else BlendDataset(*weighted, worker_config=worker)
        dataset = ShuffleBufferDataset(dataset, size=stream.shuffle_buffer, worker_config=worker)
        return make_loader(_EncodedBatches(dataset, self._encoders[name], stream.batch_size // worker.world_size, seed))

    def __iter__(self) -> Iterator[dict[str, T_batch]]:
        """Continue after the last batch drawn: each item holds one batch of every stream."""
        if not self._iterators:
            self._iterators = {name: iter(loader) for name, loader in self._loaders.items()}
        while True:
            yield {name: self._next_batch(name) for name in self._streams}

    def _next_batch(self, name: str) -> T_batch:
        """Draw one batch of a stream and count what was skipped for it."""
        item = next(self._iterators[name])
        for reason, count in item["skipped"].items():
            self.skipped[f"{name}/{reason}"] += count
        if item["error"] is not None:
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(item["skipped"].items()))
            sources = ", ".join(str(self._data / source.path) for source in self._streams[name].sources)
            raise BeitError(f"stream '{name}' gives no usable sample ({counts}) in {sources}: {item['error']}")
        batch: T_batch = item["batch"]
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Save this rank's exact position as plain dicts, lists, numbers and bytes."""
        return {
            "seed": self._seed,
            "layout": dict(self._layout),
            "batch_sizes": {name: stream.batch_size for name, stream in self._streams.items()},
            "skipped": dict(self.skipped),
            "streams": {name: to_plain(loader.save_state_rank()) for name, loader in self._loaders.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; the loader must have been built with the same arguments.

        Raises:
            ConfigError: the state was saved under another seed, rank, world size, worker count or batch size.
        """
        own = {
            "seed": self._seed,
            "layout": self._layout,
            "batch_sizes": {name: stream.batch_size for name, stream in self._streams.items()},
        }
        for name, value in own.items():
            require(
                state[name] == value,
                f"the data state was saved with {name} {state[name]}, this run has {value}: resume with the same",
            )
        self.close()
        self._loaders = {name: self._open(name) for name in self._streams}
        for name, loader in self._loaders.items():
            saved = from_plain(state["streams"][name])
            loader.restore_state_rank(saved)
            if saved is not None and loader.num_workers > 0:
                # Energon forgets the offset of a worker that has not sent a batch since the restore.
                loader._worker_sample_counters = [
                    part.offset - 1 + (part.state.sample_index if part.state else 0) for part in saved.worker_states
                ]
        self.skipped = Counter(state["skipped"])

    def close(self) -> None:
        """End the worker processes; the loader can be drawn from no more. Happens by itself when it is dropped."""
        for loader in self._loaders.values():
            workers = getattr(loader, "_iterator", None)
            if workers is not None:  # left to python's garbage collection, each one would be waited for 5 seconds
                workers._shutdown_workers()
        self._iterators, self._loaders = {}, {}

    def __del__(self) -> None:
        if hasattr(self, "_loaders"):
            self.close()
