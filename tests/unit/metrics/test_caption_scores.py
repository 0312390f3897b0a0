"""Caption scores on cases worked out by hand. (Equality with pycocoevalcap: tests/parity.)"""

from __future__ import annotations

import math

import pytest

from beit3.errors import ConfigError
from beit3.metrics.caption_scores import bleu, caption_scores, cider_d, document_frequencies, rouge_l


def test_bleu_clips_counts() -> None:
    """The example of Papineni et al.: "the" stands seven times, but at most twice in one reference.

    BLEU-1 is 2/7: of the references' lengths 6 and 7 the closer is 7, so no penalty. No pair of words fits.
    """
    scores = bleu(["the the the the the the the"], [["the cat is on the mat", "there is a cat on the mat"]])
    assert scores[0] == pytest.approx(2 / 7)
    assert scores[1:] == pytest.approx([0, 0, 0], abs=1e-6)


def test_bleu_orders_and_the_penalty_for_short_captions() -> None:
    """All n-grams of "a b c d" fit the reference of 5 words: precisions 1, penalty exp(1 - 5/4)."""
    assert bleu(["a b c d"], [["a b c d e"]]) == pytest.approx([math.exp(1 - 5 / 4)] * 4)


def test_bleu_of_two_equally_close_lengths_takes_the_shorter() -> None:
    """5 words against 4 and 6: with 6 there would be a penalty."""
    assert bleu(["a b c d e"], [["a b c d", "a b c d e f"]]) == pytest.approx([1, 1, 1, 1])


def test_bleu_sums_over_the_set() -> None:
    """Words: 2 of 2 and 1 of 4 fit, 3/6 together (a mean of captions would say 5/8). Pairs: 1 of 1 and 0 of 3."""
    scores = bleu(["a b", "x q r s"], [["a b"], ["x y z w"]])
    assert scores[:2] == pytest.approx([3 / 6, math.sqrt(3 / 6 * 1 / 4)])


@pytest.mark.parametrize(
    ("candidate", "references", "precision", "recall"),
    [
        ("police kill the gunman", ["police killed the gunman"], 3 / 4, 3 / 4),  # Lin's example
        ("gunman the kill police", ["police killed the gunman"], 1 / 4, 1 / 4),  # order counts
        ("a x b", ["a b c d"], 2 / 3, 2 / 4),
        ("a b c", ["a b", "a b c d"], 1, 1),  # the best precision from one reference, the best recall from the other
        ("a b", ["x y z"], 0, 0),
        ("", ["a b"], 0, 0),
    ],
)
def test_rouge_l(candidate: str, references: list[str], precision: float, recall: float) -> None:
    expected = 0.0
    if precision:
        expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)  # beta = 1.2
    assert rouge_l([candidate], [references]) == pytest.approx([expected])


def test_cider_of_the_same_words() -> None:
    """Two images without common words: each n-gram weighs log 2, cosines are 1 where n-grams exist.

    "a b" has no n-grams of 3 and 4 words: 10 x (1 + 1 + 0 + 0) / 4.
    """
    assert cider_d(["a b", "c d e f"], [["a b"], ["c d e f"]]) == pytest.approx([5, 10])


def test_cider_of_a_part_is_less_and_penalised_for_its_length() -> None:
    """ "a" against "a b": cosine 1/sqrt(2) for words, none for pairs; one pair less: exp(-1 / 72) for sigma 6."""
    expected = 10 * (1 / math.sqrt(2)) / 4 * math.exp(-1 / 72)
    assert cider_d(["a", "c"], [["a b"], ["c"]]) == pytest.approx([expected, 2.5])


def test_cider_clips_counts() -> None:
    """ "a a" against "a b" (w the weight of a word): min(2w, w) w over the norms 2w and sqrt(2) w."""
    expected = 10 / 4 / (2 * math.sqrt(2))
    assert cider_d(["a a", "c"], [["a b"], ["c"]])[0] == pytest.approx(expected)


def test_cider_is_the_mean_over_references() -> None:
    """The same one and one without a common word: half of 5."""
    assert cider_d(["a b", "x"], [["a b", "c d"], ["x"]])[0] == pytest.approx(2.5)


def test_cider_ignores_what_all_images_share() -> None:
    """ "the" stands in both images and weighs log(2 / 2) = 0: only "cat", and the pair, count."""
    same, other = cider_d(["the cat", "the"], [["the cat"], ["the dog"]])
    assert same == pytest.approx(5)
    assert other == 0


def test_cider_with_frequencies_from_elsewhere() -> None:
    """By itself a single image weighs log(1 / 1) = 0; among the four images of a larger set its words are rare."""
    large = [["a dog runs"], ["a cat"], ["a bird"], ["a fish"]]
    assert cider_d(["a dog runs"], [["a dog runs"]]) == [0]
    known = document_frequencies(large)
    assert known.num_images == 4
    assert known.counts["a",] == 4
    assert known.counts["a", "dog"] == 1
    assert cider_d(["a dog runs"], [["a dog runs"]], known) == pytest.approx([7.5])  # no n-gram of 4 words
    assert caption_scores(["A dog runs!"], [["a dog runs"]], known)["cider"] == pytest.approx(7.5)


def test_captions_equal_to_the_only_reference_get_the_highest_scores() -> None:
    captions = ["A red fox sleeps in the snow.", "Two planes are flying over a city!"]
    scores = caption_scores(captions, [["a red fox sleeps in the snow"], ["two planes are flying over a city"]])
    assert scores.pop("cider") == pytest.approx(10)
    assert scores == pytest.approx(dict.fromkeys(["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"], 1.0))


def test_captions_without_a_counterpart_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 candidates for 2 images"):
        caption_scores(["a"], [["a"], ["b"]])
    with pytest.raises(ConfigError, match="at least one"):
        caption_scores([], [])
    with pytest.raises(ConfigError, match="1 of 2 images have no reference, first number 1"):
        caption_scores(["a", "b"], [["a"], []])
