"""What applications call: every verb gives the model's own answer, for any number and form of inputs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import beit3
from beit3.data.emoji import load_cells
from beit3.data.labels import labels_file
from beit3.data.preprocess import Preprocess
from beit3.errors import ConfigError, DataMissingError
from beit3.model.build import build_model
from beit3.model.official import to_official
from beit3.model.presets import ModelConfig
from beit3.predict import Predictor
from beit3.tokenizer.text import TextTokenizer, train_text_tokenizer
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
    weights = loaded.model.state_dict()
    assert weights.keys() == predictor.model.state_dict().keys()
    for name, weight in predictor.model.state_dict().items():
        assert torch.equal(weights[name], weight), name
    expected = predictor.answer(pictures[0], "is it?")
    # The same weights elsewhere in memory: products may round otherwise.
    found = loaded.answer(str(_save(pictures[0], tmp_path)), "is it?")
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], rel=1e-5)
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
    with pytest.raises(ConfigError, match=r"beit3\.spm lies with it; name one: beit3\.load\(\.\.\., tokenizer=\)"):
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


def test_embeddings_train_a_layer_and_are_changed_in_place(
    build: Callable[..., Predictor], pictures: list[Image.Image]
) -> None:
    predictor = build("retrieval")
    for vectors in (predictor.embed_images(pictures), predictor.embed_texts(QUESTIONS)):
        layer = torch.nn.Linear(64, 3)
        layer(vectors).sum().backward()
        assert layer.weight.grad is not None
        assert torch.equal(vectors.mul_(2), vectors)


@pytest.mark.parametrize("task", ["retrieval", "pretraining"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lengths_are_one_in_half_precision_too(
    task: str, dtype: torch.dtype, build: Callable[..., Predictor], pictures: list[Image.Image]
) -> None:
    predictor = build(task)
    half = Predictor(predictor.model.to(dtype), predictor.tokenizer, predictor.preprocess)
    for vectors in (half.embed_images(pictures), half.embed_texts(QUESTIONS)):
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(5), rtol=0, atol=1e-6)


def test_one_picture_or_text_instead_of_a_list_is_refused(
    build: Callable[..., Predictor], pictures: list[Image.Image]
) -> None:
    predictor: Any = build("retrieval")
    for single in ("a.png", Path("a.png"), pictures[0], torch.zeros(3, 24, 24), torch.zeros(3, 24, 24).numpy(), b"png"):
        with pytest.raises(ConfigError, match=r"give a list of pictures: \[picture\] for one"):
            predictor.embed_images(single)
    for nothing in (None, 3):
        with pytest.raises(ConfigError, match=f"give a list of pictures, not a {type(nothing).__name__}"):
            predictor.embed_images(nothing)
    with pytest.raises(ConfigError, match="give a list of texts"):
        predictor.embed_texts("a cat")
    with pytest.raises(ConfigError, match="give a list of pictures"):
        build("classification", num_classes=3).classify(pictures[0])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give a list of pictures"):
        build("captioning").caption("a.png")


def test_generators_are_read_like_lists(build: Callable[..., Predictor], pictures: list[Image.Image]) -> None:
    predictor = build("retrieval")
    assert torch.equal(predictor.embed_images(picture for picture in pictures), predictor.embed_images(pictures))
    assert torch.equal(predictor.embed_texts(text for text in QUESTIONS), predictor.embed_texts(QUESTIONS))
    assert len(build("captioning").caption((picture for picture in pictures), max_length=5)) == 5


def test_what_is_no_text_is_refused_and_an_empty_one_is_read(
    build: Callable[..., Predictor], pictures: list[Image.Image]
) -> None:
    predictor: Any = build("retrieval")
    for wrong in (None, 3, b"cat"):
        with pytest.raises(ConfigError, match=f"a text must be a str, not {type(wrong).__name__}"):
            predictor.embed_texts(["a cat", wrong])
    assert torch.equal(predictor.embed_texts(["\0"]), predictor.embed_texts([""]))
    filler = build("pretraining", codebook_size=9)
    assert filler.fill_mask("a\0  cat <mask>") == filler.fill_mask("a cat <mask>")


def test_numbers_of_answers_are_checked(build: Callable[..., Predictor], pictures: list[Image.Image]) -> None:
    classes, answers, words = (
        build("classification", num_classes=3),
        build("vqa", num_answers=3),
        build("pretraining", codebook_size=9),
    )
    for top in (-1, 0, 2.5):
        wrong: Any = top
        for ask in (
            lambda top: classes.classify(pictures, top=top),
            lambda top: answers.answer(pictures[0], "who?", top=top),
            lambda top: words.fill_mask("a <mask>", top=top),
        ):
            with pytest.raises(ConfigError, match="top must be a whole number of at least 1"):
                ask(wrong)
    (ranking,) = words.fill_mask("a <mask>", top=10**6)
    assert len(ranking) == words.tokenizer.mask_id
    assert math.fsum(chance for _, chance in ranking) == pytest.approx(1, abs=1e-5)


def test_captions_come_with_scores_and_as_the_released_code_writes_them(
    build: Callable[..., Predictor], pictures: list[Image.Image]
) -> None:
    predictor = build("captioning")
    model: Any = predictor.model
    with torch.no_grad():
        model.mlm_head.bias[3] = 40  # <unk>
    pixel_rows = torch.cat([pixels(predictor, image) for image in pictures])
    for official in (False, True):
        expected = model.generate(pixel_rows, max_length=8, mask_id=predictor.tokenizer.mask_id, official=official)
        found = predictor.caption_scores(pictures, max_length=8, official=official)
        assert [score for _, score in found] == pytest.approx(expected.scores.tolist(), rel=1e-4)
        assert predictor.caption(pictures, max_length=8, official=official) == [text for text, _ in found]
        assert all(("<unk>" in text) == official for text, _ in found)


def test_captions_and_answers_are_the_same_from_many_threads(
    build: Callable[..., Predictor], pictures: list[Image.Image]
) -> None:
    writer, expert = build("captioning"), build("vqa", num_answers=7)
    captions = writer.caption_scores(pictures, max_length=7)
    answers = expert.answer(list(pictures), list(QUESTIONS), top=3)

    def same(number: int) -> bool:
        if number % 2:
            return writer.caption_scores(pictures, max_length=7) == captions
        return expert.answer(list(pictures), list(QUESTIONS), top=3) == answers

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same, range(24)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_gpu_gives_the_answers_of_the_cpu(
    dtype: torch.dtype | None, build: Callable[..., Predictor], pictures: list[Image.Image], tmp_path: Path
) -> None:
    tolerance = 1e-3 if dtype is None else 0.06
    build("retrieval").save_pretrained(tmp_path / "retrieval")
    build("vqa", num_answers=3).save_pretrained(tmp_path / "vqa")
    build("captioning").save_pretrained(tmp_path / "captioning")
    near, far = (beit3.load(tmp_path / "retrieval", device, dtype) for device in ("cpu", "cuda"))
    for one, other in (
        (near.embed_images(pictures), far.embed_images(pictures)),
        (near.embed_texts(QUESTIONS), far.embed_texts(QUESTIONS)),
    ):
        assert other.device.type == "cpu"
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0)
    answers = [beit3.load(tmp_path / "vqa", device, dtype).answer(pictures[0], "who?") for device in ("cpu", "cuda")]
    assert dict(answers[1]) == pytest.approx(dict(answers[0]), abs=tolerance)
    assert len(beit3.load(tmp_path / "captioning", "cuda", dtype).caption(pictures, max_length=7)) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "xpu"}, "device 'xpu' is not available here"),
        ({"device": "mps"}, "device 'mps' is not available here"),
        ({"device": "cuda:77"}, "device 'cuda:77' is not available here"),
        ({"device": "meta"}, "device 'meta' is not available here"),
        ({"device": "gpu"}, "device 'gpu' is unknown"),
        ({"dtype": "bfloat16"}, "dtype must be one of torch.float32, .*, not 'bfloat16'"),
        ({"dtype": torch.int8}, "dtype must be one of"),
        ({"dtype": torch.complex64}, "dtype must be one of"),
        ({"dtype": torch.float8_e4m3fn}, "dtype must be one of"),
        ({"image_size": "48"}, "image_size is a side, or height and width, in pixels, not '48'"),
        ({"image_size": 24.0}, "image_size is a side"),
        ({"image_size": (24,)}, "image_size is a side"),
        ({"image_size": True}, "image_size is a side"),
        ({"image_size": 25}, "must divide by"),
        ({"image_size": -24}, "model.image_size"),
    ],
)
def test_options_that_cannot_be_followed_are_one_line(options: dict[str, Any], message: str, vqa_file: Path) -> None:
    if options.get("device") == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(ConfigError, match=message) as caught:
        beit3.load(vqa_file, **options)
    assert "\n" not in str(caught.value)


def test_an_image_size_as_a_list_is_one(vqa_file: Path) -> None:
    sizes: Any = [32, 48]
    predictor = beit3.load(vqa_file, device="cpu", image_size=sizes)
    assert predictor.preprocess.image_size == predictor.model.model_config.image_size == (32, 48)


def test_a_folder_without_preprocessing_is_prepared_as_released(
    build: Callable[..., Predictor], pictures: list[Image.Image], tmp_path: Path
) -> None:
    predictor = build("classification", num_classes=3)
    predictor.model.save_pretrained(tmp_path / "bare")
    found = beit3.load(tmp_path / "bare", device="cpu")
    assert found.preprocess == predictor.preprocess
    for ranking, expected in zip(found.classify(pictures), predictor.classify(pictures), strict=True):
        assert dict(ranking) == pytest.approx(dict(expected), abs=1e-5)


def test_a_folder_without_its_tokenizer_embeds_pictures_and_says_what_texts_need(
    build: Callable[..., Predictor], pictures: list[Image.Image], tmp_path: Path
) -> None:
    whole = build("retrieval")
    Predictor(whole.model, None, whole.preprocess).save_pretrained(tmp_path / "model")
    predictor = beit3.load(tmp_path / "model", device="cpu")
    torch.testing.assert_close(predictor.embed_images(pictures), whole.embed_images(pictures), atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match=r"has no text tokenizer: .* name one: beit3\.load\(\.\.\., tokenizer=\)"):
        predictor.embed_texts(["a cat"])
    tower = beit3.load(tmp_path / "model", device="cpu", parts="vision")
    with pytest.raises(ConfigError, match="it is a vision tower alone"):
        tower.embed_texts(["a cat"])
    whole.tokenizer.save(tmp_path / "mine.spm")
    given = beit3.load(tmp_path / "model", device="cpu", tokenizer=tmp_path / "mine.spm")
    torch.testing.assert_close(given.embed_texts(["a cat"]), whole.embed_texts(["a cat"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": [30, 30]}, r"preprocess\.json does not fit its model: .*patches of 8"),
        ({"max_text_length": 64000}, r"preprocess\.json does not fit its model: max_text_length is 64000"),
        ({"mean": [0.5, "x", 0.5]}, r"preprocess\.json is damaged"),
        ({"std": [math.nan, 1, 1]}, r"preprocess\.json is damaged"),
    ],
)
def test_preprocessing_that_does_not_fit_is_refused_before_the_first_question(
    change: dict[str, Any], message: str, build: Callable[..., Predictor], tmp_path: Path
) -> None:
    build("vqa", num_answers=3).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "preprocess.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        beit3.load(tmp_path / "model", device="cpu")


def test_sources_that_are_none_are_one_line(build: Callable[..., Predictor], tmp_path: Path) -> None:
    build("retrieval").save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"is one file of an exchange folder: give the folder"):
        beit3.load(tmp_path / "model" / "model.safetensors")
    for name in ("x" * 300, tmp_path / "none.pth"):
        with pytest.raises(DataMissingError, match="does not exist: give an exchange folder"):
            beit3.load(name)
