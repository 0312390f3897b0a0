"""Sizes of the model: the typed `ModelConfig` and the catalogue of names (`list_models`).

Names are `beit3_{size}_patch{P}_{S}`: size x patch side x image side, official names verbatim.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from typing import Any, Literal

from beit3.config import check_types, config, nearest, replace, require
from beit3.errors import ConfigError

VOCAB_SIZE = 64010
"""Rows of the official word embedding: 64,002 ids of `beit3.spm` and 8 unused."""
BOS, PAD, EOS, UNK = 0, 1, 2, 3
"""First ids of the official layout: `<s>`, `<pad>`, `</s>`, `<unk>`."""
OFFICIAL_MASK = 64001
"""`<mask>` of `beit3.spm`."""
POSITION_OFFSET = 2
"""First used row of both position tables; rows 0 and 1 exist in official files and are never read."""


@config
class ModelConfig:
    """Shape of a Multiway Transformer."""

    width: int
    """D, features of a token."""
    num_layers: int
    """L, number of blocks."""
    num_heads: int
    """H; the head width D / H must be a whole number."""
    ffn_width: int
    """F, hidden features of every feed-forward expert."""
    patch_size: int = 16
    """P, side of a square patch in pixels."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width in pixels that the position table is made for; other sizes interpolate it."""
    vocab_size: int = VOCAB_SIZE
    """V, rows of the word embedding."""
    max_text_positions: int = 1024
    """Rows of the text position table; two are dead, so that 1,022 tokens fit."""
    attention: Literal["shared", "decoupled"] = "shared"
    """`shared`: one self-attention for both modalities (the paper); `decoupled`: one each (the released weights)."""
    fusion_layers: int = 3
    """Top layers in which the tokens of pairs use a vision-language expert; shared attention only."""
    final_norm: bool = True
    """A LayerNorm per modality after the last block; official classification and VQA files have none."""
    norm_eps: float = 1e-5
    drop_path: float = 0.0
    """Largest probability of skipping a branch for a sequence; grows linearly from 0 with depth."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, a third more work."""

    def __post_init__(self) -> None:
        if isinstance(self.image_size, list):  # as JSON has it
            object.__setattr__(self, "image_size", tuple(self.image_size))
        check_types(self, "model")
        for name in ("width", "num_layers", "num_heads", "ffn_width", "patch_size", "vocab_size"):
            require(getattr(self, name) >= 1, f"model.{name} must be at least 1, not {getattr(self, name)}")
        require(
            self.width % self.num_heads == 0,
            f"model.width ({self.width}) must divide by model.num_heads ({self.num_heads})",
        )
        height, width = self.image_size
        require(
            height % self.patch_size == 0 and width % self.patch_size == 0 and min(height, width) > 0,
            f"model.image_size ({height}, {width}) must divide by model.patch_size ({self.patch_size})",
        )
        require(
            0 <= self.fusion_layers <= self.num_layers,
            f"model.fusion_layers must lie in 0..{self.num_layers}, not {self.fusion_layers}",
        )
        require(
            self.attention == "shared" or self.fusion_layers == 0,
            "model.fusion_layers needs attention='shared': the released decoupled model has no fusion experts",
        )
        require(self.norm_eps > 0, f"model.norm_eps must be above 0, not {self.norm_eps}")
        require(0 <= self.drop_path < 1, f"model.drop_path must lie in 0..1, not {self.drop_path}")
        require(
            self.max_text_positions > POSITION_OFFSET,
            f"model.max_text_positions must exceed {POSITION_OFFSET}, not {self.max_text_positions}",
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of the native image size."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """N, patches of an image of the native size."""
        return self.grid[0] * self.grid[1]

    @property
    def max_text_length(self) -> int:
        """Longest text in tokens, `<s>` and `</s>` counted."""
        return self.max_text_positions - POSITION_OFFSET


@config
class TextTowerConfig:
    """Shape of a text transformer of its own beside an image tower; vocabulary and positions are the `ModelConfig`'s.

    CLIP's beside small, base and large image towers: 384 x 12 x 6 heads, 512 x 12 x 8, 768 x 12 x 12, each with an
    embedding of its own width (the default is that of base).
    """

    width: int = 512
    num_layers: int = 12
    num_heads: int = 8
    embed_width: int = 512
    """Features of the space that images and texts share."""

    def __post_init__(self) -> None:
        for name in ("width", "num_layers", "num_heads", "embed_width"):
            require(getattr(self, name) >= 1, f"text_tower.{name} must be at least 1, not {getattr(self, name)}")
        require(
            self.width % self.num_heads == 0,
            f"text_tower.width ({self.width}) must divide by text_tower.num_heads ({self.num_heads})",
        )

    @property
    def options(self) -> dict[str, Any]:
        """The same as options of a `clip` model."""
        return {
            "text_width": self.width,
            "text_layers": self.num_layers,
            "text_heads": self.num_heads,
            "embed_width": self.embed_width,
        }


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 192, "num_layers": 12, "num_heads": 3, "ffn_width": 768},
    "small": {"width": 384, "num_layers": 12, "num_heads": 6, "ffn_width": 1536},
    "base": {"width": 768, "num_layers": 12, "num_heads": 12, "ffn_width": 3072},
    "large": {"width": 1024, "num_layers": 24, "num_heads": 16, "ffn_width": 4096},
    "giant": {"width": 1408, "num_layers": 40, "num_heads": 16, "ffn_width": 6144},
}
_PATCHES = {"giant": (14,)}
_IMAGE_SIDES = {16: (224, 384, 480, 768), 14: (224, 336, 392, 420, 756)}
_NAMES = [
    f"beit3_{size}_patch{patch}_{side}"
    for size in _SIZES
    for patch in _PATCHES.get(size, (16,))
    for side in _IMAGE_SIDES[patch]
]


def list_models(pattern: str = "*") -> list[str]:
    """List the names of the catalogue that match a shell pattern such as `beit3_base*`."""
    return fnmatch.filter(_NAMES, pattern)


def model_config(name: str, **changes: Any) -> ModelConfig:
    """Return the configuration of a catalogue name, with fields changed.

    Args:
        name: such as `beit3_base_patch16_224`.
        **changes: fields of `ModelConfig`; `attention="decoupled"` also drops the fusion experts unless they are given.

    Raises:
        ConfigError: unknown name or field; the message holds the nearest valid one.
    """
    match = re.fullmatch(r"beit3_(\w+?)_patch(\d+)_(\d+)", name)
    if match is None or name not in _NAMES:
        raise ConfigError(f"unknown model '{name}'; {nearest(name, _NAMES)}")
    size, patch, side = match[1], int(match[2]), int(match[3])
    made = ModelConfig(**_SIZES[size], patch_size=patch, image_size=(side, side))
    if changes.get("attention") == "decoupled":
        changes.setdefault("fusion_layers", 0)
    return replace(made, **changes)


def native_head_width(width: int) -> int:
    """Head width of the catalogue's model of this width, 64 for any other: files of weights do not store it."""
    for size in itertools.chain(_SIZES.values()):
        if size["width"] == width:
            return int(width // size["num_heads"])
    return 64
