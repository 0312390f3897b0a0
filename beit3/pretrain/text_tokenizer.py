"""Training a text tokenizer from prepared texts: a run type of its own, because nothing is learned by gradient."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from beit3.config import config, require
from beit3.data.shards import load_prepared
from beit3.data.texts import clean_text
from beit3.errors import BadSampleError, ConfigError
from beit3.tokenizer.text import TextTokenizer, train_text_tokenizer

TOKENIZER_FILE = "tokenizer.spm"


@config
class TextTokenizerRun:
    """Everything that decides a text tokenizer."""

    name: str
    """The run's folder is `out/name`; it receives `tokenizer.spm`."""
    corpora: tuple[str, ...]
    """Folders of `beit3 prepare text` or `pairs`, relative to `data`."""
    data: Path = Path("data")
    out: Path = Path("runs")
    vocab_size: int = 64_000
    """Most pieces; the ids are two more."""
    model_type: Literal["unigram", "bpe"] = "unigram"
    character_coverage: float = 0.9995
    seed: int = 0
    overwrite: bool = False
    """Replace an earlier tokenizer of the same name."""

    def __post_init__(self) -> None:
        require(len(self.corpora) > 0, "corpora must name at least one folder")
        require(self.vocab_size > 4, f"vocab_size must exceed 4, not {self.vocab_size}")

    @property
    def folder(self) -> Path:
        """Where the tokenizer is written."""
        return self.out / self.name


def train_from_corpora(run: TextTokenizerRun) -> TextTokenizer:
    """Train the tokenizer of a run and write it to the run's folder."""
    path = run.folder / TOKENIZER_FILE
    if path.exists() and not run.overwrite:
        raise ConfigError(f"{path} exists: use --overwrite or another --name")
    tokenizer = train_text_tokenizer(
        _texts(run),
        run.vocab_size,
        model_type=run.model_type,
        character_coverage=run.character_coverage,
        seed=run.seed,
    )
    run.folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    return tokenizer


def _texts(run: TextTokenizerRun) -> Iterator[str]:
    for corpus in run.corpora:
        for sample in load_prepared(run.data / corpus):
            try:
                yield clean_text(sample.text)
            except BadSampleError:
                continue  # counted when the corpus was prepared
