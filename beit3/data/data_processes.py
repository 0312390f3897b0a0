"""Data processes: torch's, started alike by all loaders, and one clear line when one of them dies."""

from __future__ import annotations

import gc
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from beit3.errors import BeitError


def start_processes(dataset: Any, num_workers: int, *, numbers: Iterable[int] | None = None, fork: bool = False) -> Any:
    """Let data processes run ahead of a dataset, in turn; what they make arrives unchanged and in order.

    Args:
        dataset: an iterable that divides itself, or items by number.
        num_workers: data processes; 0: this one.
        numbers: of the items to make.
        fork: whether the dataset holds what cannot be sent to a new process.

    Returns:
        torch's iterator, which ends its processes when it is dropped.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about more processes than CPU cores: so many are asked for
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=None,
            sampler=numbers,
            num_workers=num_workers,
            collate_fn=_unchanged,
            worker_init_fn=_settle,
            multiprocessing_context="fork" if fork and num_workers else None,
            generator=torch.Generator(),  # a seed is drawn for the processes: not from the one that decides drop path
        )
        with _own_signals():
            return iter(loader)


def next_item(made: Iterator[Any]) -> Any:
    """The next item of an iterator of `start_processes`; that a process died is noticed within five seconds.

    Raises:
        StopIteration: there are no more.
        BeitError: a data process died.
    """
    try:
        return next(made)
    except (RuntimeError, OSError, EOFError) as error:
        if not hasattr(made, "_workers") or not _tells_of_a_death(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BeitError(f"a data process ended unexpectedly ({reason}): resume the run") from error


def _tells_of_a_death(error: Exception) -> bool:
    """Tell a process that is gone from an error that one of them sent."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    return not str(error).startswith("Caught ")  # what it had sent could not be fetched from it any more


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep torch from raising wherever the training process happens to be when a data process dies."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


def _settle(worker: int) -> None:
    """Prepare a new data process."""
    gc.freeze()  # it must not collect what it was forked with: freeing tensors of a GPU there is an error
    warnings.filterwarnings("ignore", module="PIL")  # odd pictures are counted or harmless


def _unchanged(item: Any) -> Any:
    return item
