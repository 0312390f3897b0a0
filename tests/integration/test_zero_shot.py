"""Zero-shot classification of checkpoints, and clip models in everything that takes a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import beit3
from beit3.cli import run_command
from beit3.config import Run
from beit3.data.preprocess import Preprocess
from beit3.data.prompts import PROMPTS, Prompts
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.errors import ConfigError
from beit3.finetune.lit import LitConfig, load_locked_images
from beit3.finetune.retrieval import Retrieval, RetrievalConfig
from beit3.model.build import build_model
from beit3.model.heads import ClipModel
from beit3.model.presets import ModelConfig, TextTowerConfig
from beit3.tokenizer.subwords import Subwords, WordList
from beit3.tokenizer.text import TextTokenizer
from beit3.train.distributed import join_ranks
from beit3.zero_shot import measure_zero_shot, zero_shot_judge
from tests.conftest import Workspace

NAMES = ["ant", "red bee", "cat"]
SHAPE = ModelConfig(
    width=16,
    num_layers=2,
    num_heads=2,
    ffn_width=24,
    patch_size=8,
    image_size=(24, 24),
    vocab_size=420,
    max_text_positions=40,
    fusion_layers=1,
)
TEXT: dict[str, Any] = {"text_width": 12, "text_layers": 1, "text_heads": 2, "embed_width": 10}


def write(kind: str, place: Path) -> Path:
    """A random model of a kind as an exchange folder with everything around it."""
    tokenizer = TextTokenizer.load(place / "runs" / "text_emoji" / "tokenizer.spm")
    model: Any = build_model(SHAPE, kind, **(TEXT if kind == "clip" else {}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    if kind == "superclass":
        counts = tuple(torch.randint(0, 50, (420,)).tolist())
        files = {**WordList(Subwords(tokenizer), 60, counts).files(), **Preprocess(image_size=(24, 24)).file()}
    else:
        files = {"tokenizer.spm": tokenizer.model, **Preprocess(image_size=(24, 24), max_text_length=30).file()}
    model.save_pretrained(place / kind, files=files)
    return place / kind


def lit(place: Path) -> Path:
    """The export of LiT beside a network of timm."""
    config = LitConfig(
        tower="timm:test_vit",
        tower_pretrained=False,
        text_tower=TextTowerConfig(width=12, num_layers=1, num_heads=2, embed_width=10),
        text_tokenizer=place / "runs" / "text_emoji" / "tokenizer.spm",
        pairs=Stream(sources=(Source(path="pairs"),), batch_size=4),
        crop=CropConfig(size=160),
        max_text_length=20,
    )
    config.build().save(place / "lit")
    return place / "lit"


def labels(place: Path) -> Path:
    (place / "names.json").write_text(json.dumps(NAMES))
    return place / "names.json"


def expected_ranks(place: Path, folder: Path, prompts: Prompts) -> list[int]:
    """How many names are nearer than the right one, picture by picture."""
    predictor, ranks = beit3.load(folder, device="cpu"), []
    for line in (place / "data" / "groups.test.jsonl").read_text().splitlines():
        row = json.loads(line)
        picture = place / "data" / row["image_path"]
        if predictor.model.task == "superclass":
            chances = dict(predictor.predict_words([picture], top=420)[0])
            assert predictor.words is not None
            words, weights = predictor.words.subwords, predictor.words.weights()
            scores = []
            for name in NAMES:
                shares = {index: float(weights[index]) for index in words.encode(name)}
                logs = {index: torch.tensor(chances[words.word(index)]).log().item() for index in shares}
                scores.append(sum(shares[i] * logs[i] for i in shares) / sum(shares.values()))
        else:
            if predictor.model.part == "text":
                locked = load_locked_images(folder)
                with Image.open(picture) as opened:
                    pixels = locked.tower.preprocess(opened.convert("RGB"))[None]
                image = locked(locked.tower.preprocess.normalize(pixels))[0]
            else:
                image = predictor.embed_images([picture])[0]
            scores = []
            for name in NAMES:
                texts = predictor.embed_texts([template.replace("{}", name) for template in PROMPTS[prompts]])
                scores.append(float(image @ F.normalize(texts.mean(0), dim=0)))
        ranks.append(sum(score > scores[row["label"]] for score in scores))
    return ranks


def measure(place: Path, folder: Path, out: str, prompts: Prompts) -> dict[str, float]:
    with join_ranks("cpu") as ranks:
        return measure_zero_shot(
            str(folder), place / "data" / "groups.test.jsonl", labels(place), place / out, ranks, prompts, batch_size=5
        )


@pytest.mark.parametrize("prompts", ["plain", "imagenet"])
@pytest.mark.parametrize("kind", ["retrieval", "clip", "superclass", "lit"])
def test_the_accuracy_is_that_of_the_nearest_names(kind: str, prompts: Prompts, place: Path) -> None:
    folder = lit(place) if kind == "lit" else write(kind, place)
    found = measure(place, folder, "out", prompts)
    ranks = expected_ranks(place, folder, prompts)
    assert found == {"zero_shot_acc1": ranks.count(0) / 12, "zero_shot_acc5": 1.0}
    assert json.loads((place / "out" / "metrics.json").read_text()) == {**found, "examples": 12}
    assert measure(place, folder, "out", prompts) == found, "the same call goes on with what is there"


def test_models_that_know_no_names_are_refused(place: Path) -> None:
    whole = write("clip", place)
    beit3.load_model(whole, parts="vision").save_pretrained(
        place / "vision", files=Preprocess(image_size=(24, 24), max_text_length=30).file()
    )
    files = {name: (whole / name).read_bytes() for name in ("tokenizer.spm", "preprocess.json")}
    beit3.load_model(whole, parts="text").save_pretrained(place / "text", files=files)
    for folder, message in (
        (write("pretraining", place), "takes a retrieval, clip or superclass model"),
        (place / "vision", "takes a retrieval, clip or superclass model"),
        (place / "text", "is a text tower alone"),
    ):
        with pytest.raises(ConfigError, match=message):
            zero_shot_judge(str(folder), NAMES, "plain", torch.device("cpu"))


def test_names_of_too_few_classes_are_refused(place: Path) -> None:
    (place / "two.json").write_text(json.dumps(NAMES[:2]))
    index = place / "data" / "groups.test.jsonl"
    with join_ranks("cpu") as ranks, pytest.raises(ConfigError, match="names 2 classes"):
        measure_zero_shot(str(write("clip", place)), index, place / "two.json", place / "out", ranks, "plain")
    assert not (place / "out").exists()


def test_another_evaluation_is_not_overwritten(place: Path) -> None:
    folder = write("clip", place)
    measure(place, folder, "out", "plain")
    with pytest.raises(ConfigError, match=r"another evaluation \(prompts differ\)"):
        measure(place, folder, "out", "drawings")


def test_a_clip_folder_serves_the_commands(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("clip", place)
    assert run_command(["info", "clip"]) == 0
    said = capsys.readouterr().out
    assert "text tower  1 layers of 12, 2 heads; vectors of 10, images by class" in said
    assert "outputs" not in said
    assert run_command(["embed", "data/drawings", "--model", "clip", "--out", "index", "--device", "cpu"]) == 0
    assert run_command(["search", "index", "a red cat"]) == 0


@torch.no_grad()
def test_a_clip_model_is_measured_by_the_retrieval_task(place: Path) -> None:
    predictor = beit3.load(write("clip", place), device="cpu")
    assert isinstance(predictor.model, ClipModel)
    config = RetrievalConfig(
        model=SHAPE,
        text_tokenizer=place / "clip" / "tokenizer.spm",
        preprocess=predictor.preprocess,
        max_text_length=30,
        eval="retrieval.test.jsonl",
        eval_batch_size=7,
    )
    task = Retrieval(config, predictor.model).eval()
    loader = task.eval_loader(Run(name="x", task=config, data=place / "data"))
    assert loader is not None
    metrics = task.evaluate(loader)
    rows = [json.loads(line) for line in (place / "data" / "retrieval.test.jsonl").read_text().splitlines()]
    owners = list(dict.fromkeys((row["image_id"], row["image_path"]) for row in rows))
    images = predictor.embed_images([place / "data" / path for _, path in owners])
    texts = predictor.embed_texts([row["text"] for row in rows])
    right = 0
    for image, (owner, _) in zip(images, owners, strict=True):
        scores = [(float(image @ text), row["image_id"] == owner) for text, row in zip(texts, rows, strict=True)]
        own = max(score for score, is_own in scores if is_own)
        right += not any(score > own - 1e-6 for score, is_own in scores if not is_own)  # equal texts do not help
    assert 0 < right < 12
    assert metrics["image_to_text_r1"] == pytest.approx(right / 12)


def test_a_clip_folder_serves_hugging_face(place: Path, workspace: Workspace) -> None:
    from beit3.huggingface import Beit3Model, Beit3Processor

    folder = write("clip", place)
    model, processor = Beit3Model.from_pretrained(folder), Beit3Processor.from_pretrained(folder)
    picture = workspace.data / "drawings" / "00.png"
    inputs = processor(images=picture, text="a red cat")
    predictor = beit3.load(folder, device="cpu")
    with torch.no_grad():
        out = model(**inputs)
    torch.testing.assert_close(out.image_embeds, predictor.embed_images([picture]), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.text_embeds, predictor.embed_texts(["a red cat"]), atol=1e-6, rtol=0)


def test_a_text_longer_than_the_context_is_cut(place: Path) -> None:
    folder = write("clip", place)
    predictor = beit3.load(folder, device="cpu")
    assert predictor.embed_texts(["red cat " * 50]).shape == (1, 10)
