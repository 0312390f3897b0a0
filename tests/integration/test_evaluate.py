"""What `beit3 evaluate` leaves: figures of what is there now, of which rows, and files that test servers take."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import beit3
from beit3.cli import run_command
from beit3.metrics.zero_shot import token_zero_shot
from beit3.model.heads import SuperClassModel
from tests.integration.conftest import Released

CPU = ["--device", "cpu"]
Row = dict[str, Any]


def evaluate(*arguments: str | Path, code: int = 0) -> None:
    assert run_command(["evaluate", *map(str, arguments), *CPU]) == code


def train(recipe: str, *arguments: str) -> None:
    assert run_command(["train", f"recipe:{recipe}:debug", *CPU, "--precision", "fp32", *arguments]) == 0


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    (line,) = (text for text in capsys.readouterr().err.splitlines() if text.startswith("beit3"))
    return line


def read_rows(path: str | Path) -> list[Row]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_rows(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics_of(folder: str | Path) -> Row:
    found: Row = json.loads(Path(folder, "metrics.json").read_text())
    return found


@pytest.fixture
def sets(place: Path) -> Path:
    """A copy of the index files that a test may change, beside the pictures."""
    folder = place / "sets"
    folder.mkdir()
    for path in (place / "data").glob("*.json*"):
        shutil.copy(path, folder)
    (folder / "drawings").symlink_to(place / "data" / "drawings")
    return folder


def test_figures_are_never_those_of_another_content(
    sets: Path, released: Released, capsys: pytest.CaptureFixture[str]
) -> None:
    """The names on the command line stay the same: the content behind each is another."""
    checkpoint, index, labels = released("vqa", num_answers=5), sets / "vqa.test.jsonl", sets / "vqa.labels.json"
    command = (checkpoint, "--data", index, "--labels", labels, "--out", "out", "--batch-size", "5")
    evaluate(*command)
    evaluate(*command)
    first, names = metrics_of("out"), json.loads(labels.read_text())
    weights, rows = checkpoint.read_bytes(), read_rows(index)

    def is_refused(what: str) -> None:
        evaluate(*command, code=2)
        assert f"out holds another evaluation (content of {what} differ): --out or --overwrite" in said(capsys)
        assert metrics_of("out") == first

    write_rows(index, rows[:6])
    is_refused("data")
    write_rows(index, rows)
    labels.write_text(json.dumps(names[::-1]))
    is_refused("labels")
    labels.write_text(json.dumps(names))
    released("vqa", num_answers=5)
    is_refused("checkpoint")
    checkpoint.write_bytes(weights)
    evaluate(*command, "--image-size", "32", code=2)
    assert "(image_size differ)" in said(capsys)
    evaluate(*command)
    assert metrics_of("out") == first
    write_rows(index, rows[:6])
    evaluate(*command, "--overwrite")
    assert metrics_of("out")["examples"] == 6


def test_yardsticks_refuse_another_content(sets: Path, released: Released, capsys: pytest.CaptureFixture[str]) -> None:
    learned, index = sets / "groups.train.jsonl", sets / "groups.test.jsonl"
    command = (released("vqa", num_answers=5), "--task", "knn", "--train", learned, "--data", index, "--out", "out")
    evaluate(*command)
    for path, name in ((learned, "train"), (index, "test")):
        rows = read_rows(path)
        write_rows(path, rows[::-1])
        evaluate(*command, code=2)
        assert f"(content of {name} differ)" in said(capsys)
        write_rows(path, rows)
    evaluate(*command)


def test_what_was_kept_for_an_interruption_goes_at_the_end(place: Path, released: Released) -> None:
    evaluate(released("nlvr2"), "--data", "data/nlvr2.test.jsonl", "--out", "out")
    assert sorted(path.name for path in Path("out").iterdir()) == ["metrics.json", "predictions.jsonl", "settings.json"]


@pytest.mark.parametrize("knows", [True, False], ids=["validation", "test"])
@pytest.mark.parametrize("task", ["vqa", "captioning"])
def test_test_servers_get_their_file(
    task: str, knows: bool, sets: Path, released: Released, capsys: pytest.CaptureFixture[str]
) -> None:
    """[{"question_id", "answer"}] for the VQA challenge, [{"image_id", "caption"}] for COCO's server and NoCaps."""
    index = sets / {"vqa": "vqa.test.jsonl", "captioning": "captions.test.jsonl"}[task]
    truth = ("labels", "scores", "answers", "captions")
    rows = [{name: value for name, value in row.items() if knows or name not in truth} for row in read_rows(index)]
    write_rows(index, rows)
    options: dict[str, int] = {"num_answers": 5} if task == "vqa" else {}
    extra = ("--labels", sets / "vqa.labels.json") if task == "vqa" else ()
    evaluate(released(task, **options), "--data", index, "--out", "out", *extra)
    submitted, predicted = json.loads(Path("out/submission.json").read_text()), read_rows("out/predictions.jsonl")
    number, text = ("question_id", "answer") if task == "vqa" else ("image_id", "caption")
    assert [list(row) for row in submitted] == [[number, text]] * 12
    assert [row[number] for row in submitted] == [row["qid" if task == "vqa" else "image_id"] for row in rows]
    assert submitted == [{name: row[name] for name in (number, text)} for row in predicted]
    assert all(isinstance(row[text], str) for row in submitted)
    if task == "vqa":
        assert {row["answer"] for row in submitted} <= set(json.loads((sets / "vqa.labels.json").read_text()))
    printed = " ".join(capsys.readouterr().out.split())
    if knows:
        assert "x 100" in printed
        assert set(predicted[0]) > {number, text}
    else:
        assert metrics_of("out") == {"examples": 12}
        assert predicted == submitted, "no score where there is nothing to compare with"
        assert printed == f"{index.name} does not say what is right: what the model says is in out/submission.json"


