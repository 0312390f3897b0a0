"""What applications call gives the same answer in any company, from any thread and process, or refuses in words."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import beit3
from beit3.data.preprocess import Preprocess
from beit3.errors import ConfigError, DataMissingError
from beit3.model.build import build_model
from beit3.model.presets import ModelConfig
from beit3.predict import Predictor
from beit3.tokenizer.text import TextTokenizer, train_text_tokenizer

WORDS = ["red", "green", "blue", "cat", "dog", "house", "tree", "with", "and", "big", "small", "the", "a"]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    lines = [" ".join(WORDS[index:] + WORDS[:index]) for index in range(len(WORDS))]
    return train_text_tokenizer(iter(lines * 10), 60)


@pytest.fixture(scope="module")
def build(tokenizer: TextTokenizer) -> Callable[..., Predictor]:
    """A predictor around a small model that is random everywhere."""

    def make(task: str, dtype: torch.dtype = torch.float32, **options: int) -> Predictor:
        torch.manual_seed(3)
        config = ModelConfig(
            width=32,
            num_layers=2,
            num_heads=4,
            ffn_width=48,
            patch_size=8,
            image_size=(32, 24),
            vocab_size=len(tokenizer),
            max_text_positions=40,
            fusion_layers=1,
        )
        model = build_model(config, task, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return Predictor(model.to(dtype), tokenizer, Preprocess.of_task(config, task))

    return make


def pictures(count: int) -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [
        Image.fromarray(draw.integers(0, 256, (20 + 3 * number, 50 - 2 * number, 3), dtype=np.uint8))
        for number in range(count)
    ]


def texts(count: int) -> list[str]:
    """Of very different lengths, the empty one among them: each batch is padded."""
    draw = np.random.default_rng(1)
    return [" ".join(draw.choice(WORDS, size=number % 12)) for number in range(count)]


# --- Company ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "step", "angle"), [(torch.float32, 1e-6, 1e-6), (torch.bfloat16, 2**-8, 1e-3)])
def test_sixteen_at_once_are_embedded_as_each_alone(
    build: Callable[..., Predictor], dtype: torch.dtype, step: float, angle: float
) -> None:
    """Row 59: padded and unpadded, in order and turned round; by the largest number and by the cosine."""
    predictor = build("retrieval", dtype)
    embed: Any
    given: Any
    for embed, given in ((predictor.embed_images, pictures(16)), (predictor.embed_texts, texts(16))):
        together: Tensor = embed(given)
        assert together.shape == (16, 32)
        alone = torch.cat([embed([one]) for one in given])
        turned: Tensor = embed(given[::-1]).flip(0)
        for other in (alone, turned):
            assert (together - other).abs().max() <= step
            assert (1 - (together * other).sum(-1)).abs().max() <= angle
        assert (together[0] - together[1]).abs().max() > 10 * step


def test_eight_threads_mixing_pictures_texts_and_pairs_get_the_serial_answers(build: Callable[..., Predictor]) -> None:
    """Row 60, bit for bit: no module remembers which modality is running."""
    embedder, expert, filler = build("retrieval"), build("vqa", num_answers=5), build("pretraining", codebook_size=9)
    images, words = pictures(5), texts(5)
    asks: list[Callable[[], Any]] = [
        lambda: embedder.embed_images(images).tolist(),
        lambda: embedder.embed_texts(words).tolist(),
        lambda: expert.answer(images, words),
        lambda: filler.fill_mask("a red <mask> and a dog"),
        lambda: filler.fill_mask("a red <mask> and a dog", images[0]),
        lambda: filler.embed_images(images).tolist(),
        lambda: filler.embed_texts(words).tolist(),
    ]
    expected = [ask() for ask in asks]
    assert expected[3] != expected[4], "the picture matters"

    def same(number: int) -> bool:
        return bool(asks[number % len(asks)]() == expected[number % len(asks)])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(same, range(20 * len(asks))))


# --- Forms ------------------------------------------------------------------------------------------------------------

GREY = np.full((32, 24), 128, np.uint8)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.full((32, 24, 3), np.nan, np.float32), r"floats must lie in 0\.\.1"),
        (torch.full((3, 32, 24), float("nan")), r"floats must lie in 0\.\.1"),
        (np.full((32, 24, 3), np.inf), r"floats must lie in 0\.\.1"),
        (np.full((32, 24, 3), 255.0), r"floats must lie in 0\.\.1"),
        (torch.full((3, 32, 24), -1.0), r"floats must lie in 0\.\.1"),
        (np.zeros((3, 32, 24), np.uint8), r"\(3, 32, 24\) is no picture"),
        (torch.zeros(32, 24, 3), "is no picture"),
        (torch.zeros(1, 3, 32, 24), "is no picture"),
        (np.zeros((0, 24, 3), np.uint8), "is no picture"),
        (np.zeros((32, 24, 2), np.uint8), "is no picture"),
        (GREY.astype(np.uint16), "must be uint8 or floats"),
        (GREY.astype(np.int64), "must be uint8 or floats"),
        (GREY > 0, "must be uint8 or floats"),
        (GREY.astype(complex), "must be uint8 or floats"),
        (np.array([["a"]]), "must be uint8 or floats"),
        (np.array([[None]]), "must be uint8 or floats"),
        (3, "is no picture"),
    ],
)  # fmt: skip
def test_pixels_that_are_none_are_refused_in_one_line(
    build: Callable[..., Predictor], picture: Any, message: str
) -> None:
    """Row 61; also among good ones."""
    predictor = build("retrieval")
    for given in ([picture], [GREY, picture, GREY]):
        with pytest.raises(ConfigError, match=message) as caught:
            predictor.embed_images(given)
        assert str(caught.value).isprintable()
    with pytest.raises(DataMissingError):
        predictor.embed_images([GREY, "nowhere.png"])


def test_all_forms_of_a_picture_are_embedded_alike(build: Callable[..., Predictor]) -> None:
    """Row 61: uint8 and floats, channels first (tensors) and last (arrays), at any size, grey or not."""
    predictor = build("retrieval")
    for size in ((32, 24), (7, 91), (1, 1), (1, 500)):
        values = np.random.default_rng(5).integers(0, 256, (*size, 3), dtype=np.uint8)
        first = torch.from_numpy(values).permute(2, 0, 1)
        forms: list[Any] = [Image.fromarray(values), values, first, values / 255, first / 255, (first / 255).double()]
        expected = predictor.embed_images([Image.fromarray(values)])
        for form in forms:
            assert torch.equal(predictor.embed_images([form]), expected)
        stacked: Any = first[None].repeat(3, 1, 1, 1)
        torch.testing.assert_close(predictor.embed_images(stacked), expected.repeat(3, 1), rtol=0, atol=1e-6)


def test_nothing_is_embedded_as_nothing(build: Callable[..., Predictor]) -> None:
    """Row 61: lists, generators and batches without anything."""
    predictor = build("retrieval")
    nothing: list[Any] = [[], (), iter(()), torch.zeros(0, 3, 32, 24)]
    for given in nothing:
        assert predictor.embed_images(given).shape == (0, 32)
    assert predictor.embed_texts([]).shape == (0, 32)
    assert build("classification", num_classes=3).classify([]) == []
    assert build("vqa", num_answers=3).answer([], []) == []


@pytest.mark.slow
def test_a_hundred_thousand_inputs_pass_in_little_memory(build: Callable[..., Predictor]) -> None:
    """Row 61: in pieces, whatever their number."""
    predictor = build("retrieval")
    few_pictures, few_texts = pictures(7), texts(24)
    wanted = predictor.embed_images(few_pictures), predictor.embed_texts(few_texts)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = predictor.embed_images(few_pictures[number % 7] for number in range(100_000))
    assert found.shape == (100_000, 32)
    assert (found[-3:] - wanted[0][[number % 7 for number in range(99_997, 100_000)]]).abs().max() < 1e-6
    found = predictor.embed_texts([few_texts[number % 24] for number in range(100_000)])
    assert found.shape == (100_000, 32)
    assert (found[:24] - wanted[1]).abs().max() < 1e-6
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 400 * 1024, "KiB; the vectors alone take 13 MB each time, all pixels at once would take 900"


# --- Processes --------------------------------------------------------------------------------------------------------


def test_a_model_loaded_twice_is_two_models(build: Callable[..., Predictor], tmp_path: Path) -> None:
    """Row 62: what is done to one is not done to the other, nor to the file."""
    build("retrieval").save_pretrained(tmp_path / "model")
    first, second = (beit3.load(tmp_path / "model", device="cpu") for _ in range(2))
    wanted = second.embed_texts(texts(5))
    assert torch.equal(first.embed_texts(texts(5)), wanted)
    with torch.no_grad():
        for parameter in first.model.parameters():
            parameter.zero_()
    assert torch.equal(second.embed_texts(texts(5)), wanted)
    assert torch.equal(beit3.load(tmp_path / "model", device="cpu").embed_texts(texts(5)), wanted)


FORKED = """
import os, signal, sys
import torch
import beit3
torch.set_num_threads(2)
pictures = [torch.full((3, 32, 24), number / 50) for number in range(50)]
predictor = beit3.load(sys.argv[1], device="cpu")
predictor.embed_images(pictures)
(torch.ones(1000, 1000) @ torch.ones(1000, 1000)).sum()  # the threads of this process are awake
torch.set_num_threads(1)
wanted = predictor.embed_images(pictures)
torch.set_num_threads(2)
for _ in range(2):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        other = beit3.load(sys.argv[1], device="cpu")
        same = all(torch.equal(one.embed_images(pictures), wanted) for one in (predictor, other))
        os._exit(0 if same else 5)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_embeds_and_loads(build: Callable[..., Predictor], tmp_path: Path) -> None:
    """Row 62: though its parent had threads at work, which do not survive a fork."""
    build("retrieval").save_pretrained(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout == "0\n0\n", done.stderr


def test_without_cuda_the_cpu_is_taken_and_a_gpu_asked_for_is_refused(
    build: Callable[..., Predictor], tmp_path: Path
) -> None:
    """Row 62."""
    build("retrieval").save_pretrained(tmp_path / "model")
    script = (
        "import sys, torch, beit3\n"
        "predictor = beit3.load(sys.argv[1])\n"
        "assert predictor.embed_texts(['a red cat']).shape == (1, 32)\n"
        "try:\n    beit3.load(sys.argv[1], device='cuda')\n"
        "except ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout == "device 'cuda' is not available here: use --device cpu\n", done.stderr
