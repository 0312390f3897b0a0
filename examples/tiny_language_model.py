"""Train a tiny GPT-2 on a file of texts, so that a frozen language model on a laptop has something to say.

    python examples/tiny_language_model.py TEXTS TOKENIZER.spm OUT [SECONDS]

TEXTS: one text a line, or `.jsonl` with the field `text`, such as an index of captions. OUT is a folder in Hugging
Face's format: `finetune/clipcap_emoji.py` and `AutoModelForCausalLM` read it.
"""

import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.finetune.common import pad_texts
from beit3.finetune.language_model import LanguageModel, Words, load_language_model, write_tiny_language_model
from beit3.tokenizer.text import TextTokenizer

BATCH = 64
LONGEST = 64
HELD_OUT = 200
"""Texts that the model is measured on and does not see."""


def main(texts: str, tokenizer: str, out: str, seconds: str = "60") -> None:
    """Write the trained model."""
    torch.manual_seed(0)
    lines = read_texts(Path(texts))
    write_tiny_language_model(Path(out), TextTokenizer.load(tokenizer), width=128, num_layers=4, num_heads=4)
    language = load_language_model(out)
    random.Random(0).shuffle(lines)
    held_out = min(HELD_OUT, len(lines) // 10)
    steps = train(language, lines[held_out:], float(seconds))
    if held_out:
        ids, mask = as_ids(lines[:held_out], language.words)
        with torch.no_grad():
            loss = float(next_word_loss(language, ids, mask))
        print(f"{steps} steps, perplexity of {held_out} held-out texts {math.exp(loss):.1f}")
    language.save(Path(out))
    print(f"{out}: written")


def read_texts(path: Path) -> list[str]:
    """Different texts of a file, in a fixed order."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".jsonl":
        lines = [json.loads(line)["text"] for line in lines]
    return sorted({line.strip() for line in lines if line.strip()})


def as_ids(texts: list[str], words: Words) -> tuple[Tensor, Tensor]:
    """Padded ids of `opening text end`, and which of them are real."""
    return pad_texts([[*words.opening(text), words.end_id][:LONGEST] for text in texts])


def next_word_loss(language: LanguageModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy of every id but the first."""
    model = language.model
    logits = model(input_ids=ids, attention_mask=mask.long()).logits
    return F.cross_entropy(logits[:, :-1][mask[:, 1:]], ids[:, 1:][mask[:, 1:]])


def train(language: LanguageModel, lines: list[str], seconds: float) -> int:
    """Train for some time, the learning rate falling to nothing; returns the number of steps."""
    optimizer = torch.optim.AdamW(language.model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.1)
    draw, started, steps = random.Random(1), time.perf_counter(), 0
    language.model.train()
    while (share := (time.perf_counter() - started) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - share) * min(1, (steps + 1) / 50)
        loss = next_word_loss(language, *as_ids(draw.choices(lines, k=BATCH), language.words))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(language.model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        if steps % 100 == 0:
            print(f"step {steps}: loss {float(loss.detach()):.2f}")
    language.model.eval()
    return steps


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:])
