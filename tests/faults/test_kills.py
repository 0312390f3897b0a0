"""Runs killed at any moment, in any phase, end with the bytes and samples of the run that nobody killed.

As a program (`test_kills.py FOLDER KILLS`) this is the driver that forks, kills and resumes the ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from beit3.train.checkpoint import list_checkpoints
from beit3.train.log import read_log
from tests.faults.ledger import in_order_of_streams, read_ledger
from tests.processes import environment, fork_command, free_ports, wait_for

pytestmark = pytest.mark.distributed
RECIPE = Path(__file__).with_name("ledger.py")
_LONGEST = 120.0
"""Seconds after which ranks that should have ended hang."""


def drive(folder: Path, *arguments: str, seconds: float) -> None:
    subprocess.run([sys.executable, __file__, *arguments], check=True, timeout=seconds, cwd=folder, env=environment())


def digest_of(run: Path, scratch: Path) -> str:
    """Of weights, optimizer and moving average in the last checkpoint, and of the exported file."""
    newest = list_checkpoints(run / "checkpoints")[-1]
    dcp_to_torch_save(newest, scratch)
    found = hashlib.sha256((run / "export" / "model.safetensors").read_bytes())
    pending: list[tuple[str, Any]] = [("", torch.load(scratch, weights_only=False))]
    while pending:
        name, value = pending.pop()
        if isinstance(value, torch.Tensor):
            found.update(name.encode() + value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            pending += sorted(((f"{name}/{key}", item) for key, item in value.items()), key=lambda item: item[0])
    return found.hexdigest()


@pytest.mark.parametrize(
    "kills", [pytest.param(4, id="4"), pytest.param(100, id="100", marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]
)
def test_kills_lose_no_sample_repeat_none_and_change_nothing(place: Path, kills: int) -> None:
    drive(place, str(place), str(kills), seconds=280 if kills < 10 else 2900)
    told = json.loads((place / "kills.json").read_text())
    assert sum(run["kills"] for run in told["runs"]) == kills
    assert told["hung"] == 0
    whole = place / "out" / "whole"
    right = [read_ledger(whole, rank) for rank in range(2)]
    for run in told["runs"]:
        folder = place / "out" / run["name"]
        assert digest_of(folder, place / "scratch.pt") == digest_of(whole, place / "scratch.pt")
        for rank in range(2):
            assert read_ledger(folder, rank) == right[rank], "samples of every draw, none lost, none twice"
        assert [record["loss"] for record in read_log(folder)] == [record["loss"] for record in read_log(whole)]
        assert not list((folder / "checkpoints").glob("*.tmp-*"))


def test_one_two_and_one_ranks_draw_the_same_samples_and_learn_the_same(place: Path) -> None:
    """Global batch constant, ranks x data processes constant: 1 x 2, 2 x 1, 1 x 2."""
    drive(place, str(place), "elastic", seconds=280)
    whole = read_ledger(place / "out" / "whole", 0)
    first, second = (read_ledger(place / "out" / "chain", rank) for rank in range(2))
    assert len(whole) == 20
    for draw, keys in whole.items():
        together = first[draw] if draw not in second else in_order_of_streams(first[draw], second[draw])
        assert together == keys, draw
    assert set(second) == set(range(8, 15))
    losses = [[record["loss"] for record in read_log(place / "out" / name)] for name in ("whole", "chain")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def start(name: str, size: int, *more: str, stop_at: int = 0) -> list[int]:
    """Fork the ranks of a run."""
    (port,) = free_ports(1)
    ranks = []
    for rank in range(size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port, "STOP_AT": stop_at}
        arguments = ["train", str(RECIPE), "--name", name, "--out", "out", "--resume", *more]
        said = Path(f"{name}-{rank}.txt")
        ranks.append(fork_command(arguments, said, {key: str(value) for key, value in place.items()}))
    return ranks


def kill(ranks: list[int]) -> None:
    """The ranks with their data processes."""
    for process in ranks:
        try:
            os.killpg(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def kill_and_resume(kills: int, length: tuple[str, ...]) -> dict[str, Any]:
    """Kill runs in any phase until there were enough kills; the last run goes to its end."""
    draw = random.Random(0)
    runs: list[dict[str, Any]] = []
    done = hung = 0
    finished = True
    while done < kills or not finished:
        if finished:
            runs.append({"name": f"run-{len(runs)}", "kills": 0})
        ranks = start(runs[-1]["name"], 2, *length)
        # Half of the kills fall into the start, half into training, of which saving is a good part.
        moment = draw.uniform(0, 1.5) if draw.random() < 0.5 else draw.uniform(1.5, 5)
        codes = wait_for(ranks, moment if done < kills else _LONGEST)
        if len(codes) < len(ranks):
            left = [process for process in ranks if process not in codes]
            victims = left if draw.random() < 0.5 else [draw.choice(left)]
            kill(victims)
            runs[-1]["kills"] += 1
            done += 1
            codes |= wait_for([process for process in ranks if process not in codes], _LONGEST)
            hung += len(codes) < len(ranks)
            kill(ranks)
        finished = list(codes.values()) == [0, 0]
    return {"runs": runs, "hung": hung}


def main() -> None:
    torch.set_num_threads(1)
    os.chdir(sys.argv[1])
    if sys.argv[2] == "elastic":
        short = ("--loop.steps", "20", "--loop.num-workers")
        assert wait_for(ranks := start("whole", 1, *short, "2"), _LONGEST) == dict.fromkeys(ranks, 0)
        for size, workers, stop_at, code in ((1, "2", 7, 75), (2, "1", 14, 75), (1, "2", 0, 0)):
            ranks = start("chain", size, *short, workers, stop_at=stop_at)
            assert wait_for(ranks, _LONGEST) == dict.fromkeys(ranks, code)
        return
    kills = int(sys.argv[2])
    length = ("--loop.steps", str(3 * kills + 60))
    assert wait_for(ranks := start("whole", 2, *length), 4 * _LONGEST) == dict.fromkeys(ranks, 0)
    Path("kills.json").write_text(json.dumps(kill_and_resume(kills, length)))


if __name__ == "__main__":
    main()
