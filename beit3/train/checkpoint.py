"""Training state on disk: written beside training, committed by renaming, verified before it is trusted.

A checkpoint is a folder `step-<digits>` whose `manifest.json` names every file with its size and SHA-256, and protects
itself as well. Its files are those of torch.distributed.checkpoint (DCP), which load into any number of ranks, and one
`rank-N.pt` of plain data per rank that saved. Writing happens in `step-N.tmp-<id>`; a kill at any moment leaves the
older checkpoints as they were. These files are for the run that wrote them: DCP unpickles its index, so never resume
from a stranger's (the exchange folder is the format to pass on).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import pickle
import random
import re
import shutil
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from beit3.errors import BeitError, ConfigError
from beit3.train.distributed import Ranks

T = TypeVar("T")

MANIFEST = "manifest.json"
LATEST = "latest"
"""File beside the checkpoints with the name of the one committed last: for people and scripts, never read here."""
SCHEMA = 1
"""Version of what a checkpoint holds. The names `schema` and `sha256` of a manifest, and its form, never change."""
_NAME = re.compile(r"step-([0-9]+)")
_FILE = re.compile(r"[A-Za-z0-9_.-]+")
_BESIDE = ".tmp-"
"""Marks what is written or deleted: such a folder is never listed as a checkpoint."""
_VERSION: str = sys.modules["beit3"].__version__  # imported already, but this room may not import it
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
    best: int | None = None
    """The one of this step, which had the best evaluation."""

    def chosen(self, steps: list[int]) -> set[int]:
        """The steps that stay, out of those there are, oldest first."""
        kept = set(steps[-self.last :])
        return kept | {step for step in steps if step == self.best or (self.every and step % self.every == 0)}


class Checkpoints:
    """All checkpoints of one run.

    A save copies the state to host memory, the only moment training waits for; a thread then writes and commits it. The
    memory stays in use for the next save. A process that ends waits for the thread. All ranks call `save`, `newest` and
    `restore` in the same order.

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
        self._thread: threading.Thread | None = None
        self._saved: int | None = None
        """Step of the newest checkpoint known to be committed."""
        self._failures: list[str] = []
        self._lost: BaseException | None = None
        """Why the thread could not even agree with the other ranks."""

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, extra: dict[str, Any], kept: Kept) -> None:
        """Copy the state of all ranks; a thread writes and commits it and deletes what is not kept.

        An earlier save still under way is awaited first. A step that is saved already stays as it is. `take_failure`
        tells what went wrong in the thread; training goes on, and the older checkpoints are as they were.

        Args:
            step: finished optimizer steps.
            model: everything that has parameters or buffers (the moving average too), without gradients.
            optimizer: its state.
            extra: this rank's own plain data and tensors (data position, progress); random states are added. A digest
                of `extra["loader"]` of all ranks goes into the manifest.
            kept: what stays beside this checkpoint.

        Raises:
            TypeError: `extra` holds something else.
            RuntimeError: in an earlier save, another rank was lost.
        """
        started = time.perf_counter()
        self.finish()
        if step != self._saved:
            own = {"extra": plain(extra), "random": _random_state()}
            state = self._stager.stage(_state_of(model, optimizer))
            self._thread = threading.Thread(
                target=self._run, args=(step, state, own, kept), name="checkpoint", daemon=True
            )
            self._thread.start()
        self.seconds_blocked += time.perf_counter() - started

    def finish(self) -> None:
        """Wait for the save under way.

        Raises:
            RuntimeError: another rank was lost meanwhile.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise_lost()

    def take_failure(self) -> str | None:
        """Say in one line what went wrong in a save since last asked, the same on all ranks; never waits.

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
        names = self._together(lambda: [path.name for path in list_checkpoints(self.folder)])[0]
        for name in reversed(names):
            find = functools.partial(damaged_files, self.folder / name, self.ranks.rank, self.ranks.world_size)
            if not any(self._together(find)):
                return self.folder / name
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
        own = [_read_own(path / f"rank-{rank}.pt") for rank in range(manifest["world_size"])]
        optimizer.zero_grad(set_to_none=True)  # torch leaves out the state of an optimizer that has gradients
        try:
            _load_tensors(path, model, optimizer, self.ranks)
        except CheckpointException as error:
            raise ConfigError(f"{path} does not fit this run: {_first_failure(error)}") from error
        if len(own) == self.ranks.world_size:
            _set_random_state(own[self.ranks.rank]["random"])
        self._saved = manifest["step"]
        return [part["extra"] for part in own]

    def _run(self, step: int, state: dict[str, Any], own: dict[str, Any], kept: Kept) -> None:
        """Body of the thread."""
        try:
            self._write_and_commit(step, state, own, kept)
        except BaseException as error:  # the main thread raises it
            self._lost = error

    def _raise_lost(self) -> None:
        if self._lost is not None:
            error, self._lost = self._lost, None
            raise error

    def _write_and_commit(self, step: int, state: dict[str, Any], own: dict[str, Any], kept: Kept) -> None:
        """Write on all ranks, commit on rank 0, tidy up; on any failure all ranks leave it."""
        target = self.folder / f"step-{step:08d}"
        folder: Path | None = None
        try:
            name = self._together(lambda: self._on_main(lambda: _make_folder(target)))[0]
            if name is not None:
                folder = self.folder / name
                files, data = _join(self._together(functools.partial(_write_files, folder, state, own, self.ranks)))
                manifest = {"step": step, "world_size": self.ranks.world_size, "run": self.run_hash, "data": data}
                self._together(lambda: self._on_main(lambda: _commit(folder, target, manifest, files)))
        except CheckpointError as error:
            self._failures.append(f"step {step} could not be saved, older checkpoints are untouched: {error}")
            if folder is not None and self.ranks.is_main:
                shutil.rmtree(folder, ignore_errors=True)
            return
        self._saved = step
        try:
            self._together(lambda: self._on_main(lambda: _tidy(target, kept)))
        except CheckpointError as error:
            self._failures.append(f"step {step} is saved, but clearing up after it failed: {error}")

    def _on_main(self, work: Callable[[], T]) -> T | None:
        return work() if self.ranks.is_main else None

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Do something on every rank and gather the results; if it fails on any, all raise the same error."""
        result: T | None = None
        failure: tuple[bool, str] | None = None
        try:
            result = work()
        except (Exception, CheckpointException) as error:
            logger.debug("a checkpoint failed", exc_info=True)
            failure = isinstance(error, ConfigError), self._describe(error)
        reports: list[Any] = [(result, failure)]
        if self.ranks.world_size > 1:
            reports = [None] * self.ranks.world_size
            dist.all_gather_object(reports, (result, failure), group=self.ranks.background)
        for _, found in reports:
            if found is not None:
                raise (ConfigError if found[0] else CheckpointError)(found[1])
        return [report[0] for report in reports]

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


def read_manifest(path: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself: step, world_size, run, data, versions, and size and sha256 of its files.

    Returns:
        None if there is no manifest or it is not, to the bit, as it was written.

    Raises:
        ConfigError: it was written by a newer version of this package, in a form not known here.
    """
    try:
        raw = (path / MANIFEST).read_bytes()
        content: dict[str, Any] = json.loads(raw)
        if raw != _serialise({name: value for name, value in content.items() if name != "sha256"}):
            return None
        schema = int(content["schema"])
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
    if schema > SCHEMA:
        raise ConfigError(
            f"{path} was written in form {schema} by beit3 {content.get('beit3')}, this version {_VERSION} knows forms "
            f"up to {SCHEMA}: resume with that version"
        )
    return content if _is_complete(content) else None


