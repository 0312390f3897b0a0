"""VQ-KD, the visual tokenizer of BEiT v2 (arXiv 2208.06366): patches to codes that let a decoder rebuild a teacher.

Shapes: B images, H, W image sides in pixels, (h, w) grid, N = h w patches, D encoder width, E code width, K codes,
C teacher features.

Encoder and decoder are timm's BEiT transformers with absolute positions, as in the official code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from torch import Tensor, nn

from beit3.config import check_types, config, nearest, replace, require, to_plain
from beit3.errors import ConfigError
from beit3.model.exchange import read_settings, read_tensors, write_folder
from beit3.model.released_files import listed, shown
from beit3.tokenizer.quantizer import VectorQuantizer


@config
class VQKDConfig:
    """Shape of a visual tokenizer."""

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    width: int = 768
    """D, of encoder and decoder."""
    depth: int = 12
    decoder_depth: int = 1
    num_heads: int = 12
    codebook_size: int = 8192
    """K."""
    code_width: int = 32
    """E."""
    teacher_width: int = 512
    """C."""
    decay: float = 0.99
    revive_after: int = 0
    """Training batches without use after which a code restarts; 0 never (official)."""

    def __post_init__(self) -> None:
        check_types(self, "tokenizer")
        sizes = ("patch_size", "width", "depth", "decoder_depth", "num_heads", "codebook_size", "code_width")
        for name in (*sizes, "teacher_width"):
            require(getattr(self, name) >= 1, f"tokenizer.{name} must be at least 1, not {getattr(self, name)}")
        for side in self.image_size:
            require(
                side % self.patch_size == 0,
                f"tokenizer.image_size {self.image_size} must divide by tokenizer.patch_size ({self.patch_size})",
            )
        require(
            self.width % self.num_heads == 0,
            f"tokenizer.width ({self.width}) must divide by tokenizer.num_heads ({self.num_heads})",
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


_PRESETS = {
    "vqkd_base_clip": VQKDConfig(teacher_width=512),
    "vqkd_base_dino": VQKDConfig(teacher_width=768),
    "vqkd_small": VQKDConfig(width=384, num_heads=6),
    "vqkd_tiny": VQKDConfig(width=192, num_heads=3),
}


def vqkd_config(name: str, **changes: Any) -> VQKDConfig:
    """Shape of a tokenizer of the catalogue.

    Args:
        name: `vqkd_base_clip` and `vqkd_base_dino` are BEiT v2's (for the tokenizer it pretrains with, pass
            `decoder_depth=3`); `vqkd_small` and `vqkd_tiny` are narrower, for CLIP's features.
        **changes: other values of fields.

    Raises:
        ConfigError: unknown name or field; the message holds the nearest valid one.
    """
    if name not in _PRESETS:
        raise ConfigError(f"no visual tokenizer '{name}'; {nearest(name, _PRESETS)}")
    return replace(_PRESETS[name], **changes)


class VQKD(nn.Module):
    """Encoder, quantizer and decoder."""

    def __init__(self, config: VQKDConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width

        def beit(image_size: tuple[int, int], patch_size: int, channels: int, depth: int) -> Beit:
            """Encoder or decoder, without a head."""
            net = Beit(
                img_size=image_size,
                patch_size=patch_size,
                in_chans=channels,
                embed_dim=width,
                depth=depth,
                num_heads=config.num_heads,
                num_classes=0,
            )
            net.head = nn.Identity()
            return net

        self.encoder = beit(config.image_size, config.patch_size, 3, config.depth)
        self.decoder = beit(config.grid, 1, config.code_width, config.decoder_depth)
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.code_width))
        self.decode_task_layer = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.teacher_width)
        )
        self.quantize = VectorQuantizer(config.codebook_size, config.code_width, config.decay, config.revive_after)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode, quantize, decode.

        Args:
            images: (B, 3, H, W) float in [0, 1], or uint8.

        Returns:
            rebuilt teacher features (B, N, C), codes (B, N), commitment loss ().
        """
        z = self._encode(images)
        with torch.autocast(z.device.type, enabled=False):
            quantized, codes, loss = self.quantize(z.flatten(0, 1))
        maps = quantized.view(*z.shape).transpose(1, 2).unflatten(2, self.config.grid)
        decoded = self.decode_task_layer(_patch_states(self.decoder, maps))
        return decoded, codes.view(z.shape[:2]), loss

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Codes (B, N) int64 of images (B, 3, H, W), float in [0, 1] or uint8."""
        z = self._encode(images)
        with torch.autocast(z.device.type, enabled=False):
            return self.quantize.nearest(F.normalize(z, dim=-1).flatten(0, 1)).view(z.shape[:2])

    def _encode(self, images: Tensor) -> Tensor:
        """Vectors (B, N, E) before quantization, of the codebook's type: bf16 would confuse close codes."""
        if tuple(images.shape[-2:]) != self.config.image_size:
            raise ValueError(
                f"the visual tokenizer takes images of {self.config.image_size}, not {tuple(images.shape[-2:])}"
            )
        if images.dtype == torch.uint8:
            images = images.float() / 255
        states = _patch_states(self.encoder, images * 2 - 1)
        with torch.autocast(states.device.type, enabled=False):
            out: Tensor = self.encode_task_layer(states.to(self.quantize.codebook.dtype))
        return out

    def check_fits(self, grid: tuple[int, int], size: int) -> None:
        """Make sure that a model of this grid, whose crops reach the tokenizer with this side, can use the codes.

        Raises:
            ConfigError: grid or image size differ.
        """
        own = self.config
        require(
            own.grid == grid,
            f"the visual tokenizer has a grid of {own.grid} codes, the model one of {grid} patches: "
            "choose crop.tokenizer_size and model sizes that agree",
        )
        require(
            own.image_size == (size, size),
            f"crop.tokenizer_size must be the visual tokenizer's image size {own.image_size}",
        )

    def save(self, folder: Path, teacher: dict[str, Any] | None = None) -> None:
        """Write an exchange folder, with the settings of the teacher it learned from where they are known."""
        shape = to_plain(self.config)
        shape.pop("type")
        write_folder(folder, {"kind": "vqkd", "tokenizer": shape, "teacher": teacher}, self.state_dict())

    @classmethod
    def load(cls, folder: Path) -> VQKD:
        """Read an exchange folder; the result is frozen and in eval mode."""
        settings = read_settings(folder)
        if settings.get("kind") != "vqkd":
            raise ConfigError(f"{folder} holds a '{shown(settings.get('kind'))}', not a visual tokenizer")
        given = settings.get("tokenizer")
        if not isinstance(given, dict):
            raise ConfigError(f"{folder}: config.json describes no tokenizer: write the folder again")
        shape = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        try:
            config = VQKDConfig(**shape)  # type: ignore[arg-type]
        except ConfigError as error:
            raise ConfigError(f"{folder}: config.json describes no tokenizer: {shown(error, 300)}") from error
        state = read_tensors(folder)
        check_state(config, state, str(folder))
        model = cls(config)
        model.load_state_dict(state)
        return model.requires_grad_(False).eval()


