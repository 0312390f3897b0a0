"""Checkpoints: what training waits for, and what goes on beside it.

Shapes: base size by default, random weights, AdamW with its moments; saved several times to a folder.

    python benchmarks/checkpointing.py --folder /tmp/checkpointing

"blocking" is the time in `Checkpoints.save`, during which training waits; the first save also makes the buffers that
the others reuse. "background" is what the thread then needs to write, hash and commit, and "of it CPU" its processor
time (with OMP_NUM_THREADS=1), which a busy machine changes least. The steps are those of a small
model that trains meanwhile in the main thread; their times with and without a save under way alternate. "verify" hashes
all files again, as every resume does.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import beit3
from beit3.train.checkpoint import Checkpoints, Kept, list_checkpoints
from beit3.train.distributed import Ranks, choose_device

INTERVAL = 600
"""Seconds between two saves, to which the blocking part is compared."""
GOAL = 0.01
"""Largest share of time that training may wait."""


def main() -> None:
    """Save several times, load once, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are put, and deleted at the end")
    parser.add_argument("--name", default="beit3_base_patch16_224", help="model of the catalogue")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--saves", type=int, default=4)
    arguments = parser.parse_args()
    ranks = Ranks(0, 1, choose_device(arguments.device))
    torch.manual_seed(0)
    model = beit3.create_model(arguments.name).to(ranks.device)
    optimizer = filled_optimizer(model)
    folder: Path = arguments.folder / "checkpoints"
    checkpoints = Checkpoints(folder, ranks)
    try:
        blocking, background, processor, alone, beside = measure_saves(checkpoints, model, optimizer, arguments.saves)
        started = time.perf_counter()
        path = checkpoints.newest()
        assert path is not None
        verify = time.perf_counter() - started
        size = sum(file.stat().st_size for file in path.iterdir())
        started = time.perf_counter()
        checkpoints.restore(path, model, optimizer)
        restore = time.perf_counter() - started
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    number = sum(parameter.numel() for parameter in model.parameters())
    waiting = statistics.median(blocking[1:])
    print(f"{arguments.name}, {number / 1e6:.0f}M parameters, {ranks.device}, torch {torch.__version__}\n")
    columns = {
        "checkpoint, GB": f"{size / 1e9:.2f}",
        "blocking: first, s": f"{blocking[0]:.2f}",
        "then, s": f"{waiting:.2f}",
        "share of 10 minutes": f"{waiting / INTERVAL:.2%} (goal {GOAL:.0%})",
        "background, s": f"{statistics.median(background):.1f}",
        "of it CPU, s": f"{statistics.median(processor):.1f}",
        "verify, s": f"{verify:.1f}",
        "load, s": f"{restore:.1f}",
        "small step alone, ms": f"{1e3 * alone:.1f}",
        "beside a save, ms": f"{1e3 * beside:.1f}",
    }
    for row in (columns, ["---"] * len(columns), columns.values()):
        print(f"| {' | '.join(row)} |")


def filled_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW after a step, so that it holds its moments."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def measure_saves(
    checkpoints: Checkpoints, model: nn.Module, optimizer: torch.optim.Optimizer, saves: int
) -> tuple[list[float], list[float], list[float], float, float]:
    """Seconds of the blocking parts, of the threads, of their processors, of a small step alone and beside a save."""
    step = small_training()
    blocking: list[float] = []
    background: list[float] = []
    processor: list[float] = []
    alone: list[float] = []
    beside: list[float] = []
    for number in range(1, saves + 1):
        alone += steps_while(step, functools.partial(lies_ahead, time.perf_counter() + 5))
        before = checkpoints.seconds_blocked
        checkpoints.save(number, model, optimizer, {}, Kept(last=1))
        blocking.append(checkpoints.seconds_blocked - before)
        started, worked = time.perf_counter(), other_threads()
        beside += steps_while(step, functools.partial(is_missing, checkpoints.folder, number))
        checkpoints.finish()
        background.append(time.perf_counter() - started)
        processor.append(other_threads() - worked)
        failure = checkpoints.take_failure()
        assert failure is None, failure
    return blocking, background, processor, statistics.median(alone), statistics.median(beside)


def small_training() -> Callable[[], None]:
    """A step of a small model, on the CPU."""
    model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = torch.randn(256, 256)

    def step() -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps_while(step: Callable[[], None], going: Callable[[], bool]) -> list[float]:
    """Seconds of every step until `going` ends."""
    found: list[float] = []
    while going():
        started = time.perf_counter()
        step()
        found.append(time.perf_counter() - started)
    return found


def other_threads() -> float:
    """Processor seconds that all threads but this one have used."""
    return time.process_time() - time.thread_time()


def lies_ahead(moment: float) -> bool:
    """Whether a moment of the steady clock has not come yet."""
    return time.perf_counter() < moment


def is_missing(folder: Path, step: int) -> bool:
    """Whether a checkpoint is not committed yet."""
    return not any(path.name == f"step-{step:08d}" for path in list_checkpoints(folder))


if __name__ == "__main__":
    main()
