"""Task models: a backbone with its heads, by name.

Shapes: B sequences, N patches, T text length, D width, V vocabulary, K codebook size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.config import nearest
from beit3.errors import ConfigError
from beit3.model.exchange import PretrainedModel
from beit3.model.packing import PackedBatch
from beit3.model.presets import ModelConfig, model_config
from beit3.model.transformer import MultiwayTransformer, Output, PackedOutput

CODEBOOK_SIZE = 8192
"""Visual tokens of the official release."""


class TaskModel(PretrainedModel):
    """A transformer, held as `.backbone`, with heads."""

    backbone: MultiwayTransformer

    @property
    def model_config(self) -> ModelConfig:
        """Shape of the transformer."""
        return self.backbone.config


class PretrainingModel(TaskModel):
    """Backbone with the two heads of masked data modeling: one bare linear map each, as released."""

    task = "pretraining"

    def __init__(self, config: ModelConfig, codebook_size: int = CODEBOOK_SIZE) -> None:
        super().__init__()
        self.backbone = MultiwayTransformer(config)
        self.mlm_head = nn.Linear(config.width, config.vocab_size)
        self.mim_head = nn.Linear(config.width, codebook_size)
        for head in (self.mlm_head, self.mim_head):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)

    @property
    def head_options(self) -> dict[str, Any]:
        """What rebuilding this model needs besides the transformer's configuration."""
        return {"codebook_size": self.mim_head.out_features}

    def forward(
        self,
        images: Tensor | None = None,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> Output:
        """The backbone's states; apply `mlm_head` and `mim_head` to the masked ones only."""
        out: Output = self.backbone(images, text_ids, text_mask, image_mask)
        return out


class RetrievalModel(TaskModel):
    """Dual encoder: the first state of each modality's own pass, a linear map, unit length, one learned scale."""

    task = "retrieval"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = MultiwayTransformer(config)
        self.vision_head = nn.Linear(config.width, config.width, bias=False)
        self.language_head = nn.Linear(config.width, config.width, bias=False)
        for head in (self.vision_head, self.language_head):
            nn.init.trunc_normal_(head.weight, std=0.02)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Embed unpaired images and texts of one packed batch: (Bi, D) and (Bt, D), unit length."""
        out: PackedOutput = self.backbone.forward_packed(batch)
        image, text = self.vision_head(out.image_rows()[:, 0]), self.language_head(out.first_text_rows())
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, H, W) as (B, D) of unit length."""
        out: Output = self.backbone(images)
        assert out.vision is not None
        return F.normalize(self.vision_head(out.vision[:, 0]), dim=-1)

    def encode_text(self, text_ids: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Embed texts (B, T) as (B, D) of unit length."""
        out: Output = self.backbone(text_ids=text_ids, text_mask=text_mask)
        assert out.text is not None
        return F.normalize(self.language_head(out.text[:, 0]), dim=-1)


AnyModel = MultiwayTransformer | PretrainingModel | RetrievalModel
_TASKS: tuple[str, ...] = ("pretraining", "retrieval")


def build_model(config: ModelConfig, task: str | None = None, **head_options: Any) -> AnyModel:
    """Build a backbone (`task=None`) or a task model with random weights."""
    if task is None:
        return MultiwayTransformer(config)
    if task == "pretraining":
        return PretrainingModel(config, **head_options)
    if task == "retrieval":
        return RetrievalModel(config, **head_options)
    raise ConfigError(f"unknown task '{task}'; {nearest(task, _TASKS)}")


def create_model(name: str, task: str | None = None, attention: str = "shared", **config: object) -> AnyModel:
    """Create a model of the catalogue with random weights.

    The default is the paper's model (shared self-attention, fusion experts on top). It is not the model that
    Microsoft released: for that architecture pass `attention="decoupled"`, for its weights use `load_model`.

    Args:
        name: such as `beit3_base_patch16_224`; see `list_models`.
        task: None for the backbone alone, or "pretraining", "retrieval".
        attention: "shared" or "decoupled".
        **config: further fields of `ModelConfig`, `codebook_size` for pretraining.

    Raises:
        ConfigError: unknown name, task or field; the message holds the nearest valid one.
    """
    options = {"codebook_size": config.pop("codebook_size")} if "codebook_size" in config else {}
    return build_model(model_config(name, attention=attention, **config), task, **options)