def test_a_question_beyond_the_vocabulary_scores_nothing(sets: Path, released: Released) -> None:
    """As before: it counts among the questions, and is told from one of a test set by its `answers`."""
    index = sets / "vqa.test.jsonl"
    checkpoint, labels = released("vqa", num_answers=5), ("--labels", sets / "vqa.labels.json")
    evaluate(checkpoint, "--data", index, "--out", "whole", *labels)
    rows = read_rows(index)
    write_rows(index, [{**row, "labels": [], "scores": []} if row["qid"] % 2 else row for row in rows])
    evaluate(checkpoint, "--data", index, "--out", "out", *labels)
    predicted = read_rows("whole/predictions.jsonl")
    expected = sum(row["score"] for row in predicted if row["question_id"] % 2 == 0) / 12
    assert metrics_of("out")["score"] == pytest.approx(expected)
    assert metrics_of("out")["accuracy"] == metrics_of("whole")["accuracy"]


BAD = {"image_path": "drawings/none.png"}


@pytest.mark.parametrize("ema", [False, True])
def test_rows_left_out_stand_beside_the_figures(ema: bool, sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = sets / "groups.test.jsonl"
    rows = read_rows(index)
    write_rows(index, [rows[0] | BAD, rows[1] | BAD, *rows[2:], rows[2] | {"label": "ant"}])
    averaged = ["--optim.ema-decay", "0.5"] if ema else []
    train("finetune/classification_emoji", "--data", "sets", "--name", "run", *averaged)
    capsys.readouterr()
    evaluate("runs/run/export", "--data", index, "--out", "out")
    shares = {"left_out/picture_not_found": 2 / 13, "left_out/invalid_label": 1 / 13}
    found = metrics_of("out")
    assert found["examples"] == 10
    for metrics in (found, metrics_of("runs/run")):
        assert {name: value for name, value in metrics.items() if name.startswith("left_out")} == pytest.approx(shares)
        assert "acc1" in metrics
    printed = capsys.readouterr().out
    assert all(name in printed for name in shares)
    assert "15.38" in printed
    write_rows(index, rows)
    evaluate("runs/run/export", "--data", index, "--out", "whole")
    assert not any("left_out" in name for name in metrics_of("whole"))


@pytest.mark.parametrize(("recipe", "index"), [("linear_probe_emoji", "groups"), ("clipcap_emoji", "captions")])
def test_runs_behind_frozen_towers_say_what_they_left_out(recipe: str, index: str, sets: Path) -> None:
    rows = read_rows(sets / f"{index}.test.jsonl")
    write_rows(sets / f"{index}.test.jsonl", [rows[0] | BAD, *rows[1:]])
    train(f"finetune/{recipe}", "--data", "sets", "--name", "run")
    assert metrics_of("runs/run")["left_out/picture_not_found"] == pytest.approx(1 / 12)


def test_yardsticks_and_zero_shot_say_what_they_left_out(
    sets: Path, released: Released, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, bad in (("train", 3), ("test", 1)):
        rows = read_rows(sets / f"groups.{part}.jsonl")
        write_rows(sets / f"groups.{part}.jsonl", [*(rows[0] | BAD for _ in range(bad)), *rows[bad:]])
    index, learned = sets / "groups.test.jsonl", sets / "groups.train.jsonl"
    checkpoint = released("retrieval")
    evaluate(checkpoint, "--task", "knn", "--train", learned, "--data", index, "--out", "knn")
    assert "train_left_out/picture_not_found" in capsys.readouterr().out
    found = metrics_of("knn")
    assert found["left_out/picture_not_found"] == pytest.approx(1 / 12)
    assert found["train_left_out/picture_not_found"] == pytest.approx(3 / 12)
    (sets / "names.json").write_text('["ant", "bee", "cat"]')
    evaluate(checkpoint, "--task", "zero_shot", "--data", index, "--labels", sets / "names.json", "--out", "zero")
    assert "left_out/picture_not_found" in capsys.readouterr().out
    found = metrics_of("zero")
    assert (found["left_out/picture_not_found"], found["examples"]) == (pytest.approx(1 / 12), 11)


def test_answers_without_names_have_no_accuracy(sets: Path, released: Released) -> None:
    """Named "answer 3" they would all be wrong; their numbers are still compared with the index's."""
    checkpoint, index = released("vqa", num_answers=5), sets / "vqa.test.jsonl"
    evaluate(checkpoint, "--data", index, "--out", "numbered")
    evaluate(checkpoint, "--data", index, "--out", "named", "--labels", sets / "vqa.labels.json")
    named = metrics_of("named")
    assert "accuracy" in named
    assert metrics_of("numbered") == {"score": named["score"], "examples": 12}
    assert not Path("numbered/submission.json").exists(), "no server takes numbers"


@pytest.mark.parametrize("has_names", [True, False])
def test_an_index_of_other_answers_is_refused(
    has_names: bool, sets: Path, released: Released, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, index, names = released("vqa", num_answers=5), sets / "vqa.test.jsonl", ["yes", "no", "two", "red"]
    own = sets / "vqa.labels.json"
    command = (checkpoint, "--data", index, "--out", "out", *(("--labels", own) if has_names else ()))
    (sets / "labels.json").write_text(json.dumps([*names, "dog"] if has_names else names))
    evaluate(*command, code=2)
    line = said(capsys)
    assert f"{index} numbers the {5 if has_names else 4} names of {sets / 'labels.json'}, the model has 5 oth" in line
    assert not Path("out").exists()
    (sets / "labels.json").write_text(own.read_text())
    evaluate(*command)


def unit_vectors(source: Path | str, rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Of the twelve pictures, and of the texts of rows, as applications get them."""
    predictor = beit3.load(source, device="cpu")
    images = predictor.embed_images([f"data/drawings/{number:02d}.png" for number in range(12)])
    return images, predictor.embed_texts([row["text"] for row in rows])


@pytest.mark.parametrize("kind", ["retrieval", "clip", "pretraining", "captioning", "vqa"])
def test_retrieval_is_measured_for_every_model_that_reads_texts(kind: str, place: Path, released: Released) -> None:
    """Heads where there are some, class tokens otherwise; pretraining and clip models as their runs write them."""
    source = Path("runs/run/export")
    if kind in ("pretraining", "clip"):
        train(f"pretrain/{ {'pretraining': 'mdm_emoji', 'clip': 'clip_emoji'}[kind] }", "--name", "run")
    else:
        source = released(kind, **({"num_answers": 5} if kind == "vqa" else {}))
    assert beit3.load(source, device="cpu").model.task == kind
    task = () if kind in ("retrieval", "clip") else ("--task", "retrieval")
    evaluate(source, *task, "--data", "data/retrieval.test.jsonl", "--out", "out")
    rows, found = read_rows("data/retrieval.test.jsonl"), metrics_of("out")
    images, texts = unit_vectors(source, rows)
    scores = (texts @ images.T).tolist()
    for k in (1, 5, 10):
        ahead = [sum(s >= own[row["image_id"]] for s in own) for own, row in zip(scores, rows, strict=True)]
        expected = sum(count <= k for count in ahead) / len(rows)
        assert found[f"text_to_image_r{k}"] == pytest.approx(expected, abs=0.05), "but for rounding"


def test_predictions_of_retrieval_are_what_was_found(
    place: Path, released: Released, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beit3.finetune.retrieval._ROWS", 5)  # never all queries at once
    source = released("retrieval")
    evaluate(source, "--data", "data/retrieval.test.jsonl", "--out", "out", "--batch-size", "7")
    asked, metrics = read_rows("data/retrieval.test.jsonl"), metrics_of("out")
    rows = read_rows("out/predictions.jsonl")
    assert len(rows) == metrics["examples"] == 12 + len(asked)
    pictures, captions = rows[:12], rows[12:]
    images, texts = unit_vectors(source, asked)
    for number, row in enumerate(pictures):
        scores = texts @ images[number]
        order = scores.argsort(descending=True).tolist()[:10]
        assert row["image_id"] == number
        assert [near["score"] for near in row["texts"]] == pytest.approx(scores[order].tolist(), abs=1e-3)
        assert (row["texts"][0]["caption"], row["texts"][0]["image_id"]) in {
            (asked[place]["text"], asked[place]["image_id"]) for place in order[:2]
        }
    for row, query, vector in zip(captions, asked, texts, strict=True):
        scores = images @ vector
        assert (row["image_id"], row["caption"]) == (query["image_id"], query["text"])
        found = {near["image_id"]: near["score"] for near in row["images"]}
        assert len(found) == len(row["images"]) == 10
        assert [scores[number].item() for number in found] == pytest.approx(list(found.values()), abs=1e-3)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert row["rank"] == int((scores > scores[query["image_id"]]).sum())
    for name, part in (("image_to_text", pictures), ("text_to_image", captions)):
        for k in (1, 5, 10):
            assert metrics[f"{name}_r{k}"] == sum(row["rank"] < k for row in part) / len(part)


def test_texts_that_are_ids_are_written_as_words(sets: Path, released: Released) -> None:
    source, index = released("retrieval"), sets / "retrieval.test.jsonl"
    tokenizer = beit3.load(source, device="cpu").tokenizer
    rows = read_rows(index)
    write_rows(index, [{**row, "text": tokenizer.encode(row["text"])[1:-1]} for row in rows])
    evaluate(source, "--data", index, "--out", "out")
    captions = [row["caption"] for row in read_rows("out/predictions.jsonl")[12:]]
    assert captions == [tokenizer.decode(tokenizer.encode(row["text"])) for row in rows]
    assert any(captions)


@pytest.mark.parametrize("prompts", ["plain", "imagenet"])
def test_zero_shot_of_a_dual_encoder(prompts: str, sets: Path, released: Released) -> None:
    from beit3.data.prompts import PROMPTS

    source, labels, index = released("retrieval"), sets / "names.json", sets / "groups.test.jsonl"
    labels.write_text('["ant", "red bee", "cat"]')
    command = (source, "--task", "zero_shot", "--data", index, "--labels", labels, "--prompts", prompts)
    evaluate(*command, "--out", "out")
    predictor, classes = beit3.load(source, device="cpu"), []
    for name in ("ant", "red bee", "cat"):
        vectors = predictor.embed_texts([text.replace("{}", name) for text in PROMPTS[prompts]])
        classes.append(torch.nn.functional.normalize(vectors.mean(0), dim=0))
    images = predictor.embed_images([sets / f"drawings/{number:02d}.png" for number in range(12)])
    right = (images @ torch.stack(classes).T).argmax(1) == torch.arange(12) % 3
    expected = {"zero_shot_acc1": float(right.float().mean()), "zero_shot_acc5": 1.0, "examples": 12}
    assert metrics_of("out") == pytest.approx(expected)
    assert not Path("out/parts").exists()


def test_zero_shot_of_a_superclass_model(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the log-probabilities of the subwords of every name, weighted as in training."""
    train("pretrain/superclass_emoji", "--name", "run", "--optim.lr", "0.1")
    names = ["red heart", "face", "cat face", "sun", "flag", "hand"]
    (sets / "names.json").write_text(json.dumps(names))
    source, index = "runs/run/export", sets / "groups.test.jsonl"
    write_rows(index, [{**row, "label": number % 6} for number, row in enumerate(read_rows(index))])
    command = (source, "--task", "zero_shot", "--data", index, "--labels", sets / "names.json", "--out", "out")
    evaluate(*command)
    assert "zero_shot_acc5" in capsys.readouterr().out
    predictor = beit3.load(source, device="cpu")
    words, model = predictor.words, predictor.model
    assert words is not None
    assert isinstance(model, SuperClassModel)
    with torch.no_grad():
        from PIL import Image

        pictures = [Image.open(sets / f"drawings/{number:02d}.png").convert("RGB") for number in range(12)]
        pixels = predictor.preprocess.normalize(torch.stack([predictor.preprocess(picture) for picture in pictures]))
        logs = model(pixels).log_softmax(-1)
    scores = token_zero_shot(logs, [words.subwords.encode(name) for name in names], words.weights())
    best, right = scores.topk(5).indices, torch.arange(12)[:, None] % 6
    found = metrics_of("out")
    assert found["zero_shot_acc1"] == pytest.approx(float((best[:, :1] == right).any(1).float().mean()))
    assert found["zero_shot_acc5"] == pytest.approx(float((best == right).any(1).float().mean()))
    (sets / "names.json").write_text(json.dumps(names[::-1]))
    evaluate(*command, code=2)
    assert "(content of labels differ)" in said(capsys)


@pytest.mark.parametrize(
    ("recipe", "task", "line"),
    [
        ("pretrain/superclass_emoji", "retrieval", "a superclass model reads no texts, so it is not evaluated as"),
        ("pretrain/superclass_emoji", None, "no figure of its own: name --task zero_shot or few_shot, knn, linear"),
        ("pretrain/mdm_emoji", None, "a pretraining model has no figure of its own: name --task retrieval or few_shot"),
        ("pretrain/mdm_emoji", "vqa", "a pretraining is not evaluated as vqa: name a --task that it was made for"),
        ("pretrain/mdm_emoji", "zero_shot", "does not compare pictures with texts"),
        ("finetune/classification_emoji", "retrieval", "this model has no text tokenizer: it reads no texts"),
    ],
)
def test_a_task_that_a_model_cannot_do_is_one_line(
    recipe: str, task: str | None, line: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe, "--name", "run")
    capsys.readouterr()
    asked = () if task is None else ("--task", task)
    labels = ("--labels", "data/groups.labels.json") if task == "zero_shot" else ()
    evaluate("runs/run/export", *asked, *labels, "--data", "data/retrieval.test.jsonl", "--out", "out", code=2)
    assert line in said(capsys)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        ((), 2, "zero_shot tells classes by their names: name their file with --labels"),
        (("--labels", "none.json"), 3, "labels none.json do not exist"),
        (("--labels", "data/groups.labels.json", "--image-size", "32"), 2, "zero_shot measures a model as it is"),
        (("--labels", "data/groups.labels.json", "--train", "x.jsonl"), 2, "--train is for yardsticks"),
        (("--labels", "data/groups.labels.json", "--data", "none.jsonl"), 3, "none.jsonl does not exist"),
    ],
)
def test_wrong_use_of_zero_shot_is_one_line(
    arguments: tuple[str, ...],
    code: int,
    line: str,
    released: Released,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evaluate(released("retrieval"), "--task", "zero_shot", "--data", "data/groups.test.jsonl", *arguments, code=code)
    assert line in said(capsys)
