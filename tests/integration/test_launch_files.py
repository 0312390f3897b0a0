"""The launch files start what they say: run under stand-ins of the launchers, which note how they were called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

SLURM = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4"}
SKY = {
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_NODE_RANK": "1",
}
RESUMED = ["-m", "beit3", "train", "recipe:pretrain/mdm_large", "--mesh.shard", "8", "--name", "big", "--out"]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Stand-ins: srun runs what it is given, scontrol knows two hosts, torchrun ends as the test says."""
    folder = tmp_path / "programs"
    folder.mkdir()
    bodies = {
        "srun": 'exec "$@"',
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol.txt; [ "$1" = show ] && printf "n1\\nn2\\n"; true',
        "torchrun": f'printf "%s\\n" "$@" > {tmp_path}/torchrun.txt; eval "$END"',
    }
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def start(script: list[str], programs: Path, end: str, **environment: str) -> int:
    path = f"{programs}:{os.environ['PATH']}"
    done = subprocess.run(
        script, cwd=programs.parent, env={**os.environ, "PATH": path, "END": end, **environment}, check=False
    )
    return done.returncode


def test_slurm_starts_torchrun_on_all_nodes_with_resume(root: Path, programs: Path) -> None:
    script = [
        "bash",
        str(root / "examples" / "launch" / "slurm.sbatch"),
        "recipe:pretrain/mdm_large",
        "--mesh.shard",
        "8",
    ]
    assert start(script, programs, "kill -USR1 $$; exit 0", RUN="big", **SLURM) == 0, "the warning is ignored"
    given = (programs.parent / "torchrun.txt").read_text().splitlines()
    assert given[:2] == ["--nnodes=2", "--nproc-per-node=4"]
    assert "--rdzv-endpoint=n1:29500" in given
    assert given[-len(RESUMED) - 2 :] == [*RESUMED, "runs", "--resume"]
    assert "requeue" not in (programs.parent / "scontrol.txt").read_text()


def test_a_stopped_job_is_queued_again_and_a_failed_one_is_not(root: Path, programs: Path) -> None:
    script = ["bash", str(root / "examples" / "launch" / "slurm.sbatch"), "recipe:pretrain/mdm_large"]
    stopped = "mkdir -p runs/big; echo 5 > runs/big/preempted; exit 1"
    assert start(script, programs, stopped, RUN="big", **SLURM) == 0
    assert "requeue 7" in (programs.parent / "scontrol.txt").read_text()
    (programs.parent / "scontrol.txt").unlink()
    assert start(script, programs, "exit 3", RUN="big", **SLURM) == 3, "the marker is of the earlier start"
    assert "requeue" not in (programs.parent / "scontrol.txt").read_text()


def test_a_job_without_a_name_is_refused(root: Path, programs: Path) -> None:
    assert start(["bash", str(root / "examples" / "launch" / "slurm.sbatch"), "x"], programs, "exit 0", **SLURM) != 0


def test_the_cloud_launcher_starts_torchrun_on_all_nodes_with_resume(root: Path, programs: Path) -> None:
    described = yaml.safe_load((root / "examples" / "launch" / "skypilot.yaml").read_text())
    environment = {**SKY, **described["envs"], "RUN": "big", "RECIPE": "recipe:pretrain/mdm_large"}
    assert start(["bash", "-c", described["run"]], programs, "exit 0", **environment) == 0
    given = (programs.parent / "torchrun.txt").read_text().splitlines()
    assert given[:5] == [
        "--nnodes=2",
        "--nproc-per-node=8",
        "--node-rank=1",
        "--master-addr=10.0.0.1",
        "--master-port=29500",
    ]
    assert given[5:] == [*RESUMED, "/runs", "--data", "/data", "--resume"]
