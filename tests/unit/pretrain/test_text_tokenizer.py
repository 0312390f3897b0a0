"""The run that trains a text tokenizer from prepared folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from beit3.config import replace
from beit3.data.shard_writer import FolderWriter
from beit3.errors import ConfigError, DataMissingError
from beit3.pretrain.text_tokenizer import TextTokenizerRun, train_from_corpora
from beit3.tokenizer.text import TextTokenizer
from tests.conftest import Workspace


@pytest.fixture
def run(workspace: Workspace, tmp_path: Path) -> TextTokenizerRun:
    return TextTokenizerRun(
        name="words", corpora=("text",), data=workspace.data, out=tmp_path, vocab_size=300, character_coverage=1.0
    )


def test_a_tokenizer_is_written_and_repeats(run: TextTokenizerRun) -> None:
    made = train_from_corpora(run)
    written = TextTokenizer.load(run.folder / "tokenizer.spm")
    assert written.model == made.model
    assert 200 < len(made) <= 302
    again = train_from_corpora(replace(run, name="again"))
    assert again.model == made.model


def test_it_reads_captions_of_pairs_as_well(run: TextTokenizerRun, tmp_path: Path) -> None:
    with FolderWriter(tmp_path / "extra", "pairs") as writer:
        for number in range(20):
            writer.add(f"{number}", {"txt": "ж щ ъ".encode()})
    data = tmp_path / "data"
    data.mkdir()
    (data / "text").symlink_to(run.data / "text", target_is_directory=True)
    (data / "extra").symlink_to(tmp_path / "extra", target_is_directory=True)
    tokenizer = train_from_corpora(replace(run, data=data, corpora=("text", "extra")))
    assert tokenizer.decode(tokenizer.encode("ж щ ъ")) == "ж щ ъ"
    alone = train_from_corpora(replace(run, name="alone"))
    assert "<unk>" in alone.decode(alone.encode("ж"))


def test_an_earlier_tokenizer_is_kept_unless_told(run: TextTokenizerRun) -> None:
    made = train_from_corpora(run)
    with pytest.raises(ConfigError, match="--overwrite"):
        train_from_corpora(replace(run, vocab_size=250))
    assert TextTokenizer.load(run.folder / "tokenizer.spm").model == made.model
    assert len(train_from_corpora(replace(run, vocab_size=250, overwrite=True))) <= 252


def test_a_missing_corpus_is_missing_data(run: TextTokenizerRun) -> None:
    with pytest.raises(DataMissingError, match="nowhere"):
        train_from_corpora(replace(run, corpora=("nowhere",)))
    assert not run.folder.exists()


@pytest.mark.parametrize("wrong", [{"corpora": ()}, {"vocab_size": 4}])
def test_contradictions_are_refused(run: TextTokenizerRun, wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        replace(run, **wrong)
