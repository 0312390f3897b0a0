"""What a run keeps an eye on: signals, numbers that are not finite, losses that jump, samples that cannot be used."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3.errors import BadDataError

BAD_STEPS = "bad_steps"
"""Folder within a run's, of the samples of steps that were not finite."""
_MEMORY = 0.9
"""Share of the running mean and deviation that a new record leaves."""
_PATIENCE = 10
"""Records before the first alarm."""
_JUMP = 6.0
"""Deviations above the mean that are called a spike."""
_ENOUGH = 1000
"""Samples before their quality is judged."""


@dataclass
class LossWatch:
    """Running mean and mean absolute deviation of the loss of log records; part of every checkpoint."""

    records: int = 0
    mean: float = 0.0
    deviation: float = 0.0

    def spike(self, loss: float) -> str | None:
        """Take in a record; the text of an alarm if its loss jumps above what went before."""
        if not math.isfinite(loss):
            return None  # told elsewhere
        limit = self.mean + _JUMP * max(self.deviation, 1e-3 * abs(self.mean))
        jumped = self.records >= _PATIENCE and loss > limit
        text = f"the loss jumped to {loss:.4g}, from {self.mean:.4g} on average" if jumped else None
        taken = min(loss, limit) if jumped else loss  # a spike should not hide the next one
        keep = min(_MEMORY, self.records / (self.records + 1))
        self.deviation = keep * self.deviation + (1 - keep) * (abs(taken - self.mean) if self.records else 0.0)
        self.mean = keep * self.mean + (1 - keep) * taken
        self.records += 1
        return text


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM, SIGUSR1 (what batch systems send ahead) and the first SIGINT, so that the loop stops at a step
    boundary with its state saved."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        """Remember a signal; a second SIGINT ends at once."""
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    except ValueError:  # not in the main thread: signals stay as they are
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def record_bad_step(
    folder: Path, step: int, rank: int, losses: Sequence[float], norm: float, keys: Sequence[str]
) -> None:
    """Write down which samples a step that is not finite was made of, on this rank.

    Args:
        folder: the run's.
        step: its number.
        rank: of this process.
        losses: of its batches, here.
        norm: of the gradient, over all ranks.
        keys: names of the samples of its batches, here.
    """
    path = folder / BAD_STEPS / f"step-{step:08d}-rank-{rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"step": step, "rank": rank, "losses": [str(loss) for loss in losses], "gradient_norm": str(norm)}
    path.write_text(json.dumps({**values, "samples": list(keys)}, indent=1) + "\n")


def check_budget(skipped: Counter[str], used: int, limit: float) -> None:
    """End a run whose data are worse than it tolerates.

    Args:
        skipped: samples left out, by reason, of all ranks.
        used: samples that entered batches, of all ranks.
        limit: largest share of the first.

    Raises:
        BadDataError: the share is larger, of at least a thousand samples.
    """
    bad = skipped.total()
    if bad + used >= _ENOUGH and bad > limit * (bad + used):
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common(5))
        raise BadDataError(
            f"{bad} of {bad + used} samples could not be used ({reasons}), more than loop.max_bad_fraction "
            f"({limit:g}): mend the data, or raise it"
        )


def shapes_of(batch: Any) -> str:
    """The tensors of a batch in words: `images (64, 3, 224, 224) uint8, ...`."""
    return ", ".join(f"{where or 'batch'} {tuple(t.shape)} {str(t.dtype)[6:]}" for where, t in _tensors(batch))


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    parts: Mapping[Any, Any] = {}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, Mapping):
        parts = value
    elif isinstance(value, (list, tuple)):
        parts = dict(enumerate(value))
    for part, inner in parts.items():
        yield from _tensors(inner, f"{name}.{part}" if name else str(part))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))
