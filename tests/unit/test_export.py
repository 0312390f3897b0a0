"""Exported programs: the dense form equals the packed engine, for any batch, and files are whole or absent."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3 import export
from beit3.config import replace
from beit3.errors import ConfigError
from beit3.export import PaddedTransformer, Tower, export_onnx, export_program
from beit3.model.build import build_model
from beit3.model.presets import ModelConfig
from beit3.model.store import load_model

SHARED = ModelConfig(
    width=32,
    num_layers=2,
    num_heads=4,
    ffn_width=48,
    patch_size=4,
    image_size=(12, 8),
    vocab_size=40,
    max_text_positions=12,
    fusion_layers=1,
)
STYLES = {"shared": SHARED, "decoupled": replace(SHARED, attention="decoupled", fusion_layers=0)}
INPUTS = {"image": ("images",), "text": ("text_ids", "text_mask"), "pair": ("images", "text_ids", "text_mask")}
OPTIONS: dict[str, dict[str, int]] = {
    "classification": {"num_classes": 7},
    "vqa": {"num_answers": 9},
    "clip": {"text_width": 20, "text_layers": 1, "text_heads": 2, "embed_width": 10},
}


def random_model(style: str = "shared", task: str | None = None) -> Any:
    """A model whose every parameter is random, LayerNorms and biases included."""
    model = build_model(STYLES[style], task, **OPTIONS.get(task or "", {})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def given(tower: str, count: int, length: int, task: str | None = None) -> dict[str, Tensor]:
    """Inputs of a tower; texts are padded, one is empty, one has a gap."""
    mask = torch.arange(length) < torch.randint(1, length + 1, (count, 1))
    mask[-1] = True
    mask[-1, 1:2] = False
    if count > 2:
        mask[1] = False
    inputs = {
        "images": torch.randn(count, *((2,) if task == "nlvr2" else ()), 3, 12, 8),
        "text_ids": torch.randint(0, 40, (count, length)),
        "text_mask": mask,
    }
    return {name: inputs[name] for name in INPUTS[tower]}


def packed(model: Any, tower: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model itself gives, by name."""
    if model.task in ("retrieval", "clip"):
        return {"embeddings": (model.encode_image if tower == "image" else model.encode_text)(**inputs)}
    out = model(**inputs)
    if isinstance(out, Tensor):
        return {"logits": out}
    return {name: value for name in ("vision", "text") if (value := getattr(out, name)) is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, and values within 1e-5 of the largest."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        error, largest = (found[name] - value).abs().max().item(), value.abs().max().item()
        assert error <= 1e-5 * largest, f"{name}: error {error:.2e}, largest value {largest:.2e}"


TOWERS: list[tuple[str | None, Tower]] = [(None, "image"), (None, "text"), (None, "pair")]
TASK_TOWERS: list[tuple[str | None, Tower]] = [
    ("pretraining", "pair"),
    ("retrieval", "image"),
    ("retrieval", "text"),
    ("clip", "image"),
    ("clip", "text"),
    ("classification", "image"),
    ("vqa", "pair"),
    ("nlvr2", "pair"),
    ("captioning", "pair"),
]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("task", "tower"), TOWERS + TASK_TOWERS)
@torch.no_grad()
def test_a_program_equals_the_model_for_any_batch_and_text_length(task: str | None, tower: Tower, style: str) -> None:
    model = random_model(style, task)
    program = export_program(model, tower).module()
    for count, length in ((1, 1), (4, 10), (3, 6)):
        inputs = given(tower, count, length, task)
        assert_equal(program(**inputs), packed(model, tower, inputs))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("causal_text", [False, True])
@torch.no_grad()
def test_the_padded_form_takes_what_the_backbone_takes(causal_text: bool, style: str) -> None:
    model = random_model(style)
    inputs = {**given("pair", 4, 6), "image_mask": torch.rand(4, 6) < 0.4}
    found = PaddedTransformer(model, "pair")(**inputs, causal_text=causal_text)
    expected = model(**inputs, causal_text=causal_text)
    assert_equal({"vision": found.vision, "text": found.text}, {"vision": expected.vision, "text": expected.text})
    plain = {**inputs, "text_mask": None}
    assert_equal({"text": PaddedTransformer(model, "pair")(**plain).text}, {"text": model(**plain).text})


@torch.no_grad()
def test_padding_has_no_influence() -> None:
    program = export_program(random_model(), "pair").module()
    inputs = given("pair", 3, 8)
    other = inputs["text_ids"].where(inputs["text_mask"], (inputs["text_ids"] + 1) % 40)
    found, expected = program(**{**inputs, "text_ids": other}), program(**inputs)
    for name in ("vision", "text"):
        assert torch.equal(found[name], expected[name])
    assert (expected["text"][~inputs["text_mask"]] == 0).all()


@torch.no_grad()
def test_a_program_survives_its_file() -> None:
    model, file = random_model(task="vqa"), io.BytesIO()
    torch.export.save(export_program(model, "pair"), file)
    file.seek(0)
    inputs = given("pair", 4, 6)
    assert_equal(torch.export.load(file).module()(**inputs), packed(model, "pair", inputs))


