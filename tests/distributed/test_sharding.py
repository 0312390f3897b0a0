"""Divided weights (FSDP2), copies (DDP) and both (hybrid) learn what one process learns from the joined batch.

As a program this is one of the processes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.tensor import DTensor

from beit3.config import MeshConfig, OptimConfig, Run, replace
from beit3.data.shards import load_prepared
from beit3.data.transforms import EvalResize, Views
from beit3.errors import ConfigError
from beit3.pretrain.masked_batches import KINDS, MaskedBatch, join_batches
from beit3.pretrain.mixture import Mixture
from beit3.recipes import load_recipe
from beit3.train.distributed import Ranks, join_ranks
from beit3.train.optim import build_optimizer
from beit3.train.sharding import blocks_of, clip_and_measure, divide, gradients_stay, is_divided, lay_mesh, whole_state
from tests.conftest import Workspace
from tests.processes import run_ranks

pytestmark = pytest.mark.distributed
PARTS, STEPS = 4, 3
"""Parts of a step's batch, with different numbers of hidden words."""


@dataclass(frozen=True)
class Case:
    ranks: int
    mesh: MeshConfig
    accumulate: int = 1
    contrast: float = 1.0
    """The contrastive loss is not that of the joined batch where batches are accumulated."""
    optimizer: str = "adamw"
    dtype: torch.dtype = torch.float32
    compiled: bool = False


CASES = {
    "ddp": Case(2, MeshConfig()),
    "ddp_accumulated": Case(2, MeshConfig(), accumulate=2, contrast=0.0),
    "divided": Case(2, MeshConfig(shard=0)),
    "divided_accumulated": Case(2, MeshConfig(shard=0), accumulate=2, contrast=0.0),
    "divided_kept_gathered": Case(2, MeshConfig(shard=2, reshard=False)),
    "divided_offloaded": Case(2, MeshConfig(shard=0, offload=True)),
    "divided_muon": Case(2, MeshConfig(shard=0), optimizer="nmuon"),
    "divided_bf16": Case(2, MeshConfig(shard=0), dtype=torch.bfloat16),
    "divided_compiled": Case(2, MeshConfig(shard=0), compiled=True),
    "ddp_by_four": Case(4, MeshConfig()),
    "divided_by_four": Case(4, MeshConfig(shard=0)),
    "hybrid": Case(4, MeshConfig(shard=2)),
}


def build_task(contrast: float) -> Mixture:
    """Hidden parts, words and contrast in one: embeddings, experts, heads, and a temperature without a dimension."""
    torch.manual_seed(0)
    changes = {"objective.contrastive": contrast, "model.drop_path": 0.0, "model.activation_checkpointing": True}
    run = load_recipe("recipe:pretrain/mixture_emoji:debug")
    assert isinstance(run, Run)
    task = replace(run.task, **changes).build()
    assert isinstance(task, Mixture)
    return task


def parts_of_steps(task: Mixture) -> list[list[list[MaskedBatch]]]:
    """Steps of parts of pairs, images and texts."""
    random.seed(0)
    np.random.seed(0)
    look = EvalResize(task.config.model.image_size)
    encoders = [task.encoder(kind, lambda image: Views(look(image), None)) for kind in KINDS]
    stored = itertools.cycle(load_prepared(Path("data/pairs")))
    return [
        [
            [encoder.collate([encoder.encode(next(stored)) for _ in range(4)]) for encoder in encoders]
            for _ in range(PARTS)
        ]
        for _ in range(STEPS)
    ]


def joined(parts: Sequence[Sequence[MaskedBatch]]) -> MaskedBatch:
    """One batch, pairs first."""
    return join_batches([batch for kind in zip(*parts, strict=True) for batch in kind])


