"""A recipe that fits a line and misbehaves: FAULT=KIND:RANK:STEP in the environment says how, where and when.

What torchrun has restarted behaves.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beit3.config import LoopConfig, MeshConfig, OptimConfig, Run, TaskConfig, config
from beit3.train import checkpoint
from beit3.train.task import Loader, Task, Work

WIDTH, ROWS = 6, 4


@config
class FaultyConfig(TaskConfig):
    def build(self) -> Faulty:
        return Faulty()


class Rows:
    """Batches that depend on rank and number alone."""

    data_digest = ""

    def __init__(self, rank: int) -> None:
        self.rank, self.used = rank, 0
        self.skipped: Counter[str] = Counter()
        self.keys: list[str] = []

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            number = self.used // ROWS
            self.keys = [f"{self.rank}/{number}/{row}" for row in range(ROWS)]
            self.used += ROWS
            yield torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1000 * self.rank + number))

    def state_dict(self) -> dict[str, Any]:
        return {"used": self.used}

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        self.used = states[self.rank]["used"]


class Faulty(Task[Tensor]):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)])
        self.rank, self.step = 0, 0

    def train_loader(self, run: Run, rank: int, world_size: int) -> Loader[Tensor]:
        self.rank = rank
        kind = os.environ.get("FAULT", "")
        if rank == 1 and kind.startswith("save_slowly"):
            _write_slowly()
        if rank == 1 and kind.startswith("load_stop"):
            checkpoint._load_tensors = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
        return Rows(rank)

    def prepare_data(self, run: Run) -> None:
        if os.environ.get("FAULT", "").startswith("prepare_"):
            misbehave(os.environ["FAULT"].split(":")[0], torch.zeros(()))

    def prepare_step(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        self.step += 1
        return batches

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        states = batch
        for layer in self.layers:
            states = layer(states)
        loss = (states - batch[:, :1]).square().mean()
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        kind, rank, step = ("none:0:0" if restarted else os.environ.get("FAULT", "none:0:0")).split(":")
        if self.rank == int(rank) and (self.step == int(step) or (kind == "always_nan" and self.step >= int(step))):
            loss = misbehave(kind, loss)
        return {"loss": loss}

    def work(self, batch: Tensor) -> Work:
        return Work(len(batch), batch.numel(), 1.0)

    def move(self, batch: Tensor, device: torch.device) -> Tensor:
        return batch.to(device)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "weights.pt")


def misbehave(kind: str, loss: Tensor) -> Tensor:
    if kind in ("raise", "save_slowly_and_raise"):
        raise ValueError("a mistake in the model")
    if kind == "exit":
        os._exit(0)
    if kind == "prepare_slowly":
        time.sleep(6)  # longer than ranks wait for each other
    if kind in ("stop", "prepare_stop"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "sleep":
        time.sleep(600)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
    if kind == "terminate_twice":
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    if kind == "batch_system":
        os.kill(os.getpid(), signal.SIGUSR1)
    if kind == "memory":
        torch.empty(2**60)
    if kind == "network":
        _fail_next_reduction()
    if kind in ("nan", "always_nan"):
        return loss * torch.nan
    if kind == "infinite_gradient":
        return loss + (loss - loss.detach()) * torch.inf
    return loss


def _write_slowly() -> None:
    write = checkpoint._write_own

    def sleep_and_write(path: Path, own: dict[str, Any]) -> None:
        time.sleep(6)  # longer than ranks wait for each other
        write(path, own)

    checkpoint._write_own = sleep_and_write


def _fail_next_reduction() -> None:
    whole = dist.all_reduce

    def fail(*args: Any, **options: Any) -> None:
        dist.all_reduce = whole
        raise dist.DistBackendError("the network failed")

    dist.all_reduce = fail  # type: ignore[assignment]


def recipe() -> Run:
    """Eight steps, a checkpoint every two."""
    return Run(
        name="faulty",
        task=FaultyConfig(),
        device="cpu",
        precision="fp32",
        optim=OptimConfig(lr=0.05),
        loop=LoopConfig(steps=8, save_every=2, log_every=1, max_bad_steps=3),
        mesh=MeshConfig(timeout=4),
    )
