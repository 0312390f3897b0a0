"""Who is lost when ranks wait in vain.

Each rank shows signs of life in the store that the ranks met in. Where one of them stops answering, the others find out
there who it is, say so, and end it if it hangs on the same computer, so that nothing is left behind. Who may be healthy
is left alone: one that waits itself has left a note, and one that ends needs a moment for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from torch.distributed.distributed_c10d import Store

from beit3.errors import RankLostError

T = TypeVar("T")

THREADS = "beit3-"
"""How names of threads begin that may wait for another rank in C++ when the process ends."""
_GRACE = 2.0
"""Seconds that ranks have to leave a note when something common failed, and to end when they do."""
_QUESTION = 2.0
"""Seconds to wait for an answer of the store, which may be lost as well."""
_FAREWELL = 3.0
"""Seconds that the store outlives the first who know: some ranks notice only when these end."""
_WAITED, _BROKEN, _LEFT = "waited", "broken", "left"
"""Notes of ranks that waited their full time, of those whose connection broke, and of those that end by themselves."""
_ENDED, _HANGS, _SILENT = "which has ended", "which hangs", "of which nothing is heard"
_NAMED = 8
"""Lost ranks that a message names."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank runs."""

    rank: int
    host: str
    process: int
    machine: str
    """Of the kernel that runs it, and of its view of process numbers: host names may repeat."""
    born: str
    """When it was started: process numbers come again."""

    @classmethod
    def of(cls, rank: int, process: int) -> Place:
        """The place of a process of this computer."""
        return cls(rank, socket.gethostname(), process, _this_machine(), _stat(process)[1])

    @property
    def is_here(self) -> bool:
        """Whether it runs on this computer."""
        return self.machine == _this_machine()

    @property
    def has_ended(self) -> bool:
        """Whether it is known to run no more."""
        if not self.is_here or not os.path.isdir("/proc/self"):
            return False
        state, born = _stat(self.process)
        return state in ("", "Z") or born != self.born

    def end(self) -> None:
        """End it, if it runs here: what hangs cannot end itself, and what starts ranks would wait for it."""
        if self.is_here and not self.has_ended:
            with contextlib.suppress(OSError):
                os.kill(self.process, signal.SIGKILL)

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"


