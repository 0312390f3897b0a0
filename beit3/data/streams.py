"""Endless streams of training batches over prepared shards, with exact resume.

megatron-energon reads, shuffles, blends and remembers its place; this module draws one batch of every stream for each
step. A batch is made of the units of W data workers (`units.py`), W = ranks x max(1, data processes of a rank), so the
samples, crops and masks of a step depend on (seed, stream, W) alone, not on how the workers lie in ranks and processes.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from megatron.energon import BlendDataset, RepeatDataset, SavableDataset, ShuffleBufferDataset, WorkerConfig

from beit3.config import Run, config, require
from beit3.data.fingerprint import Fingerprint, file_digest, fingerprint_digest, fingerprint_folder
from beit3.data.loaders import belongs_here, share_of_counts
from beit3.data.shards import build_quietly, check_folder, open_folder
from beit3.data.units import BatchEncoder, Position, Unit, UnitMaker, Units, beginning
from beit3.errors import BadDataError, ConfigError

T_batch = TypeVar("T_batch")

CODES_FILE = "codes.json"
"""What the visual tokens of a folder of codes were made from."""


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
    """Samples of one step over all ranks; ranks x data processes of a rank must divide it."""
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


class StreamLoader(Generic[T_batch]):
    """Draws one batch of every stream for each step, for ever, and knows its exact position.

    A state can be taken up by any number of ranks that divides the number W of data workers it was saved with: each
    rank then runs W / ranks data processes, whatever `num_workers` says (0 and 1 are as asked: both are one worker).
    Of bad samples nothing but a count is left, each time the stream meets them.
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
        allow_data_change: bool = False,
        awaits_state: bool = False,
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
            allow_data_change: begin anew if a state belongs to other data, instead of refusing it.
            awaits_state: a state may follow that brings its own number of data processes; until the first batch,
                `num_workers` is held against nothing.

        Raises:
            ConfigError: names differ, a batch is not divisible, or there are more workers than samples.
            DataMissingError: a folder or shard is missing.
        """
        require(bool(streams), "a StreamLoader needs at least one stream")
        if streams.keys() != encoders.keys():
            raise ConfigError(f"streams {sorted(streams)} and encoders {sorted(encoders)} must have the same names")
        self.skipped: Counter[str] = Counter()
        """Samples left out so far on this rank, by 'stream/reason'."""
        self._streams = dict(streams)
        self._encoders = dict(encoders)
        self._data = data
        self._seed = seed
        self._rank, self._world_size, self._num_workers = rank, world_size, num_workers
        self._allow_data_change = allow_data_change
        self._drawn = 0
        self._keys: dict[str, list[str]] = {}
        self._units: dict[str, Units] = {}
        self._check_shares(1)
        self._fingerprint = fingerprint_streams(streams, data)
        if not awaits_state:
            self._begin()

    @classmethod
    def for_run(
        cls,
        streams: Mapping[str, Stream],
        encoders: Mapping[str, BatchEncoder[T_batch]],
        run: Run,
        rank: int,
        world_size: int,
    ) -> Self:
        """The loader of one rank of a run."""
        return cls(
            streams,
            encoders,
            data=run.data,
            seed=run.seed,
            rank=rank,
            world_size=world_size,
            num_workers=run.loop.num_workers,
            allow_data_change=run.allow_data_change,
            awaits_state=run.resume,
        )

    @property
    def used(self) -> int:
        """Samples that entered batches so far on this rank."""
        return self._drawn * sum(stream.batch_size for stream in self._streams.values()) // self._world_size

    @property
    def keys(self) -> list[str]:
        """Samples of the batch drawn last, as 'stream/source/key', in the order of workers."""
        return [f"{name}/{key}" for name, keys in self._keys.items() for key in keys]

    def _check_shares(self, num_workers: int) -> None:
        """Make sure that batches can be divided among the data workers."""
        total = self._world_size * max(1, num_workers)
        for name, stream in self._streams.items():
            size = stream.batch_size
            fitting = [f"{near}" for near in (size - size % total, size - size % total + total) if near]
            require(
                size % total == 0,
                f"stream '{name}': batch_size {size} is not divisible by {total} data workers ({self._world_size} "
                f"ranks x {max(1, num_workers)}): use {' or '.join(fitting)}",
            )

    def _begin(self) -> None:
        """Open all streams at their beginning."""
        self._check_shares(self._num_workers)
        self._open(self._num_workers, {name: [beginning()] * max(1, self._num_workers) for name in self._streams})
        self.skipped, self._drawn = Counter(), 0

    def _open(self, num_workers: int, positions: Mapping[str, Sequence[Position]]) -> None:
        """Open all streams where their workers stand; processes start with the first batch."""
        self.close()
        self._units = {
            name: Units(self._make(name, num_workers), num_workers, positions[name]) for name in self._streams
        }

    def _make(self, name: str, num_workers: int) -> UnitMaker:
        """Build energon's pipeline of one stream (read, repeat, blend, shuffle), and what makes units of it."""
        stream = self._streams[name]
        seed = f"{self._seed}/{name}"
        offset = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big")
        worker = WorkerConfig(rank=self._rank, world_size=self._world_size, num_workers=num_workers, seed_offset=offset)
        total = self._world_size * max(1, num_workers)
        weighted: list[tuple[SavableDataset[Any], float]] = []
        before = 0
        for source in stream.sources:
            folder = self._data / source.path
            factory = open_folder(folder, worker, source=source.path)
            part = RepeatDataset(build_quietly(factory, folder, before % total), worker_config=worker)
            weighted.append((part, source.weight))
            before += len(factory)
        require(
            before >= total,
            f"stream '{name}' has {before} samples for {total} data workers: use fewer ranks or workers",
        )
        dataset = weighted[0][0] if len(weighted) == 1 else BlendDataset(*weighted, worker_config=worker)
        dataset = ShuffleBufferDataset(dataset, size=stream.shuffle_buffer, worker_config=worker)
        return UnitMaker(dataset, self._encoders[name], stream.batch_size // total, seed)

    def __iter__(self) -> Iterator[dict[str, T_batch]]:
        """Continue after the last batch drawn: each item holds one batch of every stream.

        Raises:
            BadDataError: a stream gives no usable sample.
            BeitError: a data process died, or an encoder refused to go on.
        """
        if not self._units:
            self._begin()
        while True:
            yield self._draw()

    def _draw(self) -> dict[str, T_batch]:
        """Draw a round of units of every stream and join them."""
        drawn = {name: self._next_units(name) for name in self._streams}
        self._drawn += 1
        self._keys = {name: [key for unit in units for key in unit.keys] for name, units in drawn.items()}
        return {
            name: units[0].batch if len(units) == 1 else self._encoders[name].join([unit.batch for unit in units])
            for name, units in drawn.items()
        }

    def _next_units(self, name: str) -> list[Unit]:
        """Draw a round of units of a stream and count what was skipped for them."""
        units = self._units[name].draw()
        for unit in units:
            for reason, count in unit.skipped.items():
                self.skipped[f"{name}/{reason}"] += count
        for unit in units:
            if isinstance(unit.error, BadDataError):
                sources = ", ".join(str(self._data / source.path) for source in self._streams[name].sources)
                raise BadDataError(f"stream '{name}' gives {unit.error}; it reads {sources}")
            if unit.error is not None:
                raise unit.error
        return units

    @property
    def data_digest(self) -> str:
        """SHA-256 of what is known of the data: the same on all ranks that see the same."""
        return fingerprint_digest(self._fingerprint)

    def state_dict(self) -> dict[str, Any]:
        """Save this rank's exact position as plain dicts, lists, numbers and bytes."""
        if not self._units:
            self._begin()
        return {
            "settings": self._settings(),
            "data": self._fingerprint if self._rank == 0 else None,  # of many shards it is long
            "drawn": self._drawn,
            "skipped": dict(self.skipped),
            "workers": {name: units.positions() for name, units in self._units.items()},
        }

    def _settings(self) -> dict[str, Any]:
        """What an order depends on beside the data and the number of workers."""
        streams = self._streams.items()
        return {
            "seed": self._seed,
            "batch_size": {name: stream.batch_size for name, stream in streams},
            "shuffle_buffer": {name: stream.shuffle_buffer for name, stream in streams},
        }

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go to a saved position.

        Args:
            states: what each rank saved, in the order of ranks; there may have been more or fewer of them than now.

        Raises:
            ConfigError: the states belong to other data (which `allow_data_change` accepts), another seed or batch
                size, or to a number of data workers that these ranks cannot share.
        """
        first, allowed = states[0], self._allow_data_change
        if not belongs_here(first, self._settings(), self._fingerprint, allow_change=allowed, rank=self._rank):
            self._begin()
            return
        workers = {name: [place for state in states for place in state["workers"][name]] for name in self._streams}
        total = len(next(iter(workers.values())))
        require(
            total % self._world_size == 0,
            f"the data state holds the places of {total} data workers, which {self._world_size} ranks cannot share: "
            f"resume with {' or '.join(str(ranks) for ranks in range(1, total + 1) if total % ranks == 0)} ranks",
        )
        own = total // self._world_size
        num_workers = min(self._num_workers, 1) if own == 1 else own
        if self._rank == 0 and num_workers != self._num_workers:
            line = f"beit3: {num_workers} data processes on each of {self._world_size} ranks, not {self._num_workers}"
            print(f"{line}: the order of samples goes on with {total} data workers", file=sys.stderr)
        begin = self._rank * own
        self._open(num_workers, {name: places[begin : begin + own] for name, places in workers.items()})
        self._drawn = first["drawn"]
        self.skipped = share_of_counts(states, self._rank, self._world_size)

    def close(self) -> None:
        """End the data processes; the next draw starts new ones. Happens by itself when the loader is dropped."""
        for units in self._units.values():
            units.close()

    def __del__(self) -> None:
        if hasattr(self, "_units"):
            self.close()


def fingerprint_streams(streams: Mapping[str, Stream], data: Path) -> Fingerprint:
    """What the order of all streams is made of: their sources, and the shards of each.

    Raises:
        DataMissingError: a folder or shard is missing or cut.
    """
    found: Fingerprint = {}
    for name, stream in streams.items():
        for source in stream.sources:
            check_folder(data / source.path)
            codes = None if source.codes is None else file_digest(data / source.codes / CODES_FILE)
            found[f"{name}/{source.path}"] = {"weight": source.weight, "codes": codes}
            shards = fingerprint_folder(data / source.path).items()
            found |= {f"{name}/{source.path}/{shard}": facts for shard, facts in shards}
    return found
