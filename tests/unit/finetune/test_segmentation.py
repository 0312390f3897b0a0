"""The segmentation task: colours are learned, evaluation counts every pixel at full size, nothing is shifted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as scikit  # type: ignore[import-untyped]
from timm.utils import ModelEmaV3
from torch import nn

import beit3
from beit3.config import OptimConfig, Run, replace
from beit3.data.compose import ComposeConfig
from beit3.data.dense_views import SegmentationViewConfig
from beit3.data.preprocess import Preprocess
from beit3.data.whole_pictures import segment_image
from beit3.errors import BeitError, ConfigError, DataMissingError
from beit3.finetune.segmentation import Segmentation, SegmentationConfig
from beit3.model.build import build_model
from beit3.model.presets import ModelConfig
from beit3.model.sliding_window import SlidingConfig
from beit3.train.optim import build_optimizer

COLORS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]], np.uint8)
NAMES = ["red", "green", "blue"]
HEADS = ("upernet", "mask2former")
Make = Callable[..., SegmentationConfig]


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    """Pictures of three colours, each a class, in sizes of their own; label maps as ADE20K writes them, from 1 on."""
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 5)):
        rows = []
        for number in range(count):
            name = f"{split}{number}"
            height, width = 28 + 3 * number, 52 - 5 * number
            areas = random.integers(0, 3, (2, 3))
            labels = np.kron(areas, np.ones((height // 2, -(-width // 3)), int))[:height, :width].astype(np.uint8)
            labels = np.pad(labels, ((0, height - len(labels)), (0, 0)), mode="edge")
            noise = random.integers(0, 30, (height, width, 3), dtype=np.uint8)
            Image.fromarray(COLORS[labels] + noise).save(tmp_path / f"{name}.png")
            written = labels + 1
            written[:2] = 0
            Image.fromarray(written).save(tmp_path / f"{name}.labels.png")
            row = {"image_path": f"{name}.png", "mask_path": f"{name}.labels.png", "reduce_zero_label": True}
            rows.append(row)
        (tmp_path / f"maps.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "labels.json").write_text(json.dumps(NAMES))
    return tmp_path


def say_that_zero_is_a_class(maps: Path) -> None:
    for index in maps.glob("maps.*.jsonl"):
        index.write_text(index.read_text().replace(', "reduce_zero_label": true', ""))


@pytest.fixture
def config(maps: Path) -> Make:
    def make(head: str = "upernet", **changes: Any) -> SegmentationConfig:
        shape: dict[str, Any] = {"width": 16, "num_layers": 3, "num_heads": 2, "ffn_width": 24, "patch_size": 8}
        values: dict[str, Any] = {
            "model": ModelConfig(**shape, image_size=(24, 24), vocab_size=8, max_text_positions=4, final_norm=False),
            "train": "maps.train.jsonl",
            "eval": "maps.test.jsonl",
            "batch_size": 4,
            "eval_batch_size": 2,
            "labels": maps / "labels.json",
            "head": head,
            "pyramid_width": 16,
            "head_width": 32,
            "num_queries": 8,
            "view": SegmentationViewConfig(distort=False),
        }
        return SegmentationConfig(**{**values, **changes})

    return make


def run_of(task: Segmentation, maps: Path) -> Run:
    return Run(name="test", task=task.config, data=maps)


def first_batch(task: Segmentation, maps: Path) -> Any:
    return next(iter(task.train_loader(run_of(task, maps), 0, 1)))


def held_out(maps: Path) -> list[tuple[Path, Image.Image, torch.Tensor]]:
    """Pictures to evaluate with their labels, read anew; 255 where ignored."""
    found = []
    for line in (maps / "maps.test.jsonl").read_text().splitlines():
        row = json.loads(line)
        labels = np.asarray(Image.open(maps / row["mask_path"])).astype(int) - 1
        labels[labels < 0] = 255
        path = maps / row["image_path"]
        found.append((path, Image.open(path).convert("RGB"), torch.from_numpy(labels)))
    return found


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("windows", [None, 2])
def test_every_trained_parameter_gets_a_gradient(head: str, windows: int | None, config: Make, maps: Path) -> None:
    """Otherwise several ranks would wait for it in vain."""
    task = config(head, window_size=windows, num_global_layers=1).build().train()
    batch = first_batch(task, maps)
    assert batch.images.shape == (4, 3, 24, 24)
    assert set(batch.labels.unique().tolist()) <= {0, 1, 2, 255}
    values = task(batch)
    assert torch.isfinite(values["loss"])
    values["loss"].backward()
    for name, parameter in task.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize(("head", "steps"), [("upernet", 60), pytest.param("mask2former", 400, marks=pytest.mark.slow)])
def test_colours_are_learned(head: str, steps: int, config: Make, maps: Path) -> None:
    task = config(head).build()
    if head == "mask2former":
        task.model.head._settings.train_num_points = 256  # a quarter of the time
    run = run_of(task, maps)
    optimizer = torch.optim.Adam(task.parameters(), lr=1e-3)
    for _, batch in zip(range(steps), task.train().train_loader(run, 0, 1), strict=False):
        optimizer.zero_grad()
        task(batch)["loss"].backward()
        nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
    task.eval()
    loader = task.eval_loader(run)
    assert loader is not None
    with torch.no_grad():
        found = task.evaluate(loader)
    assert found["mean_iou"] > 0.8, found


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "slide", [SlidingConfig(), SlidingConfig(scales=(0.5, 1.5), flip=True, stride_share=0.5)], ids=["one", "several"]
)
def test_evaluation_counts_every_pixel_at_full_size(head: str, slide: SlidingConfig, config: Make, maps: Path) -> None:
    """Against scikit-learn over all pixels of all pictures, and against what a user of the model is told."""
    task = config(head, slide=slide).build().eval()
    loader = task.eval_loader(run_of(task, maps))
    assert loader is not None
    rows = [row for batch in loader for row in task.predict(batch)]
    pictures = held_out(maps)
    assert [row["image"] for row in rows] == [str(path) for path, _, _ in pictures]
    guesses = [segment_image(task.model, task.preprocess, image, slide) for _, image, _ in pictures]
    true = torch.cat([labels.flatten() for _, _, labels in pictures])
    guessed = torch.cat([guess.flatten() for guess in guesses])
    kept = true != 255
    assert 0 < int(kept.sum()) < len(true)
    found = task.measure(rows)
    ious = scikit.jaccard_score(true[kept], guessed[kept], labels=[0, 1, 2], average=None)
    assert [found[f"iou/{name}"] for name in NAMES] == pytest.approx(ious.tolist())
    assert found["mean_iou"] == pytest.approx(float(ious.mean()))
    assert found["pixel_accuracy"] == pytest.approx(scikit.accuracy_score(true[kept], guessed[kept]))
    assert found == task.evaluate(loader)
    written = json.loads(json.dumps(list(task.readable(rows))))
    for row, guess, (path, _, labels) in zip(written, guesses, pictures, strict=True):
        own = labels != 255
        assert row["image"] == str(path)
        assert row["pixel_accuracy"] == pytest.approx(float((guess == labels)[own].float().mean()))
        assert 0 <= row["mean_iou"] <= 1


def test_a_picture_without_labels_is_written_down_without_figures(config: Make) -> None:
    task = config().build()
    (row,) = task.readable([{"image": "a.png", "confusion": torch.zeros(0, 3, dtype=torch.int64)}])
    assert row == {"image": "a.png", "mean_iou": None, "pixel_accuracy": None}


def test_classes_that_never_occur_have_no_figure(config: Make) -> None:
    task = config(labels=None, num_classes=4).build()
    found = task.measure([{"image": "a.png", "confusion": torch.tensor([[0, 0, 6], [0, 2, 2]])}])
    assert found == {"mean_iou": 0.375, "pixel_accuracy": 0.75, "mean_accuracy": 0.75, "iou/0": 0.75, "iou/2": 0.0}


@pytest.mark.parametrize("size", [(24, 24), (40, 24)])
@pytest.mark.parametrize("windows", [1, 2, 3, 9])
def test_operations_are_counted_as_windows_leave_them(
    size: tuple[int, int], windows: int, config: Make, maps: Path
) -> None:
    """Of each layer with windows, 4 D operations for every pair of tokens that see each other."""
    shape = replace(config().model, image_size=size)
    plain = config(model=shape).build()
    batch = first_batch(plain, maps)
    task = config(model=shape, window_size=windows, num_global_layers=1).build()
    places = [(row // windows, column // windows) for row in range(size[0] // 8) for column in range(size[1] // 8)]
    pairs = sum(one == other for one in places for other in places) + 2 * len(places) + 1
    every = (1 + len(places)) ** 2
    saved = 3 * 4 * 2 * 4 * 16 * (every - pairs)  # forward and backward, pictures, layers, operations
    assert plain.work(batch).flops - task.work(batch).flops == saved
    assert (saved == 0) == (8 * windows >= max(size))
    assert plain.work(batch).images == 4


@pytest.mark.parametrize("head", HEADS)
def test_pyramid_and_head_learn_at_the_full_rate_and_embeddings_do_not_decay(head: str, config: Make) -> None:
    task = config(head).build()
    optimizer = build_optimizer(task, OptimConfig(lr=1.0, weight_decay=0.05, layer_decay=0.5))
    names = {parameter: name for name, parameter in task.named_parameters()}
    scales: dict[str, float] = {}
    decayed: dict[str, bool] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            scales[names[parameter]] = group["lr_scale"]
            decayed[names[parameter]] = bool(group["weight_decay"])
    assert {scales[name] for name in scales if name.startswith(("model.pyramid.", "model.head."))} == {1.0}
    assert {scales[name] for name in scales if ".blocks.2." in name} == {0.5}
    assert {scales[name] for name in scales if "vision_embedding" in name} == {0.5**4}
    embeddings = {name for name in decayed if ".queries_" in name or ".level_embed" in name}
    assert bool(embeddings) == (head == "mask2former")
    assert not any(decayed[name] for name in embeddings)
    assert decayed["model.pyramid.levels.0.3.weight"]


def test_labels_mean_the_same_with_and_without_a_zero_for_the_rest(config: Make, maps: Path) -> None:
    """The same pixels are labelled, the numbers are one apart."""
    reduced = config().build().examples([maps / "maps.test.jsonl"], training=False).load(0).labels
    say_that_zero_is_a_class(maps)
    other = config(labels=None, num_classes=4).build()
    plain = other.examples([maps / "maps.test.jsonl"], training=False).load(0).labels
    assert torch.equal(plain == 0, reduced == 255)
    assert torch.equal(plain[plain > 0].int() - 1, reduced[reduced != 255].int())


def test_scenes_are_composed_in_the_run(config: Make, maps: Path) -> None:
    scenes = {"compose": ComposeConfig(size=(24, 24), objects=(2, 4)), "labels": None, "eval": None}
    task = config(**scenes, num_classes=10).build()
    batches = [next(iter(task.train_loader(run_of(task, maps), 0, 1))) for _ in range(2)]
    assert torch.equal(batches[0].images, batches[1].images), "the same seed, the same scenes"
    assert batches[0].labels.shape == (4, 24, 24)
    found = set(batches[0].labels.unique().tolist()) - {255}
    assert 0 in found
    assert len(found) > 2
    assert max(found) <= 9
    with pytest.raises(ConfigError, match=r"scenes have 10 classes \(background, .*\), not 9"):
        config(**scenes, num_classes=9).build().train_loader(run_of(task, maps), 0, 1)


@pytest.mark.parametrize("compose", [None, ComposeConfig(size=(24, 24), objects=(2, 4))], ids=["index", "compose"])
def test_what_is_wrong_with_the_evaluation_is_said_before_training(
    compose: ComposeConfig | None, config: Make, maps: Path
) -> None:
    task = config(compose=compose, labels=None, num_classes=10, eval="none.jsonl").build()
    with pytest.raises(DataMissingError, match=r"index .*none\.jsonl does not exist"):
        task.train_loader(run_of(task, maps), 0, 1)
    task.train_loader(run_of(task, maps), 1, 2)  # rank 0 evaluates


def test_what_does_not_fit_is_said(config: Make, maps: Path) -> None:
    for changes, said in (
        ({"labels": None}, "give num_classes, or labels to count them"),
        ({"num_classes": 7}, r"labels\.json names 3 classes, num_classes is 7"),
        ({"num_classes": 300, "labels": None}, r"num_classes must lie in 1\.\.255, not 300"),
        ({"preprocess": Preprocess(image_size=(24, 24))}, "resize must be slide .* not squash"),
    ):
        with pytest.raises(ConfigError, match=said):
            config(**changes).build()
    Image.new("L", (9, 9), 1).save(maps / "test0.labels.png")
    task = config().build()
    loader = task.eval_loader(run_of(task, maps))
    with pytest.raises(BeitError, match=r"mask_of_another_size: .*test0\.labels\.png: \(9, 9\), not \(28, 52\)"):
        list(loader or ())
    say_that_zero_is_a_class(maps)
    task = config().build()
    loader = task.eval_loader(run_of(task, maps))
    (maps / "test0.labels.png").write_bytes((maps / "test1.labels.png").read_bytes())
    (maps / "test0.png").write_bytes((maps / "test1.png").read_bytes())
    with pytest.raises(BeitError, match=r"labels\.png holds 3, with 3 classes"):
        list(loader or ())


def test_batch_norm_needs_two_pictures_on_each_rank(config: Make, maps: Path) -> None:
    task = config(batch_size=2).build()
    assert len(next(iter(task.train_loader(run_of(task, maps), 0, 1))).images) == 2
    with pytest.raises(ConfigError, match="batch norm needs a batch_size of at least 4, not 2"):
        task.train_loader(run_of(task, maps), 0, 2)
    assert any(isinstance(module, nn.BatchNorm2d) for module in task.modules())
    other = config("mask2former", batch_size=2).build()
    assert len(next(iter(other.train_loader(run_of(other, maps), 0, 2))).images) == 1


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_what_was_trained_is_loaded_and_answers(head: str, config: Make, maps: Path, tmp_path: Path) -> None:
    task = config(head, window_size=2, num_global_layers=1).build()
    average = ModelEmaV3(task, decay=0.5)
    task.train()(first_batch(task, maps))  # batch norms see something
    average.update(task)
    module: Segmentation = average.module.eval()
    module.save(tmp_path / "export")
    predictor = beit3.load(tmp_path / "export", device="cpu")
    assert predictor.labels == NAMES
    pictures = held_out(maps)
    for (_, image, _), found in zip(pictures, predictor.segment([path for path, _, _ in pictures]), strict=True):
        assert torch.equal(found, segment_image(module.model, module.preprocess, image))
    again = config(head, window_size=2, num_global_layers=1, init_from=tmp_path / "export").build()
    for name, value in module.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_it_starts_from_a_pretrained_model_of_another_size(config: Make, tmp_path: Path) -> None:
    before = replace(config().model, image_size=(16, 16), final_norm=True)
    pretrained = build_model(before, "pretraining", codebook_size=8)
    pretrained.save_pretrained(tmp_path / "pretrained")
    started = config(init_from=tmp_path / "pretrained").build()
    state = pretrained.state_dict()
    for name, value in started.model.backbone.state_dict().items():
        if name != "vision_embedding.positions":
            assert torch.equal(value, state[f"backbone.{name}"]), name


OF_CLASSES = {
    "upernet": {"head.decode_head.classifier", "head.auxiliary_head.classifier"},
    "mask2former": {"head.class_predictor"},
}


@pytest.mark.parametrize("head", HEADS)
def test_classes_of_other_names_begin_at_random_however_many_there_are(
    head: str, config: Make, maps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = config(head).build()
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    source.save(maps / "first")
    theirs = source.model.state_dict()
    (maps / "others.json").write_text('["sky", "road", "car"]')
    for labels, renewed in (("labels.json", set()), ("others.json", OF_CLASSES[head])):
        with caplog.at_level("WARNING"):
            caplog.clear()
            ours = config(head, labels=maps / labels, init_from=maps / "first").build().model.state_dict()
        assert {name.rpartition(".")[0] for name in ours if not torch.equal(ours[name], theirs[name])} == renewed
        said = f"{maps / 'first'} is of other classes: random weights in {', '.join(sorted(renewed))}"
        assert caplog.messages == ([said] if renewed else [])
