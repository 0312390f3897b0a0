"""What every Task over index files shares: endless shuffled batches to train on, held-out examples in order."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch

from beit3.config import Run, TaskConfig, config, require
from beit3.data.example_loader import ExampleLoader, Examples, evaluation_batches
from beit3.data.fingerprint import Fingerprint, fingerprint_files
from beit3.data.index_files import Index
from beit3.train.task import Loader, Task

logger = logging.getLogger(__name__)


@config
class IndexConfig(TaskConfig):
    """Which index files, and how many examples at a time."""

    train: str = "train.jsonl"
    """Index file, relative to the run's data folder; several are separated by commas."""
    eval: str | None = None
    """Index file to evaluate on."""
    batch_size: int = 64
    """Examples of one batch of all ranks."""
    eval_batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_batch_size"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")


class Movable(Protocol):
    """A batch that can be copied to a device."""

    def to(self, device: torch.device) -> Self:
        """Copy the tensors to a device."""


T = TypeVar("T")
B = TypeVar("B", bound=Movable)
B_co = TypeVar("B_co", covariant=True)


class BatchedExamples(Examples[T], Protocol[T, B_co]):
    """Examples that know how they lie side by side. Data processes hold them, so no model is within."""

    index: Index[Any]
    """The rows that they are made of."""

    def collate(self, examples: list[T]) -> B_co:
        """Make a batch."""


class _HeldOut:
    """What a run evaluates on. The moving average of a Task is a copy of the Task, and shares it."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.examples: BatchedExamples[Any, Any] | None = None

    def __deepcopy__(self, memo: object) -> Self:
        return self


class IndexTask(Task[B], ABC):
    """A Task whose examples index files name."""

    config: Any
    """An `IndexConfig`."""

    def __init__(self) -> None:
        super().__init__()
        self._held_out = _HeldOut()

    @abstractmethod
    def examples(self, paths: Sequence[Path], *, training: bool) -> BatchedExamples[Any, B]:
        """What index files name, with the view of training or of evaluation."""

    def train_loader(self, run: Run, rank: int, world_size: int) -> Loader[B]:
        """Endless batches in a new order each epoch."""
        paths = [run.data / name for name in self.config.train.split(",")]
        examples = self.examples(paths, training=True)
        loader = self.loader_of(examples, examples.collate, run, rank, world_size, fingerprint_files(paths))
        if rank == 0 and self.config.eval is not None:
            held_out = run.data / self.config.eval
            if held_out.resolve() in (path.resolve() for path in paths):
                logger.warning("%s is trained on and evaluated on: metrics will not tell of unseen examples", held_out)
        return loader

    def loader_of(
        self,
        examples: Examples[T],
        collate: Callable[[list[T]], B],
        run: Run,
        rank: int,
        world_size: int,
        data: Fingerprint | None = None,
    ) -> Loader[B]:
        """Endless batches of examples, which are made of some files, in a new order each epoch.

        Rank 0 reads what it will evaluate on as well: whatever is wrong there is said now, not after the training.
        """
        if rank == 0 and self.config.eval is not None:
            self._examples_to_evaluate(run.data / self.config.eval)
        return ExampleLoader.for_run(
            examples, collate, run, rank, world_size, batch_size=self.config.batch_size, data=data
        )

    def eval_loader(self, run: Run) -> Iterable[B] | None:
        """Held-out examples in order; their index is read once."""
        if self.config.eval is None:
            return None
        examples = self._examples_to_evaluate(run.data / self.config.eval)
        return evaluation_batches(
            examples,
            examples.collate,
            batch_size=self.config.eval_batch_size,
            num_workers=run.loop.num_workers,
        )

    def left_out(self) -> dict[str, float]:
        """Share of the rows that `eval_loader` left out, by reason; empty before it was asked."""
        return {} if self._held_out.examples is None else self._held_out.examples.index.left_out()

    def move(self, batch: B, device: torch.device) -> B:
        """Copy a batch to the device."""
        return batch.to(device)

    def _examples_to_evaluate(self, path: Path) -> BatchedExamples[Any, B]:
        """Examples of an index file, which is read once."""
        held_out = self._held_out
        if held_out.examples is None or held_out.path != path:
            held_out.path, held_out.examples = path, self.examples([path], training=False)
        return held_out.examples
