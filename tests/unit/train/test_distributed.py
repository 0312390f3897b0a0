"""Who is lost among the ranks: ended, said farewell, or silent for longer than all others."""

from __future__ import annotations

import json
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
from beit3.train.distributed import Place, Pulse, _name_start, choose_device, join_ranks

ELSEWHERE = "another.host"


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes that do nothing."""
    started = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
    yield started
    for process in started:
        process.kill()
        process.wait()


def pulse_of_three(first: Place, second: Place, timeout: float = 10.0) -> tuple[Pulse, Store]:
    """Seen from rank 0, whose others are elsewhere or here."""
    store: Store = getattr(dist, "HashStore")()  # noqa: B009 - hidden from type checkers
    store.set_timeout(timedelta(seconds=1))
    return Pulse(store, [Place(0, socket.gethostname(), os.getpid()), first, second], 0, timeout), store


def heard(store: Store, rank: int, step: int, seconds_ago: float) -> None:
    store.set(f"beat/{rank}", json.dumps([step, time.time() - seconds_ago]))


def test_a_process_that_ended_is_known_to_have(sleepers: list[subprocess.Popen[bytes]]) -> None:
    place = Place(1, socket.gethostname(), sleepers[0].pid)
    assert not place.has_ended
    place.end()
    deadline = time.monotonic() + 10
    while not place.has_ended:  # a zombie until somebody waits for it
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert sleepers[0].wait() == -signal.SIGKILL
    assert place.has_ended
    far = Place(1, ELSEWHERE, sleepers[1].pid)
    far.end()
    assert not far.has_ended
    assert sleepers[1].poll() is None, "processes of other computers are left alone"


def test_the_rank_that_fell_silent_first_is_lost_and_ended(sleepers: list[subprocess.Popen[bytes]]) -> None:
    here = socket.gethostname()
    pulse, store = pulse_of_three(Place(1, here, sleepers[0].pid), Place(2, here, sleepers[1].pid))
    heard(store, 1, 41, 30.0)
    heard(store, 2, 45, 9.0)
    (lost,) = pulse.find_lost()
    assert f"rank 1 (process {sleepers[0].pid} on {here}), last heard of after step 41, which hangs" == lost
    assert sleepers[0].wait() == -signal.SIGKILL
    assert sleepers[1].poll() is None


def test_a_rank_that_said_farewell_is_told_before_those_that_wait_for_it() -> None:
    pulse, store = pulse_of_three(Place(1, ELSEWHERE, 1), Place(2, ELSEWHERE, 2))
    heard(store, 1, 41, 30.0)
    heard(store, 2, 45, 9.0)
    store.set("left/2", "yes")
    assert pulse.find_lost() == [f"rank 2 (process 2 on {ELSEWHERE}), last heard of after step 45, which has ended"]


def test_nobody_is_accused_as_long_as_all_are_heard_of() -> None:
    pulse, store = pulse_of_three(Place(1, ELSEWHERE, 1), Place(2, ELSEWHERE, 2))
    heard(store, 1, 41, 0.5)
    heard(store, 2, 41, 0.2)
    assert pulse.find_lost() == []


def test_a_store_that_does_not_answer_accuses_who_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr("beit3.train.distributed._QUESTION", 0.1)
    places = [Place(0, ELSEWHERE, 7), Place(1, socket.gethostname(), os.getpid())]
    store: Store = getattr(dist, "HashStore")()  # noqa: B009 - hidden from type checkers
    store.set_timeout(timedelta(seconds=1))
    pulse = Pulse(store, places, 1, 10.0)
    monkeypatch.setattr(pulse, "_ask", lambda: time.sleep(1))
    assert pulse.find_lost() == [f"rank 0 (process 7 on {ELSEWHERE}), which hangs"]
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # torchrun keeps it
    pulse = Pulse(store, places, 1, 10.0)
    monkeypatch.setattr(pulse, "_ask", lambda: time.sleep(1))
    assert pulse.find_lost() == []


def test_a_rank_speaks_at_most_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    pulse, store = pulse_of_three(Place(1, ELSEWHERE, 1), Place(2, ELSEWHERE, 2))
    for step in range(1, 50):
        pulse.say(step)
    assert json.loads(store.get("beat/0"))[0] == 0
    monkeypatch.setattr("beit3.train.distributed._BEAT", 0.0)
    pulse.say(50)
    assert json.loads(store.get("beat/0"))[0] == 50


def test_ranks_meet_under_a_name_of_their_own_whatever_an_earlier_start_left() -> None:
    store: Store = getattr(dist, "HashStore")()  # noqa: B009 - hidden from type checkers
    store.set_timeout(timedelta(seconds=5))
    names = []
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
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(one.getsockname()[1])}
    for name, value in {**place, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankLostError, match="the 2 ranks did not meet at"), join_ranks("cpu", timeout=0.5):
        pass


def test_an_unknown_device_is_one_line() -> None:
    with pytest.raises(ConfigError, match="device 'gpu' is unknown"):
        choose_device("gpu")