def check_state(config: VQKDConfig, state: Mapping[str, Tensor], where: str) -> None:
    """Make sure that weights are those of such a tokenizer.

    Args:
        config: its shape.
        state: tensors by name.
        where: what holds them, for the message.

    Raises:
        ConfigError: one line that lists what is missing, unknown, wrongly shaped or not finite.
    """
    for net, depth in (("encoder", config.depth), ("decoder", config.decoder_depth)):  # before as many are built
        held = len({name.split(".")[2] for name in state if name.startswith(f"{net}.blocks.")})
        require(held == depth, f"{where} describes {depth} blocks of its {net}, its weights hold {held}")
    try:
        with torch.device("meta"):
            shapes = {name: tuple(value.shape) for name, value in VQKD(config).state_dict().items()}
    except (RuntimeError, TypeError, OverflowError) as error:  # torch's, at sizes that no tensor can have
        raise ConfigError(f"{where} describes a tokenizer that cannot be built: {shown(error)}") from error
    problems = [f"{name} is missing" for name in shapes if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in shapes]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, not {shape}"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    counted = ("quantize.idle", "quantize.ready")
    problems += [
        f"{name} holds {value.dtype}"
        for name, value in state.items()
        if name not in counted and not value.is_floating_point()
    ]
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ConfigError(f"the VQ-KD weights of {where} do not fit: {'; '.join(problems[:10])}{more}")
    if broken := [name for name, value in state.items() if not value.isfinite().all()]:
        raise ConfigError(f"{where} holds NaN or infinity in {listed(broken, 3)}: take an earlier one")


def _patch_states(net: Beit, x: Tensor) -> Tensor:
    """Final states of the patches, normalised one by one: (B, N, D)."""
    out: Tensor = net.fc_norm(net.forward_features(x)[:, 1:])
    return out


def distillation_loss(decoded: Tensor, features: Tensor) -> Tensor:
    """Mean of 1 - cos(decoded, teacher) over patches (BEiT v2, equation 2); both (B, N, C)."""
    return 1 - F.cosine_similarity(decoded.float(), features.float(), dim=-1).mean()
