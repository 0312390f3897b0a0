"""ClipCap and LLaVA as tasks: the loss as defined, what trains, what is measured, and what is saved."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from beit3.config import Run
from beit3.errors import BeitError, ConfigError, DataMissingError
from beit3.finetune.conversation import WritingConfig
from beit3.finetune.language_bridge import INSTRUCT_TEMPLATE, LanguageBridgeConfig
from beit3.finetune.language_model import load_language_model, write_tiny_language_model
from beit3.finetune.picture_reader import load_picture_reader
from beit3.finetune.prefix_captioning import PrefixCaptioningConfig
from beit3.metrics.vqa_accuracy import consensus_accuracy
from beit3.model.build import build_model
from beit3.model.exchange import read_tensors
from beit3.model.prefix_language_model import ConnectorConfig
from beit3.model.presets import ModelConfig
from beit3.tokenizer.text import TextTokenizer
from tests.conftest import Workspace

Build = Callable[..., Any]
TASKS = ("captioning", "captioning_finetuned", "align", "instruct")


@pytest.fixture(scope="session")
def tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny model of ours."""
    torch.manual_seed(1)
    shape = ModelConfig(
        width=16,
        num_layers=2,
        num_heads=2,
        ffn_width=24,
        patch_size=8,
        image_size=(24, 24),
        vocab_size=420,
        max_text_positions=40,
        fusion_layers=0,
    )
    folder = tmp_path_factory.mktemp("towers") / "own"
    build_model(shape, None).save_pretrained(folder)
    (folder / "preprocess.json").write_text(json.dumps({"image_size": [24, 24]}))
    return str(folder)


