"""What all models have in common: they know their shape and task, write themselves into a folder, and publish it."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from beit3.config import require, to_plain
from beit3.errors import ConfigError
from beit3.model.card import model_card
from beit3.model.exchange import CARD_FILE, write_folder
from beit3.model.hub import PREFIX, check_name, publish
from beit3.model.presets import ModelConfig
from beit3.model.released_files import shown

Part = Literal["vision", "text"]


class ModelSettings(NamedTuple):
    """What `config.json` says of a model."""

    config: ModelConfig
    task: str | None
    heads: dict[str, Any]
    """Options of the heads by name."""
    part: Part | None
    """The tower that it holds alone."""


def model_settings(model: PretrainedModel) -> dict[str, Any]:
    """What `config.json` says of a model: task, shape, options of the heads, and its tower if it has one alone."""
    shape = to_plain(model.model_config)
    shape.pop("type")
    settings = {"kind": "model", "model_type": "beit3", "task": model.task, "model": shape, "heads": model.head_options}
    return settings if model.part is None else {**settings, "part": model.part}


def parse_model_settings(settings: Mapping[str, Any], where: Path) -> ModelSettings:
    """The inverse of `model_settings`; options of heads are checked where the heads are built.

    Args:
        settings: content of `config.json`.
        where: named in errors.

    Raises:
        ConfigError: they describe no model.
    """
    kind, shape = settings.get("kind"), settings.get("model")
    task, heads, part = settings.get("task"), settings.get("heads"), settings.get("part")
    require(
        kind == "model" and isinstance(shape, dict),
        f"{where} holds a '{shown(kind)}', not a model: give a model's folder",
    )
    for name, fits, wanted in (
        ("task", task is None or isinstance(task, str), "a text or null"),
        ("heads", heads is None or isinstance(heads, dict), "options by name"),
        ("part", part in (None, "vision", "text"), "vision, text or null"),
    ):
        require(
            fits, f"{where}: '{name}' must be {wanted}, not {shown(settings.get(name), 60)}: write the folder again"
        )
    try:
        config = ModelConfig(**shape)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"{where} describes no model: {shown(error, 300)}") from error
    return ModelSettings(config, task, heads or {}, part)


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

    @property
    def vector_width(self) -> int:
        """Features of the vector that stands for an image or a text."""
        return self.model_config.width

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
            folder: where; an older exchange folder of that name is replaced in one step, but for files that are not
                written now.
            files: further files by name, such as `tokenizer.spm`.
            licence: of the weights, for the card, such as "mit"; None: not stated.
            numbers: results for the card by name, such as {"ImageNet-1k top-1": 85.4}.
            max_shard_size: largest file of weights, in bytes or as "5GB".

        Raises:
            ConfigError: at `folder` stands something else, which is left alone, or an argument is wrong.
        """
        self._write(
            Path(folder), Path(os.path.abspath(folder)).name, files or {}, licence, numbers or {}, max_shard_size
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

        Raises:
            ConfigError: not the name of a repository.
            BeitError: the Hub refused, or cannot be reached.
        """
        check_name(name)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / name.rpartition("/")[2]
            self._write(folder, f"{PREFIX}{name}", files or {}, licence, numbers or {})
            return publish(folder, name, private=private)

    def _write(
        self,
        folder: Path,
        source: str,
        files: Mapping[str, bytes],
        licence: str | None,
        numbers: Mapping[str, float | str],
        max_shard_size: int | str = "5GB",
    ) -> None:
        """Write the folder; its card says to load it from `source`."""
        settings = model_settings(self)
        card = model_card(source, settings, self.num_parameters, licence, numbers)
        write_folder(folder, settings, self.state_dict(), {CARD_FILE: card.encode(), **files}, max_shard_size)

    @property
    def num_parameters(self) -> int:
        """Trained and frozen numbers, all counted."""
        return sum(parameter.numel() for parameter in self.parameters())
