"""Checkpoints: whole or not there, verified before they are trusted, and restored bit for bit."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from beit3.errors import ConfigError
from beit3.train import checkpoint as module
from beit3.train.checkpoint import (
    clean_leftovers,
    damaged_files,
    delete_newer,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from beit3.train.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


class Killed(BaseException):
    """Stands for the end of the process."""


class State:
    """A model with buffers of several types, and an optimizer with two groups."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1, "lr_scale": 0.5}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01)

    def step(self) -> None:
        self.model(torch.randn(5, 3)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path, step: int, keep: int = 2) -> Path:
        save_checkpoint(folder, step, self.model, self.optimizer, {"step": step}, ALONE, keep)
        return folder / f"step-{step:08d}"

    def load(self, path: Path) -> dict[str, int]:
        return load_checkpoint(path, self.model, self.optimizer, ALONE)


def trained(steps: int = 3) -> State:
    state = State(0)
    for _ in range(steps):
        state.step()
    return state


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = trained()
    path = state.save(tmp_path, 3)
    draws = torch.rand(3), np.random.rand(3), random.random()
    state.step()
    other = State(1)
    assert other.load(path) == {"step": 3}
    again = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(draws[0], again[0])
    assert np.array_equal(draws[1], again[1])
    assert draws[2] == again[2]
    other.load(path)
    torch.rand(3)
    other.step()
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    left, right = state.optimizer.state_dict(), other.optimizer.state_dict()
    assert [{k: v for k, v in g.items() if k != "params"} for g in left["param_groups"]] == [
        {k: v for k, v in g.items() if k != "params"} for g in right["param_groups"]
    ]
    assert left["state"].keys() == right["state"].keys()
    for key, moments in left["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, right["state"][key][name]), f"{key} {name}"


def test_only_the_newest_are_kept_in_order_of_their_numbers(tmp_path: Path) -> None:
    state = trained()
    for step in (2, 9, 10, 100):
        state.save(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000100"]


def test_a_save_killed_before_its_commit_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = trained()
    older = state.save(tmp_path, 1)

    def killed(*_: object) -> None:
        raise Killed

    for name in ("_write_manifest", "_sync_folder"):
        monkeypatch.setattr(module, name, killed)
        with pytest.raises(Killed):
            state.save(tmp_path, 2)
        monkeypatch.undo()
        assert list_checkpoints(tmp_path) == [older]
        assert latest_checkpoint(tmp_path) == older
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        state.save(tmp_path, 2)
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == older
    assert any(path.name.startswith("step-00000002.tmp-") for path in tmp_path.iterdir())
    newer = state.save(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == newer
    assert not damaged_files(newer)


def test_leftovers_are_cleaned_and_checkpoints_stay(tmp_path: Path) -> None:
    path = trained().save(tmp_path, 1)
    (tmp_path / "step-00000002.tmp-77").mkdir()
    (tmp_path / "step-00000002.tmp-77" / "part").write_text("x")
    (tmp_path / "notes").mkdir()
    clean_leftovers(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, "notes"}


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def test_the_manifest_names_every_file(tmp_path: Path) -> None:
    path = trained().save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 1
    assert set(manifest["files"]) == {file.name for file in files_of(path)} - {"manifest.json"}
    assert len(manifest["files"]) >= 3


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_any_damage_to_any_file_is_found_and_the_older_one_is_taken(tmp_path: Path, damage: str) -> None:
    state = trained()
    older, newer = state.save(tmp_path, 1), state.save(tmp_path, 2)
    for file in files_of(newer):
        content = file.read_bytes()
        if damage == "flip":
            middle = len(content) // 2
            if file.name == "manifest.json":
                continue  # its own bytes are checked by what they say
            file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        elif damage == "cut":
            file.write_bytes(content[:-3])
        else:
            file.unlink()
        assert damaged_files(newer) == [file.name]
        assert latest_checkpoint(tmp_path) == older
        file.write_bytes(content)
        assert latest_checkpoint(tmp_path) == newer


def test_only_what_is_newer_than_the_valid_one_is_deleted(tmp_path: Path) -> None:
    state = trained()
    paths = [state.save(tmp_path, step, keep=9) for step in (1, 2, 3, 4)]
    delete_newer(paths[1])
    assert list_checkpoints(tmp_path) == paths[:2]


def test_without_a_valid_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-abc").mkdir()
    assert latest_checkpoint(tmp_path) is None
    assert damaged_files(tmp_path / "step-00000001") == ["manifest.json"]


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    state = trained()
    path = state.save(tmp_path, 1)
    with pytest.raises(ConfigError, match="written by 1 processes, this run has 2"):
        load_checkpoint(path, state.model, state.optimizer, Ranks(0, 2, torch.device("cpu")))


def test_saving_a_step_twice_keeps_the_first(tmp_path: Path) -> None:
    state = trained()
    path = state.save(tmp_path, 1)
    before = {file.name: file.read_bytes() for file in files_of(path)}
    state.step()
    state.save(tmp_path, 1)
    assert {file.name: file.read_bytes() for file in files_of(path)} == before
