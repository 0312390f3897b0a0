"""Under torchrun, runs whose ranks hang, die or lose their machine end at once, or go on as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from beit3.train.checkpoint import list_checkpoints
from beit3.train.log import read_log
from tests.faults.ledger import in_order_of_streams, read_ledger
from tests.processes import environment, free_ports

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
HERE = Path(__file__).parent
TIMEOUT = 4.0
"""Seconds that ranks of the faulty recipe wait for each other."""
LONGEST = 150.0


@dataclass(frozen=True)
class Agent:
    """A torchrun under way."""

    process: subprocess.Popen[str]
    mark: bytes
    """Part of the environment of all that it starts; torchrun gives its ranks sessions of their own."""

    def kill(self) -> None:
        """The ranks as well."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def processes(self) -> list[int]:
        """All that it started and itself, as long as they run."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark in (path / "environ").read_bytes():
                    found.append(int(path.name))
        return found


def start(
    folder: Path, recipe: str, launch: list[str], name: str, *, fault: str = "none:0:0", more: Sequence[str] = ()
) -> Agent:
    """Start torchrun with a recipe."""
    command = [sys.executable, "-m", "torch.distributed.run", *launch, "-m", "beit3", "train", str(HERE / recipe)]
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [*command, "--name", name, "--out", "out", "--resume", *more],
        cwd=folder,
        env=environment(FAULT=fault, MARK=mark),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    return Agent(process, mark.encode())


def ended(*agents: Agent) -> tuple[list[int], str]:
    """Exit codes of all agents, and what they said; whatever hangs is killed."""
    try:
        said = [agent.process.communicate(timeout=LONGEST)[1] for agent in agents]
        return [agent.process.returncode for agent in agents], "\n".join(said)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"hangs: {(error.stderr or b'').decode()}")
    finally:
        for agent in agents:
            agent.kill()


def two_machines(smallest: int) -> tuple[int, list[str]]:
    """The port where two agents of one rank meet, and how each is started."""
    (port,) = free_ports(1)
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    meet += ["--rdzv-conf", "last_call_timeout=5"]  # seconds to wait for more machines than are needed
    return int(port), [*meet, "--nnodes", f"{smallest}:2", "--nproc-per-node", "1", "--max-restarts", "3"]


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def wait_until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of the faulty recipe to which nothing happened."""
    folder = tmp_path_factory.mktemp("torchrun")
    codes, said = ended(start(folder, "faulty.py", ["--standalone", "--nproc-per-node", "2"], "whole"))
    assert codes == [0], said
    return folder


def assert_equal_runs(folder: Path, name: str) -> None:
    ours, theirs = (torch.load(folder / "out" / run / "export" / "weights.pt") for run in (name, "whole"))
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    losses = [[record["loss"] for record in read_log(folder / "out" / run)] for run in (name, "whole")]
    assert losses[0] == losses[1]


def test_a_hang_ends_torchrun_within_the_timeout_and_leaves_no_process(whole: Path) -> None:
    started = start(whole, "faulty.py", ["--standalone", "--nproc-per-node", "2"], "hang", fault="stop:1:5")
    steps = whole / "out" / "hang" / "log.jsonl"
    wait_until(lambda: steps.exists() and bool(records := read_log(steps.parent)) and records[-1]["step"] == 4)
    begun = time.monotonic()
    assert len(started.processes()) == 3
    started.process.wait(LONGEST)
    assert time.monotonic() - begun < TIMEOUT + 5
    assert not started.processes()
    codes, said = ended(started)
    assert codes == [1]
    assert "rank 0 waited in vain for rank 1" in said
    assert "which hangs" in said


@pytest.mark.parametrize("fault", ["stop:1:5", "kill:0:5", "exit:1:5"])
def test_torchrun_restarts_a_run_that_lost_a_rank(whole: Path, fault: str) -> None:
    launch = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    name = fault.replace(":", "-")
    codes, said = ended(start(whole, "faulty.py", launch, name, fault=fault))
    assert codes == [0], said
    assert_equal_runs(whole, name)


def test_a_stop_of_torchrun_saves_the_state_although_data_processes_hear_it_too(place: Path) -> None:
    launch = ["--standalone", "--nproc-per-node", "2"]
    endless = ["--loop.steps", "100000", "--loop.save-every", "100000", "--loop.num-workers", "2"]
    started = start(place, "ledger.py", launch, "stopped", more=endless)
    run = place / "out" / "stopped"
    wait_until(lambda: (run / "log.jsonl").exists() and len(read_log(run)) >= 10)
    started.process.terminate()
    codes, said = ended(started)
    assert codes == [1]
    step = int((run / "preempted").read_text())
    assert f"stopped at step {step}, state saved" in said
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == [f"step-{step:08d}"]
    assert not started.processes()


def test_a_survivor_ends_in_order_although_a_save_is_under_way(tmp_path: Path) -> None:
    """Its thread waits for the lost rank in C++, which would abort an orderly end of Python; without torchrun."""
    (port,) = free_ports(1)
    group = {"MASTER_PORT": port, "WORLD_SIZE": "2", "FAULT": "save_slowly_and_raise:1:3"}
    command = [sys.executable, "-m", "beit3", "train", str(HERE / "faulty.py"), "--out", str(tmp_path)]
    ranks = [
        subprocess.Popen(command, env=environment(**group, RANK=f"{rank}"), stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=LONGEST)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], said
    assert "a mistake in the model" in said[1]
    assert said[0].splitlines()[-1].startswith("beit3: rank 0 waited in vain for rank 1")


def test_two_machines_restart_together(whole: Path) -> None:
    _, launch = two_machines(smallest=2)
    codes, said = ended(*(start(whole, "faulty.py", launch, "machines", fault="kill:1:5") for _ in range(2)))
    assert codes == [0, 0], said
    assert_equal_runs(whole, "machines")


def test_a_run_goes_on_with_the_machine_that_is_left(place: Path) -> None:
    """Two ranks of one data process each become one rank of two; no sample is lost, none is drawn twice."""
    long = ["--loop.steps", "60"]
    codes, said = ended(start(place, "ledger.py", ["--standalone"], "whole", more=[*long, "--loop.num-workers", "2"]))
    assert codes == [0], said
    port, launch = two_machines(smallest=1)
    left = start(place, "ledger.py", launch, "elastic", more=long)
    wait_until(lambda: listens(port))  # the first is where they meet: a run does not outlive that
    lost = start(place, "ledger.py", launch, "elastic", more=long)
    run = place / "out" / "elastic"
    wait_until(lambda: (run / "ledger-1.jsonl").exists() and len(read_ledger(run, 1)) >= 20)
    lost.kill()
    codes, said = ended(left)
    assert codes == [0], said
    whole, first, second = (
        read_ledger(place / "out" / name, rank) for name, rank in (("whole", 0), ("elastic", 0), ("elastic", 1))
    )
    assert len(whole) == 60
    for draw, keys in whole.items():
        alone = len(first[draw]) == len(keys)
        together = first[draw] if alone else in_order_of_streams(first[draw], second[draw])
        assert together == keys, draw
    losses = [[record["loss"] for record in read_log(place / "out" / name)] for name in ("whole", "elastic")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
