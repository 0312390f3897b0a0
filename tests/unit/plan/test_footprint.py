"""Memory of a GPU: what is counted is what real Tasks and optimizers have."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from beit3.config import OptimConfig, Run, replace
from beit3.errors import ConfigError
from beit3.model.heads import CODEBOOK_SIZE
from beit3.model.memory import FP32, BatchSizes, kept_bytes
from beit3.plan.fit import make_plan
from beit3.plan.footprint import OVERHEAD, SLACK, count_parameters, optimizer_bytes
from beit3.plan.gpus import Cluster
from tests.conftest import Workspace
from tests.unit.plan.conftest import H100, recipe

PRETRAINING = ("mdm", "mixture", "beit2", "superclass", "contrastive", "clip", "siglip")
FINETUNING = ("imagenet", "vqav2", "nlvr2", "captioning", "retrieval")
PLANNED = [f"pretrain/{name}_base" for name in PRETRAINING] + [f"finetune/{name}_base" for name in FINETUNING]
SEPARATE_HEADS = "pretrain/mixture_base"


def tiny(address: str) -> tuple[Run, BatchSizes]:
    """The debug variant with texts as short as the workspace's, and its sizes with the workspace's 24 codes."""
    texts = {"task.max_text_length": 12} if hasattr(recipe(f"{address}:debug").task, "max_text_length") else {}
    shape = {"task.model.width": 64, "task.model.ffn_width": 256, "task.model.vocab_size": 420}
    run = recipe(f"{address}:debug", **shape, **texts)
    sizes = run.task.sizes
    heads = [dataclasses.replace(head, classes=24) if head.classes == CODEBOOK_SIZE else head for head in sizes.heads]
    return run, dataclasses.replace(sizes, heads=tuple(heads))


@pytest.mark.parametrize("address", PLANNED)
def test_sizes_are_those_of_the_real_task(address: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace.folder)
    run, sizes = tiny(address)
    task = run.task.in_folder(run.data).build().train()
    prefix = "" if address == SEPARATE_HEADS else "model."
    counted = {prefix + name for name, value in sizes.build().named_parameters() if value.requires_grad}
    assert counted == {name for name, value in task.named_parameters() if value.requires_grad}
    (batch,) = task.prepare_step([next(iter(task.train_loader(run, 0, 1)))])
    weights = {parameter.untyped_storage()._cdata for parameter in task.parameters()}
    storages: dict[int, Any] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        storages[saved.untyped_storage()._cdata] = saved.untyped_storage()
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved):
        task(batch)
    kept = sum(storage.nbytes() for place, storage in storages.items() if place not in weights)
    assert kept_bytes(sizes, FP32) == pytest.approx(kept, rel=0.1)
    assert sizes.flops == pytest.approx(task.work(batch).flops, rel=0.1)


@pytest.mark.parametrize("address", PLANNED)
def test_planning_needs_no_files(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = make_plan(recipe(address), Cluster(H100, 64))
    assert plan.counts.parameters > 1e8
    assert plan.memory.total > 3e9
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        (OptimConfig(), (8, 8)),
        (OptimConfig(name="muon"), (4, 8)),
        (OptimConfig(name="momentum"), (4, 4)),
        (OptimConfig(name="lion"), (4, 4)),
    ],
    ids=["adamw", "muon", "momentum", "lion"],
)
def test_optimizers_are_asked_what_they_keep(optim: OptimConfig, expected: tuple[float, float]) -> None:
    assert optimizer_bytes(optim) == expected


def test_states_take_sixteen_bytes_a_parameter_and_divide() -> None:
    run = recipe("pretrain/mdm_base:large", **{"loop.accumulate": 2})
    counts = count_parameters(run.task.sizes, run.optim)
    alone = make_plan(run, Cluster(H100, 1)).memory.parts
    states = ("weights", "gradients", "optimizer (adamw)")
    assert sum(alone[name] for name in states) == 16 * counts.parameters
    assert "DDP's gradient buckets" not in alone
    whole = make_plan(run, Cluster(H100, 8)).memory.parts
    assert whole["DDP's gradient buckets"] == 4 * counts.trained
    divided = make_plan(replace(run, **{"mesh.shard": 8}), Cluster(H100, 32)).memory.parts
    assert divided["weights"] * 8 == alone["weights"]
    assert divided["optimizer (adamw)"] * 8 == alone["optimizer (adamw)"]
    assert divided["gradients"] == 4 * counts.trained * (1 + 1 / 8)  # whole ones until the step's last batch


def test_reserves_are_added_once() -> None:
    plan = make_plan(recipe("pretrain/mdm_base"), Cluster(H100, 64))
    assert plan.memory.parts["CUDA and NCCL"] == OVERHEAD
    assert plan.memory.total == sum(plan.memory.parts.values())
    assert plan.memory.parts["activations"] > (1 + SLACK) * kept_bytes(plan.sizes.of_rank(64), FP32) / 2


def test_offloaded_states_lie_in_the_machines_memory() -> None:
    run = recipe("pretrain/mdm_base:large", **{"mesh.shard": 0, "mesh.offload": True})
    memory = make_plan(run, Cluster(H100, 64)).memory
    counts = count_parameters(run.task.sizes, run.optim)
    assert "weights" not in memory.parts
    assert memory.host * 64 == pytest.approx(16 * counts.parameters)


def test_states_of_one_gpu_cannot_be_offloaded() -> None:
    run = recipe("pretrain/mdm_base:large", **{"mesh.shard": 0, "mesh.offload": True})
    with pytest.raises(ConfigError, match=r"mesh.offload needs weights divided"):
        make_plan(run, Cluster(H100, 1))
