"""Loading models: exchange folders, the Hugging Face Hub and released files, by one function.

Nothing is initialised at random that the source holds, and weights of exchange folders stay mapped from disk until
they are used.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beit3.config import differences, to_plain
from beit3.errors import ConfigError
from beit3.model import official
from beit3.model.embeddings import resample_positions
from beit3.model.exchange import CONFIG_FILE, Part, parse_model_config, read_settings, read_tensors
from beit3.model.heads import AnyModel, build_model
from beit3.model.hub import local_path
from beit3.model.parts import keep_part
from beit3.model.presets import ModelConfig
from beit3.model.released_files import read_official
from beit3.model.transformer import MultiwayTransformer

_POSITIONS = "vision_embedding.positions"
_FINAL_NORM = re.compile(r"(backbone\.)?norm\.")
logger = logging.getLogger(__name__)


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
            which needs `strict=False`.
        image_size: None keeps the source's resolution; another one (height and width, or a side) interpolates
            the vision position table, and the log says so.
        parts: "vision" or "text" keeps one tower and drops the other.
        strict: an error names every missing or unexpected tensor; False leaves missing ones random.

    Returns:
        The model in eval mode, fp32, on the CPU.

    Raises:
        DataMissingError: the source does not exist.
        ConfigError: the source is damaged, of another kind, or does not fit the task.
    """
    stored = _read(local_path(source))
    wanted = stored.task if task is None else (None if task == "backbone" else task)
    if wanted != stored.task:
        if wanted is not None and strict:
            raise ConfigError(
                f"{source} holds {'a backbone' if stored.task is None else f'a {stored.task} model'}, not a {wanted} "
                "model: pass strict=False to start with random heads"
            )
        state = _with_prefix(_backbone_state(stored), wanted)
        stored = replace(stored, task=wanted, state=state, options={})
    if image_size is not None:
        stored = _resize(stored, (image_size, image_size) if isinstance(image_size, int) else image_size)
    return _fill(stored, parts, strict, str(source)).eval()


def fill_model(model: AnyModel, source: str | Path) -> None:
    """Start a model from a saved one: its backbone, and its heads if they are of the same task and sizes.

    Positions are interpolated to the model's image size; drop path and the like may differ. Final norms that the model
    does not have are left out, and those that the source does not have stay as they are (as the released code does).

    Args:
        model: of the same backbone shape; changed in place.
        source: as for `load_model`.

    Raises:
        DataMissingError: the source does not exist.
        ConfigError: it is damaged, or its backbone has another shape.
    """
    stored, own = _read(local_path(source)), model.model_config
    if stored.config.image_size != own.image_size and stored.config.patch_size == own.patch_size:
        stored = _resize(stored, own.image_size)
    free = ("drop_path", "activation_checkpointing", "final_norm")
    same = replace(stored.config, **{name: getattr(own, name) for name in free})
    if same != own:
        names = differences(to_plain(same), to_plain(own))
        raise ConfigError(f"{source} has another shape than the model of this run: {', '.join(names)} differ")
    _check_finite(stored.state, str(source))
    with_heads = (stored.task, stored.options) == (model.task, model.head_options)
    target = model if with_heads or isinstance(model, MultiwayTransformer) else model.backbone
    state = stored.state if with_heads else _backbone_state(stored)
    if stored.config.final_norm != own.final_norm:
        state = {name: value for name, value in state.items() if not _FINAL_NORM.match(name)}
        state |= {name: value for name, value in target.state_dict().items() if _FINAL_NORM.match(name)}
    _check_fits(target, state, strict=True, source=str(source))
    target.load_state_dict(state)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """What a source holds."""

    config: ModelConfig
    state: dict[str, Tensor]
    task: str | None
    options: dict[str, Any] = field(default_factory=dict)
    """Of the heads."""
    part: Part | None = None


def _read(source: Path) -> _Stored:
    if (source / CONFIG_FILE).is_file():
        settings = read_settings(source)
        return _Stored(
            config=parse_model_config(settings, source),
            state=read_tensors(source),
            task=settings.get("task"),
            options=settings.get("heads") or {},
            part=settings.get("part"),
        )
    tensors = read_official(source)
    try:
        converted = official.to_ours(tensors)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    return _Stored(
        config=converted.config, state=converted.state, task=converted.task, options=dict(converted.head_options)
    )


def _fill(stored: _Stored, part: Part | None, strict: bool, source: str) -> AnyModel:
    """Build the model around the stored tensors: without copies where all are there, from random weights otherwise."""
    with torch.device("meta"):
        model = build_model(stored.config, stored.task, **stored.options)
    if stored.part is not None:
        keep_part(model, stored.part)
    complete = _check_fits(model, stored.state, strict=strict, source=source)
    if not complete:
        model = build_model(stored.config, stored.task, **stored.options)
    if part is not None:
        keep_part(model, part)
    needed = model.state_dict()
    # No copy of what is fp32 already; and the file is not read for a tower that was dropped.
    state = {name: value.float() for name, value in stored.state.items() if name in needed}
    _check_finite(state, source)
    model.load_state_dict(state, strict=False, assign=complete)
    return model


def _check_fits(model: nn.Module, state: dict[str, Tensor], *, strict: bool, source: str) -> bool:
    """Refuse tensors that a model has no place for, or that it lacks if `strict`; returns whether it lacks none."""
    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = sorted(name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape)
    if unexpected or wrong or (missing and strict):
        raise ConfigError(
            f"{source} does not fit its configuration: missing {missing}, unexpected {unexpected}, "
            f"of another shape {wrong}"
        )
    return not missing


def _check_finite(state: dict[str, Tensor], source: str) -> None:
    """Refuse weights that hold NaN or infinity: every answer would be NaN."""
    # A sum is finite only if all its terms are, and costs one pass at the speed of memory.
    suspects = [name for name, value in state.items() if not value.sum().isfinite()]
    broken = [name for name in suspects if not state[name].isfinite().all()]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ConfigError(
            f"{source} holds NaN or infinity in {', '.join(broken[:3])}{more}: take an earlier checkpoint"
        )


def _backbone_state(stored: _Stored) -> dict[str, Tensor]:
    if stored.task is None:
        return stored.state
    prefix = "backbone."
    return {name.removeprefix(prefix): value for name, value in stored.state.items() if name.startswith(prefix)}


def _with_prefix(state: dict[str, Tensor], task: str | None) -> dict[str, Tensor]:
    return state if task is None else {f"backbone.{name}": value for name, value in state.items()}


def _resize(stored: _Stored, size: tuple[int, int]) -> _Stored:
    """Interpolate the vision position table for another image size, and say so."""
    resized = replace(stored.config, image_size=size)
    name = next((name for name in stored.state if name.endswith(_POSITIONS)), None)
    if name is None or resized.grid == stored.config.grid:
        return replace(stored, config=resized)
    (old_rows, old_columns), (rows, columns) = stored.config.grid, resized.grid
    logger.warning(
        "vision positions interpolated (bicubic) from %d x %d to %d x %d patches", old_rows, old_columns, rows, columns
    )
    positions = resample_positions(stored.state[name], stored.config.grid, resized.grid)
    return replace(stored, config=resized, state={**stored.state, name: positions})
