"""Beam search of the released captioning code, for whole batches at once (beit3, `engine_for_finetuning.py`).

Shapes: B images, K beams, C = 3 K candidates, V vocabulary, T longest caption in words.

Mask and predict: behind the words so far stands `<mask>`, whose state names the next word. A caption's score is the sum
of its log-probabilities over its length (`<s>` and the last place counted) to the power of `length_penalty`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from beit3.model.presets import BOS, EOS, PAD


class Captions(NamedTuple):
    """What a search found best for each image."""

    ids: Tensor
    """(B, T) int64 words without `<s>` and `</s>`, filled up with `<pad>`."""
    scores: Tensor
    """(B,) float32."""


class NextWord(Protocol):
    """Log-probabilities of the next words."""

    def __call__(self, words: Tensor, parents: Tensor | None) -> Tensor:
        """Extend texts: words (B, K) follow the texts of beams parents (B, K), to (B, K, V) float32."""
        ...


def beam_search(
    next_word: NextWord,
    num_images: int,
    device: torch.device,
    *,
    num_beams: int,
    max_length: int,
    length_penalty: float,
) -> Captions:
    """Search the captions of highest score.

    Args:
        next_word: the model; called first with `<s>` in one beam, then once for each word.
        num_images: B.
        device: of the model.
        num_beams: K.
        max_length: places of a text, `<s>`, `</s>` and the one to predict counted: at most `max_length - 3` words.
        length_penalty: 0 sums log-probabilities, 1 takes their mean.

    Returns:
        The best caption of each image and its score.
    """
    best = torch.full((num_images,), -torch.inf, device=device)
    found = torch.full((num_images, max_length - 3), PAD, device=device)
    done = torch.zeros(num_images, dtype=torch.bool, device=device)
    scores = torch.zeros(num_images, 1, device=device)
    texts = torch.empty(num_images, 1, 0, dtype=torch.int64, device=device)  # (B, K, words so far)
    words = torch.full((num_images, 1), BOS, device=device)
    parents: Tensor | None = None
    for length in range(2, max_length):
        log_probs = next_word(words, parents)
        total = (scores[..., None] + log_probs).flatten(1)
        values, index = total.topk(min(3 * num_beams, total.shape[1]))  # (B, C), best first
        of_beam, word = index // log_probs.shape[2], index % log_probs.shape[2]
        done |= best >= values[:, 0] / (max_length - 1) ** length_penalty
        last = length + 1 == max_length
        ends = (word == EOS) | last
        # A candidate counts until the beams of the next step are full.
        closes = ends & ((~ends).cumsum(1) < num_beams) & ~done[:, None]
        first = closes.int().argmax(1, keepdim=True)  # (B, 1): equal lengths, so the most probable one scores best
        score = values.gather(1, first)[:, 0] / length**length_penalty
        better = closes.any(1) & (score > best)
        best = torch.where(better, score, best)
        closed = _rows(texts, of_beam.gather(1, first))[:, 0]  # (B, words so far)
        found[:, : length - 2] = torch.where(better[:, None], closed, found[:, : length - 2])
        found[:, length - 2 :] = torch.where(better[:, None], PAD, found[:, length - 2 :])
        if last or bool(done.all()):
            break
        going_on = ends.int().argsort(dim=1, stable=True)[:, :num_beams]
        scores, words, parents = (x.gather(1, going_on) for x in (values, word, of_beam))
        texts = torch.cat([_rows(texts, parents), words[..., None]], dim=2)
    return Captions(found, best)


def _rows(texts: Tensor, beams: Tensor) -> Tensor:
    """Texts (B, K, words) of beams (B, k), to (B, k, words)."""
    return texts.gather(1, beams[..., None].expand(-1, -1, texts.shape[2]))
