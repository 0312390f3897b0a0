"""The layout of the released BEiT-3 files, translated to ours and back (`released_files` reads them).

Shapes: D width, F feed-forward width, P patch side, N patches, V vocabulary, K codebook size.

Every key of a file has exactly one place here. A missing, unknown or wrongly shaped one is an error, because a file
that is loaded half leaves a model half random. Official names: `A` is vision, `B` is text; `final_layer_norm` is the
norm before the feed-forward network; the norm after the last block is `encoder.layer_norm`.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from beit3.errors import ConfigError
from beit3.model.build import build_model
from beit3.model.presets import POSITION_OFFSET, ModelConfig, native_head_width
from beit3.model.released_files import listed, shown, unwrap

_BACKBONE = ("text_embed.", "vision_embed.", "encoder.")
_MODALITIES = {"A": "vision", "B": "text"}
_HEADS: dict[str, tuple[str, ...]] = {
    "pretraining": ("mlm_head.weight", "mlm_head.bias", "mim_head.weight", "mim_head.bias"),
    "captioning": ("mlm_head.weight", "mlm_head.bias"),
    "retrieval": ("vision_head.weight", "language_head.weight", "logit_scale"),
    "classification": ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"),
    "vqa": tuple(
        f"{layer}.{part}"
        for layer in ("pooler.norm", "pooler.dense", "head.0", "head.1", "head.3")
        for part in ("weight", "bias")
    ),
    "nlvr2": tuple(
        f"head.{layer}.{part}" for layer in ("norm1", "dense1", "norm2", "dense2") for part in ("weight", "bias")
    ),
}
_OPTIONS = {
    "pretraining": ("codebook_size", "mim_head"),
    "classification": ("num_classes", "head"),
    "vqa": ("num_answers", "head.3"),
}
"""Options of task models, and the linear map whose outputs tell them."""
_WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
logger = logging.getLogger(__name__)


class Converted(NamedTuple):
    """An official file in our layout."""

    config: ModelConfig
    state: dict[str, Tensor]
    """Loads strictly into `build_model(config, task, **head_options)`."""
    task: str | None
    """None (a backbone alone), or one of `_HEADS`."""
    head_options: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Entry:
    """One of our tensors and the official ones that it joins along its first dimension."""

    ours: str
    shape: tuple[int, ...]
    official: tuple[str, ...]
    part_shape: tuple[int, ...]


def to_ours(
    state: Mapping[str, object],
    *,
    heads: bool = True,
    num_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    strict: bool = True,
) -> Converted:
    """Translate official weights into ours.

    Args:
        state: official names to tensors; wrappers (`model`, `module`) and prefixes (`beit3.`, `module.`,
            `_orig_mod.`) may be there or not.
        heads: False ignores everything that is not the backbone.
        num_heads: H, which files do not store; None takes the catalogue's head width for this width, 64 for others.
        image_size: height and width in pixels that the position table was made for; read only where the table fits no
            square.
        strict: False leaves missing tensors out of the result, and drops unknown ones, which the log names.

    Returns:
        A decoupled configuration, our state dict in fp32 (shares memory with `state` where nothing was joined or
        cast), the task its heads belong to, and that task's options.

    Raises:
        ConfigError: missing, unknown or wrongly shaped tensors, or numbers that are no weights; the message lists
            them. Shapes must fit even if not `strict`.
    """
    found = _normalise(unwrap(state))
    backbone = {key: value for key, value in found.items() if key.startswith(_BACKBONE)}
    extra = {key: value for key, value in found.items() if key not in backbone} if heads else {}
    config = _infer_config(backbone, num_heads, image_size)
    task, head_options = _infer_task(extra)
    prefix = "" if task is None else "backbone."
    entries = list(_backbone_entries(config, prefix)) + _head_entries(config, task, head_options)
    shapes = {key: entry.part_shape for entry in entries for key in entry.official}
    check_tensors({**backbone, **extra}, shapes, "the official weights", strict=strict)
    numbers = _layer_numbers(backbone)
    if numbers != set(range(config.num_layers)):  # a whole layer at random would be another model
        raise ConfigError(
            f"the official weights lack a layer: {listed(sorted(numbers))} of {config.num_layers} are there"
        )
    ours: dict[str, Tensor] = {}
    for entry in entries:
        if any(key not in found for key in entry.official):
            continue  # only if not strict
        # Files of fp16 or bf16 load as the same values in fp32, so that resizing positions rounds nothing.
        parts = [found[key].float() for key in entry.official]
        ours[entry.ours] = (parts[0] if len(parts) == 1 else torch.stack(parts)).reshape(entry.shape)
    return Converted(config, ours, task, head_options)


def to_official(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate our weights into the official layout.

    Args:
        config: the model's configuration; a shared self-attention is written twice, once for each modality.
        state: state dict of a backbone or of a task model.

    Returns:
        Official names (with `beit3.` before the backbone's) to copies of the tensors.

    Raises:
        ConfigError: the model has fusion experts, for which the official layout has no place, or `state` is not
            the state dict of such a model.
    """
    if config.fusion_layers:
        raise ConfigError(
            f"a model with fusion experts (model.fusion_layers={config.fusion_layers}) has no official layout: "
            "the released architecture holds a vision and a text expert only"
        )
    prefix = "backbone." if any(key.startswith("backbone.") for key in state) else ""
    heads = {key: value for key, value in state.items() if not key.startswith(prefix)} if prefix else {}
    task, head_options = _infer_task(heads)
    entries = list(_backbone_entries(config, prefix)) + _head_entries(config, task, head_options)
    check_tensors(state, {entry.ours: entry.shape for entry in entries}, "the given weights")
    official: dict[str, Tensor] = {}
    for entry in entries:
        parts = state[entry.ours].detach().reshape(len(entry.official), *entry.part_shape)
        for key, part in zip(entry.official, parts, strict=True):
            official[f"beit3.{key}" if key.startswith(_BACKBONE) else key] = part.clone()
    return official