def damaged_files(path: Path, rank: int = 0, world_size: int = 1) -> list[str]:
    """Files of a checkpoint that are missing or differ from its manifest (size and SHA-256).

    Args:
        path: a checkpoint.
        rank: only a share of the files is looked at, so that ranks together look at all.
        world_size: number of shares.

    Raises:
        ConfigError: as `read_manifest`.
    """
    manifest = read_manifest(path)
    if manifest is None:
        return [MANIFEST]
    files: dict[str, dict[str, Any]] = manifest["files"]
    names = sorted(files, key=lambda name: (-files[name]["size"], name))[rank::world_size]
    return sorted(name for name in names if not _is_whole(path / name, files[name]))


def delete_newer(valid: Path) -> None:
    """Delete damaged checkpoints that `newest` passed over, so that their steps are saved again."""
    found = list_checkpoints(valid.parent)
    for path in found[found.index(valid) + 1 :]:
        _delete(path)
    _point_latest(valid)


def clean_leftovers(folder: Path) -> None:
    """Delete what a killed save or deletion left behind."""
    for path in folder.glob(f"*{_BESIDE}*"):
        if path.is_dir() and path.name.startswith("step-"):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(LATEST):
            path.unlink(missing_ok=True)


def plain(value: Any, of_tensor: Callable[[Tensor], Any] = lambda tensor: tensor.detach().cpu().clone()) -> Any:
    """Copy nested plain data; torch's restricted reader brings all of it back as it is.

    Dictionaries of any class become `dict`, numbers of numpy Python's, tensors copies on the CPU.

    Args:
        value: None, bool, numbers, str, bytes and tensors in dicts, lists and tuples.
        of_tensor: what becomes of a tensor.

    Raises:
        TypeError: something else is among it.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, dict):
        return {plain(name, of_tensor): plain(item, of_tensor) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item, of_tensor) for item in value)
    raise TypeError(f"a checkpoint holds plain data and tensors, not {type(value).__name__}: {value!r:.100}")


# --- Steps of a save, in order ----------------------------------------------------------------------------------------


def _make_folder(target: Path) -> str | None:
    """Make the folder to write in; returns its name, None if the checkpoint exists."""
    if target.exists():
        return None
    beside = target.with_name(f"{target.name}{_BESIDE}{uuid.uuid4().hex[:12]}")
    beside.mkdir(parents=True)
    return beside.name


def _write_files(
    folder: Path, state: dict[str, Any], own: dict[str, Any], ranks: Ranks
) -> tuple[dict[str, dict[str, Any]], str]:
    """Write and hash this rank's files; returns what the manifest says of them, and the digest of the data position."""
    _write_tensors(folder, state, ranks)
    _write_own(folder / f"rank-{ranks.rank}.pt", own)
    names = [f"rank-{ranks.rank}.pt", *(path.name for path in folder.glob(f"__{ranks.rank}_*"))]
    data = repr(plain(own["extra"].get("loader"), Tensor.tolist))
    return {name: _entry(folder / name) for name in names}, _digest(data)


