"""Processes that tests start: ranks of a group, and forked children. No test of its own.

A program among the tests finds this module, as it finds the others, by `environment`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from beit3.cli import run_command
from beit3.train import loop

T = TypeVar("T")


def free_ports(count: int) -> list[str]:
    """Different ports of this machine at which nobody listens."""
    with ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in sockets]


def environment(**more: str) -> dict[str, str]:
    """Of a program: one thread, ranks that meet on this machine, and the repository to import from."""
    own = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    return {**os.environ, **own, **more}


def run_ranks(script: str | Path, arguments: list[str], folder: Path, size: int) -> None:
    """Run a script as every rank of a group, as torchrun would; all have to end well."""
    (port,) = free_ports(1)
    group = {"MASTER_PORT": port, "WORLD_SIZE": str(size)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            cwd=folder,
            env=environment(**group, RANK=str(rank), LOCAL_RANK=str(rank)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [process.communicate(timeout=240)[1][-1500:] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * size, "\n".join(said)


def fork_command(arguments: list[str], said: Path, own: Mapping[str, str]) -> int:
    """Run a command of `beit3` in a forked child, with data processes a group; what it says goes behind a file's end.

    Whoever forks must have started no threads.
    """
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.environ.update(own)
        for stream in (1, 2):
            os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
        code = 1
        try:
            code = run_command(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def wait_for(children: Collection[int], seconds: float, *, stopped: bool = False) -> dict[int, int]:
    """Exit codes of the forked children that ended in time, minus the signal for those that one ended.

    With `stopped`, a child that a signal stopped counts as well.
    """
    deadline, codes = time.monotonic() + seconds, dict[int, int]()
    while len(codes) < len(children) and time.monotonic() < deadline:
        for child in set(children) - codes.keys():
            found, status = os.waitpid(child, os.WNOHANG | (os.WUNTRACED if stopped else 0))
            if found:
                codes[child] = -signal.SIGSTOP if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return codes


def in_group(part: Callable[[], T]) -> T:
    """Do something under the process group that the environment describes."""
    dist.init_process_group("gloo")
    try:
        return part()
    finally:
        dist.destroy_process_group()


def trained_weights(arguments: list[str]) -> dict[str, Tensor]:
    """Train through the command line, on the CPU; into `ddp`; this rank's weights as they were last saved."""
    kept: dict[str, Tensor] = {}
    save = loop._save

    def keep_and_save(trainer: loop.Trainer, *rest: Any, **options: Any) -> None:
        kept.update({name: value.clone() for name, value in trainer.task.state_dict().items()})
        save(trainer, *rest, **options)

    loop._save = keep_and_save
    try:
        assert run_command(["train", *arguments, "--device", "cpu", "--precision", "fp32", "--out", "ddp"]) == 0
    finally:
        loop._save = save
    return kept
