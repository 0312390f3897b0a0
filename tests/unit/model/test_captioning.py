"""Captioning: what a word may see, and that remembering the past changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3.config import replace
from beit3.errors import ConfigError
from beit3.model.attention import Backend
from beit3.model.beam_search import beam_search
from beit3.model.heads import CaptioningModel
from beit3.model.packing import PackedBatch
from beit3.model.presets import EOS, PAD, ModelConfig
from beit3.model.transformer import MultiwayTransformer

Make = Callable[..., MultiwayTransformer]
Close = Callable[[Tensor, Tensor, str], None]
Ragged = Callable[..., PackedBatch]


def captioner(backbone: MultiwayTransformer) -> CaptioningModel:
    model = CaptioningModel(backbone.config)
    model.backbone = backbone
    with torch.no_grad():
        model.mlm_head.weight.normal_(std=0.5)
    return model.eval()


@pytest.fixture
def backbone(config: ModelConfig, make: Make) -> MultiwayTransformer:
    return make(config).eval()


@torch.no_grad()
def test_a_word_sees_its_image_and_the_words_before_it_and_nothing_else(
    backbone: MultiwayTransformer, close: Close
) -> None:
    images, ids = torch.randn(2, 3, 12, 8), torch.randint(4, 40, (2, 6))
    before = backbone(images, ids, causal_text=True)
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 7) % 40
    after = backbone(images, changed, causal_text=True)
    close(after.vision, before.vision, "images see no words")
    close(after.text[:, :4], before.text[:, :4], "words see no later ones")
    assert (after.text[:, 4:] - before.text[:, 4:]).abs().amax(2).min() > 1e-3
    moved = backbone(images + 0.5, ids, causal_text=True)
    assert (moved.text - before.text).abs().amax(2).min() > 1e-3


@torch.no_grad()
def test_the_last_word_sees_what_it_sees_without_the_mask(backbone: MultiwayTransformer, close: Close) -> None:
    """With one layer the last token's state depends on all rows' inputs alone, so the mask changes nothing for it."""
    one = MultiwayTransformer(replace(backbone.config, num_layers=1, fusion_layers=0)).eval()
    images, ids = torch.randn(2, 3, 12, 8), torch.randint(4, 40, (2, 6))
    close(one(images, ids, causal_text=True).text[:, -1], one(images, ids).text[:, -1], "last word")
    assert not torch.allclose(one(images, ids, causal_text=True).text[:, 0], one(images, ids).text[:, 0], atol=1e-3)


@torch.no_grad()
def test_padding_changes_nothing_under_the_mask(backbone: MultiwayTransformer, close: Close) -> None:
    images, ids = torch.randn(3, 3, 12, 8), torch.randint(4, 40, (3, 6))
    mask = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    together = backbone(images, ids, mask, causal_text=True)
    for row, length in enumerate((6, 2, 4)):
        alone = backbone(images[row : row + 1], ids[row : row + 1, :length], causal_text=True)
        close(together.text[row : row + 1, :length], alone.text, "text")
        close(together.vision[row : row + 1], alone.vision, "vision")


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
@torch.no_grad()
def test_backends_agree_under_the_mask(
    backend: Backend, backbone: MultiwayTransformer, ragged: Ragged, close: Close
) -> None:
    batch = ragged((2, 5, 5), 5, (1, 4, 4))
    expected = backbone.forward_packed(batch, "reference", causal_text=True)
    actual = backbone.forward_packed(batch, backend, causal_text=True)
    close(actual.vision, expected.vision, "vision")
    close(actual.text, expected.text, "text")


@torch.no_grad()
def test_decoding_word_by_word_equals_the_whole_text_at_once(backbone: MultiwayTransformer, close: Close) -> None:
    images, ids = torch.randn(2, 3, 12, 8), torch.randint(4, 38, (2, 5))
    caches = backbone.start_decoding(images)
    for place in range(5):
        mask = torch.full((2, 1), 38)
        states = backbone.decode(torch.cat([ids[:, place : place + 1], mask], dim=1), caches)
        whole = backbone(images, torch.cat([ids[:, : place + 1], mask], dim=1), causal_text=True)
        close(states, whole.text[:, -2:], f"word {place}")


@torch.no_grad()
def test_several_words_at_once_equal_one_by_one(backbone: MultiwayTransformer, close: Close) -> None:
    images, ids = torch.randn(2, 3, 12, 8), torch.randint(4, 38, (2, 5))
    at_once = backbone.decode(ids, backbone.start_decoding(images))
    close(at_once, backbone(images, ids, causal_text=True).text, "five at once")


@torch.no_grad()
def test_beams_share_their_image(backbone: MultiwayTransformer, close: Close) -> None:
    """Two images with three texts each equal six images with a text each."""
    images, ids = torch.randn(2, 3, 12, 8), torch.randint(4, 38, (6, 4))
    shared = backbone.decode(ids, backbone.start_decoding(images))
    single = backbone.decode(ids, backbone.start_decoding(images.repeat_interleave(3, dim=0)))
    close(shared, single, "states")


def test_a_search_over_everything_finds_the_best_caption() -> None:
    """A model of fixed tables: with as many beams as texts, the search must find what trying every text finds."""
    vocabulary, longest = 5, 6  # ids 3 and 4 are words, 2 ends
    table = torch.randn(longest, vocabulary, vocabulary).log_softmax(-1)
    table[..., :2] = -torch.inf

    def score(words: tuple[int, ...], closed: bool) -> float:
        places = [0, *words]
        total = sum(float(table[i, places[i], places[i + 1]]) for i in range(len(words)))
        end = table[len(words), places[-1], EOS] if closed else table[len(words), places[-1]].max()
        return float((total + float(end)) / (len(words) + 2) ** 0.6)

    texts: list[tuple[int, ...]] = [()]
    for _ in range(longest - 3):
        texts += [(*text, word) for text in texts for word in (3, 4) if (*text, word) not in texts]
    scores = {text: score(text, closed=len(text) < longest - 3) for text in texts}
    best = max(scores, key=lambda text: scores[text])

    steps: list[Tensor] = []

    def next_word(words: Tensor, parents: Tensor | None) -> Tensor:
        steps.append(words)
        return table[len(steps) - 1][words]

    found = beam_search(next_word, 1, torch.device("cpu"), num_beams=8, max_length=longest, length_penalty=0.6)
    assert [word for word in found.ids[0].tolist() if word != PAD] == list(best)
    torch.testing.assert_close(found.scores[0].item(), scores[best])


@torch.no_grad()
def test_a_batch_is_captioned_as_its_images_alone(backbone: MultiwayTransformer) -> None:
    model, images = captioner(backbone), torch.randn(4, 3, 12, 8)
    together = model.generate(images, max_length=9, mask_id=38)
    for index in range(4):
        alone = model.generate(images[index : index + 1], max_length=9, mask_id=38)
        assert alone.ids[0].tolist() == together.ids[index].tolist()
        torch.testing.assert_close(alone.scores[0], together.scores[index])
    assert len({tuple(row) for row in together.ids.tolist()}) > 1, "different images, different captions"


def test_settings_out_of_range_are_refused(make: Make, tiny: ModelConfig) -> None:
    model, images = captioner(make(tiny)), torch.randn(1, 3, 12, 8)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"num_beams": 0}, "num_beams must be at least 1, not 0"),
        ({"max_length": 3}, r"max_length must lie in 4\.\.18, not 3"),
        ({"max_length": 19}, r"max_length must lie in 4\.\.18, not 19"),
        ({}, "mask_id must be one of 40 ids, not 64001"),
    ]
    for options, message in refused:
        with pytest.raises(ConfigError, match=message):
            model.generate(images, **{"max_length": 9, **options})


@torch.no_grad()
def test_keys_and_values_of_images_lie_in_one_piece(backbone: MultiwayTransformer) -> None:
    """As views of the joint projections they would keep the queries, and every word would stride over them."""
    for cache in backbone.start_decoding(torch.randn(2, 3, 12, 8)):
        for kept in (cache.image_keys, cache.image_values):
            assert kept.is_contiguous()
            assert kept.untyped_storage().nbytes() == kept.nbytes
