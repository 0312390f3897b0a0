"""Loading: nothing at random, nothing twice, nothing half; one tower alone; shards; the Hub; damaged sources."""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import beit3
from beit3.config import replace
from beit3.errors import BeitError, ConfigError, DataMissingError
from beit3.model.build import build_model
from beit3.model.exchange import write_folder
from beit3.model.heads import ClassificationModel, PretrainingModel, RetrievalModel, VQAModel
from beit3.model.official import to_official
from beit3.model.presets import ModelConfig
from beit3.model.store import fill_model
from beit3.model.transformer import MultiwayTransformer

Make = Callable[..., MultiwayTransformer]
Close = Callable[[Tensor, Tensor, str], None]
COMMIT = "0123456789" * 4


@pytest.fixture
def square(tiny: ModelConfig) -> ModelConfig:
    """Sizes that a released file tells by itself."""
    return replace(tiny, attention="decoupled", fusion_layers=0, width=64, num_heads=1, image_size=(12, 12))


def test_loading_draws_no_random_numbers(tiny: ModelConfig, tmp_path: Path) -> None:
    build_model(tiny, "vqa", num_answers=5).save_pretrained(tmp_path / "model")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    beit3.load_model(tmp_path / "model")
    assert torch.equal(torch.rand(4), expected)


def test_loaded_weights_can_be_trained_and_leave_the_file_alone(tiny: ModelConfig, tmp_path: Path) -> None:
    build_model(tiny).save_pretrained(tmp_path / "model")
    before = (tmp_path / "model/model.safetensors").read_bytes()
    model = beit3.load_model(tmp_path / "model").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 3, 12, 8), torch.randint(0, 40, (2, 4))).vision.square().sum().backward()
    optimizer.step()
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    again = beit3.load_model(tmp_path / "model")
    changed = [name for name, value in again.state_dict().items() if not torch.equal(value, model.state_dict()[name])]
    assert changed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_into_fp32_models(
    dtype: torch.dtype, square: ModelConfig, make: Make, tmp_path: Path
) -> None:
    model = make(square)
    half = {name: value.to(dtype) for name, value in to_official(square, model.state_dict()).items()}
    torch.save({"module": half}, tmp_path / "half.pth")
    model.to(dtype).save_pretrained(tmp_path / "folder")
    for source in ("half.pth", "folder"):
        loaded = beit3.load_model(tmp_path / source)
        for name, value in loaded.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, model.state_dict()[name].float()), name


@pytest.mark.parametrize("size", [24, (12, 20), (8, 24)])
def test_another_image_size_interpolates_positions_and_says_so(
    size: int | tuple[int, int], square: ModelConfig, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Against torch's own bicubic resize of the table as a picture, rows 0 to 2 kept."""
    model = make(square)
    torch.save(to_official(square, model.state_dict()), tmp_path / "model.pth")
    with caplog.at_level(logging.WARNING, "beit3"):
        loaded = beit3.load_model(tmp_path / "model.pth", image_size=size)
    height, width = (size, size) if isinstance(size, int) else size
    rows, columns = height // 4, width // 4
    assert f"from 3 x 3 to {rows} x {columns} patches" in caplog.text
    table = model.vision_embedding.positions.detach()
    picture = table[3:].reshape(1, 3, 3, 64).permute(0, 3, 1, 2)
    expected = F.interpolate(picture, (rows, columns), mode="bicubic").permute(0, 2, 3, 1).reshape(-1, 64)
    actual = loaded.state_dict()["vision_embedding.positions"]
    assert torch.equal(actual[:3], table[:3])
    torch.testing.assert_close(actual[3:], expected, atol=1e-6, rtol=1e-6)
    assert loaded.model_config.image_size == (height, width)
    with torch.no_grad():
        images = torch.randn(1, 3, height, width)
        torch.testing.assert_close(loaded(images).vision, model.eval()(images).vision, atol=1e-5, rtol=1e-5)


def test_the_native_size_changes_nothing_and_says_nothing(
    square: ModelConfig, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(square).save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.WARNING, "beit3"):
        loaded = beit3.load_model(tmp_path / "model", image_size=12)
    assert not caplog.text
    stored = load_file(tmp_path / "model/model.safetensors")["vision_embedding.positions"]
    assert torch.equal(loaded.state_dict()["vision_embedding.positions"], stored)


def test_large_weights_are_cut_into_files_and_read_back(tiny: ModelConfig, make: Make, tmp_path: Path) -> None:
    model = make(tiny)
    model.save_pretrained(tmp_path / "model", max_shard_size=40_000)
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "model" / name).stat().st_size < 60_000 for name in files)
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == model.state_dict().keys()
    loaded = beit3.load_model(tmp_path / "model")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    (tmp_path / "model" / files[1]).unlink()
    with pytest.raises(DataMissingError, match=f"{files[1]} does not exist: the folder is incomplete"):
        beit3.load_model(tmp_path / "model")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "model.bin", "a/b.safetensors"])
