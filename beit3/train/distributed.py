"""Ranks: one process each, started by `torchrun`; a plain start is rank 0 of 1.

Each rank leaves its step in the store that the ranks met in. Where one of them stops answering, the others see there
who it is, say so, and end it if it hangs on the same computer, so that nothing is left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from beit3.config import differences
from beit3.errors import ConfigError, RankLostError

DEFAULT_TIMEOUT = 600.0
"""Seconds that ranks wait for each other unless a run says otherwise."""
_PATIENCE = timedelta(days=1)
"""Longest wait for a rank that evaluates or writes a model while the others have nothing to do."""
_BEAT = 1.0
"""Seconds between two notes of where a rank is."""
_QUESTION = 2.0
"""Seconds to wait for an answer about lost ranks: the store may be lost as well."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank runs."""

    rank: int
    host: str
    process: int

    @property
    def is_here(self) -> bool:
        """Whether it runs on this computer."""
        return self.host == socket.gethostname()

    @property
    def has_ended(self) -> bool:
        """Whether it is known to run no more."""
        if not self.is_here or not os.path.isdir("/proc/self"):
            return False
        try:
            with open(f"/proc/{self.process}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    def end(self) -> None:
        """End it, if it runs here: what hangs cannot end itself, and what starts ranks would wait for it."""
        if self.is_here:
            with contextlib.suppress(OSError):
                os.kill(self.process, signal.SIGKILL)

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"


class Pulse:
    """Where every rank is, as they say themselves.

    Args:
        store: what the ranks met in.
        places: of all ranks, in order.
        rank: this process.
        timeout: seconds that ranks wait for each other.
    """

    def __init__(self, store: Store, places: list[Place], rank: int, timeout: float) -> None:
        self._store = store
        self._others = [place for place in places if place.rank != rank]
        self._keeper = places[0] if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" else None
        self._rank = rank
        self._timeout = timeout
        self._said = 0.0
        self.say(0)

    def say(self, step: int) -> None:
        """Say that `step` steps are finished, at most once a second."""
        now = time.time()
        if now - self._said >= _BEAT:
            self._store.set(f"beat/{self._rank}", json.dumps([step, now]))
            self._said = now

    def leave(self) -> None:
        """Say that this rank ends by itself, with a message of its own."""
        with contextlib.suppress(RuntimeError):  # nobody may be left to listen
            self._store.set(f"left/{self._rank}", "yes")

    def find_lost(self) -> list[str]:
        """Describe the ranks that ended or hang; those that hang on this computer are ended."""
        ended = [f"{place}, which has ended" for place in self._others if place.has_ended]
        if ended:
            return ended
        answers: list[list[tuple[float, int, bool]]] = []
        asking = threading.Thread(target=lambda: answers.append(self._ask()), daemon=True)
        asking.start()
        asking.join(_QUESTION)
        if not answers:  # lost is who keeps the store
            if self._keeper is None or self._keeper.rank == self._rank:
                return []
            self._keeper.end()
            return [f"{self._keeper}, which hangs"]
        heard = list(zip(self._others, answers[0], strict=True))
        left = [
            f"{place}, last heard of after step {step}, which has ended" for place, (_, step, gone) in heard if gone
        ]
        if left:
            return left
        # All wait for the one that fell silent first, give or take the second between two notes.
        first = min(seen for _, (seen, _, _) in heard)
        lost = [(place, step) for place, (seen, step, _) in heard if seen - first < 2 * _BEAT]
        if time.time() - first < 0.5 * self._timeout:
            return []
        for place, _ in lost:
            place.end()
        return [f"{place}, last heard of after step {step}, which hangs" for place, step in lost]

    def _ask(self) -> list[tuple[float, int, bool]]:
        """When each other rank was heard of, after which step, and whether it said farewell."""
        found = []
        for place in self._others:
            step, seen = json.loads(self._store.get(f"beat/{place.rank}"))
            found.append((float(seen), int(step), bool(self._store.check([f"left/{place.rank}"]))))
        return found


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

    def report(self, step: int) -> None:
        """Tell the other ranks that `step` steps are finished."""
        if self.pulse is not None:
            self.pulse.say(step)

    def gather(self, value: Any) -> list[Any]:
        """What every rank holds, in order; small plain data."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self.patient)
        return found

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
    patient, background = (dist.new_group(backend="gloo", timeout=wait) for wait in (_PATIENCE, limit))
    assert isinstance(patient, dist.ProcessGroup)  # every rank is a member
    assert isinstance(background, dist.ProcessGroup)
    places: list[Any] = [None] * world_size
    dist.all_gather_object(places, Place(rank, socket.gethostname(), os.getpid()), group=patient)
    pulse = Pulse(PrefixStore("pulse", store), places, rank, timeout)
    try:
        yield Ranks(rank, world_size, device, patient, background, pulse)
    except RuntimeError as error:
        if not _is_of_the_network(error):
            raise
        raise RankLostError(
            f"rank {rank} waited in vain for {'; '.join(pulse.find_lost()) or 'another rank'}: see the first error, "
            "mend it and go on with --resume"
        ) from error
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


def _is_of_the_network(error: RuntimeError) -> bool:
    """Whether a collective failed, and not the program."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed" in str(error)


def refuse_differences(ranks: Ranks, described: dict[str, Any]) -> None:
    """Make sure that all ranks were started with the same run.

    Raises:
        ConfigError: on all ranks; names what differs.
    """
    first, *others = ranks.gather(described)
    for rank, other in enumerate(others, start=1):
        if names := differences(first, other):
            raise ConfigError(f"rank {rank} was started with other values of {', '.join(names)} than rank 0")
