"""A language model that says what a frozen image tower sees: tower, connector and words in one object.

    reader = load_picture_reader("runs/clipcap/export")
    reader.write(["cat.png"])                         # captions
    reader.write(["cat.png"], ["what is it?"])        # answers, if its template asks

Its folder holds `config.json` (names of tower and language model, connector, template) and `model.safetensors` (the
connector). A language model that was trained lies in `language_model/` in Hugging Face's format; a frozen one and the
tower are found again under their names. Loading runs no code.

Shapes: B pictures, H, W height and width in pixels, D width of the tower's features, N patches, T ids.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3.config import differences, require, to_plain
from beit3.data.images import ImageInput, open_image
from beit3.data.texts import clean_text
from beit3.errors import ConfigError
from beit3.finetune.common import pad_texts
from beit3.finetune.conversation import Conversation, WritingConfig
from beit3.finetune.image_tower import ImageTower, load_image_tower
from beit3.finetune.language_model import LanguageModel, load_language_model
from beit3.model.exchange import CARD_FILE, CONFIG_FILE, is_exchange, read_settings, read_tensors, write_folder
from beit3.model.official import check_tensors
from beit3.model.prefix_language_model import ConnectorConfig, PrefixLanguageModel

KIND = "picture_reader"
LANGUAGE_MODEL = "language_model"
_CARD = """\
# {name}

A connector between the image tower `{tower}` and the language model `{language}`.

