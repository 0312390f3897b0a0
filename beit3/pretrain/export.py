"""What a trained model is written with, so that it can be applied without knowing its recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from beit3.model.exchange import PretrainedModel
from beit3.model.presets import ModelConfig
from beit3.tokenizer.text import TextTokenizer


def export_model(model: PretrainedModel, tokenizer: TextTokenizer, max_text_length: int, folder: Path) -> None:
    """Write a model with its text tokenizer and preprocessing as an exchange folder.

    Args:
        model: with its trained weights.
        tokenizer: of the run.
        max_text_length: most ids of a text in training.
        folder: where.
    """
    preprocess = {**preprocessing(model.model_config), "max_text_length": max_text_length}
    files = {"tokenizer.spm": tokenizer.model, "preprocess.json": (json.dumps(preprocess, indent=2) + "\n").encode()}
    model.save_pretrained(folder, files=files)


def preprocessing(config: ModelConfig) -> dict[str, Any]:
    """How pictures were prepared in pretraining: the content of `preprocess.json`."""
    return {
        "image_size": list(config.image_size),
        "resize": "squash",
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }
