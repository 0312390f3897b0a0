"""A transformer with heads: what all task models are."""

from __future__ import annotations

from beit3.model.presets import ModelConfig
from beit3.model.pretrained import PretrainedModel
from beit3.model.transformer import MultiwayTransformer


class TaskModel(PretrainedModel):
    """A transformer, held as `.backbone`, with heads."""

    backbone: MultiwayTransformer

    @property
    def model_config(self) -> ModelConfig:
        """Shape of the transformer."""
        return self.backbone.config
