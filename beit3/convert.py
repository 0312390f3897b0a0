"""Between released files and exchange folders, both ways: BEiT-3 models and BEiT v2's visual tokenizers."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from tyro.conf import Positional

from beit3.config import require
from beit3.data.source import Source, find_source
from beit3.errors import ConfigError
from beit3.model import official as official_model
from beit3.model.presets import ModelConfig
from beit3.model.pretrained import Part
from beit3.model.released_files import read_official
from beit3.model.store import load_model
from beit3.predict import load
from beit3.tokenizer import official as official_tokenizer
from beit3.tokenizer.fast import save_fast
from beit3.tokenizer.official import is_visual_tokenizer, load_visual_tokenizer
from beit3.tokenizer.vqkd import VQKD, VQKDConfig


def convert(
    source: Positional[str],
    out: Positional[Path],
    *,
    image_size: int | None = None,
    parts: Part | None = None,
    tokenizer: Path | None = None,
    labels: Path | None = None,
    licence: str | None = None,
    hugging_face: bool = False,
) -> str:
    """Turn a released file into an exchange folder, or an exchange folder into a file of the released layout.

    Args:
        source: `.pth` file (or its `.zip` name), an exchange folder, or "hf-hub:organisation/name".
        out: a new folder, or a new file that ends in `.pth`; nothing is overwritten.
        image_size: side in pixels to interpolate the vision positions to.
        parts: "vision" or "text" keeps one tower.
        tokenizer: `.spm` file of a released model; left out, `beit3.spm` beside it.
        labels: names of its classes or answers: `labels.json` or the released `answer2label.txt`.
        licence: of the weights, for the model card.
        hugging_face: also write the text tokenizer in the form that transformers reads.

    Returns:
        One line about what was written.

    Raises:
        DataMissingError: the source does not exist.
        ConfigError: `out` exists, or the source is damaged or has no form in the other layout.
    """
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists: choose another place")
    found = find_source(source)
    if out.suffix.lower() == ".pth":
        require(found.is_folder, f"{source} is of the released layout already: name a new folder, not {out}")
        options = (image_size, parts, tokenizer, labels, licence, hugging_face or None)
        require(
            not any(option is not None for option in options),
            "the released layout holds tensors alone: leave the options out",
        )
        return _to_file(found, out)
    if found.is_visual_tokenizer or (not found.is_folder and is_visual_tokenizer(read_official(found.path))):
        visual = load_visual_tokenizer(found.path)
        visual.save(out)
        return f"{out}: visual tokenizer with {visual.config.codebook_size:,} codes"
    whole = load(found.path, "cpu", image_size=image_size, parts=parts, tokenizer=tokenizer, labels=labels)
    text = whole.tokenizer if hugging_face else None  # before anything is written: there may be none
    whole.save_pretrained(out, licence=licence)
    if text is not None:
        save_fast(text, out)
    model = whole.model
    return f"{out}: {model.task or 'backbone'}, {model.model_config.num_layers} layers of {model.model_config.width}"


def _to_file(found: Source, out: Path) -> str:
    source = found.path
    if found.is_visual_tokenizer:
        tokenizer = VQKD.load(source)
        state = official_tokenizer.to_official(tokenizer.state_dict())
        _check_inferable(tokenizer.config, official_tokenizer.to_ours(state)[0], source)
    else:
        model = load_model(source)
        unknown = model.task in ("detection", "segmentation", "clip", "superclass")
        require(not unknown, f"{source} holds a {model.task} model, for which there is no released layout")
        require(
            model.part is None, f"{source} holds a {model.part} tower alone, which the released layout has no form for"
        )
        state = official_model.to_official(model.model_config, model.state_dict())
        _check_inferable(model.model_config, official_model.to_ours(state).config, source)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        torch.save({"model": state}, beside)
        os.replace(beside, out)
    finally:
        beside.unlink(missing_ok=True)
    return f"{out}: {len(state)} tensors in the released layout"


def _check_inferable(own: ModelConfig | VQKDConfig, read_back: ModelConfig | VQKDConfig, source: Path) -> None:
    """Refuse what a reader of the released layout would rebuild as another network: it stores tensors alone."""
    for name in ("num_heads", "image_size"):
        mine, theirs = getattr(own, name), getattr(read_back, name)
        require(
            mine == theirs,
            f"{source} has no form in the released layout: that does not store {name}, and {theirs} would be read back "
            f"instead of {mine}",
        )
