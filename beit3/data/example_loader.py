"""Batches of map-style examples: endless and shuffled with exact resume for training, once and in order for evaluation.

A training batch is a pure function of (seed, rank, number of the batch): the order of an epoch follows from (seed,
epoch), and whatever `load` draws from the generators of torch, numpy and python follows from (seed, epoch, index). So
the state is a number, data processes may run ahead of it, and how many there are changes nothing.

How many ranks there are changes neither which examples the batch of a step is made of, nor the view of each. It changes
what stands in for an example that cannot be used (the next good one of the rank's share) and what `collate` draws, such
as the pairs that mixup mixes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from beit3.config import Run, require
from beit3.data.data_processes import next_item, start_processes
from beit3.data.fingerprint import Fingerprint, fingerprint_digest
from beit3.data.loaders import MAX_BAD_IN_A_ROW, belongs_here, share_of_counts, told
from beit3.data.randomness import seeded
from beit3.errors import BadSampleError, BeitError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
B = TypeVar("B")


class Examples(Protocol[T_co]):
    """A fixed number of examples. Data processes get a copy, so it should be small or hold its rows in arrays."""

    def __len__(self) -> int:
        """Count them."""

    def load(self, index: int) -> T_co:
        """Read and prepare example `index`; may draw random numbers; `BadSampleError` says why it cannot be used."""


class _Drawn(NamedTuple):
    """What a data process sends: a batch, or the error that ends the run (a raised one would arrive as a page)."""

    batch: Any
    indices: list[int]
    skipped: dict[str, int]
    error: BeitError | None


class ExampleLoader(Generic[T, B]):
    """Draws batches for ever. What fills no batch at the end of an epoch is left out of that epoch.

    The ranks take turns in the order of an epoch, so their shares are disjoint and equally long, and together they see
    the same batch whatever their number. An example that cannot be used is counted under its reason, once in each epoch
    that reaches it, and the next good one of the rank's share stands in for it, with a view of its own.
    """

    def __init__(
        self,
        examples: Examples[T],
        collate: Callable[[list[T]], B],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        data: Fingerprint | None = None,
        allow_data_change: bool = False,
    ) -> None:
        """Check the sizes; nothing is loaded yet.

        Args:
            examples: what is drawn.
            collate: joins the examples of one batch of this rank; may draw random numbers.
            batch_size: examples of one step over all ranks.
            seed: decides order and augmentation.
            rank: this process among `world_size`.
            world_size: processes that share each batch.
            num_workers: data processes of this rank; 0 loads in this process.
            data: what the examples are made of; a saved position holds for nothing else.
            allow_data_change: begin anew if a state belongs to other data, instead of refusing it.

        Raises:
            ConfigError: the batch is not divisible by the ranks, or larger than the data.
        """
        size = _size_of_rank(batch_size, world_size)
        require(batch_size <= len(examples), f"batch_size {batch_size} is larger than the data ({len(examples)} rows)")
        self.skipped: Counter[str] = Counter()
        """Examples left out so far on this rank, by reason."""
        self._batches = _TrainingBatches(examples, collate, size, seed, rank, world_size)
        self._num_workers = num_workers
        self._data: Fingerprint = {**(data or {}), "the whole": {"examples": len(examples)}}
        self._allow_data_change = allow_data_change
        self._settings = {"batch_size": batch_size, "seed": seed}
        self._rank, self._world_size = rank, world_size
        self._drawn = 0
        self._indices: list[int] = []
        self._prefetched: Iterator[_Drawn] | None = None

    @classmethod
    def for_run(
        cls,
        examples: Examples[T],
        collate: Callable[[list[T]], B],
        run: Run,
        rank: int,
        world_size: int,
        *,
        batch_size: int,
        data: Fingerprint | None = None,
    ) -> Self:
        """The loader of one rank of a run."""
        return cls(
            examples,
            collate,
            batch_size=batch_size,
            seed=run.seed,
            rank=rank,
            world_size=world_size,
            num_workers=run.loop.num_workers,
            data=data,
            allow_data_change=run.allow_data_change,
        )

    def __len__(self) -> int:
        """Count the batches of one epoch."""
        return len(self._batches)

    @property
    def used(self) -> int:
        """Examples that entered batches so far on this rank."""
        return self._drawn * self._batches.size

    @property
    def keys(self) -> list[str]:
        """Numbers of the examples of the batch drawn last."""
        return [str(index) for index in self._indices]

    def __iter__(self) -> Iterator[B]:
        """Continue after the last batch drawn, for ever.

        Raises:
            BeitError: no example of the share can be used.
        """
        while True:
            yield self._next()

    def _next(self) -> B:
        """Draw one batch; an error leaves the position where it was."""
        if self._prefetched is None:
            self._prefetched = _make(self._batches, itertools.count(self._drawn), self._num_workers)
        try:
            drawn = next(self._prefetched)
            if drawn.error is not None:
                raise drawn.error
        except BaseException:
            self.close()
            raise
        self.skipped.update(drawn.skipped)
        self._drawn += 1
        self._indices = drawn.indices
        batch: B = drawn.batch
        return batch

    @property
    def data_digest(self) -> str:
        """SHA-256 of what is known of the data: the same on all ranks that see the same."""
        return fingerprint_digest(self._data)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch drawn, whatever data processes have prepared beyond it."""
        epoch, batches = divmod(self._drawn, len(self))
        return {
            "epoch": epoch,
            "batches": batches,
            "skipped": dict(self.skipped),
            "settings": dict(self._settings),
            "data": self._data,
        }

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go to a saved position; the numbers of ranks and of data processes may differ.

        Args:
            states: what each rank saved, in the order of ranks.

        Raises:
            ConfigError: the states belong to other data (which `allow_data_change` accepts), or to another batch size
                or seed.
        """
        state, allowed = states[0], self._allow_data_change
        if belongs_here(state, self._settings, self._data, allow_change=allowed, rank=self._rank):
            self._drawn = state["epoch"] * len(self) + state["batches"]
            self.skipped = share_of_counts(states, self._rank, self._world_size)
        else:
            self._drawn, self.skipped = 0, Counter()
        self.close()

    def close(self) -> None:
        """End the data processes; the next draw starts new ones. Happens by itself when the loader is dropped."""
        self._prefetched = None


class _TrainingBatches(Generic[T, B]):
    """Makes batch number `n` of one rank; this is what data processes hold."""

    def __init__(
        self, examples: Examples[T], collate: Callable[[list[T]], B], size: int, seed: int, rank: int, world_size: int
    ) -> None:
        self.examples, self.collate = examples, collate
        self.size, self.seed, self.rank, self.world_size = size, seed, rank, world_size
        self._share: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self.examples) // (self.size * self.world_size)

    def __getitem__(self, number: int) -> _Drawn:
        """Load and join the examples of one batch."""
        epoch, position = divmod(number, len(self))
        share = self.share(epoch)
        start, end = position * self.size, (position + 1) * self.size
        skipped: Counter[str] = Counter()
        try:
            loaded = self._load(epoch, share[start:end].tolist(), (share[end:], share[:start]), skipped)
            indices, examples = map(list, zip(*loaded, strict=True))
            with seeded(f"{self.seed}/{epoch}/batch {position}/{self.rank}"):
                return _Drawn(self.collate(examples), indices, dict(skipped), None)
        except BeitError as error:
            return _Drawn(None, [], {}, error)

    def share(self, epoch: int) -> NDArray[np.int64]:
        """Shuffle the examples and take those of this rank; kept for the batches that follow."""
        if self._share is None or self._share[0] != epoch:
            digest = hashlib.sha256(f"order {self.seed}/{epoch}".encode()).digest()
            order = np.random.default_rng(int.from_bytes(digest, "big")).permutation(len(self.examples))
            length = len(order) // self.world_size
            self._share = epoch, order[self.rank :: self.world_size][:length].copy()
        return self._share[1]

    def _load(
        self, epoch: int, own: list[int], others: tuple[NDArray[np.int64], ...], skipped: Counter[str]
    ) -> list[tuple[int, T]]:
        """Load a batch's own examples, then one of the others of the share for each that cannot be used."""
        loaded: dict[int, tuple[int, T]] = {}
        detail = ""
        for index in own:
            try:
                with seeded(f"{self.seed}/{epoch}/{index}"):
                    loaded[index] = index, self.examples.load(index)
            except BadSampleError as error:
                skipped[error.reason] += 1
                detail = str(error)
        # Not one of this batch as long as there are others: a contrastive loss would take it for a negative.
        spares = map(int, itertools.chain(*others, itertools.cycle(list(loaded))))
        bad_in_a_row = 0
        for index in own:
            while index not in loaded:
                spare = next(spares, None)
                if spare is None or bad_in_a_row >= MAX_BAD_IN_A_ROW:
                    raise BeitError(
                        f"no example can be used to fill a batch ({told(skipped)}): the last was '{detail}'"
                    )
                try:
                    with seeded(f"{self.seed}/{epoch}/{index}/{spare}"):
                        loaded[index] = spare, self.examples.load(spare)
                    bad_in_a_row = 0
                except BadSampleError as error:
                    bad_in_a_row += 1
                    detail = str(error)
        return [loaded[index] for index in own]


