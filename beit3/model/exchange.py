"""The exchange folder: `config.json` + `model.safetensors` (+ tokenizer, preprocessing, labels) and a model card.

Loading it runs no code. A folder is written beside its place and renamed, so that a killed save leaves no half of one.
What is no such folder is never replaced.
Weights above 5 GB are cut into files that `model.safetensors.index.json` lists, in the layout of the Hugging Face Hub.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from beit3.errors import BeitError, ConfigError, DataMissingError
from beit3.model.released_files import load_safetensors, shown

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CARD_FILE = "README.md"
_OF_A_MODEL = {"preprocess.json", "labels.json", "words.json"} | {
    "tokenizer.spm",
    "tokenizer.json",
    "tokenizer_config.json",
}
"""What belongs to the weights: it goes with them, or another model would be read with the wrong words and pictures."""


def write_folder(
    folder: Path,
    settings: Mapping[str, Any],
    state: Mapping[str, Tensor],
    files: Mapping[str, bytes] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write an exchange folder in one step.

    An older exchange folder of that name and kind is replaced; what is not of the older model stays.

    Args:
        folder: where; its parent is made if need be, a link is followed.
        settings: content of `config.json`.
        state: tensors.
        files: further files by name, such as `tokenizer.spm`.
        max_shard_size: largest file of weights, in bytes or as "5GB".

    Raises:
        ConfigError: at `folder` stands something else, `files` holds a name that is not free, or `max_shard_size` is
            no size. Nothing is left behind then, nor if the disk is full.
    """
    place = _find_place(Path(folder), settings.get("kind"))
    for name in files or {}:
        if name != Path(name).name or name in ("", "..") or name == CONFIG_FILE or is_weights(name):
            raise ConfigError(f"'{name}' cannot be written beside the weights: give a plain name that is not taken")
    beside = place.with_name(f"{place.name[:64]}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        beside.mkdir()
        _write_tensors(beside, state, max_shard_size)
        text = json.dumps({"format_version": FORMAT_VERSION, **settings}, indent=2)
        (beside / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        for name, content in (files or {}).items():
            (beside / name).write_bytes(content)
        if place.exists():
            _swap(beside, place)
        else:
            os.replace(beside, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def is_weights(name: str) -> bool:
    """Whether a file of an exchange folder holds its weights, some of them, or their index."""
    return name == INDEX_FILE or re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", name) is not None


def is_exchange(folder: Path) -> bool:
    """Whether a folder holds the settings of one."""
    try:
        return bool(read_settings(folder))
    except BeitError:
        return False


def _find_place(folder: Path, kind: object) -> Path:
    """Where a folder of this kind can be written without harm to anything else."""
    try:
        place = folder.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        exists = place.exists()
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{folder} cannot be made: a part of its path is a file, choose another place") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{shown(folder)} cannot be made ({error}): choose another place") from error
    if not exists:
        return place
    if not place.is_dir():
        raise ConfigError(f"{folder} is a file: choose a new folder")
    if any(place.iterdir()) and not (is_exchange(place) and read_settings(place).get("kind") == kind):
        raise ConfigError(f"{folder} holds other files, which are left alone: choose a new folder, or empty it")
    if Path.cwd().is_relative_to(place):
        raise ConfigError(f"{folder} is the current folder, which cannot be replaced: choose another one")
    return place


def _swap(beside: Path, place: Path) -> None:
    """Put a new folder in the place of an older one, and what was foreign in that one back."""
    old = beside.with_name(f"{beside.name}-old")
    shutil.copymode(place, beside)
    os.replace(place, old)
    try:
        os.replace(beside, place)
    except OSError:
        os.replace(old, place)
        raise
    for path in old.iterdir():
        if not is_weights(path.name) and path.name not in _OF_A_MODEL and not (place / path.name).exists():
            os.replace(path, place / path.name)
    shutil.rmtree(old)


def _write_tensors(folder: Path, state: Mapping[str, Tensor], max_shard_size: int | str) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ConfigError(f"max_shard_size '{max_shard_size}' is no size: write bytes or '5GB'") from error
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
            state.update(load_safetensors(file))
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
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}): write the folder again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not settings: write the folder again")
    return content