def test_an_index_names_no_file_outside_its_folder(name: str, tiny: ModelConfig, tmp_path: Path) -> None:
    model = build_model(tiny)
    model.save_pretrained(tmp_path / "model")
    save_file(model.state_dict(), tmp_path / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(model.state_dict(), name)}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="no file of weights of this folder: do not trust it"):
        beit3.load_model(tmp_path / "model")


@torch.no_grad()
@pytest.mark.parametrize("attention", ["shared", "decoupled"])
def test_one_tower_answers_as_the_whole_model_in_less_memory(
    attention: str, tiny: ModelConfig, make: Make, tmp_path: Path, close: Close
) -> None:
    changes = {"fusion_layers": 0} if attention == "decoupled" else {}
    whole = make(tiny, attention=attention, **changes).eval()
    whole.save_pretrained(tmp_path / "model")
    images, ids = torch.randn(2, 3, 12, 8), torch.randint(0, 40, (2, 5))
    vision = beit3.load_model(tmp_path / "model", parts="vision")
    text = beit3.load_model(tmp_path / "model", parts="text")
    close(vision(images).vision, whole(images).vision, "vision")
    close(text(text_ids=ids).text, whole(text_ids=ids).text, "text")
    own = whole.num_parameters
    if attention == "decoupled":
        assert vision.num_parameters + text.num_parameters == own
    assert max(vision.num_parameters, text.num_parameters) < 0.8 * own
    for model, arguments in (
        (vision, {"text_ids": ids}),
        (text, {"images": images}),
        (text, {"images": images, "text_ids": ids}),
    ):
        with pytest.raises(ConfigError, match=r"loaded without its (text|vision) tower"):
            model(**arguments)


@torch.no_grad()
def test_one_tower_is_saved_and_loaded_as_such(tiny: ModelConfig, tmp_path: Path, close: Close) -> None:
    model = RetrievalModel(tiny).eval()
    model.save_pretrained(tmp_path / "whole")
    beit3.load_model(tmp_path / "whole", parts="vision").save_pretrained(tmp_path / "vision")
    weights = load_file(tmp_path / "vision/model.safetensors")
    assert not [name for name in weights if "text" in name or "language" in name]
    loaded: Any = beit3.load_model(tmp_path / "vision")
    assert (loaded.part, loaded.task) == ("vision", "retrieval")
    images = torch.randn(2, 3, 12, 8)
    close(loaded.encode_image(images), model.encode_image(images), "embeddings")
    with pytest.raises(ConfigError, match="this model is a vision tower alone"):
        beit3.load_model(tmp_path / "vision", parts="text")


@pytest.mark.parametrize(("kind", "part"), [(VQAModel, "vision"), (VQAModel, "text"), (ClassificationModel, "text")])
def test_a_tower_that_its_task_cannot_use_is_refused(kind: Any, part: Any, tiny: ModelConfig, tmp_path: Path) -> None:
    kind(tiny).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="model needs both towers"):
        beit3.load_model(tmp_path / "model", parts=part)


