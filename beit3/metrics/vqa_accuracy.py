"""VQA accuracy: the consensus of ten people, after the published normalisation of answers.

Source: Antol et al., ICCV 2015, and the published evaluation script (`vqaEvaluation/vqaEval.py` of GT-Vision-Lab/VQA),
which is followed to the letter, oddities included. Tables are carried over from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from beit3.errors import ConfigError

_NUMBERS: Mapping[str, str] = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""In the published order. Apostrophe, colon and full stop are not among them."""
_COMMA_IN_NUMBER = re.compile(r"[0-9],[0-9]")
# Meant to keep the point of a decimal number; its look behind is misspelt there, so only what follows counts.
_FULL_STOP = re.compile(r"\.(?![0-9])")
_MOST_FULL_STOPS = 32
"""The script passes a flag (re.UNICODE, 32) where the number of replacements goes."""

_ONE_APOSTROPHE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
    "isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've "
    "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're "
    "there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd "
    "where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll "
    "you're you've"
)
_TWO_APOSTROPHES = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've "
    "there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've"
)
_ODD_CONTRACTIONS = {
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "somebody'd": "somebodyd",
}


def _contractions() -> dict[str, str]:
    """Words written without one of their apostrophes, and the words with all of them.

    The script also lists Im, Ive, Id've and I'dve, which can never match a word in lower case, and two words that
    stay as they are (let's, she's).
    """
    table = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
    for word in _TWO_APOSTROPHES.split():
        start, middle, end = word.split("'")
        table[f"{start}{middle}'{end}"] = table[f"{start}'{middle}{end}"] = word
    return table | _ODD_CONTRACTIONS


_CONTRACTIONS = _contractions()
_SOFT_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class VQAAccuracy:
    """Accuracies in 0..1, unrounded (the script prints them times 100 with two digits)."""

    overall: float
    by_answer_type: dict[str, float]
    """`yes/no`, `number`, `other`."""
    by_question_type: dict[str, float]
    """First words of the question, such as `how many`; empty if none were given."""


def vqa_accuracy(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    answer_types: Sequence[str],
    question_types: Sequence[str] | None = None,
) -> VQAAccuracy:
    """Mean accuracy over questions, over all and by type.

    Args:
        predictions: one answer a question.
        answers: the human answers of each question, ten in VQAv2.
        answer_types: of each question.
        question_types: of each question, if known.

    Raises:
        ConfigError: no questions, or a question without answers.
    """
    if not predictions:
        raise ConfigError("VQA accuracy: no questions; give at least one")
    scores = [consensus_accuracy(*pair) for pair in zip(predictions, answers, strict=True)]
    return VQAAccuracy(
        fmean(scores), _mean_by(answer_types, scores), _mean_by(question_types, scores) if question_types else {}
    )


def consensus_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy of one answer: the mean over annotators of min(1, matches among the others / 3).

    With ten annotators that is 0, 0.3, 0.6, 0.9, 1 for 0, 1, 2, 3, 4 or more matches. As in the script, answers are
    normalised only if the annotators differ; where all agree, only the very same string is right. With three
    answers or fewer nothing reaches 1: repeat a single known answer ten times.

    Args:
        prediction: one answer.
        answers: of the annotators, at least one.

    Raises:
        ConfigError: no answers.
    """
    if not answers:
        raise ConfigError("VQA accuracy: a question has no answers; leave it out")
    given, known = _one_line(prediction), [_one_line(answer) for answer in answers]
    if len(set(known)) > 1:
        given, known = normalize_answer(given), [normalize_answer(answer) for answer in known]
    matches = known.count(given)
    return fmean(min(1.0, (matches - (answer == given)) / 3) for answer in known)


def normalize_answer(answer: str) -> str:
    """Lower case without punctuation and articles, numbers up to ten as digits, contractions with their apostrophes.

    The released BEiT-3 makes its answer vocabulary with the same rules.
    """
    return _plain_words(_without_punctuation(answer))


def soft_score(count: int) -> float:
    """Target of an answer that `count` of ten annotators gave: 0, 0.3, 0.6, 0.9, then 1.

    Source: `get_score` of the released BEiT-3 (beit3/datasets.py).
    """
    return _SOFT_SCORES[min(count, len(_SOFT_SCORES) - 1)]


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(answer: str) -> str:
    """Drop marks that stand beside a space, or all if a number holds a comma; others become spaces."""
    grouped = _COMMA_IN_NUMBER.search(answer) is not None
    result = answer
    for mark in _PUNCTUATION:
        dropped = grouped or f"{mark} " in answer or f" {mark}" in answer
        result = result.replace(mark, "" if dropped else " ")
    return _FULL_STOP.sub("", result, count=_MOST_FULL_STOPS)


def _plain_words(answer: str) -> str:
    words = [_NUMBERS.get(word, word) for word in answer.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _mean_by(types: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for kind, score in zip(types, scores, strict=True):
        groups.setdefault(kind, []).append(score)
    return {kind: fmean(group) for kind, group in groups.items()}
