"""Ranks: one process each, started by `torchrun`; a plain start is rank 0 of 1."""

from __future__ import annotations

import dataclasses
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from beit3.config import differences
from beit3.errors import ConfigError, RankLostError
from beit3.train.pulse import Place, Pulse, lost_error

T = TypeVar("T")

DEFAULT_TIMEOUT = 600.0
"""Seconds that ranks wait for each other unless a run says otherwise."""
_PATIENCE = timedelta(days=1)
"""Longest wait for a rank that evaluates, saves or loads; whether it lives is watched meanwhile."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Place of this process among all of a run."""

    rank: int
    world_size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None
    """All ranks, for waiting long; over the CPU."""
    background: dist.ProcessGroup | None = None
    """All ranks, for the thread that writes checkpoints; over the CPU."""
    pulse: Pulse | None = field(default=None, repr=False)

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

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """What every rank holds, in order; small plain data."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=group)
        return found

    def barrier(self) -> None:
        """Wait for all ranks, also for one that evaluates for hours, as long as it lives.

        Raises:
            RankLostError: it does not.
            RuntimeError: its connection broke.
        """
        if self.world_size > 1:
            work = dist.barrier(self.patient, async_op=True)
            assert work is not None
            self.wait_until(work.is_completed)
            work.wait()

    def wait_until(self, done: Callable[[], bool]) -> None:
        """Wait without a limit for what depends on other ranks, as long as they live.

        Raises:
            RankLostError: one of them does not.
        """
        if self.pulse is not None:
            self.pulse.wait_until(done)


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
def join_ranks(device_name: str, timeout: float = DEFAULT_TIMEOUT) -> Iterator[Ranks]:
    """Join the process group that torchrun describes, and leave it at the end.

    Args:
        device_name: as in `Run.device`.
        timeout: seconds that ranks wait for each other.

    Raises:
        RankLostError: the ranks did not meet; or, from the body, another one ended or hangs.
    """
    device = choose_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(0, 1, device)
        return
    limit = timedelta(seconds=timeout)
    store, rank, world_size = _meet(limit)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=world_size, timeout=limit)
    patient, background = (dist.new_group(backend="gloo", timeout=_PATIENCE) for _ in range(2))
    assert isinstance(patient, dist.ProcessGroup)  # every rank is a member
    assert isinstance(background, dist.ProcessGroup)
    ranks = Ranks(rank, world_size, device, patient, background)
    places = ranks.gather(Place.of(rank, os.getpid()))
    pulse = Pulse(PrefixStore("pulse", store), places, rank, timeout)
    pulse.keep_alive()
    try:
        yield dataclasses.replace(ranks, pulse=pulse)
    except RuntimeError as error:
        if not is_of_the_network(error):
            raise
        raise lost_error(rank, pulse.find_lost(timed_out="timed out" in str(error).lower())) from error
    finally:
        pulse.leave()
        dist.destroy_process_group()


def _meet(limit: timedelta) -> tuple[Store, int, int]:
    """Find the other ranks where the environment says: a store of this start alone, this rank, and how many there are.

    Raises:
        RankLostError: not all came in time.
    """
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        return PrefixStore(_name_start(store, rank, world_size, limit), store), rank, world_size
    except (dist.DistError, TimeoutError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankLostError(
            f"the {os.environ['WORLD_SIZE']} ranks did not meet at {place} within {limit.total_seconds():g} seconds: "
            "see whether all were started, and reach that place"
        ) from error


def _name_start(store: Store, rank: int, world_size: int, limit: timedelta) -> str:
    """Agree on a name that no earlier start had: torchrun's store still holds what the ranks said that it restarts."""
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", own)
        name = store.get(f"welcome/{own}").decode()  # by one who has read what was written just now
        store.add(f"present/{name}", 1)
        return name
    deadline = time.monotonic() + limit.total_seconds()
    answered: dict[int, bytes] = {}
    while store.add(f"present/{own}", 0) < world_size - 1:
        for other in range(1, world_size):
            if store.check([f"hello/{other}"]) and (said := store.get(f"hello/{other}")) != answered.get(other):
                store.set(f"welcome/{said.decode()}", own)
                answered[other] = said
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)
    return own


def is_of_the_network(error: BaseException) -> bool:
    """Whether something common failed because of another rank, and not the program here."""
    if isinstance(error, (dist.DistError, RankLostError)):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "Connection closed" in str(error))


def refuse_differences(ranks: Ranks, described: dict[str, Any]) -> None:
    """Make sure that all ranks were started with the same run.

    Raises:
        ConfigError: on all ranks; names what differs.
    """
    first, *others = ranks.gather(described)
    for rank, other in enumerate(others, start=1):
        if names := differences(first, other):
            raise ConfigError(f"rank {rank} was started with other values of {', '.join(names)} than rank 0")
