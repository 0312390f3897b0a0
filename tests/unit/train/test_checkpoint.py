"""Checkpoints of one process: whole or not there, verified before they are trusted, restored bit for bit."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import pickle
import random
import resource
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import beit3
from beit3.cli import run_command
from beit3.errors import ConfigError
from beit3.train import checkpoint as module
from beit3.train import manifest
from beit3.train.checkpoint import (
    Checkpoints,
    Kept,
    clean_leftovers,
    list_checkpoints,
    plain,
    set_newer_aside,
)
from beit3.train.distributed import Ranks
from beit3.train.manifest import damaged_files
from tests.unit.train.test_manifest import rewrite_manifest

ALONE = Ranks(0, 1, torch.device("cpu"))
KEEP = Kept(last=9)


class Killed(BaseException):
    """Stands for the end of the process."""


class State:
    """A model with buffers of several types, an optimizer with two groups, and the checkpoints of both."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1, "lr_scale": 0.5}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01)
        self.checkpoints = Checkpoints(folder, ALONE, run_hash="the run")

    def step(self) -> None:
        self.model(torch.randn(5, 3)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def begin(self, step: int, kept: Kept = KEEP, **extra: Any) -> Path:
        """Save without waiting for the disk."""
        self.checkpoints.save(step, self.model, self.optimizer, {"step": step, **extra}, kept)
        return self.checkpoints.folder / f"step-{step:08d}"

    def save(self, step: int, kept: Kept = KEEP, **extra: Any) -> Path:
        path = self.begin(step, kept, **extra)
        self.checkpoints.finish()
        assert self.checkpoints.take_failure() is None
        return path

    def load(self, path: Path) -> list[dict[str, Any]]:
        return self.checkpoints.restore(path, self.model, self.optimizer)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of everything that training changes."""
        found = dict(self.model.state_dict())
        for number, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"{number}.{name}": value for name, value in moments.items()}
        return {name: value.clone() for name, value in found.items()}


def trained(folder: Path, steps: int = 3) -> State:
    state = State(folder)
    for _ in range(steps):
        state.step()
    return state


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if ".tmp-" in path.name]


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = trained(tmp_path)
    path = state.save(3)
    draws = torch.rand(3), np.random.rand(3), random.random(), np.random.standard_normal()
    state.step()
    other = State(tmp_path, seed=1)
    assert other.load(path) == [{"step": 3}]
    again = torch.rand(3), np.random.rand(3), random.random(), np.random.standard_normal()
    assert torch.equal(draws[0], again[0])
    assert np.array_equal(draws[1], again[1])
    assert draws[2:] == again[2:]
    other.load(path)
    torch.rand(3)
    other.step()
    assert_equal(state.tensors(), other.tensors())
    groups = [
        [{name: value for name, value in group.items() if name != "params"} for group in one.optimizer.param_groups]
        for one in (state, other)
    ]
    assert groups[0] == groups[1]


def test_restoring_drops_gradients_that_would_hide_the_optimizer(tmp_path: Path) -> None:
    state = trained(tmp_path)
    path = state.save(3)
    other = State(tmp_path, seed=1)
    other.model(torch.randn(5, 3)).sum().backward()
    other.load(path)
    assert_equal(state.tensors(), other.tensors())


def test_saving_an_optimizer_that_never_stepped_leaves_it_so(tmp_path: Path) -> None:
    state, twin = State(tmp_path / "saved"), State(tmp_path / "twin")
    path = state.save(0)
    assert not state.optimizer.state
    other = State(tmp_path / "saved", seed=1)
    other.load(path)
    assert not other.optimizer.state
    torch.manual_seed(1)
    twin.step()
    for one in (state, other):
        torch.manual_seed(1)
        one.step()
        assert_equal(one.tensors(), twin.tensors())


def test_parameters_that_had_no_gradient_yet_have_no_state_afterwards(tmp_path: Path) -> None:
    def build(seed: int) -> tuple[nn.ModuleList, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = build(0)
    model[0](torch.randn(4, 2)).sum().backward()
    optimizer.step()
    checkpoints = Checkpoints(tmp_path, ALONE)
    checkpoints.save(1, model, optimizer, {}, KEEP)
    other, restored = build(1)
    path = checkpoints.newest()
    assert path is not None
    checkpoints.restore(path, other, restored)
    assert set(restored.state) == set(other[0].parameters())
    assert [float(fields["step"]) for fields in restored.state.values()] == [1, 1]


def test_what_training_changes_after_save_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = trained(tmp_path)
    waiting, write = threading.Event(), module._write_tensors
    monkeypatch.setattr(module, "_write_tensors", lambda *given: (waiting.wait(20), write(*given)))
    before, extra = state.tensors(), {"seen": [1, 2], "position": torch.tensor([5])}
    path = state.begin(3, loader=extra)
    for _ in range(3):
        state.step()
    with torch.no_grad():
        for value in state.model.state_dict().values():
            value += 1
    extra["seen"].append(3)  # type: ignore[attr-defined]
    extra["position"] += 1  # type: ignore[operator]
    waiting.set()
    state.checkpoints.finish()
    other = State(tmp_path, seed=1)
    (found,) = other.load(path)
    assert_equal(before, other.tensors())
    assert found["loader"]["seen"] == [1, 2]
    assert found["loader"]["position"].tolist() == [5]


def test_slow_storage_keeps_training_waiting_only_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, write = trained(tmp_path), module._write_tensors
    written = threading.Event()
    monkeypatch.setattr(module, "_write_tensors", lambda *given: (written.wait(20), write(*given)))
    state.begin(3)
    blocked = state.checkpoints.seconds_blocked
    assert 0 < blocked < 5
    assert not list_checkpoints(tmp_path), "it is still being written"
    state.step()
    threading.Timer(0.3, written.set).start()
    state.begin(4)  # waits for the first
    assert state.checkpoints.seconds_blocked - blocked > 0.2
    assert list_checkpoints(tmp_path)[0].name == "step-00000003"
    state.checkpoints.finish()
    assert len(list_checkpoints(tmp_path)) == 2


def test_two_saves_are_never_under_way_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, write = trained(tmp_path), module._write_tensors
    at_once: list[int] = []
    writing = 0

    def count(*given: Any) -> None:
        nonlocal writing
        writing += 1
        at_once.append(writing)
        time.sleep(0.1)
        write(*given)
        writing -= 1

    monkeypatch.setattr(module, "_write_tensors", count)
    for step in (3, 4, 5):
        state.begin(step)
    state.checkpoints.finish()
    assert at_once == [1, 1, 1]


def test_the_copy_goes_to_the_same_memory_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, write = trained(tmp_path), module._write_tensors
    places: list[dict[str, int]] = []

    def note(folder: Path, staged: dict[str, Any], ranks: Ranks) -> None:
        found = dict(staged["model"])
        found |= {name: fields["exp_avg"] for name, fields in staged["optimizer"]["state"].items()}
        places.append({name: value.data_ptr() for name, value in found.items()})
        write(folder, staged, ranks)

    monkeypatch.setattr(module, "_write_tensors", note)
    for step in (3, 4):
        state.save(step)
        state.step()
    assert places[0] == places[1]
    own = {value.data_ptr() for value in state.model.state_dict().values()}
    assert not own & set(places[0].values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_on_while_its_state_is_written(tmp_path: Path) -> None:
    ranks = Ranks(0, 1, torch.device("cuda"))

    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Checkpoints]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).to(ranks.device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        return model, optimizer, Checkpoints(tmp_path, ranks)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        model(torch.randn(8, 256, device=ranks.device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return {name: value.clone() for name, value in model.state_dict().items()}

    model, optimizer, checkpoints = build(0)
    for step in (1, 2, 3):
        wanted = train(model, optimizer)
        checkpoints.save(step, model, optimizer, {}, KEEP)
    later = train(model, optimizer)
    checkpoints.finish()
    assert checkpoints.take_failure() is None
    model, optimizer, checkpoints = build(1)
    path = checkpoints.newest()
    assert path is not None
    checkpoints.restore(path, model, optimizer)
    assert_equal(dict(model.state_dict()), wanted)
    assert_equal(train(model, optimizer), later)


def test_only_the_newest_are_kept_in_order_of_their_numbers(tmp_path: Path) -> None:
    state = trained(tmp_path)
    for step in (2, 9, 10, 100):
        state.save(step, Kept(last=2))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000100"]
    assert not leftovers(tmp_path)


def test_multiples_and_the_best_are_kept_beside_the_newest(tmp_path: Path) -> None:
    state = trained(tmp_path)
    for step in range(1, 11):
        best = tuple(better for better in (3, 7) if better <= step)
        state.save(step, Kept(last=2, every=4, best=best))
        if step == 6:
            kept = [int(path.name[5:]) for path in list_checkpoints(tmp_path)]
            assert kept == [3, 4, 5, 6]
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == [4, 7, 8, 9, 10]


def test_a_file_names_the_newest(tmp_path: Path) -> None:
    state = trained(tmp_path)
    older, newer = state.save(1), state.save(2)
    assert (tmp_path / "latest").read_text() == f"{newer.name}\n"
    set_newer_aside(older)
    assert (tmp_path / "latest").read_text() == f"{older.name}\n"


@pytest.mark.parametrize("place", ["_make_folder", "_write_tensors", "_write_own", "_commit", "_write_manifest"])
def test_a_failing_writer_is_told_once_and_the_older_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    state = trained(tmp_path)
    older = state.save(1)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(module, place, fail)
    state.begin(2)
    state.checkpoints.finish()
    line = state.checkpoints.take_failure()
    assert line == "step 2 could not be saved, older checkpoints are untouched: somewhere: No space left on device"
    assert state.checkpoints.take_failure() is None
    assert state.checkpoints.newest() == older
    assert not leftovers(tmp_path)
    monkeypatch.undo()
    state.step()
    assert state.checkpoints.newest() != state.save(2)
    assert len(list_checkpoints(tmp_path)) == 2


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    state = trained(tmp_path)
    older = state.save(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # the system refuses to write more into any file
    try:
        state.begin(2)
        state.checkpoints.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step 2 could not be saved" in (state.checkpoints.take_failure() or "")
    assert state.checkpoints.newest() == older
    assert not leftovers(tmp_path)
    assert state.save(3) == state.checkpoints.newest()


def test_failures_of_two_saves_are_both_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = trained(tmp_path)

    def fail(*_: object) -> None:
        raise ValueError("first line\nsecond line")

    monkeypatch.setattr(module, "_write_own", fail)
    state.begin(1)
    state.begin(2)
    state.checkpoints.finish()
    line = state.checkpoints.take_failure() or ""
    assert "step 1 could" in line
    assert "step 2 could" in line
    assert "ValueError: first line" in line
    assert "\n" not in line


def test_what_cannot_be_deleted_costs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = trained(tmp_path)
    state.save(1)

    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(shutil, "rmtree", fail)
    newer = state.begin(2, Kept(last=1))
    state.checkpoints.finish()
    assert (state.checkpoints.take_failure() or "").startswith("step 2 is saved, but clearing up after it failed")
    monkeypatch.undo()
    assert list_checkpoints(tmp_path) == [newer], "what is to be deleted has another name"
    clean_leftovers(tmp_path)
    assert not leftovers(tmp_path)


def test_a_save_that_ends_before_its_commit_is_raised_once_and_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = trained(tmp_path)
    older = state.save(1)

    def killed(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(module, "_write_own", killed)
    state.begin(2)
    with pytest.raises(Killed):
        state.checkpoints.finish()
    state.checkpoints.finish()  # once
    monkeypatch.undo()
    assert list_checkpoints(tmp_path) == [older]
    assert state.checkpoints.newest() == older
    clean_leftovers(tmp_path)
    assert not leftovers(tmp_path)
    newer = state.save(2)
    assert state.checkpoints.newest() == newer
    assert not damaged_files(newer)


def test_leftovers_are_cleaned_and_checkpoints_stay(tmp_path: Path) -> None:
    path = trained(tmp_path).save(1)
    (tmp_path / "step-00000002.tmp-77").mkdir()
    (tmp_path / "step-00000002.tmp-77" / "part").write_text("x")
    (tmp_path / "latest.tmp-77").write_text("x")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.tmp-1").write_text("x")
    clean_leftovers(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, "latest", "notes", "notes.tmp-1"}
    clean_leftovers(tmp_path / "nowhere")


def test_a_part_of_a_checkpoint_is_passed_over_and_its_step_saved_again(tmp_path: Path) -> None:
    state = trained(tmp_path)
    older, newer = state.save(1), state.save(2)
    (newer / "manifest.json").unlink()
    (newer / "rank-0.pt").unlink()
    assert state.checkpoints.newest() == older
    state = State(tmp_path)
    state.load(older)
    set_newer_aside(older)
    assert state.save(2) == newer
    assert state.checkpoints.newest() == newer


def test_storage_that_fails_for_a_moment_costs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = trained(tmp_path)
    state.save(1)
    newer = state.save(2)
    describe, pauses = manifest.describe_file, list[float]()
    failures: Iterator[int] = iter([errno.EIO, errno.ESTALE])

    def fail_twice(path: Path) -> dict[str, Any]:
        for number in failures:
            raise OSError(number, "storage fails")
        return describe(path)

    monkeypatch.setattr(manifest, "describe_file", fail_twice)
    monkeypatch.setattr("beit3.train.manifest.time.sleep", pauses.append)
    assert state.checkpoints.newest() == newer
    assert pauses == [0.1, 1.0]
    failures = itertools.repeat(errno.EIO)
    with pytest.raises(ConfigError, match=r"cannot be read \(storage fails\): try again, or move step-00000002 away"):
        state.checkpoints.newest()
    assert len(list_checkpoints(tmp_path)) == 2


def test_what_is_damaged_is_told_put_aside_and_kept_until_the_next_time(tmp_path: Path) -> None:
    state = trained(tmp_path)
    older = state.save(1)
    for _ in range(2):
        newer = state.save(2)
        (newer / "rank-0.pt").write_bytes(b"")
        assert state.checkpoints.newest() == older
        assert state.checkpoints.damaged == ["step-00000002 is damaged (rank-0.pt)"]
        set_newer_aside(older)
        state.load(older)
        (aside,) = tmp_path.glob("step-00000002.damaged-*")
        assert (aside / "manifest.json").exists()
        assert list_checkpoints(tmp_path) == [older]


def test_all_is_on_the_disk_before_a_checkpoint_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a loss of power would leave the name and not the bytes."""
    events: list[str] = []
    sync, rename = os.fsync, os.rename

    def note_sync(handle: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name.removesuffix(".tmp"))
        sync(handle)

    def note_rename(source: Path, target: Path) -> None:
        events.append(f"rename {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    saved = trained(tmp_path).save(1)
    named = events.index("rename step-00000001")
    assert {path.name for path in files_of(saved)} <= set(events[:named])
    assert any(name.startswith("step-00000001.tmp-") for name in events[:named]), "the folder of the files as well"
    assert events[named + 1] == tmp_path.name, "and then the name"


def test_any_file_that_is_missing_is_named_and_the_older_one_is_taken(tmp_path: Path) -> None:
    state = trained(tmp_path)
    older, newer = state.save(1), state.save(2)
    for file in files_of(newer):
        content = file.read_bytes()
        file.unlink()
        assert damaged_files(newer) == [file.name]
        assert state.checkpoints.newest() == older
        file.write_bytes(content)
        assert state.checkpoints.newest() == newer


def test_without_a_valid_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "nowhere", ALONE).newest() is None
    checkpoints = Checkpoints(tmp_path, ALONE)
    assert checkpoints.newest() is None
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-abc").mkdir()
    (tmp_path / "step-00000002.tmp-1").mkdir()
    assert checkpoints.newest() is None
    assert damaged_files(tmp_path / "step-00000001") == ["manifest.json"]


def test_saving_a_step_twice_keeps_the_first(tmp_path: Path) -> None:
    state = trained(tmp_path)
    path = state.save(1)
    before = {file.name: file.read_bytes() for file in files_of(path)}
    state.step()
    state.save(1)
    other = trained(tmp_path, 5)
    other.save(1)
    assert {file.name: file.read_bytes() for file in files_of(path)} == before
    assert not leftovers(tmp_path)


class Payload:
    """Code in a pickle."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_code_in_a_file_of_plain_data_is_refused_and_not_run(tmp_path: Path) -> None:
    state = trained(tmp_path / "run")
    path = state.save(1)
    mark = tmp_path / "mark"
    torch.save({"extra": Payload(mark), "random": {}}, path / "rank-0.pt")
    content = (path / "rank-0.pt").read_bytes()
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite_manifest(path, lambda manifest: manifest["files"].update({"rank-0.pt": entry}))
    assert state.checkpoints.newest() == path, "a digest proves nothing about whoever made it"
    with pytest.raises(ConfigError, match=r"rank-0\.pt holds more than plain data"):
        state.load(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists(), "the code would have run"


def test_plain_data_comes_back_as_it_was(tmp_path: Path) -> None:
    class Position(dict[str, Any]):
        """As energon's."""

    given = {
        "loader": Position(shard=np.int64(3), share=np.float64(0.5), wraps=np.True_, parts=(1, (2, [None, b"\x00"]))),
        "counts": Counter("aab"),
        "far": 2**80,
        "never": float("inf"),
        7: "ß",
    }
    state = trained(tmp_path)
    (found,) = state.load(state.save(1, given=given))
    assert found["given"] == {
        "loader": {"shard": 3, "share": 0.5, "wraps": True, "parts": (1, (2, [None, b"\x00"]))},
        "counts": {"a": 2, "b": 1},
        "far": 2**80,
        "never": float("inf"),
        7: "ß",
    }
    assert [type(value) for value in found["given"]["loader"].values()] == [int, float, bool, tuple]


@pytest.mark.parametrize("value", [np.zeros(2), {1, 2}, object(), Path("x"), range(3)])
def test_what_is_no_plain_data_is_refused_at_once(tmp_path: Path, value: object) -> None:
    state = trained(tmp_path)
    with pytest.raises(TypeError, match="holds plain data and tensors, not"):
        state.save(1, nested={"list": [1, value]})
    assert not list_checkpoints(tmp_path)
    state.save(1)


def test_tensors_of_plain_data_are_copies() -> None:
    value = torch.ones(2, requires_grad=True)
    copy = plain({"a": [value]})["a"][0]
    assert copy.data_ptr() != value.data_ptr()
    assert not copy.requires_grad


def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path: Path) -> None:
    path = trained(tmp_path).save(1)
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(other.parameters())
    with pytest.raises(ConfigError, match="does not fit this run") as caught:
        Checkpoints(tmp_path, ALONE).restore(path, other, optimizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("latest", ["latest", "other", "gone"])
def test_checkpoints_are_not_taken_for_a_model_nor_for_those_of_deepspeed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], latest: str
) -> None:
    state = trained(tmp_path / "checkpoints")
    paths = [state.save(1), state.save(2)]
    file = tmp_path / "checkpoints" / "latest"
    file.unlink() if latest == "gone" else file.write_text(f"{paths[1].name if latest == 'latest' else 'step-3'}\n")
    for source in (file.parent, *paths):
        with pytest.raises(ConfigError) as caught:
            beit3.load_model(source)
        line = f"{source} holds checkpoints, for --resume alone: load the folder 'export' of their run"
        assert str(caught.value) == line
        assert run_command(["info", str(source)]) == 0
        said = capsys.readouterr().out
        assert "every file verifies" in said
        assert said.splitlines()[-1] == "  model       none here: load the folder 'export' of the run"
