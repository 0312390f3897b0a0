"""Ranks: one process each, started by `torchrun`; a plain start is rank 0 of 1."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from beit3.errors import ConfigError

_TIMEOUT = timedelta(minutes=10)
"""Longest wait for another rank while training."""
_PATIENCE = timedelta(days=1)
"""Longest wait for a rank that evaluates or writes a model while the others have nothing to do."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Place of this process among all of a run."""

    rank: int
    world_size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None
    """All ranks, for waiting long."""
    background: dist.ProcessGroup | None = None
    """All ranks, for the thread that writes checkpoints; over the CPU, and patient as well."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and exports."""
        return self.rank == 0

    def agree(self, *values: float) -> list[float]:
        """The largest of every value over all ranks, so that all take the same decision."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return list(tensor.tolist())

    def barrier(self) -> None:
        """Wait for all ranks, also for one that evaluates for hours."""
        if self.world_size > 1:
            dist.barrier(self.patient)


def choose_device(name: str) -> torch.device:
    """The device of a run: `auto` takes this rank's CUDA device, then MPS, then the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device '{name}' is unknown: use auto, cpu, cuda, cuda:N or mps") from error
    try:
        float(torch.zeros(1, device=device))  # only use tells whether a device is there
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device '{name}' is not available here: use --device cpu") from error
    return device


@contextmanager
def join_ranks(device_name: str) -> Iterator[Ranks]:
    """Join the process group that torchrun describes, and leave it at the end."""
    device = choose_device(device_name)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Ranks(0, 1, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
        background = dist.new_group(backend="gloo", timeout=_PATIENCE)
        assert isinstance(patient, dist.ProcessGroup)  # every rank is a member
        assert isinstance(background, dist.ProcessGroup)
        yield Ranks(dist.get_rank(), world_size, device, patient, background)
    finally:
        dist.destroy_process_group()
