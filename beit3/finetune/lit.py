"""LiT: a text tower learns to describe what a locked image tower sees (arXiv 2111.07991).

Any frozen tower serves (`beit3.finetune.image_tower`); a fresh text tower and a linear map of the image's feature are
trained by CLIP's or SigLIP's loss on streams of pairs. It gives zero-shot classes to towers that have never read.

Shapes: B pairs of this rank, D width of the tower's features, E width of the shared space, H, W height and width.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.config import config, replace, require
from beit3.data.source import TOKENIZER_FILE
from beit3.errors import ConfigError
from beit3.finetune.image_tower import ImageTower, Pooling, load_image_tower
from beit3.model.exchange import read_settings, read_tensors, write_folder
from beit3.model.flops import forward_flops
from beit3.model.heads import ClipModel
from beit3.model.packing import Layout, PackedBatch
from beit3.model.parts import Absent, keep_part
from beit3.model.presets import POSITION_OFFSET, ModelConfig, TextTowerConfig
from beit3.model.transformer import MultiwayTransformer
from beit3.pretrain.pairs import PairBatch, PairConfig, PairTask
from beit3.train.task import Work

PROJECTION = "image_projection"
"""Folder in an export whose image tower lies elsewhere: the linear map, and where the tower is found."""
_LARGEST_PATCH = 32
logger = logging.getLogger(__name__)


@config
class LitConfig(PairConfig):
    """The locked tower and the one that learns."""

    tower: str
    """Image tower, as `load_image_tower` takes it: exchange folder, released file, hf-hub:o/n or timm:NAME."""
    pooling: Pooling = "auto"
    """Which feature of the tower is read."""
    tower_pretrained: bool = True
    """False gives a tower of timm random weights."""
    text_tower: TextTowerConfig = TextTowerConfig()
    activation_checkpointing: bool = False
    """Recompute the text tower's blocks in the backward pass."""

    def __post_init__(self) -> None:
        PairConfig.__post_init__(self)
        require(self.max_text_length > 2, f"max_text_length must be at least 3, not {self.max_text_length}")

    def build(self) -> Lit:
        """Build the Task around the tower, with a random text tower."""
        return Lit(self)


class Lit(PairTask[LitConfig]):
    """Train a text tower and a linear map of image features; the image tower stays, and is in no checkpoint."""

    model: ClipModel

    def __init__(self, config: LitConfig) -> None:
        tower = load_image_tower(config.tower, pooling=config.pooling, pretrained=config.tower_pretrained)
        size = tower.preprocess.image_size
        require(
            (config.crop.size, config.crop.size) == size,
            f"crop.size ({config.crop.size}) must be the image_size of the tower '{config.tower}', {size}",
        )
        super().__init__(config, replace(tower.preprocess, max_text_length=config.max_text_length))
        self.keep_frozen(tower)
        shape = replace(self._shape(), num_layers=1, drop_path=0.0)  # of images there is the linear map alone
        self.model = ClipModel(shape, **self._options())
        setattr(self.model, "backbone", Absent("vision", shape))  # noqa: B010 - it is declared a transformer

    @property
    def tower(self) -> ImageTower:
        """The locked tower."""
        (tower,) = self._frozen
        assert isinstance(tower, ImageTower)
        return tower

    def embed(self, packed: PackedBatch) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, E) of the images, which are normalised, and of the texts of a batch."""
        assert packed.images is not None
        return self.embed_images(packed.images), self.model.embed_packed_texts(packed)

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, E) of images (B, 3, H, W), normalised."""
        return self.model.project_images(self.tower(images))

    def work(self, batch: PairBatch) -> Work:
        """Images, text tokens and useful operations of a step: the tower runs forward only."""
        assert batch.packed.images is not None
        count, lengths = len(batch.packed.images), batch.packed.text_lengths
        texts = forward_flops(self.model.text_backbone.config, Layout.build(0, 0, lengths, 0))
        return Work(count, sum(lengths), count * self.tower.flops + 3 * texts)

    def save(self, folder: Path) -> None:
        """Write a `clip` model; of a tower of timm its name only: the text tower alone, with `image_projection`.

        `load_locked_images` reads the latter.
        """
        files = {**self.preprocess.file(), TOKENIZER_FILE: self.text_tokenizer.model}
        backbone, state = self._own_backbone(), self.model.state_dict()
        with torch.device("meta"):
            whole = ClipModel(self._shape(), **self._options())
        if backbone is None:
            keep_part(whole, "text")
            state = {name: value for name, value in state.items() if name in whole.state_dict()}
        else:
            state |= {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
        whole.load_state_dict(state, assign=True)
        whole.save_pretrained(folder, files=files)
        if backbone is None:
            settings = {"kind": PROJECTION, "tower": self.tower.describe()}
            write_folder(folder / PROJECTION, settings, {"weight": self.model.vision_head.weight})
            logger.warning(
                "%s holds the text tower alone: the image tower is %s, and %s the map of its features",
                folder,
                self.config.tower,
                folder / PROJECTION,
            )

    def _own_backbone(self) -> MultiwayTransformer | None:
        """The tower's transformer, if it is one of this package."""
        backbone = getattr(self.tower, "backbone", None)
        return backbone if isinstance(backbone, MultiwayTransformer) else None

    def _shape(self) -> ModelConfig:
        """Shape of the clip model: of a tower of timm it tells the width and the size of pictures, no more."""
        backbone, preprocess = self._own_backbone(), self.tower.preprocess
        texts: dict[str, Any] = {
            "vocab_size": len(self.text_tokenizer),
            "max_text_positions": self.config.max_text_length + POSITION_OFFSET,
            "activation_checkpointing": self.config.activation_checkpointing,
        }
        if backbone is not None:
            return replace(backbone.config, fusion_layers=0, **texts)
        sides = preprocess.image_size
        patch = next(side for side in range(_LARGEST_PATCH, 0, -1) if not any(length % side for length in sides))
        return ModelConfig(
            width=self.tower.width,
            num_layers=1,
            num_heads=1,
            ffn_width=1,
            patch_size=patch,
            image_size=sides,
            fusion_layers=0,
            **texts,
        )

    def _options(self) -> dict[str, Any]:
        pooling = self.tower.describe()["pooling"]
        options = {**self.config.text_tower.options, "loss": self.config.loss}
        return options if pooling == "auto" else {**options, "pooling": pooling}


class LockedImages(nn.Module):
    """A frozen tower and the linear map of its features.

    Args:
        tower: as trained with.
        weight: (E, D).
    """

    def __init__(self, tower: ImageTower, weight: Tensor) -> None:
        super().__init__()
        self.tower = tower
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        """Unit vectors (B, E) of images (B, 3, H, W), normalised as `tower.preprocess` says."""
        return F.normalize(self.tower(images) @ self.weight.T, dim=-1)


def load_locked_images(folder: str | Path) -> LockedImages:
    """Load the image half of a finished run whose tower is not in its export.

    Args:
        folder: the export; `beit3.load` gives its text half.

    Raises:
        DataMissingError: there is no such folder, or its tower is not where it was.
        ConfigError: the folder holds something else.
    """
    place = Path(folder) / PROJECTION
    settings, state = read_settings(place), read_tensors(place)
    if settings.get("kind") != PROJECTION or state.keys() != {"weight"}:
        raise ConfigError(f"{place} holds no map of image features: copy it again")
    return LockedImages(load_image_tower(**settings["tower"]), state["weight"]).eval()
