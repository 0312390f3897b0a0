"""Losses of naming the subwords of a caption (SuperClass, arXiv 2411.03313), and the document counts behind them.

Shapes: B images, K subwords of all their captions, V vocabulary, N captions so far, df of them that hold a word.

    softmax   sum over images of  -sum_c y_c log softmax(x)_c,   y_c = w_c / sum of w over the caption's words,
              w_c = log((N + 1) / (df_c + 1))                                        (IDF; 1 without)

No (B, V) tensor of targets is made: with S = sum_c y_c the loss of an image is S logsumexp(x) - sum_k y_k x[c_k].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.config import require
from beit3.tokenizer.subwords import Subwords, WordList, inverse_document_frequency

LossKind = Literal["softmax", "bce", "soft_margin", "asymmetric", "two_way"]
_FOCUS_POSITIVE, _FOCUS_NEGATIVE, _CLIP = 1.0, 4.0, 0.05
"""Exponents and probability margin of the asymmetric loss, as its authors publish them (arXiv 2009.14119)."""
_POSITIVE_TEMPERATURE, _NEGATIVE_TEMPERATURE = 4.0, 1.0
"""Of the two-way loss (Kobayashi, CVPR 2023)."""
_LOWEST = -1e30
"""Stands for minus infinity where a sum may have no terms."""


@dataclass(frozen=True, slots=True)
class Words:
    """The subwords of captions, each once a caption, special ids left out."""

    ids: Tensor
    """(K,) int64"""
    rows: Tensor
    """(K,) int64, the image each belongs to, in rising order"""
    num_images: int
    """B; an image may have no words."""

    def to(self, device: torch.device) -> Words:
        """Copy to a device."""
        return Words(self.ids.to(device), self.rows.to(device), self.num_images)


def join_words(captions: Sequence[Sequence[int]]) -> Words:
    """Lay the distinct subwords of captions one after the other; a subword said twice counts once."""
    unique = [sorted(set(caption)) for caption in captions]
    ids = torch.tensor([word for caption in unique for word in caption], dtype=torch.int64)
    rows = torch.tensor([row for row, caption in enumerate(unique) for _ in caption], dtype=torch.int64)
    return Words(ids, rows, len(unique))


def concat_words(parts: Sequence[Words]) -> Words:
    """Lay the words of several sets of images one behind the other."""
    starts = accumulate((part.num_images for part in parts), initial=0)
    rows = [part.rows + start for part, start in zip(parts, starts, strict=False)]  # the last start is the end
    return Words(torch.cat([part.ids for part in parts]), torch.cat(rows), sum(part.num_images for part in parts))


class SubwordLoss(nn.Module):
    """One of five losses, with online document counts.

    Counts are integers of 64 bits, so that no cast of the model touches them; they are part of the state, and counted
    in training mode only. Call `count` with all batches of an optimizer step before the first of them is weighted:
    accumulated batches and several ranks then give the loss of the joined batch exactly, also where captions are empty
    (but for the half of "two_way" that compares images of a batch with each other).

    Args:
        num_words: V.
        kind: of loss. "bce" sums over the vocabulary, "soft_margin" is its mean: the same but for the factor V.
        idf: weigh rare words more; "softmax" only.
    """

    document_frequency: Tensor
    num_documents: Tensor

    def __init__(self, num_words: int, kind: LossKind = "softmax", idf: bool = True) -> None:
        super().__init__()
        require(kind in get_args(LossKind), f"loss must be one of {', '.join(get_args(LossKind))}, not '{kind}'")
        require(not idf or kind == "softmax", f"idf weighs the softmax loss only: switch it off for '{kind}'")
        self.kind, self.idf = kind, idf
        self.register_buffer("document_frequency", torch.zeros(num_words, dtype=torch.int64))
        self.register_buffer("num_documents", torch.zeros((), dtype=torch.int64))
        self._expected: Tensor | None = None
        """Captions with words of a batch of the step, on average over its batches and the ranks."""

    @torch.no_grad()
    def count(self, batches: Sequence[Words]) -> None:
        """Count the captions of an optimizer step: all its batches on this rank; one sum over the ranks."""
        if not self.training:
            return
        added = torch.zeros(len(self.document_frequency) + 1, dtype=torch.int64, device=self.document_frequency.device)
        for words in batches:
            ids, rows = words.ids.to(added.device), words.rows.to(added.device)
            added[:-1].index_add_(0, ids, torch.ones_like(ids))
            added[-1] += added.new_zeros(words.num_images).index_fill_(0, rows, 1).sum()
        ranks = 1
        if dist.is_initialized():
            ranks = dist.get_world_size()
            dist.all_reduce(added)
        self.document_frequency += added[:-1]
        self.num_documents += added[-1]
        self._expected = added[-1].clamp_min(1) / (len(batches) * ranks)

    def start_from(self, words: WordList) -> None:
        """Go on from the counts of an earlier training, if it kept any."""
        if self.idf and words.document_frequency:
            self.document_frequency.copy_(torch.tensor(words.document_frequency))
            self.num_documents.fill_(words.num_documents)

    def weights(self) -> Tensor:
        """Weight of each subword (V,) float32: rare ones weigh more; 1 without IDF."""
        if not self.idf:
            return torch.ones(len(self.document_frequency), device=self.document_frequency.device)
        return inverse_document_frequency(self.num_documents, self.document_frequency)

    def word_list(self, subwords: Subwords) -> WordList:
        """A vocabulary with the counts so far, for the export; without IDF nothing is weighed later either."""
        if not self.idf:
            return WordList(subwords)
        return WordList(subwords, int(self.num_documents), tuple(self.document_frequency.tolist()))

    def forward(self, logits: Tensor, words: Words) -> dict[str, Tensor]:
        """Mean loss over the images that have words.

        Args:
            logits: (B, V), any float type; the loss is computed in fp32.
            words: of the same images.

        Returns:
            `loss`, and `word_accuracy`: the share of images whose likeliest word is one of theirs.
        """
        logits = logits.float()
        named = logits.new_zeros(words.num_images).index_fill(0, words.rows, 1.0)  # (B,) 1 = has words
        count = named.sum().clamp_min(1)
        with torch.no_grad():
            accuracy = (logits.argmax(dim=1)[words.rows] == words.ids).sum() / count
        # Averaging over batches and ranks divides by their number: the mean over all their images follows.
        scale = 1 / self._expected if self.training and self._expected is not None else 1 / count
        loss = scale * (self._losses(logits, words) * named).sum()
        if self.kind == "two_way":
            loss = loss + _between_images(logits.masked_fill(named[:, None] == 0, _LOWEST), words)
        return {"loss": loss, "word_accuracy": accuracy}

    def _losses(self, logits: Tensor, words: Words) -> Tensor:
        """Loss (B,) of each image."""
        own = logits[words.rows, words.ids]  # (K,)
        if self.kind == "softmax":
            weights = self.weights()[words.ids]
            total = _sum_rows(weights, words).clamp_min(1e-12)
            shares = weights / total[words.rows]
            return _sum_rows(shares, words) * logits.logsumexp(dim=1) - _sum_rows(shares * own, words)
        if self.kind == "asymmetric":
            absent = _asymmetric_absent(logits).sum(dim=1) - _sum_rows(_asymmetric_absent(own), words)
            present = -((1 - own.sigmoid()) ** _FOCUS_POSITIVE) * F.logsigmoid(own)
            return absent + _sum_rows(present, words)
        if self.kind == "two_way":
            return _within_images(logits, words)
        binary = F.softplus(logits).sum(dim=1) - _sum_rows(own, words)
        return binary if self.kind == "bce" else binary / logits.shape[1]


def _sum_rows(values: Tensor, words: Words) -> Tensor:
    """Sum of values (K,) of each image, (B,)."""
    return values.new_zeros(words.num_images).index_add(0, words.rows, values)


def _asymmetric_absent(logits: Tensor) -> Tensor:
    """Loss of a word that is not there: easy ones weigh little, and those below the margin nothing."""
    chance = (logits.sigmoid() - _CLIP).clamp_min(0)
    return -(chance**_FOCUS_NEGATIVE) * torch.log1p(-chance)


def _within_images(logits: Tensor, words: Words) -> Tensor:
    """Two-way loss (B,) of each image: its worst words against the best of all others."""
    others = logits.index_put((words.rows, words.ids), logits.new_tensor(_LOWEST))
    present = logits.new_full(logits.shape, _LOWEST).index_put(
        (words.rows, words.ids), -logits[words.rows, words.ids] / _POSITIVE_TEMPERATURE
    )
    return _two_way(others, present, dim=1)


def _between_images(logits: Tensor, words: Words) -> Tensor:
    """Two-way loss of each word of the batch: the worst images that have it against the best that do not; a mean."""
    held, place = words.ids.unique(return_inverse=True)
    columns = logits[:, held]
    others = columns.index_put((words.rows, place), logits.new_tensor(_LOWEST))
    present = columns.new_full(columns.shape, _LOWEST).index_put(
        (words.rows, place), -columns[words.rows, place] / _POSITIVE_TEMPERATURE
    )
    return _two_way(others, present, dim=0).sum() / max(1, len(held))


def _two_way(others: Tensor, present: Tensor, dim: int) -> Tensor:
    absent = _NEGATIVE_TEMPERATURE * (others / _NEGATIVE_TEMPERATURE).logsumexp(dim)
    return F.softplus(absent + _POSITIVE_TEMPERATURE * present.logsumexp(dim))
