"""One tower alone: the image half or the text half of a model, in half the memory."""

from __future__ import annotations

from torch import nn

from beit3.config import require
from beit3.errors import ConfigError
from beit3.model.heads import AnyModel
from beit3.model.pretrained import Part
from beit3.model.transformer import MultiwayTransformer

_HEADS: dict[str, dict[Part, tuple[str, ...]]] = {
    "pretraining": {"vision": ("mim_head",), "text": ("mlm_head",)},
    "retrieval": {"vision": ("vision_head",), "text": ("language_head",)},
    "classification": {"vision": ("fc_norm", "head")},
    "superclass": {"vision": ("word_norm", "word_head")},
}
"""Heads that each tower keeps; tasks that are not named need both towers."""


class Absent(nn.Module):
    """What stands in the place of a tower that was not loaded."""

    def __init__(self, tower: str) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, *_: object) -> None:
        """Say what is missing."""
        raise ConfigError(f"this model was loaded without its {self.tower} tower: load it with parts=None")


def keep_part(model: AnyModel, part: Part) -> None:
    """Drop the other modality's own parameters; using it afterwards is an error that says so.

    Raises:
        ConfigError: the model's task needs both towers, or it is one tower already.
    """
    require(part in ("vision", "text"), f"parts is 'vision' or 'text', not {part!r}")
    if model.part not in (None, part):
        raise ConfigError(f"the {part} tower is not there: this model is a {model.part} tower alone")
    if model.task is not None and part not in _HEADS.get(model.task, {}):
        raise ConfigError(f"a {model.task} model needs both towers: parts='{part}' would leave nothing of use")
    backbone = model if isinstance(model, MultiwayTransformer) else model.backbone
    other: Part = "text" if part == "vision" else "vision"
    for block in backbone.layers():
        for experts in (block.attention_in, block.attention_out, block.ffn):
            for name in (other, "fusion"):
                if name in experts:
                    del experts[name]
    if other in backbone.norm:
        del backbone.norm[other]
    setattr(backbone, f"{other}_embedding", Absent(other))
    if model.task is not None:
        for name in _HEADS[model.task].get(other, ()):
            setattr(model, name, Absent(other))
    model.part = part