def evaluation_batches(
    examples: Examples[T],
    collate: Callable[[list[T]], B],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> EvaluationBatches[T, B]:
    """Every example exactly once over all ranks, in order; the same batches whenever they are iterated over.

    An example that cannot be used raises: a metric over what is left would be another metric. The ranks take turns, so
    rank r has examples r, r + world_size, ...; the last batch is shorter, and ranks may differ by one example and by
    one batch, so sums over ranks belong after the loop.

    Args:
        examples: what is evaluated.
        collate: joins the examples of one batch of this rank.
        batch_size: examples of one batch over all ranks.
        rank: this process among `world_size`.
        world_size: processes that share the examples.
        num_workers: data processes of this rank, started by each iteration and ended with it.

    Raises:
        ConfigError: the batch is not divisible by the ranks.
        BeitError: (while iterating) an example cannot be used.
    """
    own = range(rank, len(examples), world_size)
    return EvaluationBatches(examples, collate, _size_of_rank(batch_size, world_size), own, num_workers)


class EvaluationBatches(Generic[T, B]):
    """The batches of one rank, by number for data processes and as an iterable for everyone else."""

    def __init__(
        self, examples: Examples[T], collate: Callable[[list[T]], B], size: int, own: range, num_workers: int
    ) -> None:
        self.examples, self.collate, self.size, self.own, self.num_workers = examples, collate, size, own, num_workers

    def __len__(self) -> int:
        return -(-len(self.own) // self.size)

    def __getitem__(self, number: int) -> _Drawn:
        """Load and join the examples of one batch."""
        loaded = []
        indices = self.own[number * self.size : (number + 1) * self.size]
        try:
            for index in indices:
                try:
                    with seeded(f"evaluation/{index}"):
                        loaded.append(self.examples.load(index))
                except BadSampleError as error:
                    raise BeitError(
                        f"example {index} cannot be evaluated ({error}): mend it, or take its row out of the index"
                    ) from error
            with seeded(f"evaluation/batch {number}"):
                return _Drawn(self.collate(loaded), list(indices), {}, None)
        except BeitError as error:
            return _Drawn(None, [], {}, error)

    def __iter__(self) -> Iterator[B]:
        return self.only(range(len(self)))

    def only(self, numbers: Sequence[int]) -> Iterator[B]:
        """Some of the batches by number, such as those that an interrupted evaluation has not seen."""
        for drawn in _make(self, numbers, self.num_workers):
            if drawn.error is not None:
                raise drawn.error
            yield drawn.batch


def _size_of_rank(batch_size: int, world_size: int) -> int:
    """Divide a batch among the ranks."""
    require(batch_size >= 1, f"batch_size must be at least 1, not {batch_size}")
    require(batch_size % world_size == 0, f"batch_size {batch_size} is not divisible by {world_size} ranks")
    return batch_size // world_size


def _make(batches: Any, numbers: Iterable[int], num_workers: int) -> Iterator[_Drawn]:
    """Make batches by number, in order, here or in data processes that run ahead."""
    made = start_processes(batches, num_workers, numbers=numbers)
    with contextlib.suppress(StopIteration):
        while True:
            yield next_item(made)
