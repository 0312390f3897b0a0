"""Loading: nothing at random, nothing twice, nothing half; one tower alone; shards; the Hub; damaged sources."""

from __future__ import annotations

import json
import logging
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
from beit3.model.heads import ClassificationModel, PretrainingModel, RetrievalModel, VQAModel, build_model
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
        ({"norm.text.bias": None}, r"missing \['norm\.text\.bias'\]"),
        ({"extra": torch.zeros(1)}, r"unexpected \['extra'\]"),
        ({"norm.text.bias": torch.zeros(3)}, r"of another shape \['norm\.text\.bias'\]"),
    ):
        model.save_pretrained(tmp_path / "model")
        changed = {name: value for name, value in {**state, **change}.items() if value is not None}
        save_file(changed, tmp_path / "model/model.safetensors")
        with pytest.raises(ConfigError, match=message) as caught:
            beit3.load_model(tmp_path / "model")
        assert "\n" not in str(caught.value)


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
    (tmp_path / "down").mkdir()
    for name, content in hub.files.items():
        (tmp_path / "down" / name).write_bytes(content)
    for name, value in beit3.load_model(tmp_path / "down").state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_refused_publication_is_one_line(tiny: ModelConfig, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: FakeHub(OSError("401 Unauthorized\nlong text")))
    with pytest.raises(
        BeitError, match=r"^someone/emoji was not published: 401 Unauthorized; log in with `hf auth login`$"
    ):
        make(tiny).push_to_hub("someone/emoji")


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
