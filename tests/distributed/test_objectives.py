"""Two processes count, weigh and wait as one: SuperClass, mixtures, detection, and evaluation on one rank.

As a program (`test_objectives.py PORT ...`) this is one of the two processes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from beit3.pretrain.subword_loss import SubwordLoss, join_words
from beit3.train import distributed
from beit3.train.log import read_log
from tests.conftest import Workspace
from tests.processes import free_ports, in_group, run_ranks, trained_weights

pytestmark = pytest.mark.distributed
WORDS = 9
CAPTIONS = [[1, 4, 4], [2], [], [4, 2, 7], [0, 8], [], [1], [5, 4, 3, 2]]
RECIPES = {
    "superclass": "pretrain/superclass_emoji",
    "mixture": "pretrain/mixture_emoji",
    "detection": "finetune/detection_emoji",
    "segmentation": "finetune/segmentation_emoji",
}
DENSE = ["--data", "data/coco", "--task.batch-size", "4"]


def logits() -> torch.Tensor:
    return torch.randn(len(CAPTIONS), WORDS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def subword_step(own: list[slice]) -> dict[str, torch.Tensor]:
    """Counts, loss and gradient of a step of several batches, averaged as the loop and DistributedDataParallel do."""
    criterion = SubwordLoss(WORDS)
    values = logits().requires_grad_()
    criterion.count([join_words(CAPTIONS[part]) for part in own])
    losses = [criterion(values[part], join_words(CAPTIONS[part]))["loss"] / len(own) for part in own]
    loss = torch.stack(losses).sum()
    (gradient,) = torch.autograd.grad(loss, values)
    if dist.is_initialized():
        loss = loss.detach() / dist.get_world_size()
        for tensor in (loss, gradient):
            dist.all_reduce(tensor)
        gradient = gradient / dist.get_world_size()
    return {"loss": loss.detach(), "gradient": gradient, "df": criterion.document_frequency}


def wait_for_a_slow_rank(rank: int) -> bool:
    """Rank 0 evaluates for longer than ranks may wait for each other while they train."""
    with distributed.join_ranks("cpu", timeout=2) as ranks:
        if rank == 0:
            time.sleep(4)
        ranks.barrier()
    return True


def parts(rank: int) -> dict[str, Callable[[], Any]]:
    own = [slice(0, 2), slice(2, 3)] if rank == 0 else [slice(3, 5), slice(5, 8)]
    return {
        "subword": lambda: in_group(lambda: subword_step(own)),
        "patience": lambda: wait_for_a_slow_rank(rank),
        **{
            name: partial(trained_weights, [f"recipe:{place}:debug", *(DENSE if place.startswith("finetune") else [])])
            for name, place in RECIPES.items()
        },
    }


@pytest.fixture(scope="module")
def place(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes worked, and left what they found."""
    folder = tmp_path_factory.mktemp("objectives")
    workspace.link(folder)
    run_ranks(__file__, free_ports(len(parts(0))), folder, 2)
    return folder


def found(place: Path, part: str) -> tuple[Any, Any]:
    first, second = (torch.load(place / f"{part}-{rank}.pt", weights_only=True) for rank in range(2))
    return first, second


def test_two_ranks_count_documents_as_one_process_does(place: Path) -> None:
    first, second = found(place, "subword")
    whole = subword_step([slice(0, 8)])
    for rank in (first, second):
        assert torch.equal(rank["df"], whole["df"])
        torch.testing.assert_close(rank["loss"], whole["loss"], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(rank["gradient"], whole["gradient"], rtol=1e-6, atol=1e-7)


def test_a_long_evaluation_on_one_rank_is_waited_for(place: Path) -> None:
    assert found(place, "patience") == (True, True)


@pytest.mark.parametrize("part", RECIPES)
def test_an_objective_trains_on_two_ranks_and_they_end_equal(place: Path, part: str) -> None:
    first, second = found(place, part)
    assert first.keys() == second.keys()
    for name, value in first.items():
        own = "running_" in name  # statistics of batch norms, of which the first rank's are kept
        assert own or torch.equal(value, second[name]), name
    counted = [int(value) for name, value in first.items() if name.endswith("num_documents")]
    assert counted == {"superclass": [16], "mixture": [8]}.get(part, [])
    run = f"{Path(RECIPES[part]).name}_debug"
    assert read_log(place / "ddp" / run)[-1]["step"] == 2


def main() -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    for port, (name, part) in zip(sys.argv[1:], parts(rank).items(), strict=True):
        os.environ["MASTER_PORT"] = port
        torch.save(part(), f"{name}-{rank}.pt")


if __name__ == "__main__":
    main()
