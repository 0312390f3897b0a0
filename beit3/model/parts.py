"""One tower alone: the image half or the text half of a model, in half the memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from beit3.config import require
from beit3.errors import ConfigError
from beit3.model.presets import ModelConfig
from beit3.model.pretrained import Part
from beit3.model.transformer import MultiwayTransformer

if TYPE_CHECKING:
    from beit3.model.build import AnyModel

_HEADS: dict[str, dict[Part, tuple[str, ...]]] = {
    "pretraining": {"vision": ("mim_head",), "text": ("mlm_head",)},
    "retrieval": {"vision": ("vision_head",), "text": ("language_head",)},
    "clip": {"vision": ("vision_head",), "text": ("language_head",)},
    "classification": {"vision": ("fc_norm", "head")},
    "superclass": {"vision": ("word_head",)},
    "detection": {"vision": ("pyramid", "rpn", "roi_heads")},
    "segmentation": {"vision": ("pyramid", "head")},
}
"""Heads that each tower keeps; tasks that are not named need both towers."""


class Absent(nn.Module):
    """What stands in the place of a tower, or of a part of one, that was not loaded.

    Args:
        tower: its modality.
        config: of the tower, where a whole one is absent.
    """

    def __init__(self, tower: str, config: ModelConfig | None = None) -> None:
        super().__init__()
        self.tower = tower
        self.config = config

    def forward(self, *_: object, **__: object) -> None:
        """Say what is missing."""
        raise ConfigError(f"this model was loaded without its {self.tower} tower: load it with parts=None")

    forward_packed = forward


def keep_part(model: AnyModel, part: Part) -> None:
    """Drop the other modality's own parameters; using it afterwards is an error that says so.

    Raises:
        ConfigError: the model's task needs both towers, or it is one tower already.
    """
    require(part in ("vision", "text"), f"parts is 'vision' or 'text', not {part!r}")
    if model.part not in (None, part):
        raise ConfigError(f"the {part} tower is not there: this model is a {model.part} tower alone")
    if isinstance(model, MultiwayTransformer):
        keep_modality(model, part)
        return
    if model.task is not None and part not in _HEADS.get(model.task, {}):
        needs = "reads images alone" if model.task in ("detection", "segmentation") else "needs both towers"
        raise ConfigError(f"a {model.task} model {needs}: parts='{part}' would leave nothing of use")
    other: Part = "text" if part == "vision" else "vision"
    if hasattr(model, "text_backbone"):  # two transformers, of which one goes as a whole
        name = "backbone" if other == "vision" else "text_backbone"
        setattr(model, name, Absent(other, getattr(model, name).config))
    else:
        keep_modality(model.backbone, part)
    if model.task is not None:
        for name in _HEADS[model.task].get(other, ()):
            setattr(model, name, Absent(other))
    model.part = part


def keep_modality(backbone: MultiwayTransformer, part: Part) -> None:
    """Drop what only the sequences of the other modality run through."""
    other: Part = "text" if part == "vision" else "vision"
    for block in backbone.layers():
        for experts in (block.attention_in, block.attention_out, block.ffn):
            for name in (other, "fusion"):
                if name in experts:
                    del experts[name]
    if other in backbone.norm:
        del backbone.norm[other]
    setattr(backbone, f"{other}_embedding", Absent(other))
    backbone.part = part