def _agent_keeps_store() -> bool:
    """Whether torchrun keeps the store that the ranks met in, not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _this_machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _stat(process: int) -> tuple[str, str]:
    """State and start time of a process; empty if there is none, or none can be told."""
    try:
        with open(f"/proc/{process}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
            return fields[0], fields[19]
    except OSError:
        return "", ""


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

        threading.Thread(target=show, name=f"{THREADS}alive", daemon=True).start()

    def leave(self) -> None:
        """Say that this rank ends by itself, with a message of its own."""
        self._over.set()
        with contextlib.suppress(ConnectionError, TimeoutError):  # nobody may be left to listen
            self._ask(lambda: self._store.set(f"note/{self._rank}", _LEFT))

    def wait_until(self, done: Callable[[], bool]) -> None:
        """Wait without a limit for what depends on other ranks, as long as they live.

        Raises:
            RankLostError: one showed no sign of life for the timeout.
        """
        # Of many ranks, each asking for all would be too much for one store.
        watched = [place for place in self._places if place.rank != self._rank and 0 in (place.rank, self._rank)]
        asked = answered = time.monotonic()
        signs = dict.fromkeys(watched, (b"", asked))
        while not done():
            time.sleep(0.01)
            now = time.monotonic()
            if now - asked < self._timeout / 10:
                continue
            asked = now
            try:
                found = self._ask(lambda: [self._read(f"alive/{place.rank}") for place in watched])
            except (ConnectionError, TimeoutError) as error:
                if now - answered > self._timeout:
                    raise lost_error(self._rank, self._keeper_lost(error)) from None
                continue
            answered = now
            for place, new in zip(watched, found, strict=True):
                sign, seen = signs[place]
                if new != sign:
                    signs[place] = new, now
                elif now - seen > self._timeout:
                    place.end()
                    raise lost_error(self._rank, [f"{place}, {_HANGS}"])

    def find_lost(self, timed_out: bool) -> list[str]:
        """Describe the ranks that ended or hang, after something common failed; what hangs on this computer is ended.

        Whoever waits leaves a note. The first to do so writes down who is lost, so that all say the same: those that
        ended, or else, where any waited its full time, those that leave no note soon, although all that wait do.

        Args:
            timed_out: whether the full time was waited here; otherwise a connection broke, which not all notice at once
        """
        try:
            if self._ask(lambda: self._leave_note(timed_out)) == 1:
                self._ask(lambda: self._store.set("lost", json.dumps(self._missed(timed_out))), _GRACE + _QUESTION)
            found = self._ask(self._read_lost, _GRACE + 2 * _QUESTION)
        except (ConnectionError, TimeoutError) as error:
            return self._keeper_lost(error)
        lost: dict[str, str] = json.loads(found or b"{}")  # empty where the first of all is lost as well
        for rank, how in lost.items():
            if how == _HANGS:
                self._places[int(rank)].end()
        with contextlib.suppress(ConnectionError, TimeoutError):
            self._ask(lambda: self._let_others_read(lost), _FAREWELL + _QUESTION)
        return [f"{self._places[int(rank)]}, {how}" for rank, how in lost.items()]

    def _leave_note(self, timed_out: bool) -> int:
        """Say that this rank waits; returns the how-manieth it is."""
        self._store.set(f"note/{self._rank}", _WAITED if timed_out else _BROKEN)
        return self._store.add("waiting", 1)

    def _missed(self, timed_out: bool) -> dict[int, str]:
        """How ranks are lost, by rank."""
        silent = [place for place in self._places if place.rank != self._rank]
        ended: dict[int, str] = {}
        deadline = time.monotonic() + _GRACE
        while silent and not ended and time.monotonic() < deadline:
            for place in list(silent):
                note = self._read(f"note/{place.rank}").decode()
                timed_out |= note == _WAITED  # and so broke the connections of others
                if note or place.has_ended:
                    silent.remove(place)
                    if note not in (_WAITED, _BROKEN):
                        ended[place.rank] = _ENDED
            time.sleep(0.02)
        hangs = {place.rank: _HANGS if timed_out and place.is_here else _SILENT for place in silent}
        return ended or hangs

    def _read_lost(self) -> bytes:
        """What the first wrote, as soon as it is there; empty if it does not come."""
        deadline = time.monotonic() + _GRACE + _QUESTION
        while not (found := self._read("lost")) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    def _let_others_read(self, lost: dict[str, str]) -> None:
        """Who keeps the store does not end before the others know as much."""
        self._store.set(f"read/{self._rank}", "")
        if self._rank != 0 or _agent_keeps_store():
            return
        others = [place for place in self._places[1:] if str(place.rank) not in lost]
        deadline = time.monotonic() + _FAREWELL
        while others and time.monotonic() < deadline:
            others = [place for place in others if not (self._store.check([f"read/{place.rank}"]) or place.has_ended)]
            time.sleep(0.02)

    def _keeper_lost(self, error: Exception) -> list[str]:
        """Describe who keeps the store, which is lost: rank 0, or torchrun, which is none of the ranks.

        Args:
            error: TimeoutError where the store hangs; ConnectionError where it ended, and rank 0 is about to.
        """
        keeper = self._places[0]
        if _agent_keeps_store() or self._rank == 0:
            return []
        if isinstance(error, TimeoutError) and not keeper.has_ended:
            keeper.end()
            return [f"{keeper}, {_HANGS}"]
        return [f"{keeper}, {_ENDED}"]

    def _read(self, key: str) -> bytes:
        """What is written there; empty if nothing is."""
        return self._store.get(key) if self._store.check([key]) else b""

    def _ask(self, question: Callable[[], T], limit: float | None = None) -> T:
        """Ask the store, which may hang for ever.

        Raises:
            ConnectionError: the store has ended.
            TimeoutError: it does not answer.
        """
        answer: Future[T] = Future()

        def ask() -> None:
            """Body of the thread."""
            try:
                answer.set_result(question())
            except RuntimeError as error:
                answer.set_exception(ConnectionError(str(error)))

        threading.Thread(target=ask, name=f"{THREADS}question", daemon=True).start()
        return answer.result(_QUESTION if limit is None else limit)


def lost_error(rank: int, lost: list[str]) -> RankLostError:
    """What a rank says that waited for others."""
    more = f"; and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
    whom = "; ".join(lost[:_NAMED]) + more or "another rank"
    return RankLostError(f"rank {rank} waited in vain for {whom}: see the first error, mend it and go on with --resume")
