"""VQA accuracy: the consensus by counting all subsets, and the published normalisation case by case."""

from __future__ import annotations

from itertools import combinations

import pytest

from beit3.errors import ConfigError
from beit3.metrics.vqa_accuracy import consensus_accuracy, normalize_answer, soft_score, vqa_accuracy


@pytest.mark.parametrize("count", range(11))
def test_consensus_equals_the_mean_over_all_nine_of_ten(count: int) -> None:
    """The formula of the challenge: average over the ten subsets of nine annotators of min(1, matches / 3)."""
    answers = ["yes"] * count + ["no"] * (10 - count)
    subsets = list(combinations(answers, 9))
    expected = sum(min(1, subset.count("yes") / 3) for subset in subsets) / len(subsets)
    assert len(subsets) == 10
    assert consensus_accuracy("yes", answers) == pytest.approx(expected)


def test_consensus_by_hand() -> None:
    """One match: 9 of 10 annotators see 1/3, the one that matches sees 0: 0.3. Likewise 0.6, 0.9; then 1."""
    found = [consensus_accuracy("cat", ["cat"] * count + ["dog"] * (10 - count)) for count in range(6)]
    assert found == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])


def test_answers_are_normalised_only_if_the_annotators_differ() -> None:
    """As in the published script: ten times "two" is met by "two" alone, but not if one of them wrote "2"."""
    assert consensus_accuracy("2", ["two"] * 10) == 0
    assert consensus_accuracy("Two", ["two"] * 10) == 0
    assert consensus_accuracy("two", ["two"] * 10) == 1
    assert consensus_accuracy("A Two.", ["two"] * 9 + ["2"]) == 1


def test_spaces_and_line_breaks_around_an_answer_never_count() -> None:
    assert consensus_accuracy(" cat\n", ["cat", "cat "] * 5) == 1
    assert consensus_accuracy("black\tcat", ["black cat"] * 10) == 1


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Dog", "dog"),
        ("a an the", ""),
        ("None", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("two and three", "2 and 3"),
        ("twotwo", "twotwo"),
        ("dont", "don't"),
        ("Youre", "you're"),
        ("couldntve", "couldntve"),  # the table has each form with one apostrophe missing, not with both
        ("couldnt've couldn'tve", "couldn't've couldn't've"),
        ("don't", "don't"),
        ("somebody'd", "somebodyd"),  # so it is published
        ("Im", "im"),  # its entry has a capital, and words are in lower case by then
        ("black-and-white", "black and white"),  # a mark inside words becomes a space
        ("black - white", "black white"),  # beside a space it goes
        ("t-shirt - red", "tshirt red"),  # and with it all of its kind
        ("red/blue", "red blue"),
        ("(left)", "left"),
        ("yes!", "yes"),
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),  # a comma in a number: no mark becomes a space
        ("yes,no", "yes no"),
        ("3.5", "3.5"),
        ("5.", "5"),
        ("p.m.", "pm"),
        (".5", ".5"),
        ("2:30", "2:30"),
        ("bob's", "bob's"),
        ("50%", "50%"),
        ("", ""),
    ],
)
def test_normalisation(answer: str, normal: str) -> None:
    assert normalize_answer(answer) == normal


def test_accuracy_is_given_by_type() -> None:
    """Scores 1, 0, 0.3, 1 over the types of answers and of questions."""
    found = vqa_accuracy(
        ["yes", "no", "cat", "2"],
        [["yes"] * 10, ["yes"] * 10, ["cat"] + ["dog"] * 9, ["two"] * 5 + ["2"] * 5],
        ["yes/no", "yes/no", "other", "number"],
        ["is it", "is it", "what", "how many"],
    )
    assert found.overall == pytest.approx(2.3 / 4)
    assert found.by_answer_type == pytest.approx({"yes/no": 0.5, "other": 0.3, "number": 1})
    assert found.by_question_type == pytest.approx({"is it": 0.5, "what": 0.3, "how many": 1})
    assert vqa_accuracy(["a"], [["a"] * 10], ["other"]).by_question_type == {}


def test_soft_scores_of_the_released_code() -> None:
    assert [soft_score(count) for count in range(7)] == [0, 0.3, 0.6, 0.9, 1, 1, 1]


def test_questions_without_answers_are_refused() -> None:
    with pytest.raises(ConfigError, match="has no answers"):
        vqa_accuracy(["a", "b"], [["a"] * 10, []], ["other", "other"])
    with pytest.raises(ConfigError, match="at least one"):
        vqa_accuracy([], [], [])
