"""Checkpoints under fire: processes killed at every point of a save, ranks that fail or hang, damage, resharding.

As a program (`test_checkpoints.py SCENARIO FOLDER`) this forks the processes of a scenario and waits for them.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import beit3
from beit3.cli import run_command
from beit3.errors import BeitError
from beit3.train import checkpoint as module
from beit3.train.checkpoint import (
    Checkpoints,
    Kept,
    clean_leftovers,
    list_checkpoints,
    set_newer_aside,
)
from beit3.train.distributed import Ranks
from beit3.train.manifest import damaged_files, describe_file, serialise
from tests.processes import environment, wait_for

ALONE = Ranks(0, 1, torch.device("cpu"))
KEEP = Kept(last=9)
LONGEST = 100.0
"""Seconds after which a scenario counts as hanging."""

# --- What is saved ----------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Rows that do not divide evenly, a buffer, and a parameter without a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(7, 7), nn.Linear(7, 4)])
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * self.scale


def build(seed: int, ranks: Ranks = ALONE) -> tuple[Small, torch.optim.Optimizer]:
    """The model: whole alone, divided over two or three ranks (one has no rows then), two divided copies over four."""
    torch.manual_seed(seed)
    model = Small()
    if ranks.world_size > 1:
        size = (2, 2) if ranks.world_size == 4 else (ranks.world_size,)
        mesh = init_device_mesh("cpu", size, mesh_dim_names=("copy", "shard")[-len(size) :])
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params={model.scale})
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        model(torch.randn(4, 7, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a model and its optimizer; ranks gather them."""
    found: dict[str, Tensor] = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        found |= {f"{name}.{field}": value for field, value in optimizer.state[parameter].items()}
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in found.items()
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


# --- Processes --------------------------------------------------------------------------------------------------------


def fork(work: Callable[[], object], mark: Path) -> int:
    """Do something in a process of its own; `mark` receives what it returns, or why it failed."""
    process = os.fork()
    if process:
        return process
    os.setpgid(0, 0)  # else the system wakes what stops when the shell of this session ends
    try:
        found: object = work()
    except BaseException as error:
        traceback.print_exc()
        found = {"raised": f"{type(error).__name__}: {error}"}
    mark.write_text(json.dumps(found))
    os._exit(0)


def join(processes: list[int]) -> list[int | None]:
    """Exit codes, minus the signal for those that were killed or stopped; None: it hangs. What is left is killed."""
    codes = wait_for(processes, LONGEST, stopped=True)
    left = [process for process in processes if codes.get(process, -signal.SIGSTOP) == -signal.SIGSTOP]
    for process in left:
        os.kill(process, signal.SIGKILL)
    wait_for(left, LONGEST)
    return [codes.get(process) for process in processes]


def in_group(folder: Path, name: str, size: int, rank: int, work: Callable[[Ranks], object], timeout: float) -> object:
    """Do something as one of several ranks that meet in a file."""
    limit = timedelta(seconds=timeout)
    dist.init_process_group("gloo", f"file://{folder}/{name}.meeting", rank=rank, world_size=size, timeout=limit)
    group = dist.new_group(backend="gloo", timeout=limit)
    assert isinstance(group, dist.ProcessGroup)
    found = work(Ranks(rank, size, torch.device("cpu"), background=group))
    dist.destroy_process_group()
    return found


def fork_ranks(folder: Path, name: str, size: int, work: Callable[[Ranks], object], timeout: float = 30.0) -> list[int]:
    """Run `work` on `size` ranks; `NAME-RANK.json` receives what each returns."""
    return [
        fork(partial(in_group, folder, name, size, rank, work, timeout), folder / f"{name}-{rank}.json")
        for rank in range(size)
    ]


def scenario(name: str, folder: Path) -> None:
    """Run a scenario in a fresh process, which may fork: it has started no threads yet."""
    done = subprocess.run(
        [sys.executable, __file__, name, str(folder)],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=2 * LONGEST,
    )
    assert done.returncode == 0, done.stderr
    (folder / "errors").write_text(done.stderr)


