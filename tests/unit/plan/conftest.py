"""Runs to plan."""

from __future__ import annotations

from typing import Any

from beit3.config import Run, replace
from beit3.plan.gpus import GPUS
from beit3.recipes import load_recipe

H100 = GPUS["h100"]


def recipe(address: str, **changes: Any) -> Run:
    run = load_recipe(f"recipe:{address}")
    assert isinstance(run, Run)
    return replace(run, **changes)
