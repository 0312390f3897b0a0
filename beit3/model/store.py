"""Loading models: exchange folders, the Hugging Face Hub and released files, by one function.

Nothing is initialised at random that the source holds, and weights of exchange folders stay mapped from disk until
they are used.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beit3.config import differences, require, to_plain
from beit3.errors import ConfigError, DataMissingError
from beit3.model import official
from beit3.model.build import AnyModel, build_model
from beit3.model.embeddings import resample_positions
from beit3.model.exchange import CONFIG_FILE, is_exchange, is_weights, read_settings, read_tensors
from beit3.model.hub import local_path
from beit3.model.official import check_tensors
from beit3.model.parts import keep_modality, keep_part
from beit3.model.presets import POSITION_OFFSET, ModelConfig
from beit3.model.pretrained import Part, parse_model_settings
from beit3.model.released_files import listed, read_official, shown
from beit3.model.transformer import MultiwayTransformer

_POSITIONS = "vision_embedding.positions"
_LARGEST_SIDE = 8192
"""Pixels; a position table for more would not fit into memory."""
_FINAL_NORM = re.compile(r"(backbone\.)?norm\.")
_BLOCK = re.compile(r"((?:text_)?backbone\.)?blocks\.(\d+)\.")
_FREE = ("drop_path", "activation_checkpointing", "final_norm")
"""Settings of a backbone that its weights may be taken to others of."""
_OF_TEXTS = ("vocab_size", "max_text_positions", "fusion_layers")
"""Settings that images alone do not meet."""
_KEPT_IN_PART = ("detection", "segmentation")
"""Task models with much in their heads that does not depend on the classes."""
_IMAGES_ALONE = ("clip", "detection", "segmentation")
"""Task models whose backbone reads images alone."""
_WITHOUT_FINAL_NORM = ("classification", "vqa")
"""Released task models that have no norm after the last block."""
_MOST_LAYERS = 12
"""That the log names."""
logger = logging.getLogger(__name__)

# The threads of OpenMP do not survive a fork: a forked process that asked them for work would wait for ever.
os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))


def load_model(
    source: str | Path,
    task: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    parts: Part | None = None,
    strict: bool = True,
) -> AnyModel:
    """Load a model from an exchange folder, the Hugging Face Hub or a released file.

    Args:
        source: folder written by `save_pretrained` or a run, "hf-hub:organisation/name[@revision]", or a file of the
            released layout: `.pth` (also under a `.zip` name), `.safetensors`, DeepSpeed's checkpoint folders.
        task: None takes what the source holds; "backbone" drops its heads; another task gets its heads at random,
            which needs `strict=False`. As in the released code, the final norms of a decoupled model are dropped for
            "classification" and "vqa", whose heads have norms of their own.
        image_size: None keeps the source's resolution; another one (height and width, or a side) interpolates
            the vision position table, and the log says so. For a released file whose table fits no square it is the
            size that the table was made for.
        parts: "vision" or "text" keeps one tower and drops the other.
        strict: an error names every missing or unknown tensor; False starts missing ones at random and drops unknown
            ones, and the log names both. A tensor of another shape is an error anyway, and so is a missing layer.

    Returns:
        The model in eval mode, fp32, on the CPU.

    Raises:
        DataMissingError: the source does not exist.
        ConfigError: the source is damaged, of another kind, or does not fit the task.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    is_pair = isinstance(size, (tuple, list)) and [type(side) for side in size] == [int, int]
    require(
        size is None or is_pair,
        f"image_size must be a side in pixels, or height and width, not {image_size!r:.60}",
    )
    fits = size is None or max(size) <= _LARGEST_SIDE
    require(fits, f"image_size is at most {_LARGEST_SIDE} pixels a side, not {size}")
    stored = _read(local_path(source), heads=task != "backbone", image_size=size, strict=strict)
    wanted = stored.task if task is None else (None if task == "backbone" else task)
    if wanted != stored.task:
        if wanted is not None and strict:
            raise ConfigError(
                f"{source} holds {'a backbone' if stored.task is None else f'a {stored.task} model'}, not a {wanted} "
                "model: pass strict=False to start with random heads"
            )
        stored = _without_heads(stored, wanted)
    if size is not None:
        stored = _resize(stored, size, str(source))
    return _fill(stored, parts, strict, str(source)).eval()


