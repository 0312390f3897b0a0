"""BEiT3: pretrain, finetune, load and serve unified image-text models. The public API and nothing else."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from beit3.model.build import create_model
    from beit3.model.packing import PackedBatch
    from beit3.model.presets import ModelConfig, list_models
    from beit3.model.store import load_model
    from beit3.predict import Predictor, load

__version__ = "0.1.0"

__all__ = [
    "ModelConfig",
    "PackedBatch",
    "Predictor",
    "__version__",
    "create_model",
    "list_models",
    "load",
    "load_model",
]

_HOMES = {
    "ModelConfig": "beit3.model.presets",
    "PackedBatch": "beit3.model.packing",
    "Predictor": "beit3.predict",
    "create_model": "beit3.model.build",
    "list_models": "beit3.model.presets",
    "load": "beit3.predict",
    "load_model": "beit3.model.store",
}


def __getattr__(name: str) -> object:
    """Import what is asked for when it is asked for: PyTorch takes seconds, `beit3 --help` needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'beit3' has no attribute '{name}'")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