```python
from beit3.finetune.picture_reader import load_picture_reader
reader = load_picture_reader("{name}")
reader.write(["picture.png"]{question})
```
"""


class PictureReader:
    """Tower, connector and language model, with random weights in the connector.

    Args:
        tower: stays frozen.
        language: the language model.
        connector: what stands between them.
        writing: template and search.
        trains_language_model: whether the language model is trained too.
        owns_language_model: whether its weights are no longer those of its source, so that they are saved.

    Raises:
        ConfigError: the language model has no positions for such texts.
    """

    def __init__(
        self,
        tower: ImageTower,
        language: LanguageModel,
        connector: ConnectorConfig,
        writing: WritingConfig,
        *,
        trains_language_model: bool = False,
        owns_language_model: bool = False,
    ) -> None:
        self.tower = tower
        self.language = language
        self.connector_config = connector
        self.writing = writing
        self.owns_language_model = owns_language_model or trains_language_model
        self.conversation = Conversation(language.words, writing)
        embeddings: Any = language.model.get_input_embeddings()
        blank = self.features(torch.zeros(1, 3, *tower.preprocess.image_size, dtype=torch.uint8))
        built = connector.build(blank.shape[-1], embeddings.embedding_dim)
        self.model = PrefixLanguageModel(
            language.model, built, opening=self.conversation.opening, trains_language_model=trains_language_model
        )
        self.start_length = len(self.conversation.opening) + (
            blank.shape[1] if connector.reads_patches else connector.prefix_length
        )
        """Places before a text: opening and picture."""
        longest = self.start_length + writing.max_text_length + writing.max_new_tokens
        positions = getattr(language.model.config, "max_position_embeddings", longest)
        require(
            longest <= positions,
            f"language model {language.source} has {positions} positions, but picture ({self.start_length}), text "
            f"({writing.max_text_length}) and answer ({writing.max_new_tokens}) need {longest}: shorten them",
        )

    def features(self, images: Tensor) -> Tensor:
        """What the connector reads of pictures (B, 3, H, W) uint8: (B, D), or (B, N, D) of the patches."""
        with torch.no_grad():
            pixels = self.tower.preprocess.normalize(images)
            return self.tower.patches(pixels) if self.connector_config.reads_patches else self.tower(pixels)

    def continue_prompts(self, images: Tensor, text_ids: Tensor, text_mask: Tensor) -> list[str]:
        """Write a text behind each prompt.

        Args:
            images: (B, 3, H, W) uint8.
            text_ids: prompts (B, T) int64, padded at the right.
            text_mask: (B, T) bool, True = real id.
        """
        found = self.model.generate(
            self.features(images),
            text_ids,
            text_mask,
            end_id=self.language.words.end_id,
            max_new_tokens=self.writing.max_new_tokens,
            num_beams=self.writing.num_beams,
            length_penalty=self.writing.length_penalty,
        )
        return [self.language.words.decode(row) for row in found.tolist()]

    def write(self, pictures: Sequence[ImageInput], questions: Sequence[str] | None = None) -> list[str]:
        """Say what is in pictures, or answer a question about each, all in one batch.

        Args:
            pictures: of any size, or their paths.
            questions: one for each picture, if the template asks.

        Raises:
            ConfigError: questions are missing, not wanted, or not as many as pictures.
            BadSampleError: a question is empty or too long.
        """
        asked = None if questions is None else len(questions)
        wanted = len(pictures) if self.conversation.asks else None
        require(
            asked == wanted,
            f"this reader takes {'no questions' if wanted is None else f'{wanted} questions'}, not {asked or 'none'}",
        )
        if not pictures:
            return []
        prompts = [self.conversation.prompt(clean_text(text)) for text in questions or ()]
        ids, mask = pad_texts(prompts or [self.conversation.prompt()] * len(pictures))
        images = torch.stack([self.tower.preprocess(open_image(picture)) for picture in pictures])
        device = next(self.model.parameters()).device
        return self.continue_prompts(images.to(device), ids.to(device), mask.to(device))

    def to(self, device: torch.device | str) -> PictureReader:
        """Move everything to a device."""
        self.tower.to(device)
        self.model.to(device)
        return self

    def settings(self) -> dict[str, Any]:
        """Content of `config.json`."""
        return {
            "kind": KIND,
            "tower": self.tower.describe(),
            "language_model": self.language.source,
            "owns_language_model": self.owns_language_model,
            "connector": _plain(self.connector_config),
            "writing": _plain(self.writing),
        }

    def save(self, folder: Path) -> None:
        """Write the folder that `load_picture_reader` reads; an older one is replaced."""
        place = folder / LANGUAGE_MODEL
        if is_exchange(folder) and read_settings(folder).get("kind") == KIND:
            shutil.rmtree(place, ignore_errors=True)  # first: half of an old folder must not pass for a new one
        settings = self.settings()
        card = _CARD.format(
            name=folder.name,
            tower=settings["tower"]["source"],
            language=self.language.source,
            question=', ["what is it?"]' if self.conversation.asks else "",
        )
        write_folder(folder, settings, self.model.connector.state_dict(), {CARD_FILE: card.encode()})
        if self.owns_language_model:
            self.language.save(place)

    def start_from(self, folder: Path) -> None:
        """Take the connector of a saved reader that stood between the same tower and language model.

        Raises:
            DataMissingError: no such folder.
            ConfigError: it is damaged, or was trained between others.
        """
        saved = read_reader_settings(folder)
        own = self.settings()
        names = ("tower", "language_model", "connector")
        left, right = ({name: _places(found[name]) for name in names} for found in (saved, own))
        changed = differences(left, right)
        require(
            not changed,
            f"{folder} was trained with another {', '.join(changed)} than this run: name the same, or drop init_from",
        )
        self._fill(folder)

    def _fill(self, folder: Path) -> None:
        state, target = read_tensors(folder), self.model.connector
        shapes = {name: tuple(value.shape) for name, value in target.state_dict().items()}
        check_tensors(state, shapes, f"{folder}: the weights of its connector")
        target.load_state_dict(state)


def load_picture_reader(folder: str | Path) -> PictureReader:
    """Load what a run of `PrefixCaptioning` or `LanguageBridge` wrote: its tower and language model are found by name.

    Raises:
        DataMissingError: the folder, its tower or its language model does not exist.
        ConfigError: one of them is damaged.
    """
    folder = Path(folder)
    saved = read_reader_settings(folder)
    try:
        connector, writing = ConnectorConfig(**saved["connector"]), WritingConfig(**saved["writing"])
        tower = load_image_tower(**saved["tower"])
    except TypeError as error:
        raise ConfigError(f"{folder / CONFIG_FILE} describes no picture reader ({error}): copy it again") from error
    language = open_language_model(saved["language_model"], folder)
    reader = PictureReader(tower, language, connector, writing, owns_language_model=saved["owns_language_model"])
    reader._fill(folder)
    reader.model.eval()
    return reader


def open_language_model(source: str, folder: Path | None = None) -> LanguageModel:
    """Load the language model of a saved reader: the one trained with it, or else the one named `source`."""
    if folder is None or not read_reader_settings(folder)["owns_language_model"]:
        return load_language_model(source)
    return dataclasses.replace(load_language_model(folder / LANGUAGE_MODEL), source=source)


def read_reader_settings(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a saved reader.

    Raises:
        DataMissingError: there is none.
        ConfigError: it is damaged, or of another kind of folder.
    """
    saved = read_settings(folder)
    parts = {"tower": dict, "language_model": str, "owns_language_model": bool, "connector": dict, "writing": dict}
    if saved.get("kind") != KIND or not all(isinstance(saved.get(name), kind) for name, kind in parts.items()):
        raise ConfigError(f"{folder} holds no picture reader: give the export of a ClipCap or LLaVA run")
    return saved


def _plain(value: Any) -> dict[str, Any]:
    """Fields of a configuration value for JSON."""
    fields: dict[str, Any] = to_plain(value)
    fields.pop("type")
    return fields


def _places(value: Any) -> Any:
    """The same with paths spelled out, so that two spellings of a place compare equal."""
    if isinstance(value, dict):
        return {name: _places(item) for name, item in value.items()}
    return str(Path(value).resolve()) if isinstance(value, str) and os.path.exists(value) else value
