"""The model card: what a folder of weights is, how to use it, what it was measured to do, and what it is not for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

_VERBS = {
    None: ("image-feature-extraction", 'predictor.embed_images(["picture.png"])'),
    "pretraining": ("fill-mask", 'predictor.fill_mask("a photo of a <mask>", image="picture.png")'),
    "retrieval": ("zero-shot-image-classification", 'predictor.embed_images(["picture.png"])'),
    "clip": ("zero-shot-image-classification", 'predictor.embed_images(["picture.png"])'),
    "classification": ("image-classification", 'predictor.classify(["picture.png"])'),
    "vqa": ("visual-question-answering", 'predictor.answer("picture.png", "what is in it?")'),
    "nlvr2": ("visual-question-answering", 'predictor.reason("left.png", "right.png", "both show a cat")'),
    "superclass": ("image-classification", 'predictor.predict_words(["picture.png"])'),
    "captioning": ("image-to-text", 'predictor.caption(["picture.png"])'),
    "detection": ("object-detection", 'predictor.detect(["picture.png"])'),
    "segmentation": ("image-segmentation", 'predictor.segment(["picture.png"])'),
}
_OF_IMAGES = ("detection", "segmentation")
"""Tasks whose models read no texts."""
_OF_TEXTS = "- It reads English unless it was trained on other languages, and texts of {text} tokens at most.\n"
_LIMITS = """\
- It repeats the biases of the pictures and texts it was trained on; look at its answers before you rely on them.
{texts}\
- Pictures are seen at {height} x {width} pixels: small writing and small things are lost.
- It states no source for its answers and was not tested for decisions about people."""


def model_card(
    source: str,
    settings: Mapping[str, Any],
    num_parameters: int,
    licence: str | None,
    numbers: Mapping[str, float | str],
) -> str:
    """Write a card in the Hub's form: YAML head, then Markdown.

    Args:
        source: what `beit3.load` is told: the name of the folder, or "hf-hub:organisation/name".
        settings: content of `config.json`.
        num_parameters: of all tensors.
        licence: of the weights, as the Hub spells it; None: not stated.
        numbers: results by name.
    """
    shape, task = settings["model"], settings["task"]
    height, width = shape["image_size"]
    pipeline, call = _VERBS[task]
    texts = "" if task in _OF_IMAGES else _OF_TEXTS.format(text=shape["max_text_positions"] - 2)
    head = ModelCardData(
        license=licence or "other", library_name="beit3", pipeline_tag=pipeline, tags=["beit3", task or "backbone"]
    )
    part = f", {settings['part']} tower alone" if "part" in settings else ""
    results = [f"| {metric} | {value} |" for metric, value in numbers.items()]
    lines = [
        "---",
        head.to_yaml(),
        "---",
        "",
        f"# {source.rpartition('/')[2]}",
        "",
        f"A BEiT-3 model ({task or 'backbone'}{part}): {num_parameters / 1e6:,.1f}M parameters, "
        f"{_towers(settings)}, {shape['attention']} attention.",
        "",
        "```python",
        "import beit3",
        "",
        f'predictor = beit3.load("{source}")',
        call,
        "```",
        "",
        "## Results",
        "",
        *(["| what | value |", "|---|---|", *results] if results else ["None were recorded with these weights."]),
        "",
        "## Limits",
        "",
        _LIMITS.format(texts=texts, height=height, width=width),
        "",
        "## Licence",
        "",
        f"Weights: {licence}." if licence else "The licence of these weights was not stated: ask whoever trained them.",
        "",
    ]
    return "\n".join(lines)


def _towers(settings: Mapping[str, Any]) -> str:
    """Sizes of the transformer, or of both."""
    shape, heads, part = settings["model"], settings["heads"], settings.get("part")
    images = f"{shape['num_layers']} layers of {shape['width']}, patches of {shape['patch_size']}"
    if settings["task"] != "clip":
        return images
    texts = f"{heads['text_layers']} layers of {heads['text_width']} for texts"
    return {"vision": images, "text": texts}.get(part or "", f"{images}, {texts}")