def test_heads_are_dropped_or_begun_at_random_only_when_asked(tiny: ModelConfig, tmp_path: Path) -> None:
    PretrainingModel(tiny, codebook_size=8).save_pretrained(tmp_path / "model")
    backbone = beit3.load_model(tmp_path / "model", task="backbone")
    assert isinstance(backbone, MultiwayTransformer)
    with pytest.raises(ConfigError, match="holds a pretraining model, not a vqa model: pass strict=False"):
        beit3.load_model(tmp_path / "model", task="vqa")
    started = beit3.load_model(tmp_path / "model", task="vqa", strict=False)
    assert isinstance(started, VQAModel)
    for name, value in started.backbone.state_dict().items():
        assert torch.equal(value, backbone.state_dict()[name]), name
    assert started.state_dict()["head.3.weight"].std() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, square: ModelConfig, make: Make, tmp_path: Path) -> None:
    model = make(square)
    with torch.no_grad():
        model.text_embedding.words.weight[3, 2] = value
    model.save_pretrained(tmp_path / "folder")
    torch.save(to_official(square, model.state_dict()), tmp_path / "file.pth")
    for source in ("folder", "file.pth"):
        with pytest.raises(ConfigError, match=rf"{source} holds NaN or infinity in text_embedding\.words\.weight"):
            beit3.load_model(tmp_path / source)
    beit3.load_model(tmp_path / "folder", parts="vision")


def test_a_folder_whose_weights_do_not_fit_is_explained_in_one_line(tiny: ModelConfig, tmp_path: Path) -> None:
    model = build_model(tiny)
    state = model.state_dict()
    for change, message in (
        ({"norm.text.bias": None}, r"model: its weights do not fit: missing norm\.text\.bias$"),
        ({"extra": torch.zeros(1)}, r"do not fit: unknown extra$"),
        ({"norm.text.bias": torch.zeros(3)}, r"wrong shapes: norm\.text\.bias \(3,\) instead of \(32,\)$"),
        ({f"extra{number}": torch.zeros(1) for number in range(200)}, r"unknown extra.* and 195 more$"),
    ):
        model.save_pretrained(tmp_path / "model")
        changed = {name: value for name, value in {**state, **change}.items() if value is not None}
        save_file(changed, tmp_path / "model/model.safetensors")
        with pytest.raises(ConfigError, match=message) as caught:
            beit3.load_model(tmp_path / "model")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "holds a list, not settings"),
        ("{}", "is not of format version 1"),
        ('{"format_version": 1, "kind": "vqkd"}', "holds a 'vqkd', not a model"),
        ('{"format_version": 1, "kind": "model", "model": {"width": "x"}}', "describes no model|needs the field"),
        ('{"format_version": 1, "kind": "model", "model": {"widht": 3}}', "no field 'widht'; did you mean 'width'"),
    ],
)
def test_damaged_settings_are_explained(content: str, message: str, tiny: ModelConfig, tmp_path: Path) -> None:
    build_model(tiny).save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        beit3.load_model(tmp_path / "model")