def test_a_text_longer_than_the_position_table_is_refused() -> None:
    program = export_program(random_model(), "text").module()
    assert program(**given("text", 2, 10))["text"].shape == (2, 10, 32)
    with pytest.raises(AssertionError, match="<= 10"):
        program(**given("text", 2, 11))


@pytest.mark.parametrize("style", STYLES)
def test_a_program_shares_the_parameters_of_its_tower_and_no_others(style: str) -> None:
    model = random_model(style)
    places = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
    alone: dict[str, set[str]] = {}
    pairs: list[tuple[Tower, str]] = [("image", "text"), ("text", "vision")]
    for tower, other in pairs:
        held = {places[tensor.data_ptr()] for tensor in export_program(model, tower).state_dict.values()}
        assert not [name for name in held if other in name or "fusion" in name]
        alone[tower] = held
    held = {places[tensor.data_ptr()] for tensor in export_program(model, "pair").state_dict.values()}
    unused = {name for name in alone["image"] | alone["text"] if name.startswith("blocks.1.ffn")}
    if style == "shared":
        assert (alone["image"] | alone["text"]) - held == unused, "above, pairs run through the fusion expert"
        assert held | unused == set(places.values())
    else:
        assert held == alone["image"] | alone["text"] == set(places.values())


def test_exporting_leaves_the_model_as_it_was() -> None:
    model = random_model(task="retrieval").train()
    backbone, names = model.backbone, model.state_dict().keys()
    export_program(model, "image")
    assert model.backbone is backbone
    assert model.state_dict().keys() == names
    assert all(module.training for module in model.modules())


def test_half_precision_takes_the_same_inputs_and_gives_its_own_type() -> None:
    model, inputs = random_model(), given("pair", 3, 6)
    expected = packed(model, "pair", inputs)
    found = export_program(model.to(torch.bfloat16), "pair").module()(**inputs)
    for name, value in expected.items():
        assert found[name].dtype == torch.bfloat16
        torch.testing.assert_close(found[name].float(), value, atol=0.05 * value.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    ("task", "tower", "message"),
    [
        ("retrieval", "pair", "a retrieval model has no pair tower: export its image or text tower"),
        ("clip", "pair", "a clip model has no pair tower: export its image or text tower"),
        ("classification", "text", "a classification model has no text tower: export its image tower"),
        ("nlvr2", "image", "a nlvr2 model has no image tower: export its pair tower"),
        (None, "images", "unknown tower 'images'; did you mean 'image'?"),
    ],
)
def test_a_tower_that_is_not_there_is_refused(task: str | None, tower: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        export_program(random_model(task=task), tower)


@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_one_loaded_part_is_enough_for_its_own_tower(style: str, tmp_path: Path) -> None:
    model = random_model(style)
    model.save_pretrained(tmp_path / "model")
    text = load_model(tmp_path / "model", parts="text")
    inputs = given("text", 3, 5)
    assert_equal(export_program(text, "text").module()(**inputs), packed(model, "text", inputs))
    for tower in ("image", "pair"):
        with pytest.raises(ConfigError, match=f"tower '{tower}': this model was loaded without its vision tower"):
            export_program(text, tower)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_the_extra(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"need the package {package}: pip install 'beit3\[export\]'"):
        export_onnx(random_model(), tmp_path / "model.onnx", "image")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("old", [False, True])
def test_an_export_that_breaks_off_leaves_no_half_file(
    old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx", reason="pip install 'beit3[export]'")
    pytest.importorskip("onnxscript", reason="pip install 'beit3[export]'")
    path = tmp_path / "model.onnx"
    if old:
        path.write_bytes(b"an older file")

    def break_off(self: object, destination: Path, **options: object) -> None:
        destination.write_bytes(b"half of it")
        raise OSError("the disk is full")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", break_off)
    with pytest.raises(OSError, match="the disk is full"):
        export_onnx(random_model(), path, "image")
    assert [found.read_bytes() for found in tmp_path.iterdir()] == ([b"an older file"] if old else [])


def test_weights_stand_once_in_a_file_and_large_ones_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx = pytest.importorskip("onnx", reason="pip install 'beit3[export]'")
    pytest.importorskip("onnxscript", reason="pip install 'beit3[export]'")
    model, path = random_model(), tmp_path / "deep" / "model.onnx"
    size = sum(tensor.numel() for tensor in export_program(model, "image").state_dict.values())

    def written() -> tuple[set[str], int]:
        onnx.checker.check_model(path)
        tensors = onnx.load(path).graph.initializer
        return {found.name for found in path.parent.iterdir()}, sum(
            onnx.numpy_helper.to_array(tensor).size for tensor in tensors
        )

    for limit, names in ((1000, {"model.onnx", "model.onnx.data"}), (10**9, {"model.onnx"})):
        monkeypatch.setattr(export, "_INLINE_BYTES", limit)
        export_onnx(model, path, "image")
        found, numbers = written()
        assert found == names
        assert numbers == pytest.approx(size, rel=0.01)
