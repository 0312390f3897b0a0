"""Endless shuffled batches of a map-style dataset (finetuning sets, cached features), with exact resume.

The order of an epoch is a pure function of (seed, epoch), so the state is two numbers. Random numbers drawn in
`dataset[i]` or `collate` depend only on (seed, rank, epoch, position), whatever the number of workers.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Dataset

from beit3.config import require
from beit3.data.randomness import seeded
from beit3.errors import BadSampleError, ConfigError

T_row_co = TypeVar("T_row_co", covariant=True)
T_row = TypeVar("T_row")
T_batch = TypeVar("T_batch")


class Table(Protocol[T_row_co]):
    """Anything with a length and rows by number; a row that raises `BadSampleError` is replaced by the next one."""

    def __len__(self) -> int:
        """Count the rows."""

    def __getitem__(self, index: int) -> T_row_co:
        """Load a row."""


class _Batches(Dataset[Any], Generic[T_row, T_batch]):
    """Makes batch number `position` of an epoch; this is what worker processes hold."""

    def __init__(self, loader: TableLoader[T_row, T_batch]) -> None:
        self.table, self.collate = loader.table, loader.collate
        self.seed = f"{loader.seed}/{loader.rank}"

    def __getitem__(self, work: tuple[int, int, list[int]]) -> tuple[T_batch, dict[str, int]]:
        """Load and join the rows of one batch."""
        epoch, position, rows = work
        skipped: Counter[str] = Counter()
        with seeded(f"{self.seed}/{epoch}/{position}"):
            return self.collate([self._load(row, skipped) for row in rows]), dict(skipped)

    def _load(self, row: int, skipped: Counter[str]) -> T_row:
        """Load a row, or the next one that can be used."""
        for step in range(len(self.table)):
            try:
                return self.table[(row + step) % len(self.table)]
            except BadSampleError as error:
                skipped[error.reason] += 1
        raise ConfigError(f"no row of {len(self.table)} can be used: {dict(skipped)}")


class TableLoader(Generic[T_row, T_batch]):
    """Draws batches of a `Table` for ever; the last rows of an epoch that fill no batch are dropped."""

    def __init__(
        self,
        table: Table[T_row],
        batch_size: int,
        collate: Callable[[list[T_row]], T_batch],
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        """Check the sizes.

        Args:
            table: the dataset; `table[i]` may draw random numbers.
            batch_size: rows of one step over all ranks.
            collate: joins the rows of this rank.
            seed: decides order and augmentation.
            rank: this process among `world_size`.
            world_size: processes that share each batch.
            num_workers: data processes of this rank.

        Raises:
            ConfigError: the batch is not divisible by the ranks or larger than the table.
        """
        require(batch_size % world_size == 0, f"batch_size {batch_size} is not divisible by {world_size} ranks")
        require(1 <= batch_size <= len(table), f"batch_size must lie in 1..{len(table)} (the rows), not {batch_size}")
        self.table, self.collate = table, collate
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.num_workers = num_workers
        self.skipped: Counter[str] = Counter()
        """Rows left out so far on this rank, by reason."""
        self._epoch = self._position = 0

    def __len__(self) -> int:
        """Count the batches of one epoch."""
        return len(self.table) // self.batch_size

    def _work(self) -> Iterator[tuple[int, int, list[int]]]:
        """List what every batch from the present position on is made of."""
        epoch, position = self._epoch, self._position
        size = self.batch_size // self.world_size
        while True:
            digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
            order = np.random.default_rng(list(digest)).permutation(len(self.table))
            for place in range(position, len(self)):
                start = place * self.batch_size + self.rank * size
                yield epoch, place, order[start : start + size].tolist()
            epoch, position = epoch + 1, 0

    def __iter__(self) -> Iterator[T_batch]:
        """Continue after the last batch drawn."""
        batches: Any = _Batches(self)
        if self.num_workers:
            batches = iter(DataLoader(batches, batch_size=None, sampler=self._work(), num_workers=self.num_workers))
        else:
            batches = map(batches.__getitem__, self._work())
        for batch, skipped in batches:
            self.skipped.update(skipped)
            self._position += 1
            if self._position == len(self):
                self._epoch, self._position = self._epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Save the position."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "layout": self._layout(),
            "skipped": dict(self.skipped),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; draw from a new iterator afterwards.

        Raises:
            ConfigError: the state belongs to another table, seed, batch size or world size.
        """
        own = self._layout()
        require(state["layout"] == own, f"the data state was saved with {state['layout']}, this run has {own}")
        self._epoch, self._position = state["epoch"], state["position"]
        self.skipped = Counter(state["skipped"])

    def _layout(self) -> dict[str, int]:
        """Name what the order depends on."""
        return {
            "rows": len(self.table),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "rank": self.rank,
            "world_size": self.world_size,
        }
