"""BLEU, ROUGE-L and CIDEr-D of captions, equal to the published implementation (pycocoevalcap).

`caption_scores` takes captions as they are. The single scores take captions that `tokenize_captions` has been over:
tokens joined by single spaces. Everywhere, references[i] are the human captions of the image of candidates[i].
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from beit3.errors import ConfigError
from beit3.metrics.ptb_tokenizer import tokenize_captions

NGram = tuple[str, ...]
MAX_ORDER = 4
"""Longest n-gram that counts, in words."""
_ROUGE_BETA = 1.2
_CIDER_SIGMA = 6.0
"""Deviation of the length penalty, in words."""
_TINY, _SMALL = 1e-15, 1e-9
"""The original adds these to counts instead of testing for zero."""


def caption_scores(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    frequencies: DocumentFrequencies | None = None,
) -> dict[str, float]:
    """All scores of a set of captions.

    Args:
        candidates: one caption an image, as generated.
        references: the human captions of each image, at least one, untokenised.
        frequencies: of n-grams over images, for CIDEr-D; counted in the references if not given, as published
            figures are. A handful of images needs them from elsewhere: a single one scores 0 by its own.

    Returns:
        `bleu_1` ... `bleu_4`, `rouge_l` (0..1) and `cider` (0..10). Papers print all of them times 100.

    Raises:
        ConfigError: no candidates, not one for each image, or an image without references.
    """
    _check(candidates, references)
    tokens = tokenize_captions(candidates)
    flat = iter(tokenize_captions([caption for captions in references for caption in captions]))
    reference_tokens = [[next(flat) for _ in captions] for captions in references]
    scores = {f"bleu_{n}": score for n, score in enumerate(bleu(tokens, reference_tokens), start=1)}
    scores["rouge_l"] = fmean(rouge_l(tokens, reference_tokens))
    scores["cider"] = fmean(cider_d(tokens, reference_tokens, frequencies))
    return scores


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """BLEU-1 to BLEU-4 of the whole set, with the reference length closest to each candidate's.

    Source: Papineni et al., ACL 2002; of two equally close lengths the shorter counts.
    """
    _check(candidates, references)
    matched, offered = [0] * MAX_ORDER, [0] * MAX_ORDER
    length = reference_length = 0
    for candidate, captions in zip(candidates, references, strict=True):
        words = candidate.split()
        most: Counter[NGram] = Counter()
        for caption in captions:
            most |= _ngrams(caption)
        for ngram, count in _ngrams(candidate).items():
            matched[len(ngram) - 1] += min(count, most[ngram])
        for n in range(MAX_ORDER):
            offered[n] += max(0, len(words) - n)
        length += len(words)
        lengths = (len(caption.split()) for caption in captions)
        reference_length += min(lengths, key=lambda other: (abs(other - len(words)), other))
    ratio = (length + _TINY) / (reference_length + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    precisions = [(right + _TINY) / (total + _SMALL) for right, total in zip(matched, offered, strict=True)]
    return [penalty * math.prod(precisions[:n]) ** (1 / n) for n in range(1, MAX_ORDER + 1)]


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L of each candidate: an F-measure of the longest common subsequence that weighs recall higher.

    Best precision and best recall may come from different references, as in the original.

    Source: Lin, ACL workshop 2004, with beta = 1.2.
    """
    _check(candidates, references)
    scores = []
    for candidate, captions in zip(candidates, references, strict=True):
        # Splitting at each space leaves one empty word of an empty caption: the original counts it.
        words, others = candidate.split(" "), [caption.split(" ") for caption in captions]
        common = [_longest_common_subsequence(words, other) for other in others]
        precision = max(common) / len(words)
        recall = max(shared / len(other) for shared, other in zip(common, others, strict=True))
        weighted = recall + _ROUGE_BETA**2 * precision
        scores.append((1 + _ROUGE_BETA**2) * precision * recall / weighted if weighted else 0.0)
    return scores