def _backbone_entries(config: ModelConfig, prefix: str) -> Iterator[_Entry]:
    """Where each tensor of the backbone stands in both layouts."""
    width, side = config.width, config.patch_size

    def same(ours: str, official: str, *shape: int) -> _Entry:
        """An entry whose shape is that of our layout."""
        return _Entry(prefix + ours, shape, (official,), shape)

    yield same("text_embedding.words.weight", "text_embed.weight", config.vocab_size, width)
    for token in ("mask_token", "cls_token"):
        yield _Entry(f"{prefix}vision_embedding.{token}", (width,), (f"vision_embed.{token}",), (1, 1, width))
    yield _Entry(
        f"{prefix}vision_embedding.patch.weight",
        (width, 3 * side * side),
        ("vision_embed.proj.weight",),
        (width, 3, side, side),
    )
    yield same("vision_embedding.patch.bias", "vision_embed.proj.bias", width)
    rows = config.num_patches + 1 + POSITION_OFFSET
    yield same("vision_embedding.positions", "encoder.embed_positions.A.weight", rows, width)
    yield same("text_embedding.positions", "encoder.embed_positions.B.weight", config.max_text_positions, width)
    for index, letter in itertools.product(range(config.num_layers), _MODALITIES):
        yield from _block_entries(config, prefix, index, letter)
    if config.final_norm:
        for (letter, name), part in itertools.product(_MODALITIES.items(), ("weight", "bias")):
            yield same(f"norm.{name}.{part}", f"encoder.layer_norm.{letter}.{part}", width)


def _block_entries(config: ModelConfig, prefix: str, index: int, letter: str) -> Iterator[_Entry]:
    """One modality's tensors of one layer."""
    width, hidden = config.width, config.ffn_width
    expert = _MODALITIES[letter]
    style = expert if config.attention == "decoupled" else "shared"
    ours, layer = f"{prefix}blocks.{index}", f"encoder.layers.{index}"
    first, last, ffn = f"{ours}.attention_in.{style}", f"{ours}.attention_out.{style}", f"{ours}.ffn.{expert}"
    for part in ("weight", "bias"):
        square = (width, width) if part == "weight" else (width,)
        joined = tuple(f"{layer}.self_attn.{name}_proj.{letter}.{part}" for name in "qkv")
        yield _Entry(f"{first}.qkv.{part}", (3 * width, *square[1:]), joined, square)
        up = (hidden, width) if part == "weight" else (hidden,)
        down = (width, hidden) if part == "weight" else (width,)
        for name, key, shape in (
            (f"{first}.norm", f"self_attn_layer_norm.{letter}", (width,)),
            (f"{last}.norm", f"self_attn.inner_attn_ln.{letter}", (width,)),
            (f"{last}.out", f"self_attn.out_proj.{letter}", square),
            (f"{ffn}.norm", f"final_layer_norm.{letter}", (width,)),
            (f"{ffn}.fc1", f"ffn.{letter}.fc1", up),
            (f"{ffn}.inner_norm", f"ffn.{letter}.ffn_layernorm", (hidden,)),
            (f"{ffn}.fc2", f"ffn.{letter}.fc2", down),
        ):
            yield _Entry(f"{name}.{part}", shape, (f"{layer}.{key}.{part}",), shape)


def _head_entries(config: ModelConfig, task: str | None, options: Mapping[str, int]) -> list[_Entry]:
    """Heads have the same names and shapes in both layouts."""
    if task is None:
        return []
    with torch.device("meta"):
        model = build_model(config, task, **options)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return [_Entry(key, shapes[key], (key,), shapes[key]) for key in _HEADS[task]]


