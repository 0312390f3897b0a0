"""Manifests: they name every file, every bit of them counts, and those of newer versions are not misread."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from beit3.errors import ConfigError
from beit3.train.checkpoint import Checkpoints, Kept
from beit3.train.distributed import Ranks
from beit3.train.manifest import damaged_files, read_manifest

ALONE = Ranks(0, 1, torch.device("cpu"))


def saved(folder: Path, step: int, position: object = None) -> Path:
    """A checkpoint of a small model, with a position of its loader."""
    model = nn.Linear(2, 2)
    checkpoints = Checkpoints(folder, ALONE, run_hash="the run")
    checkpoints.save(step, model, torch.optim.AdamW(model.parameters()), {"loader": position}, Kept(last=9))
    checkpoints.finish()
    return folder / f"step-{step:08d}"


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest as the program that wrote it would have: in its form, with its digest."""
    content = json.loads((path / "manifest.json").read_text())
    del content["sha256"]
    change(content)
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def test_the_manifest_names_every_file_and_what_made_them(tmp_path: Path) -> None:
    path = saved(tmp_path, 1, {"position": (1, 2)})
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == {file.name for file in path.iterdir()} - {"manifest.json"}
    assert {"rank-0.pt", ".metadata"} < set(manifest["files"])
    for name, entry in manifest["files"].items():
        content = (path / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert {name: manifest[name] for name in ("step", "world_size", "run", "schema", "torch")} == {
        "step": 1,
        "world_size": 1,
        "run": "the run",
        "schema": 1,
        "torch": torch.__version__,
    }
    same, other = saved(tmp_path, 2, {"position": (1, 2)}), saved(tmp_path, 3, {"position": (1, 3)})
    data = [json.loads((one / "manifest.json").read_text())["data"] for one in (path, same, other)]
    assert data[0] == data[1] != data[2]


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    file = path / "manifest.json"
    content = file.read_bytes()
    with open(file, "r+b", buffering=0) as damaged:
        for place in range(len(content)):
            for bit in range(8):
                os.pwrite(damaged.fileno(), bytes([content[place] ^ (1 << bit)]), place)
                assert read_manifest(path) is None, (place, bit)
            os.pwrite(damaged.fileno(), content[place : place + 1], place)
        assert read_manifest(path) is not None
        for length in reversed(range(len(content))):
            damaged.truncate(length)
            assert read_manifest(path) is None, length
    for other in (content + b" ", b"[" * 100_000, b"\xff", b"[]"):
        file.write_bytes(other)
        assert read_manifest(path) is None


def test_ranks_together_look_at_every_file(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    files = [file for file in path.iterdir() if file.name != "manifest.json"]
    for file in files:
        file.write_bytes(b"")
    for size in (1, 2, 5):
        found = [damaged_files(path, rank, size) for rank in range(size)]
        assert sorted(itertools.chain(*found)) == sorted(file.name for file in files)


def test_a_checkpoint_of_a_newer_version_is_named_and_not_passed_over(tmp_path: Path) -> None:
    _, path = saved(tmp_path, 1), saved(tmp_path, 2)
    rewrite_manifest(path, lambda content: content.update(schema=2, beit3="7.0", novelty=[1]))
    for look in (Checkpoints(tmp_path, ALONE).newest, lambda: damaged_files(path)):
        with pytest.raises(ConfigError, match=r"written in form 2 by beit3 7\.0.*knows forms up to 1: resume with"):
            look()


def test_a_manifest_names_files_of_its_own_folder_only(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    rewrite_manifest(path, lambda content: content["files"].update({"../secret": {"size": 1, "sha256": ""}}))
    assert damaged_files(path) == ["manifest.json"]
