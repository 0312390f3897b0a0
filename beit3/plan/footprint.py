"""What a run keeps on one GPU.

Parameters are counted on the very networks, without numbers; what the optimizer holds is asked of it; activations come
from `beit3.model.memory`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from beit3.config import OptimConfig, Run
from beit3.model.memory import BatchSizes, Numbers, bytes_after_backward, bytes_before_backward, cast_bytes
from beit3.plan.gpus import GIB
from beit3.tokenizer.vqkd import VQKD, vqkd_config
from beit3.train.optim import build_optimizer
from beit3.train.sharding import blocks_of

OVERHEAD = 1.5 * GIB
"""Assumed for the CUDA context, cuBLAS workspaces and NCCL's buffers."""
SLACK = 0.1
"""Assumed share of activations and working memory that the allocator loses to fragments, as text lengths vary."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Parameters of a run's networks."""

    parameters: int
    trained: int
    optimizer: float
    """Bytes of the optimizer's state."""
    casts: tuple[int, int]
    """Bytes of autocast's copies of matrices: of all, and of those outside of blocks."""
    block: int
    """Parameters of the largest block that is gathered at once."""
    rest: int
    """Parameters outside of blocks, which stay gathered through a step."""
    num_blocks: int
    largest: int
    """Parameters of the largest tensor that is trained."""
    frozen: int
    """Parameters of the visual tokenizer."""


def count_parameters(sizes: BatchSizes, optim: OptimConfig) -> Counts:
    """Count what a run trains, on networks without numbers."""
    with torch.device("meta"):
        model = sizes.build()
        frozen = 0
        if sizes.tokenizer is not None:
            shape = sizes.tokenizer.model
            config = vqkd_config(
                "vqkd_base_clip", decoder_depth=3, image_size=shape.image_size, patch_size=shape.patch_size
            )
            frozen = _size(VQKD(config))
    blocks = [_size(block) for block in blocks_of(model)]
    trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    inside, outside = optimizer_bytes(optim)
    matrices = sum(one.numel() for name, one in trained if "blocks." in name and one.ndim >= 2)
    total = sum(one.numel() for _, one in trained)
    return Counts(
        parameters=_size(model),
        trained=total,
        optimizer=inside * matrices + outside * (total - matrices),
        casts=cast_bytes(model),
        block=max(blocks, default=0),
        rest=_size(model) - sum(blocks),
        num_blocks=max(1, len(blocks)),
        largest=max((one.numel() for _, one in trained), default=0),
        frozen=frozen,
    )


def _size(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())


class _TwoMatrices(nn.Module):
    """One matrix inside a block and one outside, for which optimizers may keep different things."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(64, 64, bias=False)])
        self.head = nn.Linear(64, 64, bias=False)

    def no_weight_decay(self) -> set[str]:
        """Nothing: it makes no difference to what is kept."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Where the number of a block stands in its parameters' names."""
        return {"blocks": r"blocks\.(\d+)\."}


def optimizer_bytes(optim: OptimConfig) -> tuple[float, float]:
    """Bytes that the optimizer keeps of a number in a block's matrix, and of any other: asked of the optimizer."""
    model = _TwoMatrices()
    optimizer = build_optimizer(model, optim)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = []
    for parameter in model.parameters():
        kept = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
        found.append(sum(value.nbytes for value in kept if value.numel() > 1) / parameter.numel())
    return found[0], found[1]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU where it is fullest."""

    parts: Mapping[str, float]
    """They add up to `total`."""
    aside: Mapping[str, float]
    """What is there at another moment, in place of something larger."""
    host: float = 0.0
    """In the memory of the machine, for each GPU."""

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(self.parts.values())


def count_memory(
    run: Run, sizes: BatchSizes, counts: Counts, gpus: int, numbers: Numbers, *, reserves: bool = True
) -> Memory:
    """Bytes on one GPU.

    Args:
        run: optimizer, mesh and accumulation.
        sizes: one GPU's share of a batch.
        counts: parameters.
        gpus: how many share the run.
        numbers: bytes of a value.
        reserves: whether to add what CUDA takes and the allocator loses.
    """
    slack = 1 + SLACK * reserves
    shard = run.mesh.ranks_of_copy(gpus)
    narrow = numbers.compute < 4
    casts = counts.casts if narrow and shard == 1 else (0, 0)  # divided weights are gathered in bf16 already
    states = {
        "weights": 4 * counts.parameters / shard,
        f"optimizer ({run.optim.name})": counts.optimizer / shard,
        "moving average": 4 * counts.parameters / shard if run.optim.ema_decay else 0.0,
    }
    gradients = 4 * counts.trained / shard
    late = 0.0
    buffers = {"DDP's gradient buckets": 4.0 * counts.trained if gpus > 1 else 0.0}
    if shard > 1:
        gathered = counts.rest + 2 * counts.block if run.mesh.reshard else counts.parameters
        buffers = {"gathered weights": float(numbers.compute * gathered)}
        late = (numbers.compute + 4.0) * (counts.rest + counts.block)  # whole gradients, and in fp32 to be reduced
    host = 0.0
    if run.mesh.offload:
        host, states = sum(states.values()) + gradients, dict.fromkeys(states, 0.0)
        gradients = 0.0
    if shard > 1 and run.loop.accumulate > 1:
        gradients += 4 * counts.trained  # whole on every GPU until the last batch of the step
    added = 4.0 * counts.largest if run.loop.accumulate > 1 else 0.0  # a new gradient beside the one it is added to
    pixels = 3 * sizes.side**2 * sizes.images
    buffers |= {
        "visual tokenizer": 4.0 * counts.frozen * (2 if run.optim.ema_decay else 1),  # the average copies it too
        "pictures": (1 + 4 + numbers.compute) * pixels + 16 * sizes.gathered,
    }
    before = bytes_before_backward(sizes, numbers, casts) * slack + added
    after = bytes_after_backward(sizes, numbers) * slack + late
    aside: dict[str, float] = {}
    if run.loop.accumulate > 1:
        moment = {"gradients": gradients, "activations": max(before, after)}
    elif before >= after + gradients:
        moment, aside = {"activations": before}, {"gradients": gradients}
    else:
        moment, aside = {"gradients": gradients, "last activations": after}, {"activations": before}
    parts = {**states, **buffers, **moment, "CUDA and NCCL": OVERHEAD * reserves}
    return Memory({name: value for name, value in parts.items() if value}, aside, host)
