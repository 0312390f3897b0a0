"""Training state on disk: written beside training, committed by renaming, verified before it is trusted.

A checkpoint is a folder `step-<digits>` whose manifest (`manifest.py`) names every file. Its files are those of
torch.distributed.checkpoint (DCP), which load into any number of ranks, and one `rank-N.pt` of plain data per rank that
saved. Writing happens in `step-N.tmp-<id>`; a kill at any moment leaves the older checkpoints as they were. These files
are for the run that wrote them: DCP unpickles its index, so never resume from a stranger's (the exchange folder is the
format to pass on).
"""

from __future__ import annotations

import functools
import logging
import os
import pickle
import re
import shutil
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from beit3.errors import BeitError, ConfigError
from beit3.train.distributed import Ranks
from beit3.train.manifest import MANIFEST, VERSIONS, damaged_files, describe_file, digest, read_manifest, serialise
from beit3.train.pulse import THREADS
from beit3.train.randomness import random_state, set_random_state

T = TypeVar("T")

LATEST = "latest"
"""File beside the checkpoints with the name of the one committed last: for people and scripts, never read here."""
_NAME = re.compile(r"step-([0-9]+)")
_DAMAGED = ".damaged-"
"""Marks what was found damaged."""
_BESIDE = ".tmp-"
"""Marks what is written or deleted: such a folder is never listed as a checkpoint."""
logger = logging.getLogger(__name__)

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # DCP's, at every save of a lone process


class CheckpointError(BeitError):
    """Something failed on one of the ranks while a checkpoint was written or searched; all ranks raise it."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Which committed checkpoints stay."""

    last: int
    """This many newest."""
    every: int = 0
    """Those of multiples of this step, for ever; 0: none."""
    best: tuple[int, ...] = ()
    """Steps of ever better evaluations: the last of these that is there."""

    def chosen(self, steps: list[int]) -> set[int]:
        """The steps that stay, out of those there are, oldest first."""
        kept = set(steps[-self.last :])
        kept |= set([step for step in self.best if step in steps][-1:])
        return kept | {step for step in steps if self.every and step % self.every == 0}


