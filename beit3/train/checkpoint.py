"""Training state on disk: `step-N/` by torch.distributed.checkpoint, with a manifest, committed by renaming.

A folder counts as a checkpoint only if its name is `step-<digits>` and its manifest verifies. Writing happens in
`step-N.tmp-<id>/`; a kill at any moment leaves the older checkpoints as they were. These files are for the run that
wrote them: never load one from a stranger (the exchange folder is the format to pass on).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from beit3.errors import ConfigError
from beit3.train.distributed import Ranks

_NAME = re.compile(r"^step-(\d+)$")
_MANIFEST = "manifest.json"


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: Optimizer, extra: dict[str, Any], ranks: Ranks, keep: int
) -> None:
    """Write and commit the state of all ranks, then delete the oldest checkpoints.

    Args:
        folder: holds the `step-N` folders.
        step: finished optimizer steps.
        model: with everything that has parameters or buffers (the moving average too).
        optimizer: its state.
        extra: this rank's own state (data position, progress); random states are added.
        ranks: all write; rank 0 commits.
        keep: newest checkpoints kept.
    """
    target = folder / f"step-{step:08d}"
    if target.exists():
        return
    beside = folder / f"{target.name}.tmp-{os.getpid() if ranks.world_size == 1 else 'ranks'}"
    if ranks.is_main:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    ranks.barrier()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state_dict_saver.save(
            {"model": model_state, "optimizer": optimizer_state}, checkpoint_id=beside, no_dist=_alone(ranks)
        )
    own = {**extra, "random": _random_state()}
    with open(beside / f"rank-{ranks.rank}.pt", "wb") as file:
        torch.save(own, file)
        file.flush()
        os.fsync(file.fileno())
    ranks.barrier()
    if ranks.is_main:
        _write_manifest(beside, step, ranks.world_size)
        os.replace(beside, target)
        _sync_folder(folder)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    ranks.barrier()


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> dict[str, Any]:
    """Restore model, optimizer and random states; returns this rank's `extra`."""
    manifest = json.loads((path / _MANIFEST).read_text())
    if manifest["world_size"] != ranks.world_size:
        raise ConfigError(
            f"{path} was written by {manifest['world_size']} processes, this run has {ranks.world_size}: start as many"
        )
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state_dict_loader.load(state, checkpoint_id=path, no_dist=_alone(ranks))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    # Own, verified file of this run; energon's data position is a tree of its own classes.
    own: dict[str, Any] = torch.load(path / f"rank-{ranks.rank}.pt", weights_only=False)
    _set_random_state(own.pop("random"))
    return own


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there and unchanged; a damaged one is passed over."""
    for path in reversed(list_checkpoints(folder)):
        if not damaged_files(path):
            return path
    return None


def delete_newer(valid: Path) -> None:
    """Delete damaged checkpoints that `latest_checkpoint` passed over, so that their steps are saved again."""
    found = list_checkpoints(valid.parent)
    for path in found[found.index(valid) + 1 :]:
        shutil.rmtree(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found)]


def damaged_files(path: Path) -> list[str]:
    """Files of a checkpoint that are missing or differ from its manifest (size and SHA-256)."""
    manifest_path = path / _MANIFEST
    try:
        files: dict[str, dict[str, Any]] = json.loads(manifest_path.read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return [_MANIFEST]
    return [
        name
        for name, entry in files.items()
        if not (path / name).is_file()
        or (path / name).stat().st_size != entry["size"]
        or _sha256(path / name) != entry["sha256"]
    ]


def clean_leftovers(folder: Path) -> None:
    """Delete what a killed save left behind."""
    for path in folder.glob("step-*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _write_manifest(folder: Path, step: int, world_size: int) -> None:
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"step": step, "world_size": world_size, "torch": torch.__version__, "files": files}
    with open(folder / _MANIFEST, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alone(ranks: Ranks) -> bool:
    return ranks.world_size == 1 and not dist.is_initialized()


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
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
