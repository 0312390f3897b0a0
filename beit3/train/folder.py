"""A run's folder: it belongs to one run, which is written down in it, and one process group at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from beit3.config import Run, differences, require, to_plain, with_defaults
from beit3.errors import ConfigError
from beit3.train.distributed import Ranks

RUN_FILE = "run.json"
EXPORT = "export"
CHECKPOINTS = "checkpoints"
PREEMPTED = "preempted"
"""Marker of a run that was stopped with its state saved; torchrun hides exit codes."""
_LOCK = "lock"
_FREE_TO_CHANGE = {"out", "data", "resume", "overwrite", "allow_data_change", "device"} | {
    *(f"loop.{name}" for name in ("log_every", "eval_every", "save_every", "save_minutes", "max_seconds")),
    *(f"loop.{name}" for name in ("keep", "keep_every", "keep_best", "num_workers", "max_bad_fraction")),
    *(f"mesh.{name}" for name in ("shard", "reshard", "offload", "timeout")),
}
"""Fields that may differ when a run is resumed: they do not decide the result, or the data loader looks at them."""


@contextmanager
def open_folder(run: Run, ranks: Ranks) -> Iterator[None]:
    """Make the run's folder, or check that it is this run's, and keep other processes out; all ranks end if it fails.

    Raises:
        ConfigError: it holds another run, is in use, or cannot be written.
    """
    refused: ConfigError | None = None
    with ExitStack() as held:
        if ranks.is_main:
            try:
                held.enter_context(_claim(run))
            except ConfigError as error:
                refused = error
        ranks.barrier()  # a large folder takes its time to be emptied
        (failed,) = ranks.agree(float(refused is not None))
        if failed:
            raise refused or ConfigError("rank 0 refused to start: see its message")
        yield


def write_record(run: Run) -> None:
    """Write down what the run is, when it starts for the first time."""
    record = run.folder / RUN_FILE
    if not record.exists():
        write_whole(record, json.dumps(to_plain(run), indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all, even if the machine loses its power."""
    beside = path.with_name(f"{path.name}.tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_preempted(run: Run, ranks: Ranks, step: int) -> None:
    """Leave the marker."""
    if ranks.is_main:
        (run.folder / PREEMPTED).write_text(f"{step}\n")


def fixed_hash(run: Run) -> str:
    """SHA-256 of the fields that decide the result."""
    return hashlib.sha256(json.dumps(_without_free(to_plain(run)), sort_keys=True).encode()).hexdigest()


def _without_free(value: object, where: str = "") -> object:
    if not isinstance(value, dict):
        return value
    names = {name: f"{where}.{name}" if where else str(name) for name in value}
    return {name: _without_free(value[name], names[name]) for name in value if names[name] not in _FREE_TO_CHANGE}


def _read_record(record: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(record.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{record} cannot be read ({error.strerror}): try again") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{record} is damaged ({error}): delete it to go on from the checkpoints beside it"
        ) from error


def _claim(run: Run) -> IO[str]:
    folder, record = run.folder, run.folder / RUN_FILE
    with suppress(OSError):
        (folder / PREEMPTED).unlink()  # first: what cannot start must not be queued again
    if record.exists() and not run.resume and not run.overwrite:
        raise ConfigError(f"{folder} holds an earlier run: use --resume, --overwrite or another --name")
    if record.exists() and not run.overwrite:
        stored = with_defaults(_read_record(record), run)  # which may be of an earlier version
        changed = differences(stored, to_plain(run))
        changed = [name for name in changed if name not in _FREE_TO_CHANGE]
        if changed:
            raise ConfigError(f"{folder} was started with other values of {', '.join(changed)}: cannot resume")
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:  # TensorBoard writes nowhere else
        raise ConfigError(f"{folder!r} is no Unicode text: choose another --out or --name") from error
    if run.overwrite and folder.is_dir() and (inside := {path.name for path in folder.iterdir()}):
        require(
            bool(inside & {RUN_FILE, _LOCK}),
            f"{folder} holds no run, but {', '.join(sorted(inside)[:3])}: not overwritten; choose another --name",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / _LOCK, "w")  # noqa: SIM115 - open, and so locked, as long as the run lasts
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}): choose another --out") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which ends with the process, however that ends
    except OSError as error:
        lock.close()
        raise ConfigError(f"{folder} is in use by another process: wait for it, or choose another --name") from error
    if run.overwrite:
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()
    return lock