def said(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


# --- Kill points ------------------------------------------------------------------------------------------------------


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_among_tensors(then: Callable[..., None] = die) -> None:
    """End this process after some tensors of the next save are in their file."""
    write, count = filesystem._write_item, 0

    def write_some(*given: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            given[1].flush()
            then()
        return write(*given, **named)

    filesystem._write_item = write_some


def die_among_files(path: Path) -> None:
    """Stands for deleting a folder: one file goes, then the process."""
    next(iter(sorted(path.iterdir()))).unlink()
    die()


KILLS: dict[str, Callable[[], None]] = {
    "K0-before-the-folder": lambda: setattr(module, "_make_folder", die),
    "K1-among-tensors": die_among_tensors,
    "K2-after-files": lambda: setattr(module, "_commit", die),
    "K3-after-manifest": lambda: setattr(module, "_rename", die),
    "K4-before-latest": lambda: setattr(module, "_point_latest", die),
    "K5-before-pruning": lambda: setattr(module, "_delete", die),
    "K5-among-files": lambda: setattr(shutil, "rmtree", die_among_files),
}


def save_three_times(folder: Path, kill: Callable[[], None]) -> None:
    """Save steps 1 and 2; the third save ends this process, and would delete the first."""
    model, optimizer = build(0)
    checkpoints = Checkpoints(folder, ALONE)
    for step in (1, 2, 3):
        train(model, optimizer, 1)
        if step == 3:
            kill()
        checkpoints.save(step, model, optimizer, {"step": step}, Kept(last=2))
        checkpoints.finish()


def run_kills(folder: Path) -> None:
    processes = [fork(partial(save_three_times, folder / name, kill), folder / name) for name, kill in KILLS.items()]
    (folder / "codes.json").write_text(json.dumps(dict(zip(KILLS, join(processes), strict=True))))


@pytest.mark.distributed
def test_a_process_killed_at_any_point_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    scenario("kills", tmp_path)
    assert said(tmp_path, "codes") == dict.fromkeys(KILLS, -signal.SIGKILL)
    for name in KILLS:
        folder = tmp_path / name
        left = [path.name for path in folder.iterdir() if ".tmp-" in path.name]
        assert bool(left) == (name[:2] in ("K1", "K2", "K3") or name == "K5-among-files"), (name, left)
        saved = 3 if name[:2] in ("K4", "K5") else 2
        checkpoints = Checkpoints(folder, ALONE)
        clean_leftovers(folder)
        path = checkpoints.newest()
        assert path == list_checkpoints(folder)[-1], name
        assert path.name == f"step-{saved:08d}", name
        model, optimizer = build(1)
        assert checkpoints.restore(path, model, optimizer) == [{"step": saved}]
        wanted = build(0)
        for _ in range(saved):
            train(*wanted, 1)
        assert same(whole(model, optimizer), whole(*wanted)), name
        train(model, optimizer, 1)
        checkpoints.save(saved + 1, model, optimizer, {}, Kept(last=2))
        checkpoints.finish()
        assert checkpoints.take_failure() is None
        assert [int(found.name[5:]) for found in list_checkpoints(folder)] == [saved, saved + 1], name
        assert not any(damaged_files(found) for found in list_checkpoints(folder)), name
        assert {found.name for found in folder.iterdir() if not found.name.startswith("step-")} == {"latest"}


# --- Ranks that are lost ----------------------------------------------------------------------------------------------

LOSSES: dict[str, Callable[[], None]] = {
    "K1-killed": die_among_tensors,
    "K2-killed": lambda: setattr(module, "_write_own", die),
    "stops": lambda: die_among_tensors(lambda: os.kill(os.getpid(), signal.SIGSTOP)),
}


def lose_rank_1(folder: Path, lose: Callable[[], None], ranks: Ranks) -> object:
    """Save twice; in the second save, rank 1 is lost."""
    model, optimizer = build(0, ranks)
    checkpoints = Checkpoints(folder, ranks)
    train(model, optimizer, 1)
    checkpoints.save(1, model, optimizer, {}, KEEP)
    checkpoints.finish()
    if ranks.rank == 1:
        lose()
    train(model, optimizer, 1)
    checkpoints.save(2, model, optimizer, {}, KEEP)
    started = time.monotonic()
    try:
        checkpoints.finish()
    except RuntimeError as error:
        print(error)
        os._exit(1 if time.monotonic() - started < 20 else 3)
    return "nothing happened"


def run_losses(folder: Path) -> None:
    groups = {
        name: fork_ranks(folder, name, 2, partial(lose_rank_1, folder / name, lose), timeout=8)
        for name, lose in LOSSES.items()
    }
    codes = join([process for group in groups.values() for process in group])
    pairs = zip(codes[::2], codes[1::2], strict=True)
    (folder / "codes.json").write_text(json.dumps(dict(zip(groups, pairs, strict=True))))


@pytest.mark.distributed
def test_the_survivors_of_a_lost_rank_end_with_an_error_and_the_older_checkpoint_stays(tmp_path: Path) -> None:
    scenario("losses", tmp_path)
    killed, stopped = [1, -signal.SIGKILL], [1, -signal.SIGSTOP]
    assert said(tmp_path, "codes") == {"K1-killed": killed, "K2-killed": killed, "stops": stopped}
    for name in LOSSES:
        path = Checkpoints(tmp_path / name, ALONE).newest()
        assert path is not None
        assert path.name == "step-00000001"
        assert list_checkpoints(tmp_path / name) == [path]


# --- Ranks that fail --------------------------------------------------------------------------------------------------


def fail_on_rank_1(folder: Path, ranks: Ranks) -> object:
    """Rank 1 cannot write for a while; both go on. Then both look for the newest among damaged ones."""
    model, optimizer = build(0, ranks)
    checkpoints = Checkpoints(folder, ranks)
    lines: list[str | None] = []
    writers = {"tensors": (filesystem, "_write_item"), "own": (module, "_write_own"), "": (module, "_no_such")}
    for step, (place, name) in enumerate(writers.values(), start=1):
        before = getattr(place, name, None)
        if ranks.rank == 1 and before is not None:
            setattr(place, name, _disk_is_full)
        train(model, optimizer, 1)
        checkpoints.save(step, model, optimizer, {"rank": ranks.rank}, KEEP)
        checkpoints.finish()
        lines.append(checkpoints.take_failure())
        if before is not None:
            setattr(place, name, before)
    checkpoints.save(4, model, optimizer, {"rank": ranks.rank}, KEEP)
    checkpoints.finish()
    found = [str(checkpoints.newest())]
    for name in ("rank-1.pt", "rank-0.pt", "__0_0.distcp", "__1_0.distcp", ".metadata", "manifest.json"):
        ranks.barrier()
        file = folder / "step-00000004" / name
        if ranks.is_main:
            shutil.copy(file, folder / "aside")
            file.write_bytes(file.read_bytes()[:-1])
        ranks.barrier()
        found.append(str(checkpoints.newest()))
        ranks.barrier()
        if ranks.is_main:
            shutil.copy(folder / "aside", file)
    ranks.barrier()
    return {"lines": lines, "found": [Path(path).name for path in found]}


def _disk_is_full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device", "somewhere")


def run_failures(folder: Path) -> None:
    assert join(fork_ranks(folder, "fails", 2, partial(fail_on_rank_1, folder / "run"))) == [0, 0]


@pytest.mark.distributed
def test_a_rank_that_cannot_write_costs_one_checkpoint_and_all_ranks_agree(tmp_path: Path) -> None:
    scenario("failures", tmp_path)
    first, second = said(tmp_path, "fails-0"), said(tmp_path, "fails-1")
    assert first == second
    line = "could not be saved, older checkpoints are untouched: rank 1: somewhere: No space left on device"
    assert first["lines"] == [f"step 1 {line}", f"step 2 {line}", None]
    assert first["found"] == ["step-00000004"] + 6 * ["step-00000003"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == [
        "step-00000003",
        "step-00000004",
    ]


# --- Other numbers of ranks -------------------------------------------------------------------------------------------


def draw() -> list[float]:
    return [float(torch.rand(1)), random.random()]


def save_divided(folder: Path, ranks: Ranks) -> object:
    """Two ranks train and save, and come back each with its own random states."""
    model, optimizer = build(0, ranks)
    train(model, optimizer, 2)
    random.seed(ranks.rank)
    torch.manual_seed(ranks.rank)
    checkpoints = Checkpoints(folder, ranks)
    checkpoints.save(2, model, optimizer, {"rank": ranks.rank}, KEEP)
    draws = draw()
    state = whole(model, optimizer)
    if ranks.is_main:
        torch.save(state, folder.parent / "saved-by-2.pt")
    train(model, optimizer, 1)  # while it is written
    checkpoints.finish()
    other = build(1, ranks)
    path = checkpoints.newest()
    assert path is not None
    extras = checkpoints.restore(path, *other)
    return {"extras": extras, "same": same(whole(*other), state), "draws": [draws, draw()]}


def load_whole(folder: Path) -> object:
    """One process goes on from what two have saved, and saves."""
    model, optimizer = build(1)
    checkpoints = Checkpoints(folder, ALONE)
    path = checkpoints.newest()
    assert path is not None
    torch.manual_seed(5)
    before = torch.get_rng_state()
    extras = checkpoints.restore(path, model, optimizer)
    untouched = torch.equal(before, torch.get_rng_state())
    found = same(whole(model, optimizer), torch.load(folder.parent / "saved-by-2.pt", weights_only=True))
    train(model, optimizer, 1)
    torch.save(whole(model, optimizer), folder.parent / "saved-by-1.pt")
    checkpoints.save(3, model, optimizer, {"step": 3}, KEEP)
    checkpoints.finish()
    return {"extras": extras, "same": found, "untouched": untouched}


def load_divided(folder: Path, before: int, ranks: Ranks) -> object:
    """Several ranks go on from what another number has saved."""
    model, optimizer = build(1, ranks)
    checkpoints = Checkpoints(folder, ranks)
    path = checkpoints.newest()
    assert path is not None
    extras = checkpoints.restore(path, model, optimizer)
    found = same(whole(model, optimizer), torch.load(folder.parent / f"saved-by-{before}.pt", weights_only=True))
    train(model, optimizer, 1)
    checkpoints.save(extras[0]["step"] + 1, model, optimizer, {"step": extras[0]["step"] + 1}, KEEP)
    checkpoints.finish()
    state = whole(model, optimizer)
    if ranks.is_main:
        torch.save(state, folder.parent / f"saved-by-{ranks.world_size}.pt")
    return {"extras": len(extras), "same": found, "failure": checkpoints.take_failure()}


def run_numbers(folder: Path) -> None:
    run = folder / "run"
    assert join(fork_ranks(folder, "two", 2, partial(save_divided, run))) == [0, 0]
    assert join([fork(partial(load_whole, run), folder / "one.json")]) == [0]
    assert join(fork_ranks(folder, "four", 4, partial(load_divided, run, 1))) == 4 * [0]
    assert join(fork_ranks(folder, "three", 3, partial(load_divided, run, 4))) == 3 * [0]


@pytest.mark.distributed
def test_two_one_four_and_three_ranks_go_on_from_each_other_with_the_same_numbers(tmp_path: Path) -> None:
    scenario("numbers", tmp_path)
    two = [said(tmp_path, f"two-{rank}") for rank in range(2)]
    for part in two:
        assert part["extras"] == [{"rank": 0}, {"rank": 1}]
        assert part["same"]
        assert part["draws"][0] == part["draws"][1]
    assert two[0]["draws"] != two[1]["draws"]
    assert said(tmp_path, "one") == {"extras": [{"rank": 0}, {"rank": 1}], "same": True, "untouched": True}
    for rank in range(4):
        assert said(tmp_path, f"four-{rank}") == {"extras": 1, "same": True, "failure": None}
    for rank in range(3):
        assert said(tmp_path, f"three-{rank}") == {"extras": 4, "same": True, "failure": None}
    model, optimizer = build(1)
    checkpoints = Checkpoints(tmp_path / "run", ALONE)
    path = checkpoints.newest()
    assert path is not None
    assert checkpoints.restore(path, model, optimizer) == 3 * [{"step": 5}]
    last = whole(model, optimizer)
    assert same(last, torch.load(tmp_path / "saved-by-3.pt", weights_only=True))
    alone = build(0)
    for steps in (2, 1, 1, 1):
        train(*alone, steps)
    for name, value in whole(*alone).items():
        torch.testing.assert_close(last[name], value, rtol=1e-4, atol=1e-5)


# --- Damage -----------------------------------------------------------------------------------------------------------


def two_checkpoints(folder: Path) -> tuple[Checkpoints, list[Path]]:
    model, optimizer = build(0)
    checkpoints = Checkpoints(folder, ALONE)
    for step in (1, 2):
        train(model, optimizer, 1)
        checkpoints.save(step, model, optimizer, {"step": step}, KEEP)
    checkpoints.finish()
    return checkpoints, list_checkpoints(folder)


def test_a_thousand_random_flips_and_cuts_are_all_found(tmp_path: Path) -> None:
    checkpoints, (older, newer) = two_checkpoints(tmp_path)
    files = {file: file.read_bytes() for file in sorted(newer.iterdir())}
    assert len(files) == 4
    draw = random.Random(0)
    fell_back = 0
    for trial in range(1000):
        file = draw.choice(sorted(files))
        content = bytearray(files[file])
        place = draw.randrange(len(content))
        if trial % 2:
            del content[place:]
        else:
            content[place] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        assert damaged_files(newer) == [file.name], (file.name, place)
        fell_back += checkpoints.newest() == older
        file.write_bytes(files[file])
    assert fell_back == 1000
    assert checkpoints.newest() == newer


def test_any_number_of_damaged_checkpoints_is_passed_over(tmp_path: Path) -> None:
    model, optimizer = build(0)
    checkpoints = Checkpoints(tmp_path, ALONE)
    for step in range(1, 7):
        checkpoints.save(step, model, optimizer, {}, KEEP)
    checkpoints.finish()
    paths = list_checkpoints(tmp_path)
    (paths[5] / "rank-0.pt").unlink()
    shutil.rmtree(paths[4])
    paths[4].mkdir()
    (paths[3] / "manifest.json").write_text("{}")
    (paths[2] / ".metadata").write_bytes(b"")
    assert checkpoints.newest() == paths[1]
    set_newer_aside(paths[1])
    assert list_checkpoints(tmp_path) == paths[:2]
    assert not list(tmp_path.glob("*.tmp-*"))


class Payload:
    """Code in a pickle."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.mark),)


PICKLED: list[str] = []
"""What pickles asked for by name while a test listens."""
_listening = False


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _listening and event == "pickle.find_class":
        PICKLED.append(".".join(map(str, arguments)))


sys.addaudithook(_listen)


def test_no_reader_of_models_opens_the_index_of_a_strangers_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    global _listening
    _, (_, path) = two_checkpoints(tmp_path / "checkpoints")
    mark = tmp_path / "mark"
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    for name in (".metadata", "rank-0.pt"):
        (path / name).write_bytes(pickle.dumps(Payload(mark)))
        manifest["files"][name] = describe_file(path / name)
    (path / "manifest.json").write_bytes(serialise(manifest))
    assert not damaged_files(path), "a digest proves nothing about whoever made it"
    PICKLED.clear()
    _listening = True
    try:
        for source in (tmp_path, path.parent, path, path / ".metadata", path / "rank-0.pt"):
            with pytest.raises(BeitError) as caught:
                beit3.load_model(source)
            assert "\n" not in str(caught.value)
            code = run_command(["info", str(source)])
            assert code == (0 if source in (path, path.parent) else 2), source
    finally:
        _listening = False
    assert "every file verifies" in capsys.readouterr().out
    assert not PICKLED
    assert not mark.exists()
    _listening = True
    pickle.loads((path / ".metadata").read_bytes())
    _listening = False
    assert PICKLED, "it would have been heard"
    assert mark.exists()


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    {"kills": run_kills, "losses": run_losses, "failures": run_failures, "numbers": run_numbers}[name](folder)


if __name__ == "__main__":
    main()
