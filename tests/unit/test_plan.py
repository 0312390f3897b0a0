"""Plans: what they count is what real Tasks and optimizers have, and what is refused names a way out."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from beit3.cli import run_command
from beit3.config import OptimConfig, Run, replace
from beit3.errors import ConfigError
from beit3.model.heads import CODEBOOK_SIZE
from beit3.model.memory import FP32, BatchSizes, kept_bytes
from beit3.model.presets import model_config
from beit3.recipes import load_recipe
from beit3.scaling import (
    GIB,
    GPUS,
    OVERHEAD,
    SLACK,
    Cluster,
    assumed_share,
    count_parameters,
    fastest_fit,
    list_exchanges,
    make_plan,
    optimizer_bytes,
)

if TYPE_CHECKING:
    from tests.conftest import Workspace

PRETRAINING = ("mdm", "mixture", "beit2", "superclass", "contrastive", "clip", "siglip")
FINETUNING = ("imagenet", "vqav2", "nlvr2", "captioning", "retrieval")
PLANNED = [f"pretrain/{name}_base" for name in PRETRAINING] + [f"finetune/{name}_base" for name in FINETUNING]
SEPARATE_HEADS = "pretrain/mixture_base"
H100 = GPUS["h100"]


def recipe(address: str, **changes: Any) -> Run:
    run = load_recipe(f"recipe:{address}")
    assert isinstance(run, Run)
    return replace(run, **changes)


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
    ("name", "compiled", "plain"),
    [("base_patch16", 0.33, 0.25), ("large_patch16", 0.37, 0.30), ("giant_patch14", 0.43, 0.36)],
)
def test_the_assumed_speed_is_that_of_the_performance_model(name: str, compiled: float, plain: float) -> None:
    config = model_config(f"beit3_{name}_224")
    assert assumed_share(H100, config, bf16=True, compiled=True) == pytest.approx(compiled, abs=0.01)
    assert assumed_share(H100, config, bf16=True, compiled=False) == pytest.approx(plain, abs=0.01)


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


def test_bytes_between_gpus_are_those_of_ring_collectives() -> None:
    run = recipe("pretrain/mdm_base")
    counts = count_parameters(run.task.sizes, run.optim)
    (reduced,) = list_exchanges(run, counts, Cluster(H100, 8))
    assert reduced.sent == 2 * 7 / 8 * 4 * counts.trained
    gathered, scattered = list_exchanges(replace(run, **{"mesh.shard": 0}), counts, Cluster(H100, 8))
    assert scattered.sent == 7 / 8 * 4 * counts.trained
    assert gathered.sent == 7 / 8 * 2 * (2 * counts.parameters - counts.rest)
    kept, _ = list_exchanges(replace(run, **{"mesh.shard": 0, "mesh.reshard": False}), counts, Cluster(H100, 8))
    assert kept.sent == 7 / 8 * 2 * counts.parameters
    *_, between = list_exchanges(replace(run, **{"mesh.shard": 8}), counts, Cluster(H100, 32))
    assert between.sent == 2 * 3 / 4 * 4 * counts.trained / 8
    assert list_exchanges(run, counts, Cluster(H100, 1)) == []


def test_a_group_in_one_machine_uses_its_links_and_one_across_machines_the_network() -> None:
    sent = 1e9
    assert Cluster(H100, 8).seconds(sent, 8, 1, 0) == sent / (0.8 * H100.link)
    assert Cluster(H100, 64).seconds(sent, 64, 1, 0) == sent / (0.8 * 8 * H100.network)  # all cards of a machine
    assert Cluster(H100, 64).seconds(sent, 8, 8, 0) == sent / (0.8 * H100.network)  # one card each


def test_a_given_mfu_decides_the_time() -> None:
    run = recipe("pretrain/mdm_base")
    plan = make_plan(run, Cluster(H100, 1), mfu=0.25)
    assert plan.pace.compute == pytest.approx(run.task.sizes.flops / (0.25 * 989e12))
    assert plan.pace.mfu == pytest.approx(0.25)
    assert plan.measured
    assert plan.seconds == pytest.approx(1_000_000 * plan.pace.step)


def test_recomputation_costs_a_forward_pass_and_tokens_of_pictures_are_no_useful_work() -> None:
    run = recipe("pretrain/superclass_base", **{"task.model.activation_checkpointing": False})
    again = replace(run, **{"task.model.activation_checkpointing": True})
    plain, recomputed = (make_plan(one, Cluster(H100, 64)).pace for one in (run, again))
    assert recomputed.compute / plain.compute == pytest.approx(4 / 3, rel=0.01)
    assert recomputed.mfu < plain.mfu
    online = make_plan(recipe("pretrain/beit2_base"), Cluster(H100, 64)).pace
    assert online.extra["visual tokens"] / online.compute == pytest.approx(1 / 4.6, rel=0.05)


def test_a_step_takes_at_least_as_long_as_starting_its_kernels() -> None:
    run = recipe("pretrain/mdm_base", **{"loop.num_workers": 1})
    pace = make_plan(run, Cluster(H100, 2048)).pace
    assert pace.step >= pace.launches > pace.compute


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--gpus 96", "pairs.batch_size 2048 does not divide by 96 GPUs: use 64 or 128 GPUs"),
        ("--gpus 1024", "use --loop.num-workers 2"),
        ("--gpus 64 --mesh.shard 12", "mesh.shard 12 does not divide 64 GPUs"),
        ("--gpus 1 --mesh.shard 8", "mesh.shard 8 does not divide 1 GPUs"),
        ("--gpus 0", "--gpus must be at least 1"),
        ("", "--gpus N"),
        ("--gpus 8 --mfu 33", "--mfu is a share"),
        ("--gpus 8 --loop.stepz 3", "did you mean --loop.steps?"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", "recipe:pretrain/mdm_base", *arguments.split()]) == 2
    message = capsys.readouterr().err
    assert told in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("address", ["finetune/ade20k_base", "tokenizers/vqkd_base", "tokenizers/text_64k"])
def test_tasks_that_are_not_counted_are_refused(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    for fit in ([], ["--fit"]):
        assert run_command(["plan", f"recipe:{address}", "--gpus", "8", *fit]) == 2
        assert "plan" in capsys.readouterr().err


@pytest.mark.parametrize(("variant", "gpus", "gpu"), [(":large", 8, "h100"), (":giant", 8, "l40s"), ("", 1, "l40s")])
def test_a_refusal_names_settings_that_fit(
    variant: str, gpus: int, gpu: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", f"recipe:pretrain/mdm_base{variant}", "--gpus", str(gpus), "--gpu", gpu]
    assert run_command(command) == 2
    message = capsys.readouterr().err
    named = re.search(r"GiB a GPU, \d[\d,]* more than there are: (--.*) fits, with (\d+) GiB", message)
    assert named is not None
    assert run_command([*command, *named[1].split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["total"] <= found["gpu_memory"]
    assert round(found["memory"]["total"] / GIB) == int(named[2])


def test_negatives_are_never_given_up_to_fit() -> None:
    assert fastest_fit(recipe("pretrain/clip_base:large"), Cluster(H100, 1)) is None
    plan = fastest_fit(recipe("pretrain/clip_base:large"), Cluster(H100, 16))
    assert plan is None or "loop.accumulate" not in plan.changes


def test_the_page_says_what_is_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", "recipe:pretrain/mdm_base:giant", "--gpus", "16", "--fit"]) == 0
    page = capsys.readouterr().out
    for words in ("memory of a GPU", "assumed, not measured", "checkpoint", "pictures needed", "a failure"):
        assert words in page
    assert max(map(len, page.splitlines())) <= 120
    assert len(page.splitlines()) < 50


def test_the_tables_of_the_guide_are_what_is_printed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guide = (root / "docs" / "scaling.md").read_text(encoding="utf-8")
    found = re.findall(r"```bash\nbeit3 (plan [^\n]*)\n```\n\n((?:\|[^\n]*\n)+)", guide)
    assert len(found) == 3
    for command, table in found:
        assert run_command(shlex.split(command)) == 0
        assert capsys.readouterr().out == table


def test_nothing_is_planned_for_tasks_without_sizes() -> None:
    with pytest.raises(ConfigError, match="SegmentationConfig"):
        make_plan(recipe("finetune/ade20k_base"), Cluster(H100, 8))
