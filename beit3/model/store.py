"""Loading models: exchange folders and official files, by one function."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from beit3.config import differences, to_plain
from beit3.errors import ConfigError
from beit3.model import official
from beit3.model.embeddings import resample_positions
from beit3.model.exchange import parse_model_config, read_settings, read_tensors
from beit3.model.heads import AnyModel, build_model
from beit3.model.presets import ModelConfig
from beit3.model.transformer import MultiwayTransformer

Part = Literal["vision", "text"]
_POSITIONS = "vision_embedding.positions"


def load_model(
    source: str | Path,
    task: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    parts: Part | None = None,
    strict: bool = True,
) -> AnyModel:
    """Load a model from an exchange folder or an official file.

    Args:
        source: folder written by `save_pretrained` or a run, or an official `.pth` (also under a `.zip` name).
        task: None takes what the source holds; "backbone" drops its heads; another task gets its heads at random,
            which needs `strict=False`.
        image_size: None keeps the source's resolution; another one (height and width, or a side) interpolates
            the vision position table.
        parts: "vision" or "text" keeps one tower of a decoupled model and drops the other.
        strict: an error names every missing or unexpected tensor; False leaves missing ones random.

    Returns:
        The model in eval mode.

    Raises:
        DataMissingError: the source does not exist.
        ConfigError: the source is damaged, of another kind, or does not fit the task.
    """
    source = Path(source)
    config, state, found, options = _read(source)
    wanted = found if task is None else (None if task == "backbone" else task)
    if wanted != found:
        if wanted is not None and strict:
            raise ConfigError(
                f"{source} holds {'a backbone' if found is None else f'a {found} model'}, not a {wanted} model: "
                "pass strict=False to start with random heads"
            )
        state = _with_prefix(_backbone_state(state, found), wanted)
        options = {}
    if image_size is not None:
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        config, state = _resize(config, state, size)
    model = build_model(config, wanted, **options)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or (missing and strict):
        raise ConfigError(f"{source} does not fit its configuration: missing {missing}, unexpected {unexpected}")
    if parts is not None:
        _keep_part(model, parts)
    return model.eval()


def load_backbone(backbone: MultiwayTransformer, source: Path) -> None:
    """Fill a backbone from the backbone of any saved model of the same shape (drop path and the like may differ)."""
    config, state, task, _ = _read(source)
    if config.image_size != backbone.config.image_size and config.patch_size == backbone.config.patch_size:
        config, state = _resize(config, state, backbone.config.image_size)
    own = backbone.config
    same = replace(config, drop_path=own.drop_path, activation_checkpointing=own.activation_checkpointing)
    if same != own:
        names = differences(to_plain(same), to_plain(own))
        raise ConfigError(f"{source} has another shape than the model of this run: {', '.join(names)} differ")
    backbone.load_state_dict(_backbone_state(state, task))


def _read(source: Path) -> tuple[ModelConfig, dict[str, Tensor], str | None, dict[str, Any]]:
    """Configuration, tensors, task and head options of a source."""
    if source.is_dir() and (source / "config.json").is_file():
        settings = read_settings(source)
        config = parse_model_config(settings, source)
        return config, read_tensors(source), settings["task"], settings["heads"]
    converted = official.to_ours(official.read_official(source))
    return converted.config, converted.state, converted.task, dict(converted.head_options)


def _backbone_state(state: dict[str, Tensor], task: str | None) -> dict[str, Tensor]:
    if task is None:
        return state
    prefix = "backbone."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _with_prefix(state: dict[str, Tensor], task: str | None) -> dict[str, Tensor]:
    return state if task is None else {f"backbone.{name}": value for name, value in state.items()}


def _resize(
    config: ModelConfig, state: dict[str, Tensor], size: tuple[int, int]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    resized = replace(config, image_size=size)
    name = next(name for name in state if name.endswith(_POSITIONS))
    return resized, {**state, name: resample_positions(state[name], config.grid, resized.grid)}


def _keep_part(model: AnyModel, part: Part) -> None:
    """Drop the other modality's own parameters; using it afterwards fails."""
    backbone = model if isinstance(model, MultiwayTransformer) else model.backbone
    other = "text" if part == "vision" else "vision"
    for block in backbone.layers():
        for experts in (block.attention_in, block.attention_out, block.ffn):
            for name in (other, "fusion"):
                if name in experts:
                    del experts[name]
    if other in backbone.norm:
        del backbone.norm[other]
    setattr(backbone, f"{other}_embedding", nn.Identity())