def fill_model(model: AnyModel, source: str | Path, *, same_classes: bool = True) -> None:
    """Start a model from a saved one: its backbone, and its heads if they are of the same task and sizes.

    Of a detection or segmentation model of other sizes all is taken that has the same shape, which the log says.

    Positions are interpolated to the model's image size; drop path and the like may differ. Final norms that the model
    does not have are left out, and those that the source does not have stay as they are (as the released code does).
    Where the model or the source reads images alone, as the image tower of a clip model does, only what images run
    through is taken, and the rest stays as it is.

    Args:
        model: of the same backbone shape; changed in place.
        source: as for `load_model`.
        same_classes: False where its outputs stand for other classes or answers: layers whose shape depends on their
            number stay random, and the log names them.

    Raises:
        DataMissingError: the source does not exist.
        ConfigError: it is damaged, or its backbone has another shape.
    """
    own = model.model_config
    stored = _read(local_path(source), image_size=own.image_size)
    if stored.config.image_size != own.image_size and stored.config.patch_size == own.patch_size:
        stored = _resize(stored, own.image_size, str(source))
    with_heads = (stored.task, stored.options, stored.part) == (model.task, model.head_options, model.part)
    backbone = model if isinstance(model, MultiwayTransformer) else model.backbone
    part = None if with_heads else _common_part(_backbone_part(stored), backbone.part)
    free = _FREE if part != "vision" else _FREE + _OF_TEXTS
    theirs, ours = ({k: v for k, v in to_plain(shape).items() if k not in free} for shape in (stored.config, own))
    if changed := differences(theirs, ours):
        raise ConfigError(f"{source} has another shape than the model of this run: {', '.join(changed)} differ")
    _check_finite(stored.state, str(source))
    of_classes = set() if same_classes or stored.task != model.task else _class_layers(model)
    if stored.task == model.task and model.task in _KEPT_IN_PART and not with_heads:
        given = {name: value for name, value in stored.state.items() if name not in of_classes}
        _fill_what_fits(model, given, str(source))
        return
    target, given = (model, stored.state) if with_heads else (backbone, _backbone_state(stored))
    of_part = None if part is None else _names_of_part(own, part)
    norms_differ = stored.config.final_norm != own.final_norm

    def is_taken(name: str) -> bool:
        """Whether a tensor comes from the source, and does not stay as it is."""
        left = (norms_differ and _FINAL_NORM.match(name)) or (with_heads and name in of_classes)
        return (of_part is None or name in of_part) and not left

    state = {name: value for name, value in given.items() if is_taken(name)}
    state |= {name: value for name, value in target.state_dict().items() if not is_taken(name)}
    check_tensors(state, _shapes(target), f"{source}: its weights")
    target.load_state_dict(state)
    if with_heads and of_classes:
        logger.warning("%s is of other classes: random weights in %s", source, _layers(of_classes))


def _class_layers(model: AnyModel) -> set[str]:
    """Tensors whose shape depends on the number of classes or answers."""
    options: dict[str, Any] = dict(model.head_options)
    options |= {name: options[name] - 1 or 2 for name in ("num_classes", "num_answers") if name in options}
    with torch.device("meta"):
        other = _shapes(build_model(model.model_config, model.task, **options))
    return {name for name, shape in _shapes(model).items() if name in other and other[name] != shape}


def _layers(tensors: Iterable[str]) -> str:
    """The layers that tensors belong to, for a line of the log."""
    return listed(list(dict.fromkeys(name.rpartition(".")[0] for name in sorted(tensors))), _MOST_LAYERS)


def _fill_what_fits(model: AnyModel, given: dict[str, Tensor], source: str) -> None:
    """Take every tensor of the same name and shape."""
    own = _shapes(model)
    state = {name: value.float() for name, value in given.items() if own.get(name) == tuple(value.shape)}
    model.load_state_dict(state, strict=False)
    if random := [name for name in own if name not in state]:
        logger.warning("%s: random weights in %s", source, _layers(random))


def _common_part(stored: Part | None, own: Part | None) -> Part | None:
    """The one modality that both backbones read; None: both."""
    if stored != own and None not in (stored, own):
        raise ConfigError(f"a {stored} tower alone is no start for a {own} tower")
    return stored or own


def _names_of_part(config: ModelConfig, part: Part) -> set[str]:
    """Tensors of a backbone that reads one modality."""
    with torch.device("meta"):
        backbone = MultiwayTransformer(config)
    keep_modality(backbone, part)
    return set(backbone.state_dict())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """What a source holds."""

    config: ModelConfig
    state: dict[str, Tensor]
    task: str | None
    options: dict[str, Any] = field(default_factory=dict)
    """Of the heads."""
    part: Part | None = None


def _read(
    source: Path, *, heads: bool = True, image_size: tuple[int, int] | None = None, strict: bool = True
) -> _Stored:
    if not os.path.exists(source):  # unlike Path's, this answers for names of any length
        raise DataMissingError(f"{shown(source)} does not exist: give an exchange folder, a .pth file or hf-hub:...")
    if (source / CONFIG_FILE).is_file():
        config, task, options, part = parse_model_settings(read_settings(source), source)
        stored = _Stored(config=config, state=read_tensors(source), task=task, options=options, part=part)
        _check_layers(stored, source)
        return stored
    if source.is_file() and is_weights(source.name) and is_exchange(source.parent):
        raise ConfigError(f"{source} is one file of an exchange folder: give the folder {source.parent}")
    tensors = read_official(source)
    try:
        converted = official.to_ours(tensors, heads=heads, image_size=image_size, strict=strict)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    return _Stored(
        config=converted.config, state=converted.state, task=converted.task, options=dict(converted.head_options)
    )


