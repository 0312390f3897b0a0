"""Time of a step: computation, kernels, and bytes between GPUs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from beit3.config import replace
from beit3.model.presets import model_config
from beit3.model.transformer import MultiwayTransformer
from beit3.plan.fit import make_plan
from beit3.plan.footprint import count_parameters
from beit3.plan.gpus import Cluster
from beit3.plan.pace import assumed_share, list_exchanges
from tests.unit.plan.conftest import H100, recipe


def test_the_assumed_speed_is_the_roofline_of_the_guide(root: Path) -> None:
    found = re.search(
        r"products at (\d+) % of the peak, all other kernels at (\d+) % of the memory bandwidth, (\d+) bytes for each "
        r"feature of a token in a layer, or (\d+) with `--loop.compile`; on an H100 that is an MFU of "
        r"([\d.]+), ([\d.]+) and ([\d.]+) for base, large and giant, or ([\d.]+), ([\d.]+) and ([\d.]+) compiled",
        " ".join((root / "docs" / "scaling.md").read_text(encoding="utf-8").split()),
    )
    assert found is not None
    products, others, *moved = map(int, found.groups()[:4])
    for compiled, told in enumerate((found.groups()[4:7], found.groups()[7:])):
        for size, mfu in zip(("base_patch16", "large_patch16", "giant_patch14"), told, strict=True):
            config = model_config(f"beit3_{size}_224", attention="decoupled", fusion_layers=0)
            with torch.device("meta"):
                block = MultiwayTransformer(config).blocks[0]
            matrices = sum(one.numel() for one in block.parameters() if one.ndim == 2) / 2  # a token meets one of two
            peak = 2 * matrices / 989e12  # seconds
            seconds = peak / (products / 100) + moved[compiled] * config.width / (others / 100 * 3.35e12)
            share = assumed_share(H100, config, bf16=True, compiled=bool(compiled))
            assert share == pytest.approx(peak / seconds)
            assert f"{share:.2f}" == mfu


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
