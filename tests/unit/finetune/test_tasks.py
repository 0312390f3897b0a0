"""What every finetuning task promises: losses as defined, gradients everywhere, metrics of the model's own answers."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import beit3
from beit3.config import Run, replace
from beit3.data.index_files import RetrievalRow, read_index
from beit3.errors import ConfigError, DataMissingError
from beit3.finetune.captioning import hide_words, smoothed_loss
from beit3.model.build import build_model

TASKS = ("classification", "vqa", "nlvr2", "captioning", "retrieval")
Build = Callable[..., Any]


def first_batch(task: Any, sets: Path) -> Any:
    return next(iter(task.train_loader(Run(name="test", task=task.config, data=sets), 0, 1)))


@pytest.mark.parametrize("attention", ["decoupled", "shared"])
@pytest.mark.parametrize("name", TASKS)
def test_every_trained_parameter_gets_a_gradient(name: str, attention: str, build: Build, sets: Path) -> None:
    """Otherwise several ranks would wait for it in vain; and no head is frozen."""
    task = build(name, attention)
    values = task.train()(first_batch(task, sets))
    assert torch.isfinite(values["loss"])
    values["loss"].backward()
    for parameter_name, parameter in task.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
        assert parameter.requires_grad or parameter_name.startswith("model.backbone."), parameter_name


@pytest.mark.parametrize("name", TASKS)
def test_a_few_steps_on_one_batch_lower_the_loss(name: str, build: Build, sets: Path) -> None:
    plain = {"mixup": 0.0, "cutmix": 0.0} if name == "classification" else {}
    task = build(name, **plain)
    batch = first_batch(task, sets)
    optimizer = torch.optim.Adam(task.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = task(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@torch.no_grad()
def test_classification_is_cross_entropy_with_smoothing(build: Build, sets: Path) -> None:
    task = build("classification", mixup=0.0, cutmix=0.0).eval()
    batch = first_batch(task, sets)
    logits = task.model(task.preprocess.normalize(batch.images))
    target = torch.full((4, 3), 0.1 / 3).scatter_add(1, batch.labels[:, None], torch.full((4, 1), 0.9))
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(task(batch)["loss"], expected)


def test_mixup_is_drawn_in_training_alone(build: Build, sets: Path) -> None:
    task = build("classification")
    batch = first_batch(task, sets)
    with torch.no_grad():
        assert len({float(task.train()(batch)["loss"]) for _ in range(4)}) == 4
        assert len({float(task.eval()(batch)["loss"]) for _ in range(4)}) == 1
    with pytest.raises(ConfigError, match="even batch_size, not 3"):
        build("classification", batch_size=3)


def test_mixup_on_several_ranks_needs_pairs_of_pictures_on_each(build: Build, sets: Path) -> None:
    task = build("classification", batch_size=6)
    run = Run(name="test", task=task.config, data=sets)
    with pytest.raises(ConfigError, match=r"batch_size 6 on 2 ranks must be a multiple of 4"):
        task.train_loader(run, 0, 2)
    assert len(next(iter(task.train_loader(run, 0, 3))).images) == 2
    plain = build("classification", batch_size=6, mixup=0.0, cutmix=0.0)
    assert len(next(iter(plain.train_loader(run, 0, 2))).images) == 3


def test_classes_are_counted_by_number_or_by_name(config: Build, sets: Path, tmp_path: Path) -> None:
    assert config("classification", num_classes=None).build().model.head.out_features == 3
    assert config("classification", num_classes=7, labels=None).build().model.head.out_features == 7
    with pytest.raises(ConfigError, match=r"groups\.labels\.json names 3 classes, num_classes is 9"):
        config("classification", num_classes=9).build()
    with pytest.raises(ConfigError, match="give num_classes, or labels to count them"):
        config("classification", num_classes=None, labels=None)
    (tmp_path / "one.json").write_text('["ant"]')
    with pytest.raises(ConfigError, match=r"one\.json names 1 classes"):
        config("classification", num_classes=None, labels=tmp_path / "one.json").build()


@torch.no_grad()
def test_vqa_is_the_sum_of_binary_cross_entropies(build: Build, sets: Path) -> None:
    task = build("vqa").eval()
    batch = first_batch(task, sets)
    chances = task.model(task.pixels(batch), batch.text_ids, batch.text_mask).sigmoid()
    for row, target in zip(batch.rows, batch.targets, strict=True):
        expected = [0.0] * 5
        expected[4] = 0.3
        expected[row.qid % 4] = 1.0
        assert target.tolist() == pytest.approx(expected)
    entropy = -(batch.targets * chances.log() + (1 - batch.targets) * (1 - chances).log())
    torch.testing.assert_close(task(batch)["loss"], entropy.sum(1).mean())


@pytest.fixture
def own_sets(sets: Path, tmp_path: Path) -> Path:
    """A copy of the index files that a test may change."""
    for path in sets.glob("*.json*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "drawings").symlink_to(sets / "drawings")
    return tmp_path


@pytest.mark.parametrize("file", ["labels.json", "answer2label.txt"])
def test_vqa_refuses_indexes_of_other_answers_than_the_runs(file: str, build: Build, own_sets: Path) -> None:
    """Their labels would be read as other words, or most of them as out of range, without a sign of it."""
    task = build("vqa")
    run = Run(name="test", task=task.config, data=own_sets)
    (own_sets / file).write_text(json.dumps(task.answers))
    task.train_loader(run, 0, 1)
    (own_sets / file).write_text(json.dumps(task.answers[::-1]))
    for changes in ({}, {"task.train": "../elsewhere.jsonl", "task.eval": "vqa.test.jsonl"}):
        changed = replace(run, **changes)
        task.config = changed.task
        with pytest.raises(
            ConfigError, match=rf"numbers the answers of .*{file}, which are others than .*labels\.json"
        ):
            task.train_loader(changed, 0, 1)


@torch.no_grad()
def test_nlvr2_is_cross_entropy_over_the_first_states_of_both_pictures(build: Build, sets: Path) -> None:
    """As released: vision and text class states of (left, text), then of (right, text), give false and true."""
    task = build("nlvr2").eval()
    batch = first_batch(task, sets)
    assert set(batch.labels.tolist()) == {0, 1}
    images = task.preprocess.normalize(batch.images)
    losses, chances = [], []
    for number, label in enumerate(batch.labels.tolist()):
        length = int(batch.text_mask[number].sum())
        states = []
        for side in (0, 1):
            out = task.model.backbone(images[number, side][None], batch.text_ids[number, :length][None])
            states += [out.vision[0, 0], out.text[0, 0]]
        false, true = task.model.head(torch.cat(states)).tolist()
        chances.append(1 / (1 + math.exp(false - true)))
        losses.append(-math.log(chances[-1] if label else 1 - chances[-1]))
    assert float(task(batch)["loss"]) == pytest.approx(sum(losses) / 4, abs=1e-5)
    assert [row["probability"] for row in task.predict(batch)] == pytest.approx(chances, abs=1e-5)
    assert len({round(loss, 3) for loss in losses}) == 4


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_smoothed_loss_against_the_written_out_divergence(smoothing: float) -> None:
    """As released: KL from the one-hot with the rest spread over the other words."""
    logits = torch.randn(6, 11, requires_grad=True)
    targets = torch.randint(0, 11, (6,))
    soft = torch.full((6, 11), smoothing / 10).scatter(1, targets[:, None], 1 - smoothing)
    expected = F.kl_div(logits.log_softmax(1), soft, reduction="none").sum(1)
    actual = smoothed_loss(logits, targets, smoothing)
    torch.testing.assert_close(actual, expected)
    (one,) = torch.autograd.grad(actual.sum(), logits, retain_graph=True)
    (other,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(one, other)


def test_words_are_hidden_as_released() -> None:
    """Counts min(int(n p + 0.5), n - 1), at least one; never <s>; 80 % <mask>, 10 % kept, 10 % another word."""
    for length, expected in ((2, 1), (3, 2), (6, 4), (10, 7), (32, 22)):
        ids = [0, *range(10, 8 + length), 2]
        assert len(ids) == length
        seen, hidden = hide_words(ids, 0.7, 99)
        assert len(hidden) == expected == max(1, min(int(length * 0.7 + 0.5), length - 1))
        assert 0 not in hidden
        assert all(ids[place] == word for place, word in hidden.items())
        assert all(seen[place] == ids[place] for place in range(length) if place not in hidden)
    random.seed(0)
    kinds: Counter[str] = Counter()
    ids = [0, *([50] * 30), 2]
    for _ in range(300):
        seen, hidden = hide_words(ids, 0.7, 99)
        kinds.update("mask" if seen[p] == 99 else "kept" if seen[p] == ids[p] else "other" for p in hidden)
    total = sum(kinds.values())
    assert kinds["mask"] / total == pytest.approx(0.8, abs=0.02)
    assert kinds["kept"] / total == pytest.approx(0.1, abs=0.02)


@torch.no_grad()
def test_captioning_sees_the_logits_of_the_whole_model(build: Build, sets: Path) -> None:
    task = build("captioning", label_smoothing=0.0, drop_worst=0.0).eval()
    batch = first_batch(task, sets)
    logits = task.model(task.pixels(batch), batch.text_ids, batch.text_mask)
    expected = F.cross_entropy(logits[batch.hidden], batch.words)
    torch.testing.assert_close(task(batch)["loss"], expected)


@torch.no_grad()
def test_the_worst_words_are_dropped_when_their_time_has_come(build: Build, sets: Path) -> None:
    task = build("captioning", drop_worst=0.25, drop_worst_after=2)
    batch = first_batch(task, sets)
    losses = [float(task.train()(batch)["loss"]) for _ in range(4)]
    assert losses[0] == losses[1] > losses[2] == losses[3]
    assert task.state_dict()["batches"] == 4


@torch.no_grad()
def test_a_single_hidden_word_is_never_dropped(build: Build, sets: Path) -> None:
    task = build("captioning", drop_worst=0.9, drop_worst_after=0, batch_size=1).train()
    batch = first_batch(task, sets)
    place = batch.hidden.nonzero()[:1]
    one = torch.zeros_like(batch.hidden)
    one[place[:, 0], place[:, 1]] = True
    batch = dataclasses.replace(batch, hidden=one, words=batch.words[:1])
    dropped = task(batch)["loss"]
    task.config = replace(task.config, drop_worst=0.0)
    torch.testing.assert_close(dropped, task(batch)["loss"])
    assert torch.isfinite(dropped)


def test_captions_are_judged_where_there_are_references_and_their_share_is_said(build: Build) -> None:
    task = build("captioning")
    rows: list[dict[str, Any]] = [
        {"image_id": 1, "caption": "a red cat", "references": ["a red cat", "a cat"]},
        {"image_id": 2, "caption": "two dogs", "references": ["three dogs"]},
        {"image_id": 3, "caption": "nothing", "references": []},
    ]
    all_judged = task.measure(rows[:2])
    assert task.measure(rows) == {**all_judged, "judged": 2 / 3}
    assert "judged" not in all_judged
    assert task.measure(rows[2:]) == {}


@torch.no_grad()
def test_captions_of_one_picture_are_no_negatives_unless_asked(build: Build, sets: Path) -> None:
    for as_released in (False, True):
        task = build("retrieval", same_image_is_negative=as_released, batch_size=8).eval()
        batch = next(
            batch
            for batch in task.train_loader(Run(name="test", task=task.config, data=sets), 0, 1)
            if len(set(batch.image_ids.tolist())) < 8
        )
        images = task.model.encode_image(task.pixels(batch))
        texts = task.model.encode_text(batch.text_ids, batch.text_mask)
        scores = task.model.logit_scale.exp() * images @ texts.T
        if not as_released:
            same = (batch.image_ids[:, None] == batch.image_ids) & ~torch.eye(8, dtype=torch.bool)
            scores = scores.masked_fill(same, -math.inf)
        own = torch.arange(8)
        expected = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
        torch.testing.assert_close(task(batch)["loss"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_evaluation_sees_every_example_once_and_without_chance(name: str, build: Build, sets: Path) -> None:
    task = build(name).eval()
    run = Run(name="test", task=task.config, data=sets)
    with torch.no_grad():
        rows = [row for batch in task.eval_loader(run) for row in task.predict(batch)]
        again = task.evaluate(task.eval_loader(run))
    keys = {"classification": None, "vqa": "question_id", "nlvr2": "identifier", "captioning": "image_id"}
    if name == "retrieval":
        index = read_index(sets / "retrieval.test.jsonl", RetrievalRow)
        assert sorted(row["image_id"] for row in rows if "image" in row) == list(range(12))
        assert sorted(row["image_id"] for row in rows if "text" in row) == sorted(row.image_id for row in index)
    else:
        assert len(rows) == 12
        key = keys[name]
        assert key is None or len({row[key] for row in rows}) == 12
    assert task.measure(rows) == again
    assert again
    assert all(0 <= value <= 10 for value in again.values())


@pytest.mark.parametrize("name", TASKS)
def test_what_is_wrong_with_the_evaluation_is_said_before_training(name: str, build: Build, sets: Path) -> None:
    task = build(name, eval="none.jsonl")
    run = Run(name="test", task=task.config, data=sets)
    with pytest.raises(DataMissingError, match=r"index .*none\.jsonl does not exist"):
        task.train_loader(run, 0, 1)
    task.train_loader(run, 1, 2)  # rank 0 evaluates


def test_the_index_to_evaluate_on_is_read_once(build: Build, own_sets: Path) -> None:
    task = build("classification")
    run = Run(name="test", task=task.config, data=own_sets)
    task.train_loader(run, 0, 1)
    (own_sets / "groups.test.jsonl").unlink()
    assert sum(len(batch.images) for batch in task.eval_loader(run)) == 12


def test_training_on_what_is_evaluated_is_said(build: Build, own_sets: Path, caplog: pytest.LogCaptureFixture) -> None:
    detour = f"groups.train.jsonl,../{own_sets.name}/groups.test.jsonl"
    for train, said in (("groups.test.jsonl", 1), (detour, 1), ("groups.train.jsonl", 0)):
        task = build("classification", train=train)
        run = Run(name="test", task=task.config, data=own_sets)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            task.train_loader(run, 0, 1)
            task.train_loader(run, 1, 2)
        line = (
            f"{own_sets / 'groups.test.jsonl'} is trained on and evaluated on: metrics will not tell of unseen examples"
        )
        assert caplog.messages == [line] * said


@torch.no_grad()
def test_retrieval_recall_against_a_full_ranking(build: Build, sets: Path) -> None:
    task = build("retrieval").eval()
    run = Run(name="test", task=task.config, data=sets)
    metrics = task.evaluate(task.eval_loader(run))
    index = list(read_index(sets / "retrieval.test.jsonl", RetrievalRow))
    predictor_images = torch.cat(
        [task.model.encode_image(task.preprocess.normalize(_view(task, sets, number))) for number in range(12)]
    )
    texts = torch.cat(
        [task.model.encode_text(torch.tensor([task.text_tokenizer.encode(str(row.text), 16)])) for row in index]
    )
    owners = [row.image_id for row in index]
    for k in (1, 5, 10):
        hits = [
            any(owners[int(place)] == number for place in (texts @ image).argsort(descending=True)[:k])
            for number, image in enumerate(predictor_images)
        ]
        assert metrics[f"image_to_text_r{k}"] == pytest.approx(sum(hits) / 12)
        hits = [
            owner in (predictor_images @ text).argsort(descending=True)[:k].tolist()
            for owner, text in zip(owners, texts, strict=True)
        ]
        assert metrics[f"text_to_image_r{k}"] == pytest.approx(sum(hits) / len(index))


def _view(task: Any, sets: Path, number: int) -> Tensor:
    from PIL import Image

    pixels: Tensor = task.preprocess(Image.open(sets / f"drawings/{number:02d}.png").convert("RGB"))[None]
    return pixels


@pytest.mark.parametrize("name", TASKS)
def test_what_was_trained_is_loaded_and_answers(name: str, build: Build, sets: Path, tmp_path: Path) -> None:
    task = build(name).eval()
    task.save(tmp_path / "export")
    predictor = beit3.load(tmp_path / "export", device="cpu")
    assert predictor.model.task == task.kind.task
    picture = sets / "drawings/03.png"
    with torch.no_grad():
        rows = [
            row for batch in task.eval_loader(Run(name="t", task=task.config, data=sets)) for row in task.predict(batch)
        ]
    if name == "classification":
        names = ["ant", "bee", "cat"]
        assert predictor.classify([picture])[0][0][0] == names[rows[3]["predicted"]]
    elif name == "vqa":
        from beit3.data.emoji import load_cells

        assert predictor.answer(picture, f"is it {load_cells('google')[3].caption}?")[0][0] == rows[3]["answer"]
    elif name == "nlvr2":
        from beit3.data.emoji import load_cells

        found = predictor.reason(picture, sets / "drawings/04.png", load_cells("google")[3].caption)
        assert found == pytest.approx(rows[3]["probability"], abs=1e-5)
    elif name == "captioning":
        assert predictor.caption([picture], max_length=16)[0] == rows[3]["caption"]
    elif name == "retrieval":
        torch.testing.assert_close(predictor.embed_images([picture])[0], rows[3]["image"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_starts_from_a_pretrained_model_of_another_size(
    name: str, build: Build, config: Build, tmp_path: Path
) -> None:
    made = build(name)
    before = replace(made.config.model, image_size=(16, 16), final_norm=True)
    pretrained = build_model(before, "pretraining", codebook_size=8)
    pretrained.save_pretrained(tmp_path / "pretrained")
    started = config(name, init_from=tmp_path / "pretrained").build()
    for parameter, value in started.model.backbone.state_dict().items():
        if parameter != "vision_embedding.positions":
            assert torch.equal(value, pretrained.state_dict()[f"backbone.{parameter}"]), parameter
    assert started.model.backbone.vision_embedding.positions.shape[0] == 3 + 9


@pytest.mark.parametrize(
    ("name", "labels", "of_classes"),
    [("classification", "groups.labels.json", "head"), ("vqa", "vqa.labels.json", "head.3")],
)
def test_outputs_of_other_names_begin_at_random_however_many_there_are(
    name: str,
    labels: str,
    of_classes: str,
    build: Build,
    config: Build,
    sets: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = build(name)
    source.save(tmp_path / "first")
    theirs = source.model.state_dict()
    others = tmp_path / "others.json"
    others.write_text(json.dumps([f"{known}s" for known in json.loads((sets / labels).read_text())]))
    for named, renewed in ((sets / labels, set()), (others, {of_classes})):
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            ours = config(name, labels=named, init_from=tmp_path / "first").build().model.state_dict()
        assert {key.rpartition(".")[0] for key in ours if not torch.equal(ours[key], theirs[key])} == renewed
        said = f"{tmp_path / 'first'} is of other classes: random weights in {of_classes}"
        assert caplog.messages == ([said] if renewed else [])
    (tmp_path / "first" / "labels.json").unlink()  # nothing is known of its classes but their number
    ours = config(name, labels=others, init_from=tmp_path / "first").build().model.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
