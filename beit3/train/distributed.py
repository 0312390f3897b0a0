"""Ranks: one process each, started by `torchrun`; a plain start is rank 0 of 1.

Each rank shows signs of life in the store that the ranks met in. Where one of them stops answering, the others find out
there who it is, say so, and end it if it hangs on the same computer, so that nothing is left behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import threading
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

T = TypeVar("T")

DEFAULT_TIMEOUT = 600.0
"""Seconds that ranks wait for each other unless a run says otherwise."""
_PATIENCE = timedelta(days=1)
"""Longest wait for a rank that evaluates or writes a model while the others have nothing to do."""
_GRACE = 2.0
"""Seconds that ranks have to leave a note when something common failed."""
_QUESTION = 2.0
"""Seconds to wait for an answer of the store, which may be lost as well."""
_WAITS, _LEFT = "waits", "left"
"""Notes of ranks that wait for another one, and of those that end with a message of their own."""
_HANGS = "hangs"


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
    """Whether the other ranks live, and who is lost when they do not answer.

    Args:
        store: what the ranks met in.
        places: of all ranks, in order.
        rank: this process.
        timeout: seconds that ranks wait for each other.
    """

    def __init__(self, store: Store, places: list[Place], rank: int, timeout: float) -> None:
        self._store = store
        self._places = places
        self._rank = rank
        self._timeout = timeout
        self._over = threading.Event()

    def keep_alive(self) -> None:
        """Show until `leave` that this process runs, however long it works alone."""

        def show() -> None:
            """Body of the thread."""
            with contextlib.suppress(RuntimeError):  # the store ends with who keeps it
                while not self._over.wait(self._timeout / 10):
                    self._store.set(f"alive/{self._rank}", f"{time.time()}")

        threading.Thread(target=show, name="alive", daemon=True).start()

    def leave(self) -> None:
        """Say that this rank ends by itself, with a message of its own."""
        self._over.set()
        with contextlib.suppress(RuntimeError):  # nobody may be left to listen
            self._store.set(f"note/{self._rank}", _LEFT)

    def wait_until(self, done: Callable[[], bool]) -> None:
        """Wait without a limit for what depends on other ranks, as long as they live.

        Raises:
            RankLostError: one showed no sign of life for the timeout.
        """
        # Of many ranks, each asking for all would be too much for one store.
        watched = [place for place in self._places if place.rank != self._rank and 0 in (place.rank, self._rank)]
        signs = {place: (b"", time.monotonic()) for place in watched}
        asked = time.monotonic()
        while not done():
            time.sleep(0.01)
            now = time.monotonic()
            if now - asked < self._timeout / 10:
                continue
            asked = now
            found = self._answer(lambda: [self._read(f"alive/{place.rank}") for place in watched])
            for place, new in zip(watched, found or [b""] * len(watched), strict=True):
                sign, seen = signs[place]
                if new not in (sign, b""):
                    signs[place] = new, now
                elif now - seen > self._timeout:
                    place.end()
                    raise lost_error(self._rank, [f"{place}, which hangs"])

    def find_lost(self, timed_out: bool) -> list[str]:
        """Describe the ranks that ended or hang, after something common failed; what hangs on this computer is ended.

        Whoever waits leaves a note. The first to do so writes down who is lost, so that all say the same: those that
        ended, or else, where waiting took its full time, those that leave no note soon, although all that wait do.

        Args:
            timed_out: whether the full time was waited; otherwise a connection broke, which not all notice at once.
        """
        order = self._answer(self._leave_note)
        if order is None:
            return self._accuse_keeper()
        if order == 1:
            self._answer(lambda: self._store.set("lost", json.dumps(self._missed(timed_out))), _GRACE + _QUESTION)
        found = self._answer(lambda: self._store.get("lost"), _GRACE + _QUESTION)
        if found is None:
            return self._accuse_keeper()
        lost: dict[str, str] = json.loads(found)
        for rank, how in lost.items():
            if how == _HANGS:
                self._places[int(rank)].end()
        self._answer(self._let_others_read)
        return [f"{self._places[int(rank)]}, which {how}" for rank, how in lost.items()]

    def _leave_note(self) -> int:
        """Say that this rank waits; returns the how-manieth it is."""
        self._store.set(f"note/{self._rank}", _WAITS)
        return self._store.add("waiting", 1)

    def _let_others_read(self) -> int:
        """Rank 0 may keep the store, and does not end before the others know as much."""
        read = self._store.add("read", 1)
        deadline = time.monotonic() + _QUESTION / 2
        while self._rank == 0 and read < self._store.add("waiting", 0) and time.monotonic() < deadline:
            time.sleep(0.02)
            read = self._store.add("read", 0)
        return read

    def _missed(self, timed_out: bool) -> dict[int, str]:
        """How ranks are lost, by rank."""
        silent = [place for place in self._places if place.rank != self._rank]
        ended: dict[int, str] = {}
        deadline = time.monotonic() + _GRACE
        while silent and not ended and time.monotonic() < deadline:
            for place in list(silent):
                note = self._read(f"note/{place.rank}")
                if note or place.has_ended:
                    silent.remove(place)
                    if note != _WAITS.encode():
                        ended[place.rank] = "has ended"
            time.sleep(0.02)
        if ended or not timed_out:
            return ended
        return {place.rank: _HANGS if place.is_here else "does not answer" for place in silent}

    def _accuse_keeper(self) -> list[str]:
        """If the store does not answer, who keeps it is lost: rank 0, or torchrun, which is none of the ranks."""
        keeper = self._places[0]
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or self._rank == 0:
            return []
        if keeper.has_ended:
            return [f"{keeper}, which has ended"]
        keeper.end()
        return [f"{keeper}, which {_HANGS}"]

    def _read(self, key: str) -> bytes:
        """What is written there; empty if nothing is."""
        return self._store.get(key) if self._store.check([key]) else b""

    def _answer(self, question: Callable[[], T], limit: float | None = None) -> T | None:
        """Ask the store; None if it does not answer."""
        answers: list[T] = []

        def ask() -> None:
            """Body of the thread, which may never end."""
            with contextlib.suppress(RuntimeError):
                answers.append(question())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_QUESTION if limit is None else limit)
        return answers[0] if answers else None


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
    places = ranks.gather(Place(rank, socket.gethostname(), os.getpid()))
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


def lost_error(rank: int, lost: list[str]) -> RankLostError:
    """What a rank says that waited for others."""
    whom = "; ".join(lost) or "another rank"
    return RankLostError(f"rank {rank} waited in vain for {whom}: see the first error, mend it and go on with --resume")


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
