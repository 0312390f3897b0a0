"""What applications call: every verb gives the model's own answer, for any number and form of inputs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import beit3
from beit3.data.emoji import load_cells
from beit3.data.labels import labels_file
from beit3.data.preprocess import Preprocess
from beit3.errors import ConfigError, DataMissingError
from beit3.model.heads import build_model
from beit3.model.official import to_official
from beit3.model.presets import ModelConfig
from beit3.predict import Predictor
from beit3.tokenizer.text import TextTokenizer, train_text_tokenizer

if TYPE_CHECKING:
    from tests.integration.conftest import Released

QUESTIONS = ["is this a cat?", "which colour has the heart?", "", "how many people are there?", "who?"]
Given = tuple[list[Image.Image], TextTokenizer]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    texts = [text for cell in load_cells("google")[:300] for text in (cell.caption, *cell.keywords)]
    return train_text_tokenizer(iter(texts + QUESTIONS), 300, character_coverage=1.0)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [cell.image.resize((40 + 7 * index, 48)) for index, cell in enumerate(load_cells("google")[:5])]


@pytest.fixture
def build(tokenizer: TextTokenizer) -> Callable[..., Predictor]:
    """A predictor around a small random model of a task."""

    def make(task: str, labels: list[str] | None = None, **options: int) -> Predictor:
        config = ModelConfig(
            width=64,
            num_layers=2,
            num_heads=1,
            ffn_width=48,
            patch_size=8,
            image_size=(24, 24),
            vocab_size=len(tokenizer) + 8,
            max_text_positions=40,
            attention="decoupled",
            fusion_layers=0,
        )
        model = build_model(config, task, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return Predictor(model, tokenizer, Preprocess.of_task(config, task), labels=labels)

    return make


def pixels(predictor: Predictor, image: Image.Image) -> Tensor:
    return predictor.preprocess.normalize(predictor.preprocess(image)[None])


def ids(tokenizer: TextTokenizer, text: str) -> Tensor:
    return torch.tensor([tokenizer.encode(text)])


@torch.no_grad()
def test_classes_are_the_models_with_their_names(build: Callable[..., Predictor], pictures: list[Image.Image]) -> None:
    predictor = build("classification", ["ant", "bee", "cat"], num_classes=3)
    assert predictor.preprocess.resize == "crop"
    for image, ranking in zip(pictures, predictor.classify(pictures, top=2), strict=True):
        chances: Any = predictor.model(pixels(predictor, image)).softmax(-1)[0]
        best = chances.argsort(descending=True)[:2].tolist()
        assert [name for name, _ in ranking] == [["ant", "bee", "cat"][index] for index in best]
        assert [chance for _, chance in ranking] == pytest.approx(chances[best].tolist(), rel=1e-4)
    assert len(predictor.classify(pictures[:1], top=9)[0]) == 3
    assert predictor.classify([]) == []


@torch.no_grad()
def test_answers_are_the_models_for_one_and_for_many(
    build: Callable[..., Predictor], pictures: list[Image.Image], tokenizer: TextTokenizer
) -> None:
    names = [f"answer of {number}" for number in range(7)]
    predictor = build("vqa", names, num_answers=7)
    together = predictor.answer(list(pictures), list(QUESTIONS), top=3)
    for image, question, ranking in zip(pictures, QUESTIONS, together, strict=True):
        scores: Any = predictor.model(pixels(predictor, image), ids(tokenizer, question)).sigmoid()[0]
        best = scores.argsort(descending=True)[:3].tolist()
        assert [name for name, _ in ranking] == [names[index] for index in best]
        assert [score for _, score in ranking] == pytest.approx(scores[best].tolist(), rel=1e-4)
        alone = predictor.answer(image, question, top=3)
        assert [name for name, _ in alone] == [name for name, _ in ranking]


@torch.no_grad()
def test_judgements_are_the_models_and_know_left_from_right(
    build: Callable[..., Predictor], pictures: list[Image.Image], tokenizer: TextTokenizer
) -> None:
    predictor = build("nlvr2")
    with torch.no_grad():
        for name, parameter in predictor.model.named_parameters():
            if name.startswith("head."):
                parameter.normal_(std=0.3)
    turned = pictures[1:] + pictures[:1]
    together = predictor.reason(list(pictures), turned, list(QUESTIONS))
    for left, right, sentence, chance in zip(pictures, turned, QUESTIONS, together, strict=True):
        images = torch.stack([pixels(predictor, left), pixels(predictor, right)], dim=1)
        expected: Any = predictor.model(images, ids(tokenizer, sentence)).softmax(-1)[0, 1]
        assert chance == pytest.approx(float(expected), rel=1e-4)
        assert predictor.reason(left, right, sentence) == pytest.approx(chance, rel=1e-4)
    assert predictor.reason(pictures[0], pictures[1], "a") != pytest.approx(
        predictor.reason(pictures[1], pictures[0], "a"), abs=1e-4
    )


@torch.no_grad()
def test_captions_are_the_models(build: Callable[..., Predictor], pictures: list[Image.Image]) -> None:
    predictor = build("captioning")
    found = predictor.caption(pictures, max_length=9)
    assert len(found) == 5
    assert len(set(found)) > 1
    for image, caption in zip(pictures, found, strict=True):
        model: Any = predictor.model
        words = model.generate(pixels(predictor, image), max_length=9, mask_id=predictor.tokenizer.mask_id)
        assert caption == predictor.tokenizer.decode(words.ids[0].tolist())
        assert "<" not in caption


@pytest.mark.parametrize("verb", ["classify", "answer", "reason", "caption", "fill_mask"])
def test_a_verb_of_another_task_is_refused(
    verb: str, build: Callable[..., Predictor], pictures: list[Image.Image]
) -> None:
    predictor: Any = build("retrieval")
    arguments: dict[str, list[Any]] = {
        "classify": [pictures],
        "answer": [pictures[0], "a"],
        "reason": [pictures[0], pictures[0], "a"],
        "caption": [pictures],
        "fill_mask": ["a <mask>"],
    }
    with pytest.raises(ConfigError, match=rf"{verb} needs a \w+ model; this is a retrieval model"):
        getattr(predictor, verb)(*arguments[verb])


def test_lists_that_do_not_match_are_refused(build: Callable[..., Predictor], pictures: list[Image.Image]) -> None:
    predictor: Any = build("vqa", num_answers=3)
    for image, question in ((pictures, ["a"]), (pictures, "a"), (pictures[0], ["a"])):
        with pytest.raises(ConfigError, match="give one of each, or lists of equal length"):
            predictor.answer(image, question)


def test_batches_of_any_size_give_equal_answers(
    build: Callable[..., Predictor], pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build("retrieval")
    expected = whole.embed_images(pictures)
    monkeypatch.setattr("beit3.predict._IMAGE_TOKENS", 20)
    small = Predictor(whole.model, whole.tokenizer, whole.preprocess)
    assert small._images_at_once == 2
    torch.testing.assert_close(small.embed_images(pictures), expected, atol=1e-5, rtol=1e-5)


def test_answers_are_the_same_again_and_from_many_threads(
    build: Callable[..., Predictor], pictures: list[Image.Image]
) -> None:
    predictor = build("retrieval")
    images, texts = predictor.embed_images(pictures), predictor.embed_texts(QUESTIONS)

    def both(number: int) -> bool:
        if number % 2:
            return torch.equal(predictor.embed_images(pictures), images)
        return torch.equal(predictor.embed_texts(QUESTIONS), texts)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(both, range(40)))


def test_half_precision_is_near_the_full_one(
    build: Callable[..., Predictor], pictures: list[Image.Image], tmp_path: Path
) -> None:
    predictor = build("retrieval")
    predictor.save_pretrained(tmp_path / "model")
    half = beit3.load(tmp_path / "model", device="cpu", dtype=torch.bfloat16)
    found = half.embed_images(pictures)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, predictor.embed_images(pictures), atol=0.05, rtol=0)


def test_everything_is_saved_and_loaded(
    build: Callable[..., Predictor], pictures: list[Image.Image], tmp_path: Path
) -> None:
    predictor = build("vqa", ["yes", "no", "blue"], num_answers=3)
    predictor.save_pretrained(tmp_path / "model", licence="mit", numbers={"VQAv2 test-dev": 77.65})
    loaded = beit3.load(tmp_path / "model", device="cpu")
    assert loaded.labels == ["yes", "no", "blue"]
    assert loaded.preprocess == predictor.preprocess
    expected = predictor.answer(pictures[0], "is it?")
    assert loaded.answer(str(_save(pictures[0], tmp_path)), "is it?") == expected
    assert "| VQAv2 test-dev | 77.65 |" in (tmp_path / "model/README.md").read_text()


def _save(image: Image.Image, folder: Path) -> Path:
    image.save(folder / "picture.png")
    return folder / "picture.png"


@pytest.fixture
def vqa_file(released: Released) -> Path:
    return released("vqa", num_answers=3)


def test_a_released_file_answers_in_one_line(
    vqa_file: Path, pictures: list[Image.Image], caplog: pytest.LogCaptureFixture
) -> None:
    predictor = beit3.load(vqa_file, device="cpu")
    assert "has no names for its 3 outputs, so they are numbered" in caplog.text
    assert {name for name, _ in predictor.answer(pictures[0], "what?")} == {"answer 0", "answer 1", "answer 2"}
    (vqa_file.parent / "answers.json").write_bytes(labels_file(["yes", "no", "blue"])["labels.json"])
    caplog.clear()
    named = beit3.load(vqa_file, device="cpu", labels=vqa_file.parent / "answers.json")
    assert not caplog.text
    assert {name for name, _ in named.answer(pictures[0], "what?")} == {"yes", "no", "blue"}


def test_a_released_file_without_its_tokenizer_says_what_to_do(vqa_file: Path, pictures: list[Image.Image]) -> None:
    vqa_file.with_name("beit3.spm").rename(vqa_file.with_name("other.spm"))
    predictor = beit3.load(vqa_file, device="cpu")
    assert predictor.embed_images(pictures).shape == (5, 64)
    with pytest.raises(ConfigError, match=r"no beit3\.spm lies beside it"):
        predictor.answer(pictures[0], "what?")
    given = beit3.load(vqa_file, device="cpu", tokenizer=vqa_file.with_name("other.spm"))
    assert len(given.answer(pictures[0], "what?")) == 3
    with pytest.raises(DataMissingError, match=r"none\.spm does not exist"):
        beit3.load(vqa_file, device="cpu", tokenizer="none.spm")


def test_a_wrong_vocabulary_or_label_list_is_refused(vqa_file: Path) -> None:
    other = train_text_tokenizer(iter(QUESTIONS * 3), 40, character_coverage=1.0)
    other.save(vqa_file.with_name("beit3.spm"))
    with pytest.raises(ConfigError, match=r"this tokenizer belongs to another model"):
        beit3.load(vqa_file, device="cpu")
    vqa_file.with_name("beit3.spm").unlink()
    (vqa_file.parent / "answers.json").write_bytes(labels_file(["yes", "no"])["labels.json"])
    with pytest.raises(ConfigError, match="names 2 outputs, the model has 3"):
        beit3.load(vqa_file, device="cpu", labels=vqa_file.parent / "answers.json")


def test_another_image_size_is_used_throughout(vqa_file: Path, pictures: list[Image.Image]) -> None:
    predictor = beit3.load(vqa_file, device="cpu", image_size=(32, 48))
    assert predictor.preprocess.image_size == predictor.model.model_config.image_size == (32, 48)
    assert len(predictor.answer(pictures[0], "what?")) == 3


def test_imagenet_classes_have_their_names(build: Callable[..., Predictor], tmp_path: Path) -> None:
    model = build("classification", num_classes=1000).model
    torch.save(to_official(model.model_config, model.state_dict()), tmp_path / "in1k.pth")
    predictor = beit3.load(tmp_path / "in1k.pth", device="cpu")
    assert predictor.labels is not None
    assert "tench" in predictor.labels[0]
    assert predictor.preprocess.resize == "crop"