def _infer_task(heads: Mapping[str, Tensor]) -> tuple[str | None, dict[str, int]]:
    """The task that most of the heads belong to, and its options; `check_tensors` finds what is missing or unknown."""
    known = {task: len(heads.keys() & set(keys)) for task, keys in _HEADS.items()}
    task = max(_HEADS, key=lambda name: (known[name], known[name] - len(_HEADS[name])))
    if not known[task]:
        return None, {}
    option, layer = _OPTIONS.get(task, ("", ""))
    rows = [heads[key].shape[:1] for key in (f"{layer}.bias", f"{layer}.weight") if key in heads]
    return task, {option: rows[0].numel()} if rows else {}


def _layer_numbers(state: Mapping[str, Tensor]) -> set[int]:
    return {int(match[1]) for key in state if (match := re.match(r"encoder\.layers\.(\d{1,4})\.", key))}


def _infer_config(
    state: Mapping[str, Tensor], num_heads: int | None, image_size: tuple[int, int] | None
) -> ModelConfig:
    """Read every size from the shapes of a few tensors; `_check` compares all others with the result."""

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        """Shape of a tensor that must be there, with so many dimensions."""
        if key not in state:
            raise ConfigError(f"not an official BEiT-3 file: it has no '{key}'; keys found: {listed(state) or 'none'}")
        if state[key].ndim != dimensions:
            raise ConfigError(f"'{key}' has shape {tuple(state[key].shape)}, not {dimensions} dimensions")
        return tuple(state[key].shape)

    vocab_size, width = shape("text_embed.weight", 2)
    patch_size = shape("vision_embed.proj.weight", 4)[3]
    patches = shape("encoder.embed_positions.A.weight", 2)[0] - POSITION_OFFSET - 1
    side = math.isqrt(max(patches, 0))
    size = (side * patch_size, side * patch_size)
    if side < 1 or side * side != patches:
        if image_size is None or math.prod(pixels / max(patch_size, 1) for pixels in image_size) != patches:
            raise ConfigError(
                f"'encoder.embed_positions.A.weight' has {patches + POSITION_OFFSET + 1} rows, "
                "which is 3 more than no square grid of patches: give image_size, the height and width it was made for"
            )
        size = image_size
    if num_heads is None and width % native_head_width(width):
        raise ConfigError(
            f"the width {width} does not divide by a head width of 64: give num_heads to "
            "beit3.model.official.to_ours, for files do not store it"
        )
    layers = _layer_numbers(state)
    return ModelConfig(
        width=width,
        num_layers=max(len(layers), 1),
        num_heads=num_heads or width // native_head_width(width),
        ffn_width=shape("encoder.layers.0.ffn.A.fc1.weight", 2)[0],
        patch_size=patch_size,
        image_size=size,
        vocab_size=vocab_size,
        max_text_positions=shape("encoder.embed_positions.B.weight", 2)[0],
        attention="decoupled",
        fusion_layers=0,
        final_norm=any(key.startswith("encoder.layer_norm.") for key in state),
    )


def _normalise(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of data parallelism, compilation and the official wrapper class."""
    clean: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.replace("_orig_mod.", "")
        while name.startswith("module."):
            name = name.removeprefix("module.")
        name = name.removeprefix("beit3.")
        if name in clean:
            raise ConfigError(
                f"two tensors are named '{shown(name)}' once prefixes are removed; the second is '{shown(key)}'"
            )
        clean[name] = value
    return clean


def check_tensors(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], what: str, *, strict: bool = True
) -> None:
    """Raise one line that lists all missing, unknown and wrongly shaped tensors, and those of other types.

    Args:
        state: tensors by name.
        expected: shapes by name.
        what: subject of the message, such as "the official weights".
        strict: False allows missing tensors, and names unknown ones in the log.

    Raises:
        ConfigError: they do not fit.
    """
    problems: list[str] = []
    missing = [key for key in expected if key not in state]
    unknown = [key for key in state if key not in expected]
    if missing and strict:
        problems.append(f"missing {listed(missing)}")
    if unknown and strict:
        problems.append(f"unknown {listed(unknown)}")
    wrong = [
        f"{key} {tuple(state[key].shape)} instead of {shape}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    if wrong:
        problems.append(f"wrong shapes: {listed(wrong)}")
    used = [(key, value) for key, value in state.items() if strict or key in expected]
    if alien := [f"{key} ({value.dtype})" for key, value in used if value.dtype not in _WEIGHT_TYPES]:
        problems.append(f"not floating point of 16 to 64 bits: {listed(alien)}")
    if problems:
        raise ConfigError(f"{what} do not fit: {'; '.join(problems)}")
    if unknown:
        logger.warning("%s: unknown tensors are left out: %s", what, listed(unknown))
