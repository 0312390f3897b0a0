"""How ranks meet, and who is lost among them: ended, said farewell, or silent while the others wait."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from beit3.errors import ConfigError, RankLostError
from beit3.train.distributed import _name_start, choose_device, join_ranks
from beit3.train.pulse import Place, Pulse
from tests.processes import free_ports


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes that do nothing."""
    started = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
    yield started
    for process in started:
        process.kill()
        process.wait()


def new_store(timeout: float = 5.0) -> Store:
    store: Store = getattr(dist, "HashStore")()  # noqa: B009 - hidden from type checkers
    store.set_timeout(timedelta(seconds=timeout))
    return store


def far(rank: int) -> Place:
    """A place on another computer, of the number of a process that runs here."""
    return Place(rank, "another.host", os.getpid(), "another machine", "")


def four_places(processes: list[subprocess.Popen[bytes]]) -> list[Place]:
    """Ranks 0 and 1 here, 2 here too, 3 elsewhere."""
    return [Place.of(0, os.getpid()), Place.of(1, processes[0].pid), Place.of(2, processes[1].pid), far(3)]


def test_a_process_that_ended_is_known_to_have(sleepers: list[subprocess.Popen[bytes]]) -> None:
    place = Place.of(1, sleepers[0].pid)
    assert not place.has_ended
    place.end()
    deadline = time.monotonic() + 10
    while not place.has_ended:  # a zombie until somebody waits for it
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert sleepers[0].wait() == -signal.SIGKILL
    assert place.has_ended


def test_processes_of_others_are_left_alone(sleepers: list[subprocess.Popen[bytes]]) -> None:
    """Of another computer of the same name, and one that has come to the number of one that ended."""
    mine = Place.of(1, sleepers[0].pid)
    elsewhere = dataclasses.replace(mine, machine="another machine")
    later = dataclasses.replace(mine, born="1")
    assert not elsewhere.has_ended
    assert later.has_ended
    for place in (elsewhere, later):
        place.end()
    time.sleep(0.1)
    assert sleepers[0].poll() is None


class Hung:
    """A store that answers nothing."""

    def set(self, key: str, value: str) -> None:
        time.sleep(3)


def found_by(store: Store, places: list[Place], *ranks: int, timed_out: bool = True) -> list[list[str]]:
    """What these ranks find, all at once."""
    pulses = [Pulse(store, places, rank, 10.0) for rank in ranks]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda pulse: pulse.find_lost(timed_out), pulses))


def test_ranks_that_wait_agree_on_the_one_that_hangs_and_end_it(sleepers: list[subprocess.Popen[bytes]]) -> None:
    places = four_places(sleepers)
    first, second, third = found_by(new_store(), places, 0, 1, 3)
    assert first == second == third == [f"rank 2 (process {sleepers[1].pid} on {socket.gethostname()}), which hangs"]
    assert sleepers[1].wait() == -signal.SIGKILL
    assert sleepers[0].poll() is None, "a rank that waits is left alone, however long it has"


def test_nobody_is_accused_of_hanging_before_the_time_is_over(sleepers: list[subprocess.Popen[bytes]]) -> None:
    places = four_places(sleepers)
    told = [f"{place}, of which nothing is heard" for place in places[2:]]
    assert found_by(new_store(), places, 0, 1, timed_out=False) == [told, told]
    assert [process.poll() for process in sleepers] == [None, None]


def test_one_that_waited_its_full_time_speaks_for_those_whose_connections_it_broke(
    sleepers: list[subprocess.Popen[bytes]],
) -> None:
    store, places = new_store(), four_places(sleepers)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(Pulse(store, places, 0, 10.0).find_lost, False)
        time.sleep(0.2)
        second = pool.submit(Pulse(store, places, 1, 10.0).find_lost, True)
        third = pool.submit(Pulse(store, places, 3, 10.0).find_lost, False)
    assert first.result() == second.result() == third.result() == [f"{places[2]}, which hangs"]
    assert sleepers[1].wait() == -signal.SIGKILL
    assert sleepers[0].poll() is None


def test_a_rank_that_said_farewell_is_told_at_once(sleepers: list[subprocess.Popen[bytes]]) -> None:
    store, places = new_store(), four_places(sleepers)
    Pulse(store, places, 3, 10.0).leave()
    started = time.monotonic()
    for found in found_by(store, places, 0, 1, 2):
        assert found == [f"{far(3)}, which has ended"]
    assert time.monotonic() - started < 1


