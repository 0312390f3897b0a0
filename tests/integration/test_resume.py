"""An interrupted run ends as if nothing had happened: weights, optimizer and exported file, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from beit3.cli import run_command
from beit3.pretrain.masked_data_modeling import MaskedDataModeling
from beit3.train.checkpoint import list_checkpoints
from beit3.train.log import read_log
from tests.conftest import Workspace

Start = Callable[..., subprocess.Popen[str]]
STEPS = 20
TRAIN = ["train", "recipe:pretrain/mdm_emoji:debug", "--device", "cpu", "--precision", "fp32", "--name", "run"]
TRAIN += ["--loop.steps", str(STEPS), "--loop.save-every", "4", "--loop.log-every", "1", "--optim.ema-decay", "0.9"]
UNLOGGED = {"images_per_second", "tokens_per_second", "tflops", "mfu", "seconds"}


@pytest.fixture(scope="module")
def whole(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    workspace.link(folder)
    before, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(folder)
    torch.set_num_threads(1)
    try:
        assert run_command(TRAIN) == 0
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)
    return folder / "runs" / "run"


def tensors(value: Any, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of a nested state, by name."""
    if isinstance(value, Tensor):
        yield where, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from tensors(item, f"{where}/{name}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors(item, f"{where}/{index}")


def final_state(run: Path, scratch: Path) -> dict[str, Tensor]:
    newest = list_checkpoints(run / "checkpoints")[-1]
    assert newest.name == f"step-{STEPS:08d}"
    dcp_to_torch_save(newest, scratch)
    return dict(tensors(torch.load(scratch, weights_only=False)))


def assert_equal_runs(run: Path, whole: Path, scratch: Path) -> None:
    assert (run / "export/model.safetensors").read_bytes() == (whole / "export/model.safetensors").read_bytes()
    left, right = final_state(run, scratch / "left.pt"), final_state(whole, scratch / "right.pt")
    assert left.keys() == right.keys()
    assert any("exp_avg" in name for name in left)
    assert any("/ema" in name for name in left)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
    logs = [
        [{name: value for name, value in record.items() if name not in UNLOGGED} for record in read_log(folder)]
        for folder in (run, whole)
    ]
    assert len(logs[0]) == STEPS
    assert logs[0] == logs[1]


@pytest.mark.distributed
def test_resume_in_a_fresh_process_is_bit_identical(
    whole: Path, place: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    work = MaskedDataModeling.work

    def stop_at_7(self: MaskedDataModeling, batch: Any) -> Any:
        nonlocal count
        count += 1
        if count == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return work(self, batch)

    monkeypatch.setattr(MaskedDataModeling, "work", stop_at_7)
    assert run_command(TRAIN) == 75
    assert list_checkpoints(place / "runs/run/checkpoints")[-1].name == "step-00000007"
    process = start(["-m", "beit3", *TRAIN, "--resume"], place)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert_equal_runs(place / "runs" / "run", whole, place)
