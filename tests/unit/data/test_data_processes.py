"""Data processes go on when a whole group is asked to end, and end with the process that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils.data import IterableDataset

from beit3.data.data_processes import end_processes, next_item, start_processes
from tests.processes import environment


class Numbers(IterableDataset[tuple[int, int]]):
    """The process that made it, and a number, for ever."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        number = 0
        while True:
            yield os.getpid(), number
            number += 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_asks_to_end_are_left_to_the_training_process(number: signal.Signals) -> None:
    made = start_processes(Numbers(), 2, fork=True)
    found = [next_item(made) for _ in range(2)]
    for process, _ in found:
        os.kill(process, number)
    time.sleep(0.2)
    later = [next_item(made) for _ in range(20)]
    assert {process for process, _ in later} == {process for process, _ in found}
    assert [count for _, count in later] == [count for count in range(1, 11) for _ in range(2)]
    end_processes(made)
    for process, _ in found:
        assert not Path(f"/proc/{process}").exists()


def test_signals_of_the_training_process_are_as_they_were() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGINT)]
    made = start_processes(Numbers(), 1, fork=True)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGINT)] == handlers
    end_processes(made)


def test_one_that_hangs_is_ended_with_the_others() -> None:
    made = start_processes(Numbers(), 2, fork=True)
    found = [next_item(made) for _ in range(2)]
    os.kill(found[0][0], signal.SIGSTOP)
    end_processes(made)
    for process, _ in found:
        assert not Path(f"/proc/{process}").exists()


def test_they_end_with_a_training_process_that_fails() -> None:
    program = """
from tests.unit.data.test_data_processes import Numbers
from beit3.data.data_processes import next_item, start_processes
kept = start_processes(Numbers(), 2, fork=True)
print(*(next_item(kept)[0] for _ in range(2)), flush=True)
raise SystemError("training failed")
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert "training failed" in ended.stderr
    for process in ended.stdout.split():
        assert not Path(f"/proc/{process}").exists()
    assert len(ended.stdout.split()) == 2
