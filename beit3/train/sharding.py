"""How a Task lies over the ranks: whole on each (DDP), or divided (FSDP2), with copies side by side if asked (hybrid).

Divided weights are DTensors: each rank holds its rows, and gathers a block's others for as long as it needs them.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from beit3.config import MeshConfig, require
from beit3.train.distributed import Ranks

_LISTS = ("blocks", "layers", "h")
"""Names under which models keep their repeated blocks; each block is gathered and given back by itself."""


def divide(task: nn.Module, config: MeshConfig, ranks: Ranks, dtype: torch.dtype) -> nn.Module:
    """Lay a Task over the ranks.

    Args:
        task: on the ranks' device, equal on all of them; divided in place where weights are divided.
        config: over how many ranks one copy is divided.
        ranks: all of them take part.
        dtype: of the run's matrix products, in which blocks are gathered; sums of gradients are fp32.

    Returns:
        What is called in place of the Task.

    Raises:
        ConfigError: the ranks do not divide.
    """
    if ranks.world_size == 1:
        require(
            config.shard <= 1 and not config.offload,
            f"mesh.shard {config.shard} and mesh.offload need several processes: start with torchrun",
        )
        return task
    if config.shard == 1:
        device_ids = [ranks.device] if ranks.device.type == "cuda" else None
        known = inspect.signature(DistributedDataParallel).parameters
        sync_buffers = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in known)
        return DistributedDataParallel(task, device_ids=device_ids, **{sync_buffers: False})  # type: ignore[arg-type]
    shard_task(task, config, lay_mesh(config, ranks), dtype)
    return task


def lay_mesh(config: MeshConfig, ranks: Ranks) -> DeviceMesh:
    """Ranks in rows of those that share one copy: neighbours, and so the fastest links, share."""
    size = config.ranks_of_copy(ranks.world_size)
    if size == ranks.world_size:
        return init_device_mesh(ranks.device.type, (size,), mesh_dim_names=("shard",))
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size // size, size), mesh_dim_names=("copy", "shard"))
    for group in mesh.get_all_groups():  # which torch makes with a timeout of its own
        _set_pg_timeout(timedelta(seconds=config.timeout), group)
    return mesh


def shard_task(task: nn.Module, config: MeshConfig, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Divide a Task in place: every block by itself, then all that is left."""
    narrow = dtype if dtype != torch.float32 else None
    pinned = mesh.device_type == "cuda"
    options: dict[str, Any] = {
        "mesh": mesh,
        # Autocast decides what is computed in which type; gathering in the narrow one halves the traffic.
        "mp_policy": MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if config.offload else OffloadPolicy(),
        "ignored_params": scalars(task),
    }
    for block in blocks_of(task):
        fully_shard(block, reshard_after_forward=config.reshard, **options)
    fully_shard(task, **options)


def blocks_of(task: nn.Module) -> list[nn.Module]:
    """The repeated blocks of all models within, none inside another."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for name, module in task.named_modules():
        if name.rpartition(".")[2] in _LISTS and isinstance(module, (nn.ModuleList, nn.Sequential)):
            new = [block for block in module if block not in inside and any(True for _ in block.parameters())]
            found += new
            for block in new:
                inside.update(block.modules())
    return found


def scalars(task: nn.Module) -> set[nn.Parameter]:
    """Parameters without a dimension, such as temperatures: they cannot be divided, and every rank keeps them."""
    return {parameter for parameter in task.parameters() if parameter.ndim == 0}


def is_divided(task: nn.Module) -> bool:
    """Whether the weights of a Task are divided over ranks."""
    return isinstance(task, FSDPModule)


@contextlib.contextmanager
def gradients_stay(model: nn.Module, stay: bool) -> Iterator[None]:
    """Keep the gradients of a batch on their rank while an accumulated step is not complete."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not stay)
        yield
    elif isinstance(model, DistributedDataParallel) and stay:
        with model.no_sync():
            yield
    else:
        yield


@torch.no_grad()
def clip_and_measure(task: nn.Module, clip: float | None) -> float:
    """Clip the global gradient norm, over all ranks' shares.

    Args:
        task: its gradients, divided or not; those of scalars of a divided Task are averaged over the ranks here.
        clip: largest norm; None: it is only measured.

    Returns:
        The norm before clipping; may be NaN or infinite.
    """
    whole: list[Tensor] = []
    divided: list[Tensor] = []
    for parameter in task.parameters():
        if parameter.grad is not None:
            (divided if isinstance(parameter.grad, DTensor) else whole).append(parameter.grad)
    if not divided:
        return float(nn.utils.clip_grad_norm_([p for p in task.parameters() if p.grad is not None], clip or math.inf))
    for gradient in whole:
        dist.all_reduce(gradient, op=dist.ReduceOp.SUM)
        gradient /= dist.get_world_size()
    groups = [group for group in (whole, divided) if group]
    norm = math.hypot(*(_norm(group) for group in groups))
    if clip is not None and clip < norm + 1e-6:  # torch's rule
        for group in groups:
            torch._foreach_mul_(group, clip / (norm + 1e-6))
    return norm


def _norm(gradients: list[Tensor]) -> float:
    norm = nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """All weights and buffers of a divided module in the memory of rank 0; all ranks take part, the others get {}."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(module, options=options))
