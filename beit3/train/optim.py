"""Optimizer, schedule and moving average of a run: all timm's, built from `OptimConfig`."""

from __future__ import annotations

from typing import Any

import timm.optim
import timm.optim.muon
import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from beit3.config import OptimConfig
from beit3.errors import ConfigError

_newton_schulz = timm.optim.muon.zeropower_via_newtonschulz


def _orthogonalize(update: Tensor, *args: Any, **options: Any) -> Tensor:
    """Run timm's Newton-Schulz iteration, on a CPU in fp32: its bf16 is emulated by most CPUs, ten times slower."""
    if update.device.type == "cpu":
        options["dtype"] = torch.float32
    turned: Tensor = _newton_schulz(update, *args, **options)
    return turned


timm.optim.muon.zeropower_via_newtonschulz = _orthogonalize


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Build the optimizer over the trainable parameters, with layer decay where asked.

    Muon (https://kellerjordan.github.io/posts/muon; `muon`, with Nesterov momentum `nmuon`) turns the matrices inside
    blocks; its AdamW takes everything else.

    Args:
        model: has `no_weight_decay()` and `group_matcher()`, as every Task.
        config: name, rates and decay.
    """
    options: dict[str, object] = {}
    if config.name in ("adamw", "adam"):
        options = {"betas": config.betas, "eps": config.eps, "fused": True}
    elif "muon" in config.name:
        outside = [name for name, _ in model.named_parameters() if "blocks." not in name]
        options = {"betas": config.betas, "fallback_list": outside}
    try:
        optimizer: Optimizer = timm.optim.create_optimizer_v2(
            model,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            **options,
        )
    except (ValueError, KeyError, AssertionError) as error:
        raise ConfigError(f"optim.name '{config.name}' could not be built by timm: {error}") from error
    if config.head_lr != 1:
        _scale_heads(optimizer, model, config.head_lr)
    return optimizer


def _scale_heads(optimizer: Optimizer, model: nn.Module, factor: float) -> None:
    """Give `model.head` a learning rate of its own (beit3, `optim_factory.py`, task_head_lr_weight)."""
    heads = {id(parameter) for name, parameter in model.named_parameters() if name.startswith("model.head.")}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in heads]
        if own:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in heads]
            optimizer.add_param_group({**group, "params": own, "lr_scale": factor * group.get("lr_scale", 1.0)})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


class Schedule:
    """Cosine learning rate with linear warm-up, set from the finished share of the run.

    Args:
        optimizer: its groups keep their `lr_scale`.
        config: peak, minimum and warm-up.
        steps: length of the whole run.
    """

    def __init__(self, optimizer: Optimizer, config: OptimConfig, steps: int) -> None:
        self._steps = steps
        self._scheduler = CosineLRScheduler(
            optimizer,
            t_initial=max(1, steps - config.warmup_steps),
            lr_min=config.min_lr,
            warmup_t=config.warmup_steps,
            warmup_prefix=True,
            t_in_epochs=False,
        )

    def set(self, share: float) -> None:
        """Set the learning rates for a share of the run in 0..1."""
        self._scheduler.step_update(min(self._steps - 1, round(share * self._steps)))
