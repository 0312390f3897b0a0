"""Where a model lies and what lies with it: preprocessing, text tokenizer, names of its outputs.

Loading, converting and describing a model all ask here, so that they agree.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from beit3.data.labels import FILE as LABELS_FILE
from beit3.data.labels import imagenet_labels, read_labels
from beit3.data.preprocess import FILE as PREPROCESS_FILE
from beit3.data.preprocess import Preprocess
from beit3.errors import ConfigError, DataMissingError
from beit3.model.build import AnyModel
from beit3.model.exchange import CONFIG_FILE, is_exchange, is_weights, read_settings
from beit3.model.heads import SuperClassModel
from beit3.model.hub import local_path
from beit3.model.released_files import shown
from beit3.tokenizer.subwords import WordList
from beit3.tokenizer.text import TextTokenizer

TOKENIZER_FILE = "tokenizer.spm"
"""In an exchange folder."""
RELEASED_TOKENIZER = "beit3.spm"
"""Beside a released file."""
_UNUSED_ROWS = 8
"""Rows of the released word embedding that no id of `beit3.spm` reaches."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model's folder or file, and the files that belong to it; None where there is none."""

    path: Path
    is_folder: bool
    """Whether it is an exchange folder; otherwise it is of the released layout, or of another kind altogether."""
    preprocess: Path | None
    tokenizer: Path | None
    labels: Path | None

    @property
    def is_visual_tokenizer(self) -> bool:
        """Whether it is an exchange folder of a visual tokenizer."""
        return self.is_folder and read_settings(self.path).get("kind") == "vqkd"

    def read_preprocess(self, model: AnyModel) -> Preprocess:
        """How the model's inputs are prepared: as written beside it, or else as the released code does.

        Raises:
            ConfigError: it is damaged, or does not fit the model.
        """
        if self.preprocess is None:
            return Preprocess.of_task(model.model_config, model.task)
        found = Preprocess.read(self.preprocess.parent)
        try:
            found.check_fits(model.model_config)
        except ConfigError as error:
            raise ConfigError(f"{self.preprocess} does not fit its model: {error}") from error
        return found

    def read_tokenizer(self, model: AnyModel, preprocess: Preprocess) -> TextTokenizer | None:
        """The text tokenizer; None if there is none, or the model reads no texts.

        Raises:
            DataMissingError: the one that was asked for does not exist.
            ConfigError: it is damaged, or belongs to another model.
        """
        if self.tokenizer is None or model.part == "vision" or not preprocess.max_text_length:
            return None
        found, rows = TextTokenizer.load(self.tokenizer), model.model_config.vocab_size
        if len(found) > rows or (not self.is_folder and len(found) != rows - _UNUSED_ROWS):
            raise ConfigError(
                f"{self.tokenizer} has {len(found):,} ids, but the model {rows:,} words: "
                "this tokenizer belongs to another model"
            )
        return found

    def read_words(self, model: AnyModel) -> WordList | None:
        """The vocabulary of a SuperClass model; None for other models.

        Raises:
            DataMissingError: it does not lie with the model.
            ConfigError: it is damaged, or belongs to another model.
        """
        if not isinstance(model, SuperClassModel) or model.part == "text":
            return None
        return WordList.read(self.path, model.word_head.linear.out_features)

    def read_labels(self, model: AnyModel) -> list[str] | None:
        """Names of the classes or answers: those beside the model, or ImageNet's; None if it has none.

        Raises:
            DataMissingError: the list that was asked for does not exist.
            ConfigError: it is damaged, or of another length.
        """
        outputs = num_outputs(model)
        if not outputs:
            return None
        if self.labels is None:
            known = imagenet_labels() if model.task == "classification" else []
            return known if len(known) == outputs else None
        names = read_labels(self.labels)
        if len(names) != outputs:
            raise ConfigError(
                f"{self.labels} names {len(names):,} outputs, the model has {outputs:,}: "
                "these labels belong to another model"
            )
        return names


def find_source(source: str | Path, *, tokenizer: str | Path | None = None, labels: str | Path | None = None) -> Source:
    """Find a model and what lies with it; nothing is read yet.

    Args:
        source: exchange folder, "hf-hub:organisation/name" (downloaded if need be), or a file of the released layout.
        tokenizer: `.spm` file to use instead of the one that lies there.
        labels: names of the outputs to use instead of those that lie there.

    Raises:
        DataMissingError: there is no such file or folder.
        ConfigError: it is a file out of an exchange folder.
    """
    path = local_path(source)
    if not os.path.exists(path):  # unlike pathlib's, this one answers for names of any length
        raise DataMissingError(
            f"{shown(path)} does not exist: give an exchange folder, a .pth file, or hf-hub:organisation/name"
        )
    if is_weights(path.name) and is_exchange(path.parent):
        raise ConfigError(f"{path} is one file of an exchange folder: give the folder, {path.parent}")
    is_folder = (path / CONFIG_FILE).is_file()
    beside = path / TOKENIZER_FILE if is_folder else path.parent / RELEASED_TOKENIZER
    preprocess, names = path / PREPROCESS_FILE, path / LABELS_FILE
    return Source(
        path=path,
        is_folder=is_folder,
        preprocess=preprocess if is_folder and preprocess.is_file() else None,
        tokenizer=Path(tokenizer) if tokenizer is not None else (beside if beside.is_file() else None),
        labels=Path(labels) if labels is not None else (names if is_folder and names.is_file() else None),
    )


def num_outputs(model: AnyModel) -> int:
    """Classes or answers of a model; 0 for one that has neither."""
    options = model.head_options
    return int(options.get("num_classes") or options.get("num_answers") or 0)
