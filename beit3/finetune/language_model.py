"""Causal language models of Hugging Face's format with their tokenizers; and a tiny one that is made in place.

A model's texts are `opening text end`: what its own tokenizer puts before a text (`<s>`, or nothing as for GPT-2), the
words, and the id that ends a text.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from beit3.config import require
from beit3.errors import ConfigError, DataMissingError
from beit3.model.presets import BOS, EOS, PAD
from beit3.tokenizer.fast import save_fast
from beit3.tokenizer.text import TextTokenizer

TINY = "tiny:"
_HUB = "hf-hub:"
_MOST_SAID = 200
"""Characters of a library's complaint."""


@dataclass(frozen=True, slots=True)
class Words:
    """A language model's tokenizer: texts to ids and back. Data processes hold it, so no model is within."""

    tokenizer: Any
    """Of transformers."""

    @property
    def end_id(self) -> int:
        """The id that ends a text."""
        return int(self.tokenizer.eos_token_id)

    def opening(self, text: str) -> list[int]:
        """Ids of a text at the very beginning, with what the tokenizer puts before it."""
        whole, alone = list(self.tokenizer("a").input_ids), self.encode("a")
        start = next((n for n in range(len(whole)) if whole[n : n + len(alone)] == alone), 0)
        return [*whole[:start], *self.encode(text)]

    def encode(self, text: str) -> list[int]:
        """Ids of a text that stands behind something else."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, without special ones and white space around it."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.strip()


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A causal language model, its tokenizer, and where they come from."""

    source: str
    """As `load_language_model` takes it."""
    model: Any
    """Of transformers, `AutoModelForCausalLM`."""
    words: Words

    def save(self, folder: Path) -> None:
        """Write model and tokenizer in Hugging Face's format, weights as safetensors."""
        with _without_progress():
            self.model.save_pretrained(folder)
            self.words.tokenizer.save_pretrained(folder)


def load_language_model(source: str | Path) -> LanguageModel:
    """Load a causal language model in fp32 with its tokenizer; weights are safetensors, and no code is run.

    Args:
        source: folder in Hugging Face's format, name on the Hub ("gpt2", "organisation/name", "hf-hub:..." where a
            folder here has the organisation's name), or "tiny:FILE.spm", a tiny GPT-2 with random weights, always the
            same ones, over the ids of a text tokenizer.

    Returns:
        The model on the CPU in eval mode.

    Raises:
        DataMissingError: nothing of that name can be read.
        ConfigError: it is damaged, needs code of its own, or has no id that ends a text.
    """
    name = str(source)
    if name.startswith(TINY):
        tokenizer = TextTokenizer.load(name.removeprefix(TINY))
        return LanguageModel(name, _build_tiny(tokenizer, width=64, num_layers=2, num_heads=4), _as_words(tokenizer))
    return _load(name, name.removeprefix(_HUB))


def write_tiny_language_model(
    folder: Path,
    tokenizer: TextTokenizer,
    *,
    width: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    max_positions: int = 256,
) -> None:
    """Write a small GPT-2 with random weights, always the same ones, as `AutoModelForCausalLM` reads it.

    Args:
        folder: made if need be.
        tokenizer: its ids are the model's words; `AutoTokenizer` reads it from the same folder.
        width: of the embeddings; must divide by `num_heads`.
        num_layers: blocks.
        num_heads: of each block.
        max_positions: longest sequence, prefix and text together.

    Raises:
        ConfigError: the sizes contradict each other, or Hugging Face has no such tokenizer.
    """
    model = _build_tiny(tokenizer, width=width, num_layers=num_layers, num_heads=num_heads, max_positions=max_positions)
    LanguageModel(str(folder), model, _as_words(tokenizer)).save(folder)


def _build_tiny(
    tokenizer: TextTokenizer, *, width: int, num_layers: int, num_heads: int, max_positions: int = 256
) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    require(width % num_heads == 0, f"width {width} of the language model must divide by num_heads {num_heads}")
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=width,
        n_layer=num_layers,
        n_head=num_heads,
        n_positions=max_positions,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: Any = GPT2LMHeadModel(config)
    return made.eval()


def _as_words(tokenizer: TextTokenizer) -> Words:
    """Our text tokenizer as transformers has it."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as place:
        save_fast(tokenizer, place)
        return Words(AutoTokenizer.from_pretrained(place))


def _load(name: str, place: str) -> LanguageModel:
    """Load from a folder or the Hub; `name` is what the user wrote."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not Path(place).is_dir() and _is_path(name):
        raise DataMissingError(
            f"language model {name} does not exist: train one (docs/language_models.md) or name another"
        )
    try:
        with _without_progress():
            tokenizer: Any = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # transformers and the Hub raise many kinds
        said = " ".join(str(error).split())[:_MOST_SAID]
        kind = ConfigError if Path(place).is_dir() else DataMissingError
        raise kind(f"language model '{name}' cannot be read by transformers: check name or folder ({said})") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(f"language model '{name}' lacks {len(missing)} weights, such as {missing[0]}: copy it again")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"language model '{name}': its tokenizer names no eos_token, so no text would ever end")
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ConfigError(f"language model '{name}': its tokenizer has {len(tokenizer)} ids, the model {rows}")
    return LanguageModel(name, model.eval(), Words(tokenizer))


def _is_path(name: str) -> bool:
    """Whether a name is meant as a place on this machine: the Hub would be asked in vain, several times."""
    path = Path(name)
    if name.startswith(_HUB):
        return False
    return name.startswith((".", "/", "~")) or len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())


@contextmanager
def _without_progress() -> Iterator[None]:
    """Keep transformers from drawing bars for files that take no time."""
    from transformers.utils import logging as library

    logging: Any = library
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
