"""The released VQ-KD files of BEiT v2: their layout to ours and back.

Shapes: D width, P patch side, N patches, K codes, E code width, C teacher features.

Encoder, decoder and task layers have the same names in both layouts. The codebook differs: officially
`quantize.embedding.weight` holds the codes and `quantize.cluster_size` the moving average of their use;
`quantize.embedding.cluster_size` and `.embed_avg` are never used, but a strict official loader wants them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from beit3.config import require
from beit3.errors import ConfigError
from beit3.model.released_files import read_official
from beit3.tokenizer.vqkd import VQKD, VQKDConfig, check_state

_HEAD_WIDTH = 64
_TRAINING_ONLY = ("loss", "teacher", "scaling")
"""First letters of what official training files hold besides the tokenizer: the teacher and its normalisation."""
_CODES, _USE = "quantize.embedding.weight", "quantize.cluster_size"
_STARTED = "quantize.embedding.initted"
_UNUSED = ("quantize.embedding.cluster_size", "quantize.embedding.embed_avg")


def load_visual_tokenizer(source: Path | str) -> VQKD:
    """Load a visual tokenizer, frozen and in eval mode.

    Args:
        source: exchange folder, or a released `.pth` of BEiT v2.

    Raises:
        DataMissingError: the source does not exist.
        ConfigError: it is damaged, or holds something else.
    """
    source = Path(source)
    if os.path.isdir(source):
        return VQKD.load(source)
    config, state = to_ours(read_official(source))
    model = VQKD(config)
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


def is_visual_tokenizer(state: Mapping[str, Tensor]) -> bool:
    """Whether official weights are those of a VQ-KD tokenizer."""
    return _CODES in state


def to_ours(state: Mapping[str, Tensor]) -> tuple[VQKDConfig, dict[str, Tensor]]:
    """Translate official weights into ours; the teacher, where the file holds it, is left out.

    Args:
        state: official names to tensors. The number of heads is not stored: heads of 64, as all released files have.

    Returns:
        The tokenizer's configuration and a state dict that loads strictly.

    Raises:
        ConfigError: missing, unknown or wrongly shaped tensors.
    """
    found = {name: value for name, value in state.items() if not name.startswith(_TRAINING_ONLY)}
    config = _infer_config(found)
    codes = found[_CODES]
    ours = {name: value for name, value in found.items() if not name.startswith("quantize.")}
    ours["quantize.codebook"] = codes
    ours["quantize.usage"] = found.get(_USE, torch.zeros(len(codes)))
    ours["quantize.idle"] = torch.zeros(len(codes), dtype=torch.int64)
    ours["quantize.ready"] = found.get(_STARTED, torch.ones(1)).bool().all()
    known = {_CODES, _USE, _STARTED, *_UNUSED}
    unknown = [name for name in found if name.startswith("quantize.") and name not in known]
    ours |= {name: found[name] for name in unknown}
    check_state(config, ours, "the file")
    return config, ours


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate the state dict of a `VQKD` into the official layout, complete for an official strict load."""
    codes, use = state["quantize.codebook"], state["quantize.usage"]
    official = {name: value for name, value in state.items() if not name.startswith("quantize.")}
    official[_CODES], official[_USE] = codes, use
    official[_STARTED] = state["quantize.ready"].float().reshape(1)
    official |= dict(zip(_UNUSED, (torch.zeros_like(use), codes.clone()), strict=True))
    return official


def _infer_config(state: Mapping[str, Tensor]) -> VQKDConfig:
    """Read every size from the shapes of a few tensors."""
    wanted = {_CODES: 2, "encoder.pos_embed": 3, "encoder.patch_embed.proj.weight": 4, "decode_task_layer.2.weight": 2}
    if missing := [name for name in wanted if name not in state]:
        raise ConfigError(f"not a VQ-KD tokenizer of BEiT v2: it has no {', '.join(missing)}")
    for name, axes in wanted.items():
        shape = tuple(state[name].shape)
        require(
            len(shape) == axes and 0 not in shape, f"not a VQ-KD tokenizer of BEiT v2: its {name} has shape {shape}"
        )
    codes, positions, patch, teacher = (state[name] for name in wanted)
    width, side = positions.shape[-1], math.isqrt(positions.shape[1] - 1)
    if width % _HEAD_WIDTH:
        raise ConfigError(f"the width {width} does not divide by a head width of {_HEAD_WIDTH}, as in released files")
    return VQKDConfig(
        image_size=(side * patch.shape[-1], side * patch.shape[-1]),
        patch_size=patch.shape[-1],
        width=width,
        depth=_depth(state, "encoder"),
        decoder_depth=_depth(state, "decoder"),
        num_heads=width // _HEAD_WIDTH,
        codebook_size=codes.shape[0],
        code_width=codes.shape[1],
        teacher_width=teacher.shape[0],
    )


def _depth(state: Mapping[str, Tensor], net: str) -> int:
    return len({match[1] for name in state if (match := re.match(rf"{net}\.blocks\.(\d+)\.", name))})