@pytest.fixture(scope="session")
def language_model(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny language model whose weights are large enough to have opinions."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("words") / "tiny"
    write_tiny_language_model(folder, TextTokenizer.load(workspace.text_tokenizer), width=32)
    language = load_language_model(folder)
    with torch.no_grad():
        for parameter in language.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    language.save(folder)
    return str(folder)


@pytest.fixture
def build(workspace: Workspace, tower: str, language_model: str) -> Build:
    """A task over the workspace's index files."""

    def make(name: str, **changes: Any) -> Any:
        common: dict[str, Any] = {"tower": tower, "language_model": language_model}
        common |= {"batch_size": 4, "eval_batch_size": 5}
        captions = {"train": "captions.train.jsonl", "eval": "captions.test.jsonl"}
        small = ConnectorConfig(prefix_length=3, clip_length=2, num_layers=2, num_heads=4)
        if name.startswith("captioning"):
            own: dict[str, Any] = {"connector": small, "finetunes_language_model": name.endswith("finetuned")}
            own["writing"] = WritingConfig(max_new_tokens=6, num_beams=2)
            return PrefixCaptioningConfig(**{**common, **captions, **own, **changes}).build()
        if name == "align":
            own = {"writing": WritingConfig(template="{image} describe it.", max_new_tokens=6, num_beams=1)}
            return LanguageBridgeConfig(stage="align", **{**common, **captions, **own, **changes}).build()
        own = {"writing": WritingConfig(template=INSTRUCT_TEMPLATE, max_new_tokens=6, num_beams=1)}
        own |= {"train": "vqa.train.jsonl", "eval": "vqa.test.jsonl", "labels": workspace.data / "vqa.labels.json"}
        return LanguageBridgeConfig(stage="instruct", **{**common, **own, **changes}).build()

    return make


def run_of(task: Any, data: Path) -> Run:
    return Run(name="test", task=task.config, data=data)


def first_batch(task: Any, data: Path) -> Any:
    return next(iter(task.train_loader(run_of(task, data), 0, 1)))


@pytest.mark.parametrize("other", ["own", "timm:test_vit", "timm:test_resnet"])
@pytest.mark.parametrize("name", TASKS)
def test_what_is_asked_to_train_gets_gradients_and_nothing_else(
    name: str, other: str, build: Build, workspace: Workspace
) -> None:
    task = build(name, **({} if other == "own" else {"tower": other, "tower_pretrained": False}))
    values = task.train()(first_batch(task, workspace.data))
    values["loss"].backward()
    for parameter_name, parameter in task.named_parameters():
        assert parameter.grad is not None, parameter_name
    trains_words = name in ("captioning_finetuned", "instruct")
    words = list(task.model.language_model.parameters())
    assert all((parameter.grad is not None) == trains_words for parameter in words)
    assert task.model.language_model.training == trains_words
    assert not any(parameter.requires_grad for parameter in task.reader.tower.parameters())
    assert not any("tower" in name for name in task.state_dict())
    assert any("language_model" in name for name in task.state_dict()) == trains_words


def test_the_loss_of_a_captioning_batch_written_out(build: Build, workspace: Workspace) -> None:
    """From pictures and captions to transformers' own loss, picture by picture."""
    task = build("captioning").eval()
    batch = first_batch(task, workspace.data)
    lines = (workspace.data / "captions.train.jsonl").read_text().splitlines()
    captions = {row["image_id"]: row["text"] for row in map(json.loads, lines)}
    total = count = 0.0
    for row in batch.rows:
        pixels = task.reader.tower.preprocess(Image.open(row.image_path).convert("RGB"))
        feature = task.reader.tower(task.reader.tower.preprocess.normalize(pixels[None]))
        tokenizer, model = task.reader.language.words.tokenizer, task.model.language_model
        ids = tokenizer(captions[row.image_id], return_tensors="pt").input_ids  # <s> caption </s>
        words = model.transformer.wte(ids)
        parts = [words[:, :1], task.model.connector(feature), words[:, 1:]]
        labels = torch.cat([torch.full((1, 4), -100), ids[:, 1:]], dim=1)
        own = float(model(inputs_embeds=torch.cat(parts, dim=1), labels=labels).loss.detach())
        total, count = total + own * (ids.shape[1] - 1), count + ids.shape[1] - 1
    assert float(task(batch)["loss"].detach()) == pytest.approx(total / count, rel=1e-5)


def test_a_question_is_a_prompt_and_only_its_answer_is_learned(build: Build, workspace: Workspace) -> None:
    task = build("instruct")
    batch = first_batch(task, workspace.data)
    words = task.reader.language.words
    names = ["yes", "no", "two", "red", "cat"]
    for row, ids, mask, targets in zip(batch.rows, batch.text_ids, batch.text_mask, batch.targets, strict=True):
        assert ids[mask & ~targets].tolist() == words.encode(f"{row.text} Answer:")
        assert words.decode(ids[targets].tolist()) == names[row.qid % 4]
        assert int(ids[targets][-1]) == words.end_id
    assert not bool((batch.targets & ~batch.text_mask).any())


def test_without_names_of_labels_what_most_people_answered_is_learned(build: Build, workspace: Workspace) -> None:
    """Of ten people `qid` say yes and the others no; of equals the first counts."""
    task = build("instruct", labels=None, train="vqa.test.jsonl", batch_size=12)
    words, batch = task.reader.language.words, first_batch(task, workspace.data)
    assert sorted(row.qid for row in batch.rows) == list(range(12))
    for row, ids, targets in zip(batch.rows, batch.text_ids, batch.targets, strict=True):
        assert words.decode(ids[targets].tolist()) == ("yes" if row.qid >= 5 else "no")


@pytest.mark.parametrize("name", TASKS)
def test_a_few_steps_on_one_batch_lower_the_loss(name: str, build: Build, workspace: Workspace) -> None:
    task = build(name)
    batch = first_batch(task, workspace.data)
    optimizer = torch.optim.Adam(task.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = task(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", TASKS)
def test_evaluation_sees_every_example_once(name: str, build: Build, workspace: Workspace) -> None:
    task = build(name).eval()
    run = run_of(task, workspace.data)
    rows = [row for batch in task.eval_loader(run) for row in task.predict(batch)]
    key = "question_id" if name == "instruct" else "image_id"
    assert sorted(row[key] for row in rows) == list(range(12))
    assert task.evaluate(task.eval_loader(run)) == task.measure(rows)
    wanted = {"accuracy", "exact_match", "score"} if name == "instruct" else {"cider", "bleu_4", "rouge_l"}
    assert wanted <= task.measure(rows).keys()


def test_answers_are_measured_by_labels_by_people_and_exactly(
    build: Build, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`score` as the classifying task defines it, `accuracy` by consensus, `exact_match` with the best label."""
    task = build("instruct").eval()
    said = ["yes", "no", "cat", "The cat"]
    monkeypatch.setattr(task, "write", lambda batch: [said[row.qid % 4] for row in batch.rows])
    run = run_of(task, workspace.data)
    metrics = task.evaluate(task.eval_loader(run))
    # Row q: label q % 4 scores 1, label 4 ("cat") 0.3; min(q, 10) of ten people say yes, the others no.
    assert metrics["score"] == pytest.approx((3 * 1 + 3 * 1 + 3 * 0.3 + 3 * 0) / 12)
    assert metrics["exact_match"] == pytest.approx(6 / 12)
    people = [["yes"] * min(number, 10) + ["no"] * max(0, 10 - number) for number in range(12)]
    expected = [consensus_accuracy(said[number % 4], people[number]) for number in range(12)]
    assert metrics["accuracy"] == pytest.approx(sum(expected) / 12)


def test_captions_are_judged_where_people_wrote_some(build: Build) -> None:
    task = build("captioning")
    rows = [{"caption": text, "references": [text, "something else"]} for text in ("a red cat", "two dogs in snow")]
    whole = task.measure(rows)
    assert whole["bleu_1"] == pytest.approx(1)
    assert task.measure([*rows, {"caption": "?", "references": []}]) == {**whole, "judged": 2 / 3}
    assert task.measure([{"caption": "?", "references": []}]) == {}


def test_what_is_wrong_with_the_held_out_part_is_said_before_training(build: Build, workspace: Workspace) -> None:
    task = build("captioning", eval="none.jsonl")
    with pytest.raises(DataMissingError, match=r"none\.jsonl does not exist"):
        task.train_loader(run_of(task, workspace.data), 0, 1)


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def test_bad_lines_are_counted(
    build: Build, workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture = str(workspace.data / "drawings/00.png")
    good = [{"image_path": picture, "image_id": number, "text": "a cat"} for number in range(5)]
    write_lines(tmp_path / "captions.train.jsonl", [*good, "{no json\n", {"image_path": picture, "image_id": 9}])
    task = build("captioning", eval=None)
    loader = task.train_loader(run_of(task, tmp_path), 0, 1)
    assert "1 malformed_line" in caplog.text
    assert "1 missing_text" in caplog.text
    assert len(next(iter(loader)).images) == 4

    question = {"image_path": picture, "text": "is it?", "labels": [0], "scores": [1.0]}
    rows = [{**question, "qid": number, "answers": ["yes"]} for number in range(5)]
    blank = {**question, "qid": 8, "answers": ["  "]}
    twice = {**question, "qid": 1, "answers": ["a"]}
    write_lines(tmp_path / "vqa.train.jsonl", [*rows, {**question, "qid": 7}, blank, twice])
    task = build("instruct", labels=None, eval=None)
    task.train_loader(run_of(task, tmp_path), 0, 1)
    assert "2 no_answer" in caplog.text
    assert "1 duplicate_qid" in caplog.text


def test_rows_that_no_language_model_can_read_are_counted(build: Build, workspace: Workspace, tmp_path: Path) -> None:
    picture = str(workspace.data / "drawings/00.png")
    good = [{"image_path": picture, "image_id": number, "text": "a cat"} for number in range(7)]
    write_lines(tmp_path / "captions.train.jsonl", [*good, {"image_path": picture, "image_id": 9, "text_segment": [5]}])
    task = build("captioning", batch_size=8, eval=None)
    loader = task.train_loader(run_of(task, tmp_path), 0, 1)
    next(iter(loader))
    assert loader.skipped == Counter(text_as_token_ids=1)
    long = " ".join(["word"] * 80)
    questions = {"image_path": picture, "text": long, "answers": ["yes"]}
    write_lines(tmp_path / "vqa.test.jsonl", [{**questions, "qid": 1}])
    task = build("instruct")
    with pytest.raises(BeitError, match=r"example 0 cannot be evaluated \(prompt_too_long"):
        list(task.eval_loader(run_of(task, tmp_path)))


@pytest.mark.parametrize("name", TASKS)
def test_what_was_trained_is_loaded_and_writes_the_same(
    name: str, build: Build, workspace: Workspace, tmp_path: Path
) -> None:
    task = build(name)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    task.eval().save(tmp_path / "export")
    reader = load_picture_reader(tmp_path / "export")
    rows = [row for batch in task.eval_loader(run_of(task, workspace.data)) for row in task.predict(batch)]
    pictures = [workspace.data / f"drawings/{number:02d}.png" for number in range(12)]
    if name == "instruct":
        asked = [json.loads(line)["text"] for line in (workspace.data / "vqa.test.jsonl").read_text().splitlines()]
        assert reader.write(pictures, asked) == [row["answer"] for row in rows]
        with pytest.raises(ConfigError, match="takes 12 questions, not none"):
            reader.write(pictures)
    else:
        written = reader.write(pictures)
        assert written == [row["caption"] for row in rows]
        assert len(set(written)) > 1, "it must look at the pictures"
        with pytest.raises(ConfigError, match="takes no questions, not 12"):
            reader.write(pictures, ["what?"] * 12)
    assert reader.write([], [] if name == "instruct" else None) == []
    owns = name in ("captioning_finetuned", "instruct")
    assert (tmp_path / "export/language_model/model.safetensors").is_file() == owns
    reader.save(tmp_path / "again")
    for state in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / state).read_bytes() == (tmp_path / "export" / state).read_bytes()
    assert (tmp_path / "again/language_model/model.safetensors").is_file() == owns


def test_the_second_stage_goes_on_from_the_first(build: Build, tmp_path: Path) -> None:
    first = build("align")
    first.save(tmp_path / "first")
    second = build("instruct", init_from=tmp_path / "first")
    for name, value in first.model.connector.state_dict().items():
        assert torch.equal(second.model.connector.state_dict()[name], value), name
    with torch.no_grad():
        second.model.language_model.transformer.wpe.weight.add_(1)
    second.save(tmp_path / "second")
    third = build("instruct", init_from=tmp_path / "second")
    assert torch.equal(
        third.model.language_model.transformer.wpe.weight, second.model.language_model.transformer.wpe.weight
    )
    frozen = build("align", init_from=tmp_path / "second")
    assert not frozen.model.trains_language_model
    frozen.save(tmp_path / "frozen")
    assert (tmp_path / "frozen/language_model").is_dir(), "its words are not those of the source"
    first.save(tmp_path / "frozen")
    assert not (tmp_path / "frozen/language_model").exists()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"tower": "timm:test_vit", "tower_pretrained": False},
            "another tower.pooling, tower.pretrained, tower.source",
        ),
        ({"connector": ConnectorConfig(kind="llava_linear")}, "another connector.kind"),
    ],
)
def test_a_start_between_others_is_refused(changes: dict[str, Any], line: str, build: Build, tmp_path: Path) -> None:
    build("align").save(tmp_path / "first")
    with pytest.raises(ConfigError, match=line):
        build("instruct", init_from=tmp_path / "first", **changes)


def test_a_place_spelled_otherwise_is_the_same_place(
    build: Build, tower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("align").save(tmp_path / "first")
    monkeypatch.chdir(Path(tower).parent)
    started = build("instruct", init_from=tmp_path / "first", tower="own")
    saved = read_tensors(tmp_path / "first")
    for name, value in started.model.connector.state_dict().items():
        assert torch.equal(value, saved[name]), name


def damage(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "error", "line"),
    [
        ({"kind": "model"}, ConfigError, "holds no picture reader"),
        ({"connector": [1]}, ConfigError, "holds no picture reader"),
        ({"connector": {"kind": "clipcap_mlp", "wings": 2}}, ConfigError, "has no field 'wings'"),
        ({"writing": {"template": 3}}, ConfigError, "writing.template must be a text"),
        ({"tower": {"sauce": "x"}}, ConfigError, "describes no picture reader"),
        ({"tower": {"source": "./gone"}}, DataMissingError, "gone does not exist"),
        ({"language_model": "./gone"}, DataMissingError, "language model ./gone does not exist"),
        ({"owns_language_model": True}, DataMissingError, "language_model does not exist"),
        ({"connector": {"kind": "clipcap_mlp"}}, ConfigError, "the weights of its connector do not fit: missing"),
    ],
)
def test_a_damaged_folder_is_one_line(
    changes: dict[str, Any], error: type[Exception], line: str, build: Build, tmp_path: Path
) -> None:
    build("captioning").save(tmp_path / "export")
    damage(tmp_path / "export", **changes)
    with pytest.raises(error, match=line) as caught:
        load_picture_reader(tmp_path / "export")
    assert "\n" not in str(caught.value)


def test_foreign_folders_are_left_alone(build: Build, tmp_path: Path) -> None:
    (tmp_path / "mine/language_model").mkdir(parents=True)
    (tmp_path / "mine/language_model/thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match="holds other files"):
        build("captioning").save(tmp_path / "mine")
    assert (tmp_path / "mine/language_model/thesis.txt").read_text() == "years"


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("captioning", {"writing": WritingConfig(max_text_length=200, max_new_tokens=100)}, "has 256 positions"),
        ("captioning", {"writing": WritingConfig(template=INSTRUCT_TEMPLATE)}, "captioning asks no question"),
        ("align", {"writing": WritingConfig(template=INSTRUCT_TEMPLATE)}, "in the stage instruct, and only there"),
        ("instruct", {"writing": WritingConfig()}, "in the stage instruct, and only there"),
        ("captioning", {"language_model": "./gone"}, "train one"),
        ("captioning", {"batch_size": 0}, "batch_size must be at least 1, not 0"),
    ],
)
def test_wrong_choices_are_one_line(name: str, changes: dict[str, Any], line: str, build: Build) -> None:
    with pytest.raises(BeitError, match=line) as caught:
        build(name, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TASKS)
def test_a_copy_stands_on_its_own(name: str, build: Build, workspace: Workspace) -> None:
    """As the moving average is: it writes and saves its own weights."""
    task = build(name).eval()
    copied = copy.deepcopy(task)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert copied.reader.model is copied.model
    assert copied.reader.language.model is copied.model.language_model
    assert copied.reader.tower is copied._frozen[0]
    assert all(parameter.any() for parameter in list(task.model.connector.parameters())[:1])
    batch = first_batch(task, workspace.data)
    assert float(copied(batch)["loss"].detach()) != float(task(batch)["loss"].detach())


def test_recomputing_blocks_changes_no_gradient(build: Build, workspace: Workspace) -> None:
    found = []
    for recompute in (False, True):
        task = build("captioning_finetuned", activation_checkpointing=recompute).train()
        torch.manual_seed(3)
        task.model.connector.load_state_dict(
            {k: torch.ones_like(v) / 9 for k, v in task.model.connector.state_dict().items()}
        )
        task(first_batch(task, workspace.data))["loss"].backward()
        found.append([parameter.grad for parameter in task.parameters()])
        assert task.model.language_model.is_gradient_checkpointing == recompute
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_work_counts_pictures_places_and_operations(build: Build, workspace: Workspace) -> None:
    frozen, trained = build("captioning"), build("captioning_finetuned")
    batch = first_batch(frozen, workspace.data)
    one, other = frozen.work(batch), trained.work(batch)
    assert one.images == 4
    assert one.tokens == other.tokens == int(batch.text_mask.sum()) + 4 * (1 + 3)
    assert other.flops > one.flops > 4 * frozen.reader.tower.flops > 0
