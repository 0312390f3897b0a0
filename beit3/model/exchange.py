"""The exchange folder: `config.json` + `model.safetensors` (+ tokenizer, preprocessing, labels) and a model card.

Loading it runs no code. A folder is written beside its place and renamed, so that a killed save leaves no half of one.
Weights above 5 GB are cut into files that `model.safetensors.index.json` lists, in the layout of the Hugging Face Hub.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from beit3.config import to_plain
from beit3.errors import ConfigError, DataMissingError
from beit3.model.card import model_card
from beit3.model.hub import publish
from beit3.model.presets import ModelConfig

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CARD_FILE = "README.md"
Part = Literal["vision", "text"]


def write_folder(
    folder: Path,
    settings: Mapping[str, Any],
    state: Mapping[str, Tensor],
    files: Mapping[str, bytes] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write an exchange folder in one step, replacing an older one of that name.

    Args:
        folder: where; its parent is made if need be.
        settings: content of `config.json`.
        state: tensors.
        files: further files by name, such as `tokenizer.spm`.
        max_shard_size: largest file of weights, in bytes or as "5GB".
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    beside.mkdir()
    _write_tensors(beside, state, max_shard_size)
    text = json.dumps({"format_version": FORMAT_VERSION, **settings}, indent=2)
    (beside / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    for name, content in (files or {}).items():
        (beside / name).write_bytes(content)
    if folder.exists():
        old = folder.with_name(f"{beside.name}-old")
        os.replace(folder, old)
        os.replace(beside, folder)
        shutil.rmtree(old)
    else:
        os.replace(beside, folder)


def _write_tensors(folder: Path, state: Mapping[str, Tensor], max_shard_size: int | str) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors writes 0600
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_settings(folder: Path) -> dict[str, Any]:
    """Read and check `config.json` of an exchange folder."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise DataMissingError(f"{path} does not exist: give a folder that save_pretrained or a run has written")
    settings = _read_json(path)
    if settings.get("format_version") != FORMAT_VERSION:
        raise ConfigError(f"{path} is not of format version {FORMAT_VERSION}: it was written by another program")
    return settings


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the weights of an exchange folder, mapped from disk: what is not used takes no memory."""
    state: dict[str, Tensor] = {}
    for file in _weight_files(Path(folder)):
        if not file.is_file():
            raise DataMissingError(f"{file} does not exist: the folder is incomplete, copy it again")
        try:
            state.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{file} is damaged ({error}): copy it again") from error
    return state


def _weight_files(folder: Path) -> list[Path]:
    """The one file of weights, or all that the index names."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return [folder / WEIGHTS_FILE]
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ConfigError(f"{index} lists no weights: copy the folder again")
    files = sorted({str(name) for name in names.values()})
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ConfigError(f"{index} names '{name}', which is no file of weights of this folder: do not trust it")
    return [folder / name for name in files]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}): write the folder again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not settings: write the folder again")
    return content


def model_settings(model: PretrainedModel) -> dict[str, Any]:
    """What `config.json` says of a model: task, shape, options of the heads, and its tower if it has one alone."""
    shape = to_plain(model.model_config)
    shape.pop("type")
    settings = {"kind": "model", "model_type": "beit3", "task": model.task, "model": shape, "heads": model.head_options}
    return settings if model.part is None else {**settings, "part": model.part}


def parse_model_config(settings: Mapping[str, Any], where: Path) -> ModelConfig:
    """Rebuild the `ModelConfig` of a settings dictionary; `where` is named in errors."""
    shape = settings.get("model")
    if settings.get("kind") != "model" or not isinstance(shape, dict):
        raise ConfigError(f"{where} holds a '{settings.get('kind')}', not a model: give a model's folder")
    size = shape.get("image_size")
    if isinstance(size, list):
        shape = {**shape, "image_size": tuple(size)}
    try:
        return ModelConfig(**shape)
    except TypeError as error:
        raise ConfigError(f"{where} describes no model ({error}): write the folder again") from error


class PretrainedModel(nn.Module, ABC):
    """Anything that `load_model` returns: knows its shape and task, and can write and publish itself."""

    task: str | None = None
    part: Part | None = None
    """The one tower that is left of it (`beit3.model.parts`); None: it is whole."""

    @property
    @abstractmethod
    def model_config(self) -> ModelConfig:
        """Shape of the transformer."""

    @property
    def head_options(self) -> dict[str, Any]:
        """What rebuilding this model needs besides the transformer's configuration."""
        return {}

    def save_pretrained(
        self,
        folder: Path | str,
        files: Mapping[str, bytes] | None = None,
        *,
        licence: str | None = None,
        numbers: Mapping[str, float | str] | None = None,
        max_shard_size: int | str = "5GB",
    ) -> None:
        """Write the model as an exchange folder with a model card.

        Args:
            folder: where; an older folder of that name is replaced in one step.
            files: further files by name, such as `tokenizer.spm`.
            licence: of the weights, for the card, such as "mit"; None: not stated.
            numbers: results for the card by name, such as {"ImageNet-1k top-1": 85.4}.
            max_shard_size: largest file of weights, in bytes or as "5GB".
        """
        settings = model_settings(self)
        card = model_card(Path(folder).name, settings, self.num_parameters, licence, numbers or {})
        write_folder(
            Path(folder), settings, self.state_dict(), {CARD_FILE: card.encode(), **(files or {})}, max_shard_size
        )

    def push_to_hub(
        self,
        name: str,
        files: Mapping[str, bytes] | None = None,
        *,
        private: bool = False,
        licence: str | None = None,
        numbers: Mapping[str, float | str] | None = None,
    ) -> str:
        """Publish the model on the Hugging Face Hub, as `load_model("hf-hub:NAME")` reads it.

        Args:
            name: "organisation/model"; made if need be.
            files: as in `save_pretrained`.
            private: whether a new repository is private.
            licence: as in `save_pretrained`.
            numbers: as in `save_pretrained`.

        Returns:
            Address of the commit.
        """
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / name.rpartition("/")[2]
            self.save_pretrained(folder, files, licence=licence, numbers=numbers)
            return publish(folder, name, private=private)

    @property
    def num_parameters(self) -> int:
        """Trained and frozen numbers, all counted."""
        return sum(parameter.numel() for parameter in self.parameters())
