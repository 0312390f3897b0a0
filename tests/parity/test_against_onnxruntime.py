"""Exported ONNX files against the package: onnxruntime gives what the model gives."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3 import export
from beit3.export import Tower, export_onnx

ort = pytest.importorskip("onnxruntime", reason="pip install 'beit3[export]'")
pytest.importorskip("onnx", reason="pip install 'beit3[export]'")
pytest.importorskip("onnxscript", reason="pip install 'beit3[export]'")
UNIT: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "unit" / "test_export.py"))
"""Models, inputs and what the package gives for them are those of the unit tests."""
CASES = [(style, task, tower) for style in ("shared", "decoupled") for task, tower in UNIT["TOWERS"]]
CASES += [("shared", task, tower) for task, tower in UNIT["TASK_TOWERS"]]


class Session:
    """An ONNX file in onnxruntime, with tensors in and out by name."""

    def __init__(self, path: Path) -> None:
        self.runtime = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.inputs = {found.name: (found.type, found.shape) for found in self.runtime.get_inputs()}
        self.outputs = [found.name for found in self.runtime.get_outputs()]

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        values = self.runtime.run(self.outputs, {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(self.outputs, values, strict=True)}


@pytest.mark.parametrize(("style", "task", "tower"), CASES)
@torch.no_grad()
def test_onnxruntime_gives_what_the_model_gives(style: str, task: str | None, tower: Tower, tmp_path: Path) -> None:
    model = UNIT["random_model"](style, task)
    export_onnx(model, tmp_path / "model.onnx", tower)
    session = Session(tmp_path / "model.onnx")
    for count, length in ((1, 1), (4, 10), (3, 6)):  # traced with two sequences and three tokens
        inputs = UNIT["given"](tower, count, length, task)
        UNIT["assert_equal"](session(**inputs), UNIT["packed"](model, tower, inputs))


def test_axes_are_named_and_a_text_longer_than_the_position_table_is_refused(tmp_path: Path) -> None:
    export_onnx(UNIT["random_model"](), tmp_path / "model.onnx", "pair")
    session = Session(tmp_path / "model.onnx")
    assert session.inputs == {
        "images": ("tensor(float)", ["batch", 3, 12, 8]),
        "text_ids": ("tensor(int64)", ["batch", "text_length"]),
        "text_mask": ("tensor(bool)", ["batch", "text_length"]),
    }
    assert session(**UNIT["given"]("pair", 2, 10))["text"].shape == (2, 10, 32)
    with pytest.raises(Exception, match="out of data bounds"):
        session(**UNIT["given"]("pair", 2, 11))


@torch.no_grad()
def test_weights_in_a_second_file_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_INLINE_BYTES", 1000)
    model = UNIT["random_model"]()
    export_onnx(model, tmp_path / "first" / "model.onnx", "pair")
    (tmp_path / "first").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "model.onnx.data").stat().st_size > 50_000
    inputs = UNIT["given"]("pair", 3, 6)
    UNIT["assert_equal"](Session(tmp_path / "moved" / "model.onnx")(**inputs), UNIT["packed"](model, "pair", inputs))