class Checkpoints:
    """All checkpoints of one run.

    A save copies the state to host memory, the only moment training waits for; a thread then writes and commits it. The
    memory stays in use for the next save. A process that ends does not wait for the thread: without `finish`, a save
    under way may be lost, and the older checkpoints stay as they were. All ranks call `save`, `newest` and `restore` in
    the same order.

    Args:
        folder: holds the `step-N` folders; storage that all ranks see.
        ranks: all save and restore together.
        run_hash: digest of what decides the run's result; written into manifests.
    """

    def __init__(self, folder: Path, ranks: Ranks, run_hash: str = "") -> None:
        self.folder = folder
        self.ranks = ranks
        self.run_hash = run_hash
        self.seconds_blocked = 0.0
        """Seconds that training waited in `save`, altogether."""
        on_cuda = ranks.device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_cuda,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=on_cuda,
            )
        )
        self.damaged: list[str] = []
        """What `newest` passed over, a line each."""
        self._thread: threading.Thread | None = None
        self._saved: int | None = None
        """Step of the newest checkpoint known to be committed."""
        self._failures: list[str] = []
        self._lost: BaseException | None = None
        """What the thread ended with, such as the loss of another rank."""

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, extra: dict[str, Any], kept: Kept) -> None:
        """Copy the state of all ranks; a thread writes and commits it and deletes what is not kept.

        An earlier save still under way is awaited first. A step that is saved already stays as it is. `take_failure`
        tells what went wrong in the thread; training goes on, and the older checkpoints are as they were.

        Args:
            step: finished optimizer steps.
            model: everything that has parameters or buffers (the moving average too), without gradients.
            optimizer: its state.
            extra: this rank's own plain data and tensors (data position, progress); random states are added. A digest
                of `extra["loader"]`, plain data alone, of all ranks goes into the manifest.
            kept: what stays beside this checkpoint.

        Raises:
            TypeError: `extra` holds something else.
            RuntimeError: in an earlier save, another rank was lost.
        """
        started = time.perf_counter()
        self.finish()
        if step != self._saved:
            own = {"extra": plain(extra), "random": random_state()}
            state = cast(dict[str, Any], self._stager.stage(_state_of(model, optimizer)))
            self._start(functools.partial(self._write_and_commit, step, state, own, kept))
        self.seconds_blocked += time.perf_counter() - started

    def finish(self) -> None:
        """Wait for the save under way, as long as the other ranks live.

        Raises:
            RuntimeError, RankLostError: another rank was lost meanwhile.
        """
        if self._thread is not None:
            self.ranks.wait_until(lambda: self._thread is None or not self._thread.is_alive())
            self._thread.join()
            self._thread = None
        self._raise_lost()

    def take_failure(self) -> str | None:
        """Say in one line what went wrong in saves that have ended since last asked; never waits.

        Raises:
            RuntimeError: another rank was lost meanwhile.
        """
        if self._thread is not None and self._thread.is_alive():
            return None
        self._raise_lost()
        lines, self._failures = self._failures, []
        return "; ".join(lines) or None

    def newest(self) -> Path | None:
        """Find the newest checkpoint whose files are all there and unchanged; every rank hashes its share of them.

        Raises:
            ConfigError: one was written by a newer version of this package, in a form not known here.
            CheckpointError: the folder cannot be read.
        """
        self.finish()
        found: list[Path | None] = []
        self.damaged = []
        self._aside(lambda: found.append(self._find_newest()))
        return found[0]

    def _find_newest(self) -> Path | None:
        names = self._on_main(lambda: [path.name for path in list_checkpoints(self.folder)])
        for name in reversed(names):
            find = functools.partial(damaged_files, self.folder / name, self.ranks.rank, self.ranks.world_size)
            damaged = sorted({file for files in self._together(find) for file in files})
            if not damaged:
                return self.folder / name
            self.damaged.append(f"{name} is damaged ({', '.join(damaged)})")
        return None

    def restore(self, path: Path, model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
        """Load a verified checkpoint into a model and optimizer, however they lie over the present ranks.

        Random states return where as many ranks saved, each rank's its own; otherwise they stay as they are.

        Args:
            path: what `newest` found.
            model: built as the one that was saved.
            optimizer: its gradients are dropped.

        Returns:
            What each rank gave as `extra`, in the order of ranks.

        Raises:
            ConfigError: the checkpoint does not fit, is damaged, or a file holds more than plain data.
        """
        self.finish()
        manifest = read_manifest(path)
        if manifest is None:
            raise ConfigError(f"{path / MANIFEST} is damaged: restore an older checkpoint")
        optimizer.zero_grad(set_to_none=True)  # torch leaves out the state of an optimizer that has gradients
        own: list[dict[str, Any]] = []
        self._aside(lambda: own.extend(self._load(path, manifest["world_size"], model, optimizer)))
        if len(own) == self.ranks.world_size:
            set_random_state(own[self.ranks.rank]["random"])
        self._saved = manifest["step"]
        return [part["extra"] for part in own]

    def _load(self, path: Path, saved: int, model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
        """Load tensors; returns what each of `saved` ranks kept for itself, of which each rank here reads a share."""
        shares = range(self.ranks.rank, saved, self.ranks.world_size)
        read = self._together(lambda: {rank: _read_own(path / f"rank-{rank}.pt") for rank in shares})
        try:
            _load_tensors(path, model, optimizer, self.ranks)
        except CheckpointException as error:
            raise ConfigError(f"{path} does not fit this run: {_first_failure(error)}") from error
        found = {rank: part for parts in read for rank, part in parts.items()}
        return [found[rank] for rank in range(saved)]

    def _start(self, work: Callable[[], None]) -> None:
        """Do something with the other ranks in a thread."""

        def run() -> None:
            """Body of the thread."""
            try:
                if self.ranks.device.type == "cuda":
                    torch.cuda.set_device(self.ranks.device)  # each thread has its own
                work()
            except BaseException as error:  # the main thread raises it
                self._lost = error

        self._thread = threading.Thread(target=run, name=f"{THREADS}checkpoint", daemon=True)
        self._thread.start()

    def _aside(self, work: Callable[[], None]) -> None:
        """Do something with the other ranks, however long it takes, as long as they live."""
        self._start(work)
        self.finish()

    def _raise_lost(self) -> None:
        if self._lost is not None:
            error, self._lost = self._lost, None
            raise error

    def _write_and_commit(self, step: int, state: dict[str, Any], own: dict[str, Any], kept: Kept) -> None:
        """Write on all ranks, commit on rank 0, tidy up; on any failure all ranks leave it."""
        target = self.folder / f"step-{step:08d}"
        folder: Path | None = None
        try:
            name = self._on_main(lambda: _make_folder(target))
            if name is not None:
                folder = self.folder / name
                written = self._together(functools.partial(_write_files, folder, state, own, self.ranks))
                files = {file: entry for part, _ in written for file, entry in part.items()}
                data = digest(" ".join(position for _, position in written))
                manifest = {"step": step, "world_size": self.ranks.world_size, "run": self.run_hash, "data": data}
                self._on_main(lambda: _commit(folder, target, manifest, files))
        except CheckpointError as error:
            self._failures.append(f"step {step} could not be saved, older checkpoints are untouched: {error}")
            if folder is not None and self.ranks.is_main:
                shutil.rmtree(folder, ignore_errors=True)
            return
        self._saved = step
        try:
            self._on_main(lambda: _tidy(target, kept))
        except CheckpointError as error:
            self._failures.append(f"step {step} is saved, but clearing up after it failed: {error}")

    def _on_main(self, work: Callable[[], T]) -> T:
        """Do something on rank 0 and tell all ranks the result; if it fails, all raise the same error."""
        return cast(T, self._together(lambda: work() if self.ranks.is_main else None)[0])

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Do something on every rank and gather the results; if it fails on any, all raise the same error."""
        result: T | None = None
        failure: tuple[bool, str] | None = None
        try:
            result = work()
        except (Exception, CheckpointException) as error:
            logger.debug("a checkpoint failed", exc_info=True)
            failure = isinstance(error, ConfigError), self._describe(error)
        reports = self.ranks.gather((result, failure), self.ranks.background)
        for _, found in reports:
            if found is not None:
                raise (ConfigError if found[0] else CheckpointError)(found[1])
        return cast(list[T], [report[0] for report in reports])

    def _describe(self, error: BaseException) -> str:
        if isinstance(error, CheckpointException):
            return _first_failure(error)
        where = "" if isinstance(error, BeitError) or self.ranks.world_size == 1 else f"rank {self.ranks.rank}: "
        return where + _one_line(error)


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()), key=_step_of)


def set_newer_aside(valid: Path) -> None:
    """Take damaged checkpoints that `newest` passed over out of the way, so that their steps are saved again.

    They are renamed, and those of an earlier time deleted: storage that rots is better looked at.
    """
    found = list_checkpoints(valid.parent)
    newer, former = found[found.index(valid) + 1 :], list(valid.parent.glob(f"*{_DAMAGED}*"))
    for path in newer:
        os.replace(path, path.with_name(f"{path.name}{_DAMAGED}{uuid.uuid4().hex[:8]}"))
    for path in former if newer else []:
        shutil.rmtree(path, ignore_errors=True)
    _point_latest(valid)


def clean_leftovers(folder: Path) -> None:
    """Delete what a killed save or deletion left behind."""
    for path in folder.glob(f"*{_BESIDE}*"):
        if path.is_dir() and path.name.startswith("step-"):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(LATEST):
            path.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """Copy nested plain data; torch's restricted reader brings all of it back as it is.

    Dictionaries of any class become `dict`, numbers of numpy Python's, tensors copies on the CPU.

    Args:
        value: None, bool, numbers, str, bytes and tensors in dicts, lists and tuples.

    Raises:
        TypeError: something else is among it.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {plain(name): plain(item) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    raise TypeError(f"a checkpoint holds plain data and tensors, not {type(value).__name__}: {value!r:.100}")


# --- Steps of a save, in order ----------------------------------------------------------------------------------------


def _make_folder(target: Path) -> str | None:
    """Make the folder to write in; returns its name, None if the checkpoint exists."""
    if target.exists():
        return None
    beside = _beside(target)
    beside.mkdir(parents=True)
    return beside.name


def _write_files(
    folder: Path, state: dict[str, Any], own: dict[str, Any], ranks: Ranks
) -> tuple[dict[str, dict[str, Any]], str]:
    """Write and hash this rank's files; returns what the manifest says of them, and the digest of the data position."""
    _write_tensors(folder, state, ranks)
    _write_own(folder / f"rank-{ranks.rank}.pt", own)
    names = [f"rank-{ranks.rank}.pt", *(path.name for path in folder.glob(f"__{ranks.rank}_*"))]
    return {name: describe_file(folder / name) for name in names}, digest(repr(own["extra"].get("loader")))


def _write_tensors(folder: Path, state: dict[str, Any], ranks: Ranks) -> None:
    """Write this rank's part of model and optimizer."""
    # Nothing is on a GPU any more: copying ahead would only open one, and the wrong one, in this thread.
    writer = FileSystemWriter(folder, per_thread_copy_ahead=0, overwrite=False)
    state_dict_saver.save(state, storage_writer=writer, process_group=ranks.background, no_dist=ranks.world_size == 1)


def _write_own(path: Path, own: dict[str, Any]) -> None:
    """Write one rank's plain data."""
    with _synced(path) as file:
        torch.save(own, file)


def _commit(folder: Path, target: Path, manifest: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest and give the folder its name: from then on it is a checkpoint."""
    for path in folder.iterdir():
        if path.name not in files:  # what DCP writes once for all ranks
            files[path.name] = describe_file(path)
    for name, entry in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != entry["size"]:
            raise CheckpointError(f"rank 0 does not see {folder / name} as written: all ranks need one shared storage")
    _write_manifest(folder, {**manifest, "files": files})
    _sync_folder(folder)
    _rename(folder, target)
    _sync_folder(target.parent)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with _synced(folder / MANIFEST) as file:
        file.write(serialise({**manifest, **VERSIONS}))


def _rename(folder: Path, target: Path) -> None:
    if target.exists():
        raise CheckpointError(f"{target} exists: another run writes into the same folder")
    os.rename(folder, target)


def _tidy(newest: Path, kept: Kept) -> None:
    """Name the newest in `latest` and delete what is not kept."""
    _point_latest(newest)
    found = list_checkpoints(newest.parent)
    steps = [_step_of(path) for path in found]
    chosen = kept.chosen(steps)
    for path, step in zip(found, steps, strict=True):
        if step not in chosen and path != newest:
            _delete(path)


def _point_latest(newest: Path) -> None:
    latest = newest.with_name(LATEST)
    beside = _beside(latest)
    with _synced(beside) as file:
        file.write(f"{newest.name}\n".encode())
    os.replace(beside, latest)


def _delete(path: Path) -> None:
    """Delete a checkpoint; half of one never bears the name of a whole."""
    away = _beside(path)
    os.rename(path, away)
    shutil.rmtree(away)


# --- Parts ------------------------------------------------------------------------------------------------------------


def _state_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Model and optimizer under names that do not depend on how they lie over ranks; still the live tensors."""
    fresh = not optimizer.state
    model_state, optimizer_state = get_state_dict(model, optimizer)
    if fresh:  # torch made some up by a step without gradients, which would count as one
        optimizer.state.clear()
        optimizer_state["state"] = {}
    return {"model": model_state, "optimizer": optimizer_state}


def _load_tensors(path: Path, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> None:
    """Load model and optimizer; parameters that had no optimizer state when they were saved have none afterwards."""
    reader = FileSystemReader(path)
    saved = reader.read_metadata().state_dict_metadata
    model_state, optimizer_state = get_state_dict(model, optimizer)
    states: dict[str, Any] = optimizer_state["state"]  # type: ignore[assignment]  # one of torch's many unions
    optimizer_state["state"] = {
        name: fields
        for name, fields in states.items()
        if any(f"optimizer.state.{name}.{field}" in saved for field in fields)
    }
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    state_dict_loader.load(state, storage_reader=reader, process_group=ranks.background, no_dist=ranks.world_size == 1)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False),  # that some optimizer state is missing; DCP checked all other names
    )


def _read_own(path: Path) -> dict[str, Any]:
    try:
        own: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{path} holds more than plain data, and reading it could run code: do not use it") from error
    return own


def _beside(path: Path) -> Path:
    """A name of its own beside a path, for what is written or deleted."""
    return path.with_name(f"{path.name}{_BESIDE}{uuid.uuid4().hex[:12]}")


@contextmanager
def _synced(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to write; at the end its bytes are on the disk."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _first_failure(error: CheckpointException) -> str:
    rank, (cause, _) = min(error.failures.items())
    return f"rank {rank}: {_one_line(cause)}"


def _one_line(error: BaseException) -> str:
    if isinstance(error, BeitError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