def test_cut_weights_are_explained(tiny: ModelConfig, tmp_path: Path) -> None:
    build_model(tiny).save_pretrained(tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    content = path.read_bytes()
    for length in (0, 4, 100, len(content) - 7):
        path.write_bytes(content[:length])
        with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
            beit3.load_model(tmp_path / "model")


def test_a_card_tells_what_the_weights_are(tiny: ModelConfig, tmp_path: Path) -> None:
    model = ClassificationModel(tiny, num_classes=3)
    model.save_pretrained(tmp_path / "flowers", licence="mit", numbers={"Flowers top-1": 91.5})
    card = huggingface_hub.ModelCard.load(tmp_path / "flowers/README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "image-classification")
    for text in ("# flowers", "| Flowers top-1 | 91.5 |", "Weights: mit.", "12 x 8 pixels", "predictor.classify"):
        assert text in card.content, text
    model.save_pretrained(tmp_path / "bare")
    bare = (tmp_path / "bare/README.md").read_text()
    assert "license: other" in bare
    assert "licence of these weights was not stated" in bare
    assert "None were recorded" in bare


@pytest.fixture
def cached(tiny: ModelConfig, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MultiwayTransformer:
    """A model in a Hub cache of this machine, which is offline."""
    cache = tmp_path / "cache" / "models--someone--emoji"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text(COMMIT)
    model = make(tiny)
    model.save_pretrained(cache / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return model


def test_a_model_of_the_hub_is_read_from_the_cache_without_a_connection(cached: MultiwayTransformer) -> None:
    for source in ("hf-hub:someone/emoji", "hf-hub:someone/emoji@main", f"hf-hub:someone/emoji@{COMMIT}"):
        loaded = beit3.load_model(source)
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, cached.state_dict()[name]), name


@pytest.mark.usefixtures("cached")
def test_what_the_cache_lacks_is_explained() -> None:
    with pytest.raises(DataMissingError, match="not in the local cache and the Hub cannot be reached"):
        beit3.load_model("hf-hub:someone/else")
    with pytest.raises(ConfigError, match="no name of a repository: write hf-hub:organisation/name"):
        beit3.load_model("hf-hub:../../etc")


class FakeHub:
    """Keeps what is uploaded."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.files: dict[str, bytes] = {}

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        if self.error:
            raise self.error
        self.repository = (name, private, exist_ok)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
        self.files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        return f"hub/{repo_id}: {commit_message}"


def test_publishing_uploads_the_whole_folder(
    tiny: ModelConfig, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, model = FakeHub(), make(tiny)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    address = model.push_to_hub("someone/emoji", {"tokenizer.spm": b"pieces"}, private=True, licence="mit")
    assert hub.repository == ("someone/emoji", True, True)
    assert address == "hub/someone/emoji: Upload emoji"
    assert hub.files.keys() == {"config.json", "model.safetensors", "README.md", "tokenizer.spm"}
    card = hub.files["README.md"].decode()
    assert "# emoji\n" in card
    assert 'beit3.load("hf-hub:someone/emoji")' in card
    (tmp_path / "down").mkdir()
    for name, content in hub.files.items():
        (tmp_path / "down" / name).write_bytes(content)
    for name, value in beit3.load_model(tmp_path / "down").state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


class NoConnection(Exception):
    """What a client of HTTP raises: no OSError, and of no type that we know."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("401 Unauthorized\nlong text"), "401 Unauthorized"),
        (NoConnection("[Errno -2] Name or service not known"), r"\[Errno -2\] Name or service not known"),
        (NoConnection(), "NoConnection"),
    ],
)
def test_a_refused_publication_is_one_line(
    error: Exception, reason: str, tiny: ModelConfig, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: FakeHub(error))
    advice = "log in with `hf auth login`, and check the connection"
    with pytest.raises(BeitError, match=rf"^someone/emoji was not published: {reason}; {advice}$"):
        make(tiny).push_to_hub("someone/emoji")


@pytest.mark.parametrize("name", ["", "..", "a/", "a/..", "a/b/c", "two words"])
def test_what_is_no_name_of_a_repository_is_not_published(
    name: str, tiny: ModelConfig, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    with pytest.raises(ConfigError, match="is no name of a repository: write organisation/name"):
        make(tiny).push_to_hub(name)


def test_a_connection_that_breaks_while_loading_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise NoConnection("reset by peer\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(DataMissingError, match=r"someone/emoji cannot be read from the Hub: reset by peer$"):
        beit3.load_model("hf-hub:someone/emoji")


@pytest.mark.parametrize("has", [True, False])
def test_a_model_starts_from_one_with_or_without_final_norms(
    has: bool, tiny: ModelConfig, make: Make, tmp_path: Path
) -> None:
    """The released ImageNet and VQA models have none, the pretrained ones do."""
    source = make(tiny, final_norm=has)
    source.save_pretrained(tmp_path / "source")
    model = VQAModel(replace(tiny, final_norm=not has, drop_path=0.1), num_answers=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fill_model(model, tmp_path / "source")
    for name, value in model.state_dict().items():
        inner = name.removeprefix("backbone.")
        expected = source.state_dict()[inner] if name != inner and not inner.startswith("norm.") else before[name]
        assert torch.equal(value, expected), name


TASKS: dict[str | None, dict[str, int]] = {
    None: {},
    "pretraining": {"codebook_size": 7},
    "retrieval": {},
    "classification": {"num_classes": 5},
    "vqa": {"num_answers": 6},
    "nlvr2": {},
    "captioning": {},
}
USABLE = {
    *((task, part) for task in (None, "pretraining", "retrieval") for part in ("vision", "text")),
    ("classification", "vision"),
}
"""Towers that are of use alone."""


@pytest.mark.parametrize("kind", ["folder", "file.pth"])
@pytest.mark.parametrize("part", [None, "vision", "text"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_and_part_is_loaded_saved_and_loaded_again(
    task: str | None, part: Any, kind: str, square: ModelConfig, tmp_path: Path
) -> None:
    model = build_model(square, task, **TASKS[task])
    if kind == "folder":
        model.save_pretrained(tmp_path / kind)
    else:
        torch.save({"model": to_official(square, model.state_dict())}, tmp_path / kind)
    if part is not None and (task, part) not in USABLE:
        with pytest.raises(ConfigError, match="model needs both towers"):
            beit3.load_model(tmp_path / kind, parts=part)
        return
    first = beit3.load_model(tmp_path / kind, parts=part)
    first.save_pretrained(tmp_path / "again")
    again = beit3.load_model(tmp_path / "again")
    assert (again.task, again.part, again.head_options) == (task, part, TASKS[task])
    assert again.model_config == square
    assert again.state_dict().keys() == first.state_dict().keys()
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_another_task_on_one_tower_gets_no_second_tower(tiny: ModelConfig, make: Make, tmp_path: Path) -> None:
    model = make(tiny)
    model.save_pretrained(tmp_path / "whole")
    beit3.load_model(tmp_path / "whole", parts="vision").save_pretrained(tmp_path / "vision")
    started = beit3.load_model(tmp_path / "vision", task="classification", strict=False)
    assert (started.part, started.task) == ("vision", "classification")
    assert not [name for name in started.state_dict() if "text" in name]
    started.save_pretrained(tmp_path / "started")
    assert beit3.load_model(tmp_path / "started").part == "vision"
    with pytest.raises(ConfigError, match="a vqa model needs both towers"):
        beit3.load_model(tmp_path / "vision", task="vqa", strict=False)


@pytest.mark.parametrize("kind", ["folder", "file.pth"])
def test_strict_false_starts_missing_tensors_at_random_and_says_so(
    kind: str, square: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, ours = build_model(square, "vqa", num_answers=6), "backbone.blocks.0.ffn.text.fc2.weight"
    extra = {"extra": torch.zeros(2)}
    if kind == "folder":
        gone, place = ours, tmp_path / kind / "model.safetensors"
        model.save_pretrained(tmp_path / kind)
        save_file({name: value for name, value in load_file(place).items() if name != gone} | extra, place)
    else:
        gone, state = "encoder.layers.0.ffn.B.fc2.weight", to_official(square, model.state_dict())
        del state[f"beit3.{gone}"]
        torch.save(state | extra, tmp_path / kind)
    with pytest.raises(ConfigError, match=rf"missing {gone}; unknown extra$"):
        beit3.load_model(tmp_path / kind)
    with caplog.at_level(logging.WARNING, "beit3"):
        loaded = beit3.load_model(tmp_path / kind, strict=False)
    assert "unknown tensors are left out: extra" in caplog.text
    assert f"random weights in {ours}" in caplog.text
    assert loaded.task == "vqa"
    for name, value in loaded.state_dict().items():
        if name == ours:
            assert 0 < value.std() < 1
        else:
            assert torch.equal(value, model.state_dict()[name]), name


def test_the_backbone_of_a_file_with_foreign_heads_is_loaded(square: ModelConfig, make: Make, tmp_path: Path) -> None:
    model = make(square)
    state = to_official(square, model.state_dict()) | {"decoder.weight": torch.zeros(2), "head.weight": torch.zeros(3)}
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(ConfigError, match=r"odd\.pth: the official weights do not fit: missing .*unknown decoder"):
        beit3.load_model(tmp_path / "odd.pth")
    loaded = beit3.load_model(tmp_path / "odd.pth", task="backbone")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_released_file_of_wide_pictures_loads_with_their_size(
    square: ModelConfig, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wide = replace(square, image_size=(24, 40))
    model = make(wide)
    torch.save(to_official(wide, model.state_dict()), tmp_path / "rect.pth")
    for wrong in (None, 24, (24, 44)):
        with pytest.raises(ConfigError, match="give image_size, the height and width it was made for"):
            beit3.load_model(tmp_path / "rect.pth", image_size=wrong)
    with caplog.at_level(logging.WARNING, "beit3"):
        loaded = beit3.load_model(tmp_path / "rect.pth", image_size=(24, 40))
    assert not caplog.text, "nothing is interpolated"
    assert loaded.model_config == wide
    assert torch.equal(
        loaded.state_dict()["vision_embedding.positions"], model.state_dict()["vision_embedding.positions"]
    )


@pytest.mark.parametrize("size", ["48", 24.0, (24,), (24, 24, 24), True, (12.0, 12), [], (13, 12)])
def test_an_image_size_that_is_none_is_refused(size: Any, square: ModelConfig, make: Make, tmp_path: Path) -> None:
    make(square).save_pretrained(tmp_path / "model")
    torch.save(to_official(square, make(square).state_dict()), tmp_path / "model.pth")
    for source in ("model", "model.pth"):
        with pytest.raises(ConfigError, match="image_size"):
            beit3.load_model(tmp_path / source, image_size=size)
    assert beit3.load_model(tmp_path / "model", image_size=[12, 24]).model_config.image_size == (12, 24)  # type: ignore[arg-type]


def test_one_file_of_an_exchange_folder_names_its_folder(tiny: ModelConfig, make: Make, tmp_path: Path) -> None:
    make(tiny).save_pretrained(tmp_path / "model")
    make(tiny).save_pretrained(tmp_path / "cut", max_shard_size=40_000)
    for file in (tmp_path / "model/model.safetensors", next((tmp_path / "cut").glob("model-00002*"))):
        with pytest.raises(ConfigError, match=rf"is one file of an exchange folder: give the folder {file.parent}$"):
            beit3.load_model(file)


@pytest.mark.parametrize("layers", [2, 4, 1_000_000, 10**18])
def test_layers_that_the_weights_lack_are_refused_before_any_is_built(
    layers: int, tiny: ModelConfig, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tiny).save_pretrained(tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(path.read_text().replace('"num_layers": 3', f'"num_layers": {layers}'))
    monkeypatch.setattr("beit3.model.store.build_model", None)
    for strict in (True, False):
        with pytest.raises(ConfigError, match=rf"config\.json describes {layers} layers, the weights hold 3"):
            beit3.load_model(tmp_path / "model", strict=strict)


@torch.no_grad()
@pytest.mark.parametrize("task", ["classification", "vqa"])
def test_final_norms_are_dropped_where_the_released_task_models_have_none(
    task: str, square: ModelConfig, make: Make, tmp_path: Path, close: Close
) -> None:
    model = make(square).eval()
    torch.save(to_official(square, model.state_dict()), tmp_path / "pretrained.pth")
    started: Any = beit3.load_model(tmp_path / "pretrained.pth", task=task, strict=False)
    assert not started.model_config.final_norm
    assert not [name for name in started.state_dict() if name.startswith("backbone.norm.")]
    images = torch.randn(2, 3, 12, 12)
    bare = MultiwayTransformer(replace(square, final_norm=False)).eval()
    bare.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("norm.")})
    close(started.backbone(images).vision, bare(images).vision, "states")
    to_official(started.model_config, started.state_dict())  # has a place in the released layout
    # Other tasks, and our own shared models, keep theirs.
    kept = beit3.load_model(tmp_path / "pretrained.pth", task="nlvr2", strict=False)
    shared = make(replace(square, attention="shared"))
    shared.save_pretrained(tmp_path / "shared")
    for other in (kept, beit3.load_model(tmp_path / "shared", task=task, strict=False)):
        assert other.model_config.final_norm
        assert [name for name in other.state_dict() if name.startswith("backbone.norm.")]


PEAK = """
import sys
from pathlib import Path
import beit3

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

beit3.load_model(sys.argv[2])  # so that all code is there
before = memory("VmRSS")
model = beit3.load_model(sys.argv[1])
loaded = memory("VmHWM")
total = sum(float(parameter.detach().sum()) for parameter in model.parameters())
weights = sum(parameter.nbytes for parameter in model.parameters())
print(weights, loaded - before, memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's own account of memory")
def test_loading_takes_little_more_memory_than_the_weights(
    start: Callable[..., subprocess.Popen[str]], square: ModelConfig, tmp_path: Path
) -> None:
    """The highest point of a process of its own, beyond what its code takes: at most 1.3 times the weights."""
    build_model(square).save_pretrained(tmp_path / "small-folder")
    torch.save(to_official(square, build_model(square).state_dict()), tmp_path / "small-file.pth")
    model = beit3.create_model("beit3_base_patch16_224", attention="decoupled")
    model.save_pretrained(tmp_path / "folder")
    torch.save({"model": to_official(model.model_config, model.state_dict())}, tmp_path / "file.pth")
    size = sum(parameter.nbytes for parameter in model.parameters())
    del model
    for source in ("folder", "file.pth"):
        out, errors = start(
            ["-c", PEAK, str(tmp_path / source), str(tmp_path / f"small-{source}")], tmp_path
        ).communicate()
        assert out, errors
        weights, loaded, touched = map(int, out.split())
        assert weights == size
        assert 0.9 * size < loaded <= 1.3 * size, f"{source}: {loaded / size:.2f} when loaded"
        assert touched <= 1.3 * size, f"{source}: {touched / size:.2f} when touched"


def test_saving_over_a_folder_takes_away_what_belonged_to_the_older_model(tiny: ModelConfig, tmp_path: Path) -> None:
    """Its words and its preprocessing would be read as the new model's; what the user put there stays."""
    old = {"preprocess.json": b"{}", "labels.json": b"[]", "tokenizer.spm": b"x", "notes.txt": b"mine"}
    build_model(tiny, "vqa", num_answers=3).save_pretrained(tmp_path / "model", old)
    build_model(tiny, "retrieval").save_pretrained(tmp_path / "model", {"preprocess.json": b"new"})
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "notes.txt",
        "preprocess.json",
    }
    assert (tmp_path / "model/preprocess.json").read_bytes() == b"new"


def test_a_model_never_replaces_a_tokenizers_folder(tiny: ModelConfig, tmp_path: Path) -> None:
    write_folder(tmp_path / "codes", {"kind": "vqkd"}, {"x": torch.zeros(1)})
    with pytest.raises(ConfigError, match="holds other files, which are left alone"):
        build_model(tiny).save_pretrained(tmp_path / "codes")


def test_unknown_parts_and_places_are_one_line(tiny: ModelConfig, tmp_path: Path) -> None:
    build_model(tiny).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="parts is 'vision' or 'text', not 'foo'"):
        beit3.load_model(tmp_path / "model", parts="foo")  # type: ignore[arg-type]
    (tmp_path / "loop").symlink_to("loop")
    for place in (tmp_path / ("a" * 300), tmp_path / "a\0b", tmp_path / "loop"):
        with pytest.raises(ConfigError, match="cannot be made"):
            build_model(tiny).save_pretrained(place)
    build_model(tiny).save_pretrained(tmp_path / ("a" * 250))


def test_a_layer_that_is_not_there_is_an_error_however_loose(square: ModelConfig, make: Make, tmp_path: Path) -> None:
    state = to_official(square, make(square).state_dict())
    moved = {name.replace("encoder.layers.1.", "encoder.layers.7."): value for name, value in state.items()}
    torch.save({"model": moved}, tmp_path / "gap.pth")
    for strict in (True, False):
        with pytest.raises(ConfigError, match=r"missing encoder\.layers\.1|lack a layer: 0, 2, 7 of 3"):
            beit3.load_model(tmp_path / "gap.pth", strict=strict)


def test_names_and_sizes_beyond_reason_are_one_line(tiny: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="does not exist"):
        beit3.load_model("a" * 300)
    build_model(tiny).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="image_size is at most 8192 pixels a side"):
        beit3.load_model(tmp_path / "model", image_size=10**9)