def _write_tensors(folder: Path, state: dict[str, Any], ranks: Ranks) -> None:
    """Write this rank's part of model and optimizer."""
    # Nothing is on a GPU any more: copying ahead would only open one, and the wrong one, in this thread.
    writer = FileSystemWriter(folder, per_thread_copy_ahead=0, overwrite=False)
    state_dict_saver.save(state, storage_writer=writer, process_group=ranks.background, no_dist=ranks.world_size == 1)


def _write_own(path: Path, own: dict[str, Any]) -> None:
    """Write one rank's plain data."""
    with open(path, "wb") as file:
        torch.save(own, file)
        file.flush()
        os.fsync(file.fileno())


def _join(written: list[tuple[dict[str, dict[str, Any]], str]]) -> tuple[dict[str, dict[str, Any]], str]:
    """Join what all ranks wrote."""
    files = {name: entry for part, _ in written for name, entry in part.items()}
    return files, _digest(" ".join(data for _, data in written))


def _commit(folder: Path, target: Path, manifest: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest and give the folder its name: from then on it is a checkpoint."""
    for path in folder.iterdir():
        if path.name not in files:  # what DCP writes once for all ranks
            files[path.name] = _entry(path)
    for name, entry in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != entry["size"]:
            raise CheckpointError(f"rank 0 does not see {folder / name} as written: all ranks need one shared storage")
    _write_manifest(folder, {**manifest, "files": files})
    _sync_folder(folder)
    _rename(folder, target)
    _sync_folder(target.parent)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    versions = {"schema": SCHEMA, "torch": str(torch.__version__), "beit3": _VERSION}
    with open(folder / MANIFEST, "wb") as file:
        file.write(_serialise({**manifest, **versions}))
        file.flush()
        os.fsync(file.fileno())


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
    beside = newest.with_name(f"{LATEST}{_BESIDE}{uuid.uuid4().hex[:12]}")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(f"{newest.name}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, newest.with_name(LATEST))


def _delete(path: Path) -> None:
    """Delete a checkpoint; half of one never bears the name of a whole."""
    away = path.with_name(f"{path.name}{_BESIDE}{uuid.uuid4().hex[:12]}")
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


def _random_state() -> dict[str, Any]:
    """Random states of this process as plain data."""
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (kind, keys.tolist(), *rest),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _is_complete(manifest: dict[str, Any]) -> bool:
    """Whether a manifest says all it must, of files in its own folder."""
    step, size, files = (manifest.get(name) for name in ("step", "world_size", "files"))
    return (
        isinstance(step, int)
        and isinstance(size, int)
        and size >= 1
        and isinstance(files, dict)
        and all(isinstance(manifest.get(name), str) for name in ("run", "data", "torch", "beit3"))
        and all(_FILE.fullmatch(name) for name in files)
        and all(isinstance(entry, dict) and isinstance(entry.get("size"), int) for entry in files.values())
        and all(f"rank-{rank}.pt" in files for rank in range(size))
    )


def _serialise(manifest: dict[str, Any]) -> bytes:
    """The one form of a manifest, its own digest included: whatever differs by a bit is damaged."""
    own = {**manifest, "sha256": _digest(json.dumps(manifest, sort_keys=True))}
    return (json.dumps(own, indent=1, sort_keys=True) + "\n").encode()


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _is_whole(path: Path, entry: dict[str, Any]) -> bool:
    try:
        return _entry(path) == entry
    except OSError:
        return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
