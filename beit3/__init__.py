"""BEiT3: pretrain, finetune, load and serve unified image-text models. The public API and nothing else."""

from beit3.model.heads import create_model
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
