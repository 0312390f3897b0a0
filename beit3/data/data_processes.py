"""Data processes: torch's, started alike by all loaders, and one clear line when one of them dies."""

from __future__ import annotations

import gc
import signal
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.utils.data import DataLoader

from beit3.errors import BeitError

_STOP_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
"""Asks to end, which often reach all processes of a run at once."""


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
            made: Any = iter(loader)
    if num_workers:
        weakref.finalize(made, _kill, list(made._workers))  # at the end of the program as well
    return made


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
    """Keep torch from raising wherever the training process happens to be when a data process dies.

    Asks to end wait until the new processes have settled: they inherit the mask.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGCHLD, before)


def _settle(worker: int) -> None:
    """Prepare a new data process.

    Asks to end are for the training process: it finishes its step, saves, and ends its data processes itself.
    """
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    gc.freeze()  # it must not collect what it was forked with: freeing tensors of a GPU there is an error
    warnings.filterwarnings("ignore", module="PIL")  # odd pictures are counted or harmless


def end_processes(made: Any) -> None:
    """End the data processes of an iterator of `start_processes` now; left to python, each is waited for 5 seconds."""
    processes = list(getattr(made, "_workers", []))
    if processes:
        made._shutdown_workers()
    _kill(processes)


def _kill(processes: list[Any]) -> None:
    """End data processes that do not end by themselves, such as one that waits for what another held that died."""
    with suppress(ValueError):  # closed already, and so are the others
        for process in processes:
            process.kill()
        for process in processes:
            process.join(timeout=1)


def _unchanged(item: Any) -> Any:
    return item
