"""The exchange folder: `config.json` + `model.safetensors` (+ tokenizer, preprocessing, labels, model card).

Loading it runs no code. A folder is written beside its place and renamed, so that a killed save leaves no half of one.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from beit3.config import to_plain
from beit3.errors import ConfigError, DataMissingError
from beit3.model.presets import ModelConfig

FORMAT_VERSION = 1


def write_folder(
    folder: Path, settings: Mapping[str, Any], state: Mapping[str, Tensor], files: Mapping[str, bytes] | None = None
) -> None:
    """Write an exchange folder in one step, replacing an older one of that name.

    Args:
        folder: where; its parent is made if need be.
        settings: content of `config.json`.
        state: tensors of `model.safetensors`.
        files: further files by name, such as `tokenizer.spm`.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    beside.mkdir()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
    (beside / "model.safetensors").chmod(0o644)  # safetensors writes 0600
    text = json.dumps({"format_version": FORMAT_VERSION, **settings}, indent=2)
    (beside / "config.json").write_text(text + "\n", encoding="utf-8")
    for name, content in (files or {}).items():
        (beside / name).write_bytes(content)
    if folder.exists():
        old = folder.with_name(f"{beside.name}-old")
        os.replace(folder, old)
        os.replace(beside, folder)
        shutil.rmtree(old)
    else:
        os.replace(beside, folder)


def read_settings(folder: Path) -> dict[str, Any]:
    """Read and check `config.json` of an exchange folder."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise DataMissingError(f"{path} does not exist: give a folder that save_pretrained or a run has written")
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}): write the folder again") from error
    if not isinstance(settings, dict) or settings.get("format_version") != FORMAT_VERSION:
        raise ConfigError(f"{path} is not of format version {FORMAT_VERSION}: it was written by another program")
    return settings


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read `model.safetensors` of an exchange folder."""
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise DataMissingError(f"{path} does not exist: the folder is incomplete, copy it again")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged ({error}): copy it again") from error


def model_settings(model: PretrainedModel) -> dict[str, Any]:
    """What `config.json` says of a model: task, shape, options of the heads."""
    shape = to_plain(model.model_config)
    shape.pop("type")
    return {"kind": "model", "task": model.task, "model": shape, "heads": model.head_options}


def parse_model_config(settings: Mapping[str, Any], where: Path) -> ModelConfig:
    """Rebuild the `ModelConfig` of a settings dictionary; `where` is named in errors."""
    shape = settings.get("model")
    if settings.get("kind") != "model" or not isinstance(shape, dict):
        raise ConfigError(f"{where} holds a '{settings.get('kind')}', not a model: give a model's folder")
    size = shape.get("image_size")
    if isinstance(size, list):
        shape = {**shape, "image_size": tuple(size)}
    return ModelConfig(**shape)


class PretrainedModel(nn.Module, ABC):
    """Anything that `load_model` returns: knows its shape and task, and can write itself."""

    task: str | None = None

    @property
    @abstractmethod
    def model_config(self) -> ModelConfig:
        """Shape of the transformer."""

    @property
    def head_options(self) -> dict[str, Any]:
        """What rebuilding this model needs besides the transformer's configuration."""
        return {}

    def save_pretrained(self, folder: Path | str, files: Mapping[str, bytes] | None = None) -> None:
        """Write the model as an exchange folder.

        Args:
            folder: where; an older folder of that name is replaced in one step.
            files: further files by name, such as `tokenizer.spm`.
        """
        write_folder(Path(folder), model_settings(self), self.state_dict(), files)
