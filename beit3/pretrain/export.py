"""What a trained model is written with, so that it can be applied without knowing its recipe."""

from __future__ import annotations

from pathlib import Path

from beit3.data.preprocess import Preprocess
from beit3.data.source import TOKENIZER_FILE
from beit3.model.pretrained import PretrainedModel
from beit3.tokenizer.text import TextTokenizer


def export_model(model: PretrainedModel, tokenizer: TextTokenizer, max_text_length: int, folder: Path) -> None:
    """Write a model with its text tokenizer and preprocessing as an exchange folder.

    Args:
        model: with its trained weights.
        tokenizer: of the run.
        max_text_length: most ids of a text in training.
        folder: where.
    """
    preprocess = Preprocess(image_size=model.model_config.image_size, max_text_length=max_text_length)
    model.save_pretrained(folder, files={TOKENIZER_FILE: tokenizer.model, **preprocess.file()})
