"""`beit3 embed` and `beit3 search` as a user types them, and the index behind them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import beit3
from beit3.cli import run_command
from beit3.data.emoji import load_cells
from beit3.predict import Predictor
from beit3.pretrain.export import export_model
from beit3.search import index as index_module
from beit3.search.embed import embed_folder
from beit3.search.index import Index, IndexSettings
from beit3.search.pictures import Picture
from beit3.tokenizer.text import TextTokenizer
from tests.conftest import Workspace

SHAPE: dict[str, Any] = {
    "num_layers": 1,
    "num_heads": 2,
    "ffn_width": 32,
    "patch_size": 16,
    "image_size": (48, 48),
    "vocab_size": 420,
    "max_text_positions": 40,
    "fusion_layers": 0,
}
NUMBER = 10


def write_model(folder: Path, tokenizer: TextTokenizer, seed: int, width: int = 32) -> None:
    torch.manual_seed(seed)
    model: Any = beit3.create_model("beit3_tiny_patch16_224", task="retrieval", width=width, **SHAPE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    export_model(model, tokenizer, 24, folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, workspace: Workspace) -> Path:
    """Folders `one`, `other` (of the same shape), `narrow`, and `blind` to text."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = TextTokenizer.load(workspace.text_tokenizer)
    write_model(folder / "one", tokenizer, seed=1)
    write_model(folder / "other", tokenizer, seed=2)
    write_model(folder / "narrow", tokenizer, seed=3, width=16)
    shutil.copytree(folder / "one", folder / "blind")
    (folder / "blind" / "tokenizer.spm").unlink()
    preprocess = json.loads((folder / "one" / "preprocess.json").read_text())
    (folder / "blind" / "preprocess.json").write_text(json.dumps({**preprocess, "max_text_length": 0}))
    return folder


