"""Learning rate and weight decay of every tensor by its released name, against the released rule.

The rule is that of the released `optim_factory.py` and `no_weight_decay`, written out from their description.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3.config import OptimConfig
from beit3.model.official import to_official
from beit3.train.optim import build_optimizer

TASKS = ("classification", "vqa", "nlvr2", "captioning", "retrieval")
Build = Callable[..., Any]

DIFFERENT_DECAY = {"beit3.encoder.embed_positions.B.weight"}
"""Decayed by the released code, which names the positions of images alone; ours are left alone in both modalities."""


def released_layer_scale(name: str, num_layers: int, decay: float) -> float:
    layer = re.search(r"layers\.(\d+)\.", name)
    place = 0 if "embed" in name else int(layer[1]) + 1 if layer else num_layers + 1
    return decay ** (num_layers + 1 - place)


def released_is_decayed(name: str, tensor: Tensor) -> bool:
    listed = {"beit3.encoder.embed_positions.A.weight", "beit3.vision_embed.cls_token", "logit_scale"}
    return tensor.ndim != 1 and not name.endswith(".bias") and name not in listed


def by_released_name(task: Any, optim: OptimConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rate scale and weight decay in every place of every tensor, NaN where nothing is trained."""
    found = {}
    for group in build_optimizer(task, optim).param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in found, "a parameter is in two groups"
            found[id(parameter)] = group.get("lr_scale", 1.0), group["weight_decay"]
    parameters = dict(task.model.named_parameters())
    assert parameters.keys() == task.model.state_dict().keys()
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert trained == {name for name, parameter in parameters.items() if id(parameter) in found}

    def filled(column: int) -> dict[str, Tensor]:
        state = {
            name: torch.full_like(value, found.get(id(value), (math.nan,) * 2)[column], dtype=torch.float64)
            for name, value in parameters.items()
        }
        return to_official(task.config.model, state)

    return filled(0), filled(1)


@pytest.mark.parametrize("name", TASKS)
def test_rates_of_layers_and_decay_are_the_released_ones_name_by_name(name: str, build: Build) -> None:
    task = build(name)
    scales, decays = by_released_name(task, OptimConfig(lr=1.0, weight_decay=0.05, layer_decay=0.65))
    compared, different = 0, set()
    for key, scale in scales.items():
        decay = decays[key]
        if scale.isnan().all():
            continue  # nothing that this task reads depends on it
        compared += 1
        expected = released_layer_scale(key, task.config.model.num_layers, 0.65)
        assert scale.unique().tolist() == pytest.approx([expected]), key
        if decay.unique().tolist() != [0.05 if released_is_decayed(key, decay) else 0.0]:
            different.add(key)
    assert compared > (30 if name == "classification" else 60), "one tower, or both"
    assert different == (DIFFERENT_DECAY if name != "classification" else set())


@pytest.mark.parametrize("name", TASKS)
def test_the_factor_of_heads_is_for_the_released_heads_alone(name: str, build: Build) -> None:
    """The released code looks for names that begin with `head`: poolers, word heads and retrieval maps have others."""
    scales, _ = by_released_name(build(name), OptimConfig(lr=1.0, head_lr=20.0))
    trained = {key: scale.unique().tolist() for key, scale in scales.items() if not scale.isnan().all()}
    assert trained == {key: [20.0 if key.startswith("head") else 1.0] for key in trained}
    assert any(key.startswith("head") for key in trained) == (name in ("classification", "vqa", "nlvr2"))