def learn(case: Case, ranks: Ranks) -> dict[str, Any]:
    """Some steps with clipping, layer decay and a moving average; one process takes the joined batch."""
    # A large epsilon: of gradients that are zero but for rounding (key biases), AdamW would make steps of full size.
    optim = OptimConfig(name=case.optimizer, lr=1e-2, weight_decay=0.1, layer_decay=0.8, eps=1e-2)
    task = build_task(case.contrast)
    steps = parts_of_steps(task)
    ema = ModelEmaV3(task, decay=0.5)
    alone = ranks.world_size == 1
    if case.compiled and not alone:
        task.compile()
    model = divide(task, MeshConfig() if alone else case.mesh, ranks, case.dtype)
    if is_divided(task):
        divide(ema.module, case.mesh, ranks, case.dtype)
    optimizer = build_optimizer(task, optim)
    norms, losses = [], []
    for parts in steps:
        share = PARTS // ranks.world_size
        own = parts[ranks.rank * share : (ranks.rank + 1) * share]
        window = [joined(own)] if alone or case.accumulate == 1 else [joined([part]) for part in own]
        total = torch.zeros(())
        for index, batch in enumerate(task.prepare_step(window)):
            autocast = torch.autocast("cpu", case.dtype, enabled=case.dtype != torch.float32)
            with gradients_stay(model, index < len(window) - 1), autocast:
                loss = model(batch)["loss"] / len(window)
            loss.backward()
            total += loss.detach()
        norms.append(clip_and_measure(task, 0.5))
        optimizer.step()
        optimizer.zero_grad()
        ema.update(task)
        losses.append(float(total))
    return {
        "state": whole(task),
        "ema": whole(ema.module),
        "norms": norms,
        "losses": losses,
        "held": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in task.parameters()),
        "plain": [name for name, p in task.named_parameters() if not isinstance(p, DTensor)],
    }


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    return whole_state(module) if is_divided(module) else dict(module.state_dict())


@pytest.fixture(scope="module")
def place(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes worked, and left what they found."""
    folder = tmp_path_factory.mktemp("sharding")
    workspace.link(folder)
    for size in (1, 2, 4):
        run_ranks(__file__, [], folder, size)
    return folder


def found(folder: Path, name: str, size: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}-{size}-{rank}.pt", weights_only=True) for rank in range(size)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_learn_what_one_process_learns_from_the_joined_batch(place: Path, name: str) -> None:
    case = CASES[name]
    (alone,) = found(place, name, 1)
    ranks = found(place, name, case.ranks)
    loose = case.dtype == torch.bfloat16
    for step in range(STEPS):
        mean = sum(rank["losses"][step] for rank in ranks) / len(ranks)
        assert mean == pytest.approx(alone["losses"][step], rel=2e-2 if loose else 1e-5), step
        for rank in ranks:
            assert rank["norms"][step] == pytest.approx(alone["norms"][step], rel=5e-2 if loose else 1e-4), step
    assert max(alone["norms"]) > 0.5, "clipping is met"
    for part in () if loose else ("state", "ema"):
        assert ranks[0][part].keys() == alone[part].keys()
        for key, value in alone[part].items():
            if key.endswith("qkv.bias") and case.optimizer != "adamw":
                continue  # Muon's own AdamW has no large epsilon
            tolerance = (2e-5 if case.optimizer == "adamw" else 1e-3) * max(1e-3, float(value.abs().max()))
            torch.testing.assert_close(ranks[0][part][key], value, rtol=0, atol=tolerance, msg=f"{part} {key}")


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].mesh.shard != 1])
def test_each_rank_holds_its_share_of_the_weights(place: Path, name: str) -> None:
    case = CASES[name]
    (alone,) = found(place, name, 1)
    size = case.mesh.shard or case.ranks
    ranks = found(place, name, case.ranks)
    assert sum(rank["held"] for rank in ranks[:size]) == pytest.approx(alone["held"], rel=1e-3)
    assert max(rank["held"] for rank in ranks) < 1.2 * alone["held"] / size
    assert ranks[0]["plain"] == ["dual.logit_scale"] * (case.contrast > 0), "a number cannot be divided"


def test_every_block_is_gathered_by_itself() -> None:
    model = nn.ModuleDict({"tower": nn.Module(), "blocks": nn.ModuleList([nn.Linear(2, 2)])})
    model["tower"].blocks = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    model["tower"].head = nn.Linear(2, 2)
    assert len(blocks_of(model)) == 3


def test_ranks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"mesh.shard 4 does not divide the 6 ranks"):
        lay_mesh(MeshConfig(shard=4), Ranks(0, 6, torch.device("cpu")))
    for mesh in (MeshConfig(shard=2), MeshConfig(shard=0, offload=True)):
        with pytest.raises(ConfigError, match="start with torchrun"):
            divide(nn.Linear(2, 2), mesh, Ranks(0, 1, torch.device("cpu")), torch.float32)


def main() -> None:
    torch.set_num_threads(1)
    with join_ranks("cpu", timeout=60) as ranks:
        for name, case in CASES.items():
            if ranks.world_size in (1, case.ranks):
                torch.save(learn(case, ranks), f"{name}-{ranks.world_size}-{ranks.rank}.pt")


if __name__ == "__main__":
    main()