@pytest.fixture
def here(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: `models`, and `pics` with pictures of several shapes and kinds in several folders."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models, tmp_path / "models")
    cells = load_cells("google")
    for number in range(NUMBER):
        image = cells[40 * number].image
        path = tmp_path / "pics" / f"{'abc'[number % 3]}" / f"{number}.{('png', 'PNG', 'webp', 'gif')[number % 4]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.resize((48 + 10 * number, 60)).save(path)
    (tmp_path / "pics" / "notes.txt").write_text("no picture")
    return tmp_path


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of pictures that went through the model, call by call."""
    numbers: list[int] = []
    whole = Predictor.embed_images

    def embed_images(self: Predictor, images: Sequence[Any]) -> Tensor:
        numbers.append(len(images))
        return whole(self, images)

    monkeypatch.setattr(Predictor, "embed_images", embed_images)
    return numbers


EMBED = ["embed", "pics", "--model", "models/one", "--out", "idx"]
NEW = [*EMBED[:5], "new"]


def stored() -> tuple[list[str], np.ndarray[Any, Any]]:
    """Paths and vectors as they lie on disk."""
    rows = [json.loads(line) for line in Path("idx/pictures.jsonl").read_text().splitlines()]
    return [row["path"] for row in rows], np.load("idx/vectors.npy")


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a command that must succeed prints."""
    capsys.readouterr()
    assert run_command(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out.splitlines()


def complaint(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that must fail with this code."""
    capsys.readouterr()
    assert run_command(arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def random_index(vectors: np.ndarray[Any, Any]) -> Index:
    import faiss

    number, width = vectors.shape
    settings = IndexSettings(model="m", fingerprint="f", width=width, count=number, folder="/pics", beit3="0")
    inner_products = faiss.IndexFlatIP(width)
    inner_products.add(vectors)
    return Index(settings, [Picture(f"{row:04d}.png", 1, 1) for row in range(number)], vectors, inner_products)


def unit(*shape: int) -> np.ndarray[Any, Any]:
    vectors: np.ndarray[Any, Any] = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors


def test_an_index_holds_the_predictors_vectors_by_path(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(EMBED, capsys)
    assert lines == [f"idx: {NUMBER} pictures, width 32 ({NUMBER} embedded, 0 kept, 0 dropped)"]
    paths, vectors = stored()
    assert paths == sorted(str(path.relative_to("pics")) for path in Path("pics").glob("*/*"))
    expected = beit3.load("models/one", device="cpu").embed_images([Path("pics", path) for path in paths])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected.numpy(), atol=1e-5)
    settings = json.loads(Path("idx/settings.json").read_text())
    assert settings["model"] == str(here / "models" / "one")
    assert (settings["folder"], settings["count"], settings["width"]) == (str(here / "pics"), NUMBER, 32)
    assert settings["beit3"] == beit3.__version__
    assert sorted(path.name for path in here.iterdir()) == ["idx", "models", "pics"]


@pytest.mark.parametrize("queries", [1, 30])
@pytest.mark.parametrize("k", [1, 7, 500, 900])
def test_search_equals_brute_force(queries: int, k: int) -> None:
    vectors, asked = unit(500, 16), unit(queries, 16) * np.float32(-1)
    found = random_index(vectors).search(torch.from_numpy(asked), k)
    scores = asked.astype(np.float64) @ vectors.astype(np.float64).T
    for row, hits in zip(scores, found, strict=True):
        order = np.argsort(-row.round(6), kind="stable")[:k]
        assert [hit.path for hit in hits] == [Path(f"/pics/{place:04d}.png") for place in order]
        np.testing.assert_allclose([hit.score for hit in hits], row[order], atol=1e-6)


@pytest.mark.parametrize("queries", [1, 30])
def test_equal_pictures_stand_in_the_order_of_their_paths(queries: int) -> None:
    """Better ones that stand behind them push some out of the candidates: not the first ones."""
    vectors = unit(200, 16)
    query, twins, better = vectors[0].copy(), np.arange(20, 170), np.arange(185, 200)
    vectors[twins] = query + np.float32(0.3) * vectors[1] + np.float32(1e-8) * vectors[twins]  # batches differ so much
    vectors[better] = query + np.float32(0.01) * vectors[better]
    vectors[0] = -query
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    for hits in random_index(vectors).search(np.repeat(query[None], queries, 0), 20):
        rows = [int(hit.path.stem) for hit in hits]
        assert set(rows[:15]) == set(better)
        assert rows[15:] == [20, 21, 22, 23, 24]
        assert len({hit.score for hit in hits[15:]}) == 1


def test_a_picture_finds_itself_first_and_a_sentence_is_read_as_one(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(EMBED, capsys)
    paths, vectors = stored()
    for path in paths:
        lines = said(["search", "idx", f"pics/{path}"], capsys)
        assert len(lines) == NUMBER
        assert lines[0] == f"1.000  pics/{path}"
    query = beit3.load("models/one", device="cpu").embed_texts(["grinning cat"]).numpy()
    lines = said(["search", "idx", "grinning cat", "--top", "3"], capsys)
    best = np.argsort(-(vectors @ query[0]))[:3]
    assert lines == [f"{vectors[place] @ query[0]:.3f}  pics/{paths[place]}" for place in best]
    both = said(["search", "idx", "grinning cat", f"pics/{paths[0]}", "--top", "3"], capsys)
    assert both[:4] == ["grinning cat", *lines]
    assert both[4:7] == ["", f"pics/{paths[0]}", f"1.000  pics/{paths[0]}"]


def test_an_index_is_searched_from_any_folder(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said(EMBED, capsys)
    lines = said(["search", "idx", "grinning cat", "--top", "1"], capsys)
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    score, path = said(["search", "../idx", "grinning cat", "--top", "1"], capsys)[0].split("  ")
    assert f"{score}  {Path(path).relative_to(here)}" == lines[0]


def test_what_cannot_be_read_is_left_out_and_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pics/a/page.png").write_text("<html>")
    Path("pics/empty.jpg").touch()
    Path("pics/link.png").symlink_to("nowhere.png")
    Image.new("RGB", (2, 90)).save("pics/thin.bmp")
    (cut,) = (path for path in Path("pics").glob("*/1.*"))
    cut.write_bytes(cut.read_bytes()[:200])
    lines = said(EMBED, capsys)
    assert lines[0].startswith(f"idx: {NUMBER - 1} pictures")
    assert lines[1:] == [
        "  left out: 1 too_small (such as thin.bmp)",
        "  left out: 1 unreadable_file (such as link.png)",
        f"  left out: 3 unreadable_image (such as a/page.png, {cut.relative_to('pics')}, empty.jpg)",
        "  all of them: idx/left_out.jsonl",
    ]
    rows = [json.loads(line) for line in Path("idx/left_out.jsonl").read_text().splitlines()]
    assert {row["path"]: row["reason"] for row in rows}["empty.jpg"] == "unreadable_image"
    assert len(rows) == 5
    assert not {row["path"] for row in rows} & set(stored()[0])


def test_an_update_embeds_only_what_is_new_or_changed(
    here: Path, capsys: pytest.CaptureFixture[str], seen: list[int]
) -> None:
    said(EMBED, capsys)
    before = dict(zip(*stored(), strict=True))
    Path("idx/mine.txt").write_text("a user's own note")
    changed, gone, *_ = before
    Image.new("RGB", (50, 50), "red").save(Path("pics", changed))
    Path("pics", gone).unlink()
    Image.new("RGB", (50, 50), "blue").save("pics/new.png")
    seen.clear()
    lines = said([*EMBED, "--update"], capsys)
    assert lines == [f"idx: {NUMBER} pictures, width 32 (2 embedded, {NUMBER - 2} kept, 1 dropped)"]
    assert sum(seen) == 2
    after = dict(zip(*stored(), strict=True))
    assert after.keys() == before.keys() - {gone} | {"new.png"}
    assert all(np.array_equal(after[path], before[path]) for path in before.keys() - {gone, changed})
    expected = beit3.load("models/one", device="cpu").embed_images([Path("pics", changed), Path("pics/new.png")])
    np.testing.assert_allclose([after[changed], after["new.png"]], expected.numpy(), atol=1e-5)
    assert said(["search", "idx", "pics/new.png", "--top", "1"], capsys) == ["1.000  pics/new.png"]
    assert Path("idx/mine.txt").read_text() == "a user's own note"
    seen.clear()
    assert f"({0} embedded, {NUMBER} kept, 0 dropped)" in said([*EMBED, "--update"], capsys)[0]
    assert sum(seen) == 0


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Make the model stop the program once, at a call; batches are of four. Returns the pictures of each call."""

    def arm(call: int) -> list[int]:
        numbers: list[int] = []
        stopped: list[bool] = []
        whole = Predictor.embed_images

        def embed_images(self: Predictor, images: Sequence[Any]) -> Tensor:
            numbers.append(len(images))
            if len(numbers) == call and not stopped:
                stopped.append(True)
                raise KeyboardInterrupt
            return whole(self, images)

        monkeypatch.setattr("beit3.search.embed._BATCH", 4)
        monkeypatch.setattr(Predictor, "embed_images", embed_images)
        return numbers

    return arm


def test_an_interrupted_run_goes_on_where_it_stopped(
    here: Path, capsys: pytest.CaptureFixture[str], stop_at: Callable[[int], list[int]]
) -> None:
    embed_folder("pics", "models/one", "whole")
    numbers = stop_at(3)
    assert run_command(EMBED) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not Path("idx").exists()
    numbers.clear()
    assert f"({NUMBER} embedded, 0 kept, 0 dropped)" in said(EMBED, capsys)[0]
    assert numbers == [NUMBER - 8]
    paths, vectors = stored()
    assert paths == [picture.path for picture in Index.load("whole").pictures]
    np.testing.assert_allclose(vectors, np.load("whole/vectors.npy"), atol=1e-5)
    assert sorted(path.name for path in here.iterdir()) == ["idx", "models", "pics", "whole"]


def test_an_interrupted_update_leaves_the_index_and_goes_on(
    here: Path, capsys: pytest.CaptureFixture[str], stop_at: Callable[[int], list[int]]
) -> None:
    said(EMBED, capsys)
    for number in range(6):
        Image.new("RGB", (50, 50), (40 * number, 0, 99)).save(f"pics/new{number}.png")
    numbers = stop_at(2)
    assert run_command([*EMBED, "--update"]) == 130
    assert len(stored()[0]) == NUMBER
    numbers.clear()
    assert f"(6 embedded, {NUMBER} kept, 0 dropped)" in said([*EMBED, "--update"], capsys)[0]
    assert numbers == [2]


def test_a_killed_run_keeps_the_parts_it_wrote_and_a_damaged_part_is_made_again(
    here: Path, capsys: pytest.CaptureFixture[str], stop_at: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beit3.search.embed._SECONDS_A_PART", 0.0)
    numbers = stop_at(3)
    assert run_command(EMBED) == 130
    parts = sorted(Path(".idx.partial").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(parts) == 2, "each batch is kept as soon as it is done"
    parts[0].write_bytes(parts[0].read_bytes()[:-100])
    numbers.clear()
    said(EMBED, capsys)
    assert numbers == [4, NUMBER - 8]
    assert len(stored()[0]) == NUMBER


def test_parts_of_another_model_are_not_mixed_in(
    here: Path, capsys: pytest.CaptureFixture[str], stop_at: Callable[[int], list[int]]
) -> None:
    numbers = stop_at(3)
    assert run_command(EMBED) == 130
    numbers.clear()
    said(["embed", "pics", "--model", "models/other", "--out", "idx"], capsys)
    assert sum(numbers) == NUMBER
    paths, vectors = stored()
    expected = beit3.load("models/other", device="cpu").embed_images([Path("pics", path) for path in paths])
    np.testing.assert_allclose(vectors, expected.numpy(), atol=1e-5)


def test_an_index_that_a_killed_update_had_put_aside_is_put_back(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said(EMBED, capsys)
    move = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(source).name == ".idx.new":
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(os, "replace", killed)
    assert run_command([*EMBED, "--update"]) == 130
    assert not Path("idx").exists()
    monkeypatch.setattr(os, "replace", move)
    assert f"(0 embedded, {NUMBER} kept, 0 dropped)" in said([*EMBED, "--update"], capsys)[0]
    assert sorted(path.name for path in here.iterdir()) == ["idx", "models", "pics"]


def test_names_that_are_no_text_are_kept(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"raw\xff\n.png")
    Image.new("RGB", (50, 50), "red").save(Path("pics", name))
    said(EMBED, capsys)
    assert name in stored()[0]
    lines = said(["search", "idx", str(Path("pics", name)), "--top", "1", "--sheet", "sheet.png"], capsys)
    assert lines == ["1.000  pics/raw\ufffd\ufffd.png"]


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["embed", "nowhere", *NEW[2:]], 3, "nowhere: no such folder"),
        (["embed", "models", *NEW[2:]], 3, "models holds no pictures"),
        (["embed", "broken", *NEW[2:]], 3, "none of 1 pictures in broken can be read, such as page.png"),
        ([*NEW[:3], "nowhere", *NEW[4:]], 3, "nowhere"),
        ([*EMBED[:5], "pics"], 2, "pics exists and is no index"),
        ([*EMBED[:5], "idx"], 2, "idx is an index already: --update"),
        ([*EMBED[:3], "models/other", *EMBED[4:], "--update"], 2, "idx was made with another model"),
        (["embed", "strange", *EMBED[2:], "--update"], 2, "has none of them: choose another folder"),
        (["search", "nowhere", "a cat"], 3, "nowhere holds no index: make one with beit3 embed"),
        (["search", "idx"], 2, "beit3 search"),
        (["search", "idx", " "], 2, "a query is empty"),
        (["search", "idx", "nowhere.png"], 3, "picture nowhere.png does not exist"),
        (["search", "idx", "broken/page.png"], 2, "picture broken/page.png cannot be read"),
        (["search", "idx", "a cat", "--top", "0"], 2, "must be at least 1, not 0"),
        (["search", "idx", "a cat", "--sheet", "sheet.txt"], 2, "let sheet.txt end in .png"),
        (["search", "idx", "a cat", "--sheet", "nowhere/sheet.png"], 3, "nowhere: no such folder"),
        (["search", "idx", "a cat", "--sheet", "pics/a/0.png"], 2, "pics/a/0.png is one of the pictures"),
        (["search", "idx", "strange/x.png", "--sheet", "strange/x.png"], 2, "is one of the pictures"),
    ],
)
def test_wrong_use_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, line: str
) -> None:
    for folder in ("broken", "strange"):
        Path(folder).mkdir()
    Path("broken/page.png").write_text("<html>")
    Image.new("RGB", (9, 9)).save("strange/x.png")
    said(EMBED, capsys)
    files = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert line in complaint(arguments, code, capsys)
    assert files == {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}


def test_a_model_of_another_width_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(EMBED, capsys)
    capsys.readouterr()
    assert run_command(["search", "idx", "a cat", "--model", "models/narrow"]) == 2
    note, line = capsys.readouterr().err.splitlines()
    assert note == "note: models/narrow is not the model idx was made with"
    assert "vectors of width 32, the query has shape (1, 16)" in line


def test_a_model_that_moved_is_named_and_one_that_changed_is_noticed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(EMBED, capsys)
    lines = said(["search", "idx", "a cat"], capsys)
    os.rename("models/one", "models/moved")
    assert "models/one" in complaint(["search", "idx", "a cat"], 3, capsys)
    assert said(["search", "idx", "a cat", "--model", "models/moved"], capsys) == lines
    os.rename("models/other", "models/one")
    assert "models/one has changed since idx was made" in complaint(["search", "idx", "a cat"], 2, capsys)


def test_an_untouched_model_is_not_read_to_be_recognised(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said(EMBED, capsys)
    lines = said(["search", "idx", "a cat"], capsys)
    hashed: list[int] = []
    whole = index_module.fingerprint

    def counted(predictor: Predictor) -> str:
        hashed.append(1)
        return whole(predictor)

    monkeypatch.setattr(index_module, "fingerprint", counted)
    assert said(["search", "idx", "a cat"], capsys) == lines
    assert hashed == []
    os.utime("models/one/model.safetensors")
    assert said(["search", "idx", "a cat"], capsys) == lines
    assert len(hashed) == 1, "touched, yet the same"
    weights = Path("models/one/model.safetensors")
    times = weights.stat()
    shutil.copy("models/other/model.safetensors", "models/swapped")
    os.utime("models/swapped", ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace("models/swapped", weights)
    assert "models/one has changed since idx was made" in complaint(["search", "idx", "a cat"], 2, capsys)


def test_queries_are_embedded_together_and_answered_in_their_order(
    here: Path, capsys: pytest.CaptureFixture[str], seen: list[int]
) -> None:
    said(EMBED, capsys)
    predictor = beit3.load("models/one", device="cpu")
    paths = [f"pics/{path}" for path in stored()[0]]
    queries = ["a cat", paths[0], "a dog", paths[1], paths[2]]
    seen.clear()
    found = index_module.embed_queries(predictor, queries)
    assert seen == [3]
    for query, row in zip(queries, found, strict=True):
        alone = predictor.embed_images([query]) if query in paths else predictor.embed_texts([query])
        torch.testing.assert_close(row, alone[0], atol=1e-5, rtol=0)


def test_an_index_of_another_size_and_tokenizer_is_searched_with_them(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.rename("models/one/tokenizer.spm", "mine.spm")
    said([*EMBED, "--image-size", "64", "--tokenizer", "mine.spm"], capsys)
    paths, vectors = stored()
    expected = beit3.load("models/one", device="cpu", image_size=64).embed_images(
        [Path("pics", path) for path in paths]
    )
    np.testing.assert_allclose(vectors, expected.numpy(), atol=1e-5)
    assert said(["search", "idx", f"pics/{paths[0]}", "--top", "1"], capsys) == [f"1.000  pics/{paths[0]}"]
    assert len(said(["search", "idx", "a cat", "--top", "2"], capsys)) == 2


def test_a_model_without_text_is_searched_with_pictures_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(["embed", "pics", "--model", "models/blind", "--out", "idx"], capsys)
    assert said(["search", "idx", "pics/a/0.png", "--top", "1"], capsys) == ["1.000  pics/a/0.png"]
    assert "has no text tokenizer" in complaint(["search", "idx", "a cat"], 2, capsys)


def test_a_model_not_tuned_for_retrieval_says_so(
    here: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone: Any = beit3.create_model("beit3_tiny_patch16_224", width=32, **SHAPE)
    export_model(backbone, TextTokenizer.load(workspace.text_tokenizer), 24, Path("models/backbone"))
    said(["embed", "pics", "--model", "models/backbone", "--out", "idx"], capsys)
    assert run_command(["search", "idx", "a cat"]) == 0
    assert "not tuned for retrieval" in capsys.readouterr().err
    assert run_command(["search", "idx", "pics/a/0.png"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("file", ["vectors.npy", "pictures.jsonl", "index.faiss", "settings.json"])
def test_a_damaged_index_is_one_line(here: Path, capsys: pytest.CaptureFixture[str], file: str) -> None:
    said(EMBED, capsys)
    path = Path("idx", file)
    path.write_bytes(path.read_bytes()[:-40])
    assert "idx is damaged" in complaint(["search", "idx", "a cat"], 2, capsys)


def test_faiss_is_asked_for_before_the_work_starts(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seen: list[int]
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert "pip install beit3[index]" in complaint(EMBED, 2, capsys)
    assert seen == []
    assert sorted(path.name for path in here.iterdir()) == ["models", "pics"]


def test_a_sheet_shows_the_hits_in_their_order(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    colors = [(255, 0, 0), (0, 160, 0), (0, 0, 255), (240, 200, 0), (0, 200, 200), (120, 0, 120)]
    Path("plain").mkdir()
    for number, color in enumerate(colors):
        Image.new("RGB", (400, 300), color).save(f"plain/{number}.png")
    said(["embed", "plain", "--model", "models/one", "--out", "idx"], capsys)
    lines = said(["search", "idx", "plain/2.png", "--top", "6", "--sheet", "sheet.png"], capsys)
    order = [int(Path(line.split("  ")[1]).stem) for line in lines]
    assert order[0] == 2
    with Image.open("sheet.png") as opened:
        sheet = np.asarray(opened.convert("RGB"))
    for rank, number in enumerate(order):
        rows, columns = np.nonzero((sheet == colors[number]).all(-1))
        card = sheet.shape[1] / 5
        inside = (columns // card == rank % 5) & (rows > 150 + 280 * (rank // 5))
        assert inside.sum() > 20_000, "a picture fills its card"
    Path("plain/0.png").unlink()
    said(["search", "idx", "a cat", "plain/1.png", "--sheet", "sheet.jpg"], capsys)
    with Image.open("sheet.jpg") as opened:
        assert opened.width == sheet.shape[1]
        assert opened.height > 2 * 500
    assert sorted(path.name for path in here.glob("*sheet*")) == ["sheet.jpg", "sheet.png"]