def test_who_keeps_the_store_ends_after_those_that_notice_late(
    monkeypatch: pytest.MonkeyPatch, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    store, places = new_store(), four_places(sleepers)
    Pulse(store, places, 3, 10.0).leave()
    with ThreadPoolExecutor() as pool:
        keeper = pool.submit(Pulse(store, places, 0, 10.0).find_lost, False)
        assert found_by(store, places, 1) == [[f"{far(3)}, which has ended"]]
        time.sleep(0.5)
        assert not keeper.done(), "rank 2 has yet to notice"
        assert found_by(store, places, 2) == [[f"{far(3)}, which has ended"]]
        assert keeper.result(1) == [f"{far(3)}, which has ended"]


def test_a_silent_rank_of_another_computer_is_named_and_left_alone(sleepers: list[subprocess.Popen[bytes]]) -> None:
    for found in found_by(new_store(), four_places(sleepers), 0, 1, 2):
        assert found == [f"{far(3)}, of which nothing is heard"]
    assert [process.poll() for process in sleepers] == [None, None]


def test_a_store_that_hangs_accuses_who_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr("beit3.train.pulse._QUESTION", 0.1)
    monkeypatch.setattr(Pulse, "_leave_note", lambda self, timed_out: time.sleep(1))
    places = [far(0), Place.of(1, os.getpid())]
    assert found_by(new_store(), places, 1) == [[f"{far(0)}, which hangs"]]
    started = time.monotonic()
    pulse = Pulse(new_store(), places, 1, 0.2)
    monkeypatch.setattr(Pulse, "_read", lambda self, key: time.sleep(1))
    with pytest.raises(RankLostError, match=r"rank 0 .* which hangs"):
        pulse.wait_until(lambda: False)
    monkeypatch.setattr(pulse, "_store", Hung())
    pulse.leave()
    assert time.monotonic() - started < 2, "a store that hangs keeps nobody from leaving"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # torchrun keeps it
    assert found_by(new_store(), places, 1) == [[]]


def test_a_store_that_ended_ends_no_process(
    monkeypatch: pytest.MonkeyPatch, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    """Who keeps it is about to end by itself, with a message and an exit code of its own."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    def refuse(self: Pulse, timed_out: bool) -> int:
        raise dist.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(Pulse, "_leave_note", refuse)
    keeper = Place.of(0, sleepers[0].pid)
    assert found_by(new_store(), [keeper, Place.of(1, os.getpid())], 1) == [[f"{keeper}, which has ended"]]
    assert sleepers[0].poll() is None


def test_a_first_that_is_lost_as_well_has_nobody_accused(
    monkeypatch: pytest.MonkeyPatch, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    monkeypatch.setattr("beit3.train.pulse._GRACE", 0.2)
    monkeypatch.setattr("beit3.train.pulse._QUESTION", 0.2)
    store, places = new_store(), four_places(sleepers)
    store.add("waiting", 1)  # and was killed before it wrote who is lost
    assert found_by(store, places, 1) == [[]]
    assert [process.poll() for process in sleepers] == [None, None]


def test_a_wait_has_no_limit_as_long_as_the_other_lives(sleepers: list[subprocess.Popen[bytes]]) -> None:
    store, places = new_store(), four_places(sleepers)
    waiting, working = (Pulse(store, places[:2], rank, 0.4) for rank in (0, 1))
    working.keep_alive()
    enough = time.monotonic() + 1.5
    waiting.wait_until(lambda: time.monotonic() > enough)
    working.leave()
    started = time.monotonic()
    with pytest.raises(
        RankLostError, match=f"rank 0 waited in vain for rank 1 .process {sleepers[0].pid} .*which hangs"
    ):
        waiting.wait_until(lambda: False)
    assert 0.3 < time.monotonic() - started < 2
    assert sleepers[0].wait() == -signal.SIGKILL


def test_ranks_meet_under_a_name_of_their_own_whatever_an_earlier_start_left() -> None:
    store, names = new_store(), []
    for order in ((2, 0, 1), (0, 1, 2), (1, 2, 0)):
        with ThreadPoolExecutor() as pool:
            found = []
            for rank in order:
                found.append(pool.submit(_name_start, store, rank, 3, timedelta(seconds=5)))
                time.sleep(0.05)
            names.append({each.result() for each in found})
    assert [len(each) for each in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3


def test_ranks_that_do_not_meet_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports(1)[0]}
    for name, value in {**place, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankLostError, match="the 2 ranks did not meet at"), join_ranks("cpu", timeout=0.5):
        pass


def test_an_unknown_device_is_one_line() -> None:
    with pytest.raises(ConfigError, match="device 'gpu' is unknown"):
        choose_device("gpu")