def _check_layers(stored: _Stored, source: Path) -> None:
    """Refuse a number of layers that the weights do not have, before as many are built."""
    tower = "" if stored.task is None else "backbone."
    described: dict[str, Any] = {tower: stored.config.num_layers}
    if stored.task == "clip":
        described |= {"text_backbone.": stored.options.get("text_layers")}
        for part, absent in (("text", tower), ("vision", "text_backbone.")):
            if stored.part == part:
                del described[absent]
    found = {match.groups() for name in stored.state if (match := _BLOCK.match(name))}
    for prefix, wanted in described.items():
        held = len({number for given, number in found if (given or "") == prefix})
        require(
            held == wanted,
            f"{source}: config.json describes {wanted} layers, the weights hold {held}: copy the folder again",
        )


def _without_heads(stored: _Stored, task: str | None) -> _Stored:
    """The backbone alone, named as in a model of another task."""
    state, config = _backbone_state(stored), stored.config
    if task in _WITHOUT_FINAL_NORM and config.attention == "decoupled":
        config = replace(config, final_norm=False)
        state = {name: value for name, value in state.items() if not _FINAL_NORM.match(name)}
    return replace(
        stored, config=config, task=task, state=_with_prefix(state, task), options={}, part=_backbone_part(stored)
    )


def _backbone_part(stored: _Stored) -> Part | None:
    """The one modality that the backbone of a source reads; None: both."""
    if stored.task == "clip" and stored.part == "text":
        raise ConfigError("it holds the text tower of a clip model alone: there is no backbone in it")
    return "vision" if stored.task in _IMAGES_ALONE else stored.part


def _fill(stored: _Stored, part: Part | None, strict: bool, source: str) -> AnyModel:
    """Build the model around the stored tensors: without copies where all are there, from random weights otherwise."""

    def build() -> AnyModel:
        """Build what the source describes; errors name the source."""
        try:
            model = build_model(stored.config, stored.task, **stored.options)
        except ConfigError as error:
            raise ConfigError(f"{source}: {shown(error, 300)}") from error
        except (RuntimeError, TypeError, OverflowError) as error:  # torch's, at sizes that no tensor can have
            raise ConfigError(f"{source} describes a model that cannot be built: {shown(error)}") from error
        if stored.part is not None:
            keep_part(model, stored.part)
        return model

    with torch.device("meta"):
        model = build()
    shapes = _shapes(model)
    check_tensors(stored.state, shapes, f"{source}: its weights", strict=strict)
    missing = [name for name in shapes if name not in stored.state]
    if missing:
        model = build()
    if part is not None:
        keep_part(model, part)
    needed = model.state_dict()
    if random := [name for name in missing if name in needed]:
        logger.warning("%s: random weights in %s", source, listed(random))
    # No copy of what is fp32 already; and the file is not read for a tower that was dropped.
    state = {name: value.float() for name, value in stored.state.items() if name in needed}
    _check_finite(state, source)
    model.load_state_dict(state, strict=False, assign=not missing)
    return model


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _check_finite(state: dict[str, Tensor], source: str) -> None:
    """Refuse weights that hold NaN or infinity: every answer would be NaN."""
    # A sum is finite only if all its terms are, and costs one pass at the speed of memory.
    suspects = [name for name, value in state.items() if not value.sum().isfinite()]
    broken = [name for name in suspects if not state[name].isfinite().all()]
    if broken:
        raise ConfigError(f"{source} holds NaN or infinity in {listed(broken, 3)}: take an earlier checkpoint")


def _backbone_state(stored: _Stored) -> dict[str, Tensor]:
    if stored.task is None:
        return stored.state
    prefix = "backbone."
    return {name.removeprefix(prefix): value for name, value in stored.state.items() if name.startswith(prefix)}


def _with_prefix(state: dict[str, Tensor], task: str | None) -> dict[str, Tensor]:
    return state if task is None else {f"backbone.{name}": value for name, value in state.items()}


def _resize(stored: _Stored, size: tuple[int, int], source: str) -> _Stored:
    """Interpolate the vision position table for another image size, and say so."""
    resized = replace(stored.config, image_size=size)
    name = next((name for name in stored.state if name.endswith(_POSITIONS)), None)
    if name is None or resized.grid == stored.config.grid:
        return replace(stored, config=resized)
    wanted = (stored.config.num_patches + 1 + POSITION_OFFSET, stored.config.width)
    check_tensors({name: stored.state[name]}, {name: wanted}, f"{source}: its weights")
    (old_rows, old_columns), (rows, columns) = stored.config.grid, resized.grid
    logger.warning(
        "vision positions interpolated (bicubic) from %d x %d to %d x %d patches", old_rows, old_columns, rows, columns
    )
    positions = resample_positions(stored.state[name], stored.config.grid, resized.grid)
    return replace(stored, config=resized, state={**stored.state, name: positions})
