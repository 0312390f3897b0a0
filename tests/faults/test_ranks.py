"""One of two ranks fails in every way there is: both end soon, with a reason, or both go on alike; nothing is lost.

As a program (`test_ranks.py FOLDER`) this is the driver that forks the ranks of cases.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3.train.checkpoint import list_checkpoints
from beit3.train.log import read_log
from tests.processes import environment, fork_command, free_ports, wait_for

pytestmark = pytest.mark.distributed
RECIPE = Path(__file__).with_name("faulty.py")
TIMEOUT = 4.0
PATIENCE = 30.0


@dataclass(frozen=True)
class Case:
    fault: str = "none:0:0"
    options: tuple[str, ...] = ()
    of_rank_1: tuple[str, ...] = ()
    resumed: bool = False
    """Started a second time without the fault, to the end."""
    of_resumed: str = ""
    """Started a second time with this fault."""
    quick: bool = False
    ranks: int = 2


CASES = {
    "whole": Case(quick=True),
    "whole_divided": Case(options=("--mesh.shard", "0")),
    "averaged": Case(options=("--optim.ema-decay", "0.5")),
    "averaged_divided": Case(options=("--optim.ema-decay", "0.5", "--mesh.shard", "0")),
    "stop": Case("stop:1:5", resumed=True, quick=True),
    "stop_of_rank_0": Case("stop:0:5"),
    "whole_of_four": Case(ranks=4),
    "stop_of_four": Case("stop:2:5", quick=True, ranks=4),
    "stop_of_rank_0_of_four": Case("stop:0:5", ranks=4),
    "stop_of_four_hybrid": Case("stop:2:5", ("--mesh.shard", "2"), ranks=4),
    "stop_divided_of_four": Case("stop:1:5", ("--mesh.shard", "0"), ranks=4),
    "sleep_of_four": Case("sleep:3:5", ranks=4),
    "kill_of_four": Case("kill:1:5", ranks=4),
    "stop_alone": Case("prepare_stop:0:0"),
    "slow_alone": Case("prepare_slowly:0:0"),
    "slow_storage": Case("save_slowly:0:0"),
    "stop_while_loading": Case(of_resumed="load_stop:1:0"),
    "raise_while_saving": Case("save_slowly_and_raise:1:3"),
    "sleep": Case("sleep:1:5"),
    "raise": Case("raise:1:5", resumed=True, quick=True),
    "raise_divided": Case("raise:1:5", ("--mesh.shard", "0"), resumed=True),
    "exit": Case("exit:1:5"),
    "kill": Case("kill:1:5", resumed=True),
    "kill_rank_0": Case("kill:0:5", resumed=True),
    "memory": Case("memory:1:5"),
    "network": Case("network:1:5", resumed=True),
    "nan": Case("nan:1:5", quick=True),
    "nan_divided": Case("nan:1:5", ("--mesh.shard", "0")),
    "infinite_gradient": Case("infinite_gradient:1:5"),
    "always_nan": Case("always_nan:1:4"),
    "terminate": Case("terminate:1:5", resumed=True, quick=True),
    "terminate_twice": Case("terminate_twice:0:5", resumed=True),
    "batch_system": Case("batch_system:0:5", resumed=True),
    "other_seed": Case(of_rank_1=("--seed", "5"), quick=True),
    "other_batch": Case(of_rank_1=("--loop.accumulate", "2", "--optim.lr", "0.1")),
    "indivisible": Case(options=("--mesh.shard", "3")),
}
DIVERGED, PREEMPTED = 4, 75


class Driver:
    """A process that has imported everything and forks the ranks of a case when it is asked to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=environment(WORLD_SIZE="2"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ended(self, name: str) -> dict[str, Any]:
        """Exit codes and messages of both ranks, and the seconds to the last end; each case runs once."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            print(name, file=self.process.stdin, flush=True)
            assert self.process.stdout.readline() == f"{name}\n"
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def run(self, name: str) -> Path:
        """Folder of the run of a case."""
        self.ended(name)
        return self.folder / name / "faulty"

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """What it exported."""
        found: dict[str, torch.Tensor] = torch.load(self.run(name) / "export" / "weights.pt", weights_only=True)
        return found


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    started = Driver(tmp_path_factory.mktemp("ranks"))
    yield started
    assert started.process.stdin is not None
    started.process.stdin.close()
    started.process.wait(timeout=60)


def cases(*names: str) -> list[Any]:
    """Cases as parameters: those marked so belong to the long part."""
    return [pytest.param(name, marks=[] if CASES[name].quick else [pytest.mark.slow]) for name in names]


def saved(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder / "checkpoints")]


def assert_ends_as_if_nothing_had_happened(driver: Driver, name: str, whole: str = "whole") -> None:
    assert driver.ended(name)["resumed"]["codes"] == [0, 0], driver.ended(name)["resumed"]["messages"]
    for key, value in driver.weights(whole).items():
        assert torch.equal(driver.weights(name)[key], value), key
    losses = [[record["loss"] for record in read_log(driver.run(run))] for run in (name, whole)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", cases("stop", "stop_of_rank_0", "stop_alone", "sleep"))
def test_a_rank_that_hangs_ends_all_within_the_timeout_and_is_named(driver: Driver, name: str) -> None:
    found = driver.ended(name)
    lost = int(CASES[name].fault.split(":")[1])
    assert found["seconds"] < driver.ended("whole")["seconds"] + TIMEOUT + 5
    assert found["codes"][lost] == -signal.SIGKILL, "it was ended by the other rank"
    assert found["codes"][1 - lost] == 1
    assert re.search(rf"waited in vain for rank {lost} .* which hangs", found["messages"][1 - lost])


@pytest.mark.parametrize("name", cases(*(name for name in CASES if "_of_four" in name and name != "whole_of_four")))
def test_of_four_ranks_the_lost_one_is_named_by_all_others_and_none_of_them_is_touched(
    driver: Driver, name: str
) -> None:
    found = driver.ended(name)
    kind, lost, _ = CASES[name].fault.split(":")
    assert found["seconds"] < driver.ended("whole_of_four")["seconds"] + TIMEOUT + 5
    # Of rank 0, which keeps the store, the others learn one after the other: one ends it, the next finds it ended.
    how = "has ended" if kind == "kill" else "(hangs|has ended)" if lost == "0" else "hangs"
    for rank, (code, message) in enumerate(zip(found["codes"], found["messages"], strict=True)):
        if rank == int(lost):
            assert code == -signal.SIGKILL
        else:
            assert code == 1
            assert re.search(
                rf"rank {rank} waited in vain for rank {lost} \(process \d+ on \S+\), which {how}:", message
            )


@pytest.mark.parametrize("name", cases("slow_alone", "slow_storage"))
def test_what_one_rank_does_alone_and_what_it_saves_may_take_longer_than_the_timeout(driver: Driver, name: str) -> None:
    assert driver.ended(name)["codes"] == [0, 0], driver.ended(name)["messages"]
    assert saved(driver.run(name))[-1] == 8


@pytest.mark.parametrize("name", cases("raise", "raise_divided", "exit", "kill", "kill_rank_0", "memory", "network"))
def test_a_rank_that_ends_ends_the_other_at_once_and_is_named(driver: Driver, name: str) -> None:
    found = driver.ended(name)
    lost = int(CASES[name].fault.split(":")[1])
    assert found["seconds"] < driver.ended("whole")["seconds"] + TIMEOUT + 3
    assert found["codes"][1 - lost] == 1, found["messages"]
    assert f"rank {1 - lost} waited in vain for" in found["messages"][1 - lost]
    assert not found["exported"]


@pytest.mark.slow
def test_a_rank_that_hangs_while_it_loads_is_ended_as_well(driver: Driver) -> None:
    found = driver.ended("stop_while_loading")["resumed"]
    assert found["codes"] == [1, -signal.SIGKILL], found["messages"]
    assert found["seconds"] < driver.ended("whole")["seconds"] + TIMEOUT + 5
    assert "rank 0 waited in vain for rank 1" in found["messages"][0]


@pytest.mark.slow
def test_an_error_while_a_save_is_under_way_is_told_and_kept(driver: Driver) -> None:
    found = driver.ended("raise_while_saving")
    assert found["codes"] == [1, 1]
    assert "a mistake in the model" in found["messages"][1]
    assert "rank 0 waited in vain for rank 1" in found["messages"][0]
    assert "which has ended" in found["messages"][0]


def test_the_first_error_is_told_by_the_rank_that_had_it(driver: Driver) -> None:
    assert "a mistake in the model" in driver.ended("raise")["messages"][1]


@pytest.mark.slow
def test_a_lack_of_memory_is_told_with_the_shape_of_the_batch(driver: Driver) -> None:
    lines = driver.ended("memory")["messages"][1].splitlines()
    assert "out of memory after step 4 on rank 1, with the batch batch (4, 6) float32" in lines[-1]


@pytest.mark.parametrize("name", cases(*(name for name, case in CASES.items() if case.resumed)))
def test_a_run_that_lost_a_rank_or_was_stopped_ends_as_if_nothing_had_happened(driver: Driver, name: str) -> None:
    assert_ends_as_if_nothing_had_happened(driver, name, "whole_divided" if "divided" in name else "whole")


@pytest.mark.parametrize("name", cases("terminate", "terminate_twice", "batch_system"))
def test_a_signal_to_one_rank_stops_all_at_the_same_step_with_the_state_saved(driver: Driver, name: str) -> None:
    found = driver.ended(name)
    assert found["codes"] == [PREEMPTED, PREEMPTED], found["messages"]
    assert "stopped at step 5" in found["messages"][0]
    assert found["saved"][-1] == 5
    assert found["marker"] == "5\n"
    assert not (driver.run(name) / "preempted").exists(), "the resumed run took it away"


@pytest.mark.parametrize("name", cases("nan", "nan_divided", "infinite_gradient"))
def test_a_number_that_is_not_finite_on_one_rank_is_skipped_by_all_and_told(driver: Driver, name: str) -> None:
    assert driver.ended(name)["codes"] == [0, 0]
    files = sorted((driver.run(name) / "bad_steps").iterdir())
    assert [path.name for path in files] == [f"step-00000005-rank-{rank}.json" for rank in range(2)]
    for rank, path in enumerate(files):
        assert json.loads(path.read_text())["samples"] == [f"{rank}/4/{row}" for row in range(4)]
    (alarm,) = read_log(driver.run(name), "alarm")
    assert alarm["step"] == 5
    losses = [record["loss"] for record in read_log(driver.run(name))]
    assert all(torch.isfinite(torch.tensor(losses[5:])))
    assert torch.isfinite(torch.cat([value.flatten() for value in driver.weights(name).values()])).all()


@pytest.mark.slow
def test_too_many_in_a_row_end_all_ranks_as_diverged(driver: Driver) -> None:
    found = driver.ended("always_nan")
    assert found["codes"] == [DIVERGED, DIVERGED]
    assert "in 3 steps in a row up to step 6" in found["messages"][0]
    assert saved(driver.run("always_nan"))[-1] == 4


@pytest.mark.parametrize("name", cases("other_seed", "other_batch"))
def test_ranks_started_differently_are_refused_and_the_fields_are_named(driver: Driver, name: str) -> None:
    fields = {"other_seed": "seed", "other_batch": "loop.accumulate, optim.lr"}[name]
    found = driver.ended(name)
    assert found["codes"] == [2, 2]
    for message in found["messages"]:
        assert f"rank 1 was started with other values of {fields} than rank 0" in message
    assert not driver.run(name).exists()


@pytest.mark.slow
def test_ranks_that_do_not_divide_are_refused_by_all(driver: Driver) -> None:
    found = driver.ended("indivisible")
    assert found["codes"] == [2, 2]
    assert "mesh.shard 3 does not divide the 2 ranks" in found["messages"][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "averaged"])
def test_what_divided_ranks_export_is_what_whole_ones_export(driver: Driver, name: str) -> None:
    left, right = driver.weights(name), driver.weights(f"{name}_divided")
    assert left.keys() == right.keys()
    for key, value in left.items():
        torch.testing.assert_close(right[key], value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(driver.weights("whole")["layers.0.weight"], driver.weights("averaged")["layers.0.weight"])


def test_no_process_is_left(driver: Driver) -> None:
    for path in driver.folder.glob("*.json"):
        for process in json.loads(path.read_text())["processes"]:
            assert not Path(f"/proc/{process}").exists()


def start_ranks(folder: Path, name: str, fault: str, more: tuple[str, ...]) -> dict[str, Any]:
    """Fork both ranks, wait for their ends; what is left after a while is killed, and told."""
    case, begun = CASES[name], time.monotonic()
    (port,) = free_ports(1)
    processes = []
    for rank in range(case.ranks):
        own = case.of_rank_1 if rank == 1 else ()
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port, "FAULT": fault}
        place["WORLD_SIZE"] = str(case.ranks)
        arguments = ["train", str(RECIPE), "--out", str(folder / name), *case.options, *more, *own]
        processes.append(fork_command(arguments, folder / f"{name}-{rank}.txt", place))
    codes = wait_for(processes, PATIENCE)
    left = [process for process in processes if process not in codes]
    for process in left:
        os.kill(process, signal.SIGKILL)
    codes |= wait_for(left, PATIENCE)
    return {
        "codes": [codes[process] for process in processes],
        "messages": [(folder / f"{name}-{rank}.txt").read_text() for rank in range(case.ranks)],
        "seconds": time.monotonic() - begun,
        "processes": processes,
    }


def run_case(folder: Path, name: str) -> None:
    """Start a case, and again if it is to be resumed; leaves what happened in a file."""
    case = CASES[name]
    found = start_ranks(folder, name, case.fault, ())
    run = folder / name / "faulty"
    marker = run / "preempted"
    found |= {"saved": saved(run), "exported": (run / "export").exists()}
    found["marker"] = marker.read_text() if marker.exists() else None
    if case.resumed or case.of_resumed:
        found["resumed"] = start_ranks(folder, name, case.of_resumed or "none:0:0", ("--resume",))
    (folder / f"{name}.json").write_text(json.dumps(found))


def main() -> None:
    """Run the cases that are asked for, a line each; answer when they are done."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        run_case(Path(sys.argv[1]), line.strip())
        print(line.strip(), flush=True)


if __name__ == "__main__":
    main()