@dataclass(frozen=True, slots=True)
class DocumentFrequencies:
    """In the references of how many images each n-gram occurs."""

    counts: Mapping[NGram, int]
    num_images: int


def document_frequencies(references: Iterable[Sequence[str]]) -> DocumentFrequencies:
    """Count in how many images' references, tokenised, each n-gram occurs."""
    counts: Counter[NGram] = Counter()
    num_images = 0
    for captions in references:
        counts.update({ngram for caption in captions for ngram in _ngrams(caption)})
        num_images += 1
    return DocumentFrequencies(counts, num_images)


def cider_d(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    frequencies: DocumentFrequencies | None = None,
) -> list[float]:
    """CIDEr-D of each candidate, 0..10: likeness to the references in n-grams that few images share.

    Args:
        candidates: tokenised, one an image.
        references: tokenised, at least one an image.
        frequencies: counted in `references` if not given.

    Source: Vedantam et al., CVPR 2015, section 5 (clipped counts, a Gaussian penalty on the difference in length),
    with sigma = 6 and n-grams of up to 4 words; coco-caption calls it CIDEr.
    """
    _check(candidates, references)
    known = frequencies or document_frequencies(references)
    scores = []
    for candidate, captions in zip(candidates, references, strict=True):
        own = _weigh(candidate, known)
        total = math.fsum(_likeness(own, _weigh(caption, known)) for caption in captions)
        scores.append(10 * total / len(captions))
    return scores


@dataclass(frozen=True, slots=True)
class _Weighted:
    """A caption as tf-idf vectors, one for each length of n-gram."""

    weights: list[dict[NGram, float]]
    norms: list[float]
    num_bigrams: int


def _weigh(caption: str, known: DocumentFrequencies) -> _Weighted:
    weights: list[dict[NGram, float]] = [{} for _ in range(MAX_ORDER)]
    for ngram, count in _ngrams(caption).items():
        rarity = math.log(known.num_images) - math.log(max(1, known.counts.get(ngram, 0)))
        weights[len(ngram) - 1][ngram] = count * rarity
    norms = [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in weights]
    return _Weighted(weights, norms, max(0, len(caption.split()) - 1))


def _likeness(candidate: _Weighted, reference: _Weighted) -> float:
    """Mean over the lengths of n-gram of the clipped cosine, times the penalty on the difference in length."""
    cosines = 0.0
    for own, other, norm, other_norm in zip(
        candidate.weights, reference.weights, candidate.norms, reference.norms, strict=True
    ):
        if norm and other_norm:
            shared = (min(weight, other[ngram]) * other[ngram] for ngram, weight in own.items() if ngram in other)
            cosines += sum(shared) / (norm * other_norm)
    difference = candidate.num_bigrams - reference.num_bigrams
    return cosines / MAX_ORDER * math.exp(-(difference**2) / (2 * _CIDER_SIGMA**2))


def _ngrams(caption: str) -> Counter[NGram]:
    """How often each n-gram of up to `MAX_ORDER` words occurs."""
    words = caption.split()
    return Counter(
        tuple(words[start : start + n]) for n in range(1, MAX_ORDER + 1) for start in range(len(words) - n + 1)
    )


def _longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest sequence of words that both hold in this order, gaps allowed."""
    row = [0] * (len(second) + 1)
    for word in first:
        above_left = 0
        for place, other in enumerate(second, start=1):
            above = row[place]
            row[place] = above_left + 1 if word == other else max(above, row[place - 1])
            above_left = above
    return row[-1]


def _check(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not candidates or len(candidates) != len(references):
        raise ConfigError(
            f"caption scores: {len(candidates)} candidates for {len(references)} images; "
            "give one candidate for each image, and at least one"
        )
    empty = [place for place, captions in enumerate(references) if not captions]
    if empty:
        raise ConfigError(
            f"caption scores: {len(empty)} of {len(references)} images have no reference, first number {empty[0]}; "
            "leave them out"
        )
