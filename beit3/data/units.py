"""Units: what each data worker makes of a stream, one after the other, in a data process or here.

A stream is divided among W workers, whatever process they are in: worker g reads its own share of every source, and its
unit n is a pure function of (seed, stream, W, g, n). A rank's batch is the joined units of its workers, in order.

A worker's position is its last snapshot (energon's state, plain) and the units made since, which are made again when
the position is taken up. Data processes send a snapshot every so many units, so no process is ever asked for one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypedDict, TypeVar

from megatron.energon import SavableDataset
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.state import FlexState
from torch.utils.data import IterableDataset

from beit3.data.data_processes import end_processes, next_item, start_processes
from beit3.data.loaders import MAX_BAD_IN_A_ROW, told
from beit3.data.randomness import seeded
from beit3.data.shards import Sample, to_sample
from beit3.errors import BadDataError, BadSampleError, BeitError

T_batch = TypeVar("T_batch")

_SNAPSHOT_EVERY = 16
"""Units between two snapshots: counted, not timed, so that equal runs save equal states."""
_STATES: dict[str, Any] = {SliceState.__name__: SliceState}
_KIND = "__kind__"


class BatchEncoder(Protocol[T_batch]):
    """Turns samples as stored into batches of a Task, whatever lies between them."""

    def encode(self, sample: Sample) -> Any:
        """Prepare one sample (decode, crop, tokenize, mask); `BadSampleError` counts and skips it."""

    def collate(self, samples: list[Any]) -> T_batch:
        """Make a unit of encoded samples. Like `encode` it may draw random numbers."""

    def join(self, units: list[T_batch]) -> T_batch:
        """Join units into a batch: what `collate` would make of their samples, up to their order."""


class Position(TypedDict):
    """Where a worker stands; plain data."""

    snapshot: Any
    """State of the dataset; None at the beginning."""
    units: int
    """Units made before the snapshot."""
    since: int
    """Units made after it."""


class Unit(NamedTuple):
    """What a worker sends."""

    batch: Any
    keys: list[str]
    """Names of its samples: source/key."""
    skipped: dict[str, int]
    """Samples left out on the way, by reason."""
    error: BeitError | None = None
    """Ends the stream (a raised one would arrive from a process as a page)."""
    snapshot: Any = None
    """State of the dataset after it, now and then."""


def beginning() -> Position:
    """Where a worker starts."""
    return {"snapshot": None, "units": 0, "since": 0}


class UnitMaker(IterableDataset[Unit]):
    """Makes the units of the worker whose process it is in, for ever or until the stream is given up.

    Args:
        dataset: endless raw samples of each worker of this rank.
        encoder: turns them into units.
        size: samples of a unit.
        seed: decides augmentation and masks.
    """

    def __init__(self, dataset: SavableDataset[Any], encoder: BatchEncoder[Any], size: int, seed: str) -> None:
        self._dataset = dataset
        self._encoder = encoder
        self._size = size
        self._seed = seed
        self.positions: list[Position] = []
        """Where each worker of this rank starts."""

    def snapshot(self) -> Any:
        """State of the dataset after the last unit."""
        return plain_state(self._dataset.save_state())

    def __iter__(self) -> Iterator[Unit]:
        worker = self._dataset.worker_config
        number_here = worker.rank_worker_id()
        position = self.positions[number_here].copy()
        name = f"{self._seed}/{worker.rank * max(1, worker.num_workers) + number_here}"
        if position["snapshot"] is not None:
            self._dataset.restore_state(energon_state(position["snapshot"]))
        raws: Iterator[Any] = iter(self._dataset)
        for number in itertools.count(position["units"]):
            worker.worker_activate(number)  # energon's datasets ask for it
            try:
                with seeded(f"{name}/{number}"):
                    unit = self._make(raws)
            finally:
                worker.worker_deactivate()
            if number < position["units"] + position["since"]:
                continue  # drawn before the position was saved
            if worker.num_workers and (number + 1) % _SNAPSHOT_EVERY == 0:
                unit = unit._replace(snapshot=self.snapshot())
            yield unit

    def _make(self, raws: Iterator[Any]) -> Unit:
        """Encode samples until a unit is full."""
        samples: list[Any] = []
        keys: list[str] = []
        skipped: Counter[str] = Counter()
        bad_in_a_row = 0
        patience = min(MAX_BAD_IN_A_ROW, max(100, 4 * self._dataset.len_worker()))
        try:
            while len(samples) < self._size:
                try:
                    sample = to_sample(next(raws))
                    samples.append(self._encoder.encode(sample))
                    keys.append(f"{sample.source}/{sample.key}")
                    bad_in_a_row = 0
                except BadSampleError as error:
                    skipped[error.reason] += 1
                    bad_in_a_row += 1
                    if bad_in_a_row >= patience:
                        raise BadDataError(f"no usable sample ({told(skipped)}): the last was '{error}'") from error
            return Unit(self._encoder.collate(samples), keys, dict(skipped))
        except BeitError as error:
            return Unit(None, [], dict(skipped), error)


class Units:
    """The units of one rank's workers, a round of them at a time, and where the workers stand.

    Args:
        maker: makes them.
        num_workers: data processes; 0: one worker, in this process.
        positions: where each worker starts.
    """

    def __init__(self, maker: UnitMaker, num_workers: int, positions: Sequence[Position]) -> None:
        self._maker = maker
        self._num_workers = num_workers
        self._positions = [position.copy() for position in positions]
        self._iterator: Any = None

    def draw(self) -> list[Unit]:
        """The next unit of every worker.

        Raises:
            BeitError: a data process died.
        """
        if self._iterator is None:
            self._iterator = self._start()
        units: list[Unit] = [next_item(self._iterator) for _ in self._positions]
        for position, unit in zip(self._positions, units, strict=True):
            position["since"] += 1
            if unit.snapshot is not None:
                position["units"] += position["since"]
                position["snapshot"], position["since"] = unit.snapshot, 0
        return units

    def _start(self) -> Iterator[Unit]:
        """Go on where the workers stand. Data processes are forked: encoders hold what cannot be sent."""
        self._maker.positions = [position.copy() for position in self._positions]
        if not self._num_workers:
            return iter(self._maker)
        made: Iterator[Unit] = start_processes(self._maker, self._num_workers, fork=True)
        return made

    def positions(self) -> list[Position]:
        """Where the workers stand after the last round drawn, whatever data processes have prepared beyond it."""
        if not self._num_workers and self._iterator is not None:
            (position,) = self._positions
            position["units"] += position["since"]
            position["snapshot"], position["since"] = self._maker.snapshot(), 0
        return [position.copy() for position in self._positions]

    def close(self) -> None:
        """End the data processes; the next draw starts new ones."""
        if self._num_workers and self._iterator is not None:
            end_processes(self._iterator)
            self._iterator = None


def plain_state(state: Any) -> Any:
    """Write the state of energon's dataset as dicts, lists, numbers and bytes, so that any checkpoint can hold it."""
    if dataclasses.is_dataclass(state):
        values = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        return {_KIND: type(state).__name__, **{name: plain_state(value) for name, value in values.items()}}
    if isinstance(state, dict):
        return {name: plain_state(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(plain_state(value) for value in state)
    return state


def energon_state(state: Any) -> Any:
    """Rebuild energon's state objects from the result of `plain_state`; shares nothing with it."""
    if isinstance(state, dict):
        values = {name: energon_state(value) for name, value in state.items() if name != _KIND}
        return _STATES[state[_KIND]](**values) if _KIND in state else FlexState(values)
    if isinstance(state, (list, tuple)):
        return type(state)(energon_state(value) for value in state)
    return state
