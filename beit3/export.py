"""Models for other runtimes: `torch.export` programs and ONNX files.

Shapes: B sequences, N patches, T longest text, S tokens of a joined sequence, D width, H heads, W head width.

The packed engine of `beit3.model.transformer` depends on the length of every text, which no graph can hold. What leaves
the package is `PaddedTransformer`: the same parameters under dense attention with a key mask, tested equal. Task models
run their own code on top of it.
"""

from __future__ import annotations

import copy
import importlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from beit3.config import nearest, require
from beit3.errors import ConfigError
from beit3.model.build import AnyModel
from beit3.model.embeddings import TextEmbedding, VisionEmbedding
from beit3.model.heads import ClipModel, RetrievalModel
from beit3.model.multiway import MultiwayBlock
from beit3.model.task_model import TaskModel
from beit3.model.transformer import MultiwayTransformer, Output

Tower = Literal["image", "text", "pair"]
_MODALITIES: dict[str, tuple[str, ...]] = {"image": ("vision",), "text": ("text",), "pair": ("vision", "text")}
_INPUTS: dict[str, tuple[str, ...]] = {
    "image": ("images",),
    "text": ("text_ids", "text_mask"),
    "pair": ("images", "text_ids", "text_mask"),
}
_METHODS: dict[str, dict[str, str]] = {
    "retrieval": {"image": "encode_image", "text": "encode_text"},
    "clip": {"image": "encode_image", "text": "encode_text"},
    "classification": {"image": "forward"},
    "vqa": {"pair": "forward"},
    "nlvr2": {"pair": "forward"},
    "captioning": {"pair": "forward"},
    "superclass": {"image": "forward"},
}
"""What runs a tower of a task model. Backbones and pretraining models give their states instead."""
_INLINE_BYTES = 1_500_000_000
"""Most bytes of weights inside an ONNX file, which cannot exceed 2 GiB; more go into a second file."""


def export_program(model: AnyModel, tower: Tower) -> ExportedProgram:
    """Capture one tower of a model as a `torch.export` program.

    Inputs by name, with any B and T: `images` (B, 3, H, W), for nlvr2 (B, 2, 3, H, W), float32 of the model's own
    image size, normalised; `text_ids` (B, T) int64; `text_mask` (B, T) bool, True = real token.

    Outputs, a dictionary: `vision` (B, 1 + N, D) and `text` (B, T, D), as a backbone or a pretraining model returns
    them; `embeddings` (B, D) of unit length of a retrieval or clip model; `logits` of every other.

    Args:
        model: backbone or task model; it stays as it is, and the program shares its parameters.
        tower: "image", "text", or "pair": both, fused.

    Raises:
        ConfigError: the model has no such tower.
    """
    entry = _Entry(model, tower)
    config = model.model_config
    device = next(model.parameters()).device
    words = (2, min(3, config.max_text_length))
    images = (2, 2, 3) if model.task == "nlvr2" else (2, 3)
    examples = {
        "images": torch.zeros(*images, *config.image_size, device=device),
        "text_ids": torch.zeros(words, dtype=torch.int64, device=device),
        "text_mask": torch.ones(words, dtype=torch.bool, device=device),
    }
    batch, length = Dim("batch"), Dim("text_length", max=config.max_text_length)
    dynamic = {"images": {0: batch}, "text_ids": {0: batch, 1: length}, "text_mask": {0: batch, 1: length}}
    names = _INPUTS[tower]
    return torch.export.export(
        entry, (), {name: examples[name] for name in names}, dynamic_shapes={name: dynamic[name] for name in names}
    )


def export_onnx(model: AnyModel, path: Path | str, tower: Tower) -> None:
    """Write one tower of a model as an ONNX file; inputs and outputs are those of `export_program`.

    An export that is killed leaves no half file at `path`. Above 1.5 GB the weights stand in a second file, `path` with
    `.data` appended, which belongs beside the first.

    Args:
        model: backbone or task model.
        path: where, usually `*.onnx`; an older file of that name is replaced.
        tower: "image", "text", or "pair": both, fused.

    Raises:
        ConfigError: the model has no such tower, or a package of the extra `export` is missing.
    """
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(f"ONNX files need the package {package}: pip install 'beit3[export]'") from error
    program = export_program(model, tower)
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    names = _INPUTS[tower]
    written = torch.onnx.export(
        program,
        input_names=names,
        output_names=_output_names(model, tower),
        dynamic_shapes={  # names for the axes of the program, each said once
            name: ({0: "batch"} if name == names[0] else {}) | ({1: "text_length"} if name == "text_ids" else {})
            for name in names
        },
        dynamo=True,
        verbose=False,
    )
    assert written is not None
    _save(written, Path(path), separate_weights=size > _INLINE_BYTES)


def _save(written: torch.onnx.ONNXProgram, path: Path, *, separate_weights: bool) -> None:
    """Write beside the place, then rename: whenever this is killed, the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(f"{path.name}.data")
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.tmp-", dir=path.parent) as beside:
        written.save(Path(beside) / path.name, external_data=separate_weights)
        new_data = Path(beside) / data.name
        if new_data.exists() or data.exists():
            path.unlink(missing_ok=True)  # an old graph must not meet new weights, nor lose its own
            data.unlink(missing_ok=True)
        if new_data.exists():
            os.replace(new_data, data)
        os.replace(Path(beside) / path.name, path)


class PaddedTransformer(nn.Module):
    """A `MultiwayTransformer` without packing, for graphs: no shape and no branch depends on the data.

    It holds the very modules of the backbone that a tower runs through, under the same names.

    Args:
        backbone: whose parameters are shared.
        tower: "image", "text", or "pair": both, fused.
    """

    def __init__(self, backbone: MultiwayTransformer, tower: Tower) -> None:
        super().__init__()
        modalities = _MODALITIES[tower]
        if "vision" in modalities:
            self.vision_embedding = backbone.vision_embedding
        if "text" in modalities:
            self.text_embedding = backbone.text_embedding
        self.blocks = nn.ModuleList(_PaddedBlock(block, modalities) for block in backbone.layers())
        self.norm = nn.ModuleDict({name: backbone.norm[name] for name in modalities if name in backbone.norm})

    def forward(
        self,
        images: Tensor | None = None,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        causal_text: bool = False,
    ) -> Output:
        """Encode what the tower takes; arguments and result are those of `MultiwayTransformer.forward`."""
        parts: list[Tensor] = []
        num_vision = 0
        if images is not None:
            rows = self.vision_embedding(images.to(self.vision_embedding.patch.weight.dtype), image_mask)
            parts.append(rows.unflatten(0, (images.shape[0], -1)))
            num_vision = parts[0].shape[1]
        if text_ids is not None:
            parts.append(self.text_embedding(text_ids, torch.arange(text_ids.shape[1], device=text_ids.device)))
        x = torch.cat(parts, dim=1)  # (B, S, D)
        seen = _seen(x, num_vision, text_mask, causal_text)
        for block in self.blocks:
            x = block(x, num_vision, seen)
        vision, text = x[:, :num_vision], x[:, num_vision:]
        if "vision" in self.norm:
            vision = self.norm["vision"](vision)
        if "text" in self.norm:
            text = self.norm["text"](text)
        if text_mask is not None:
            text = torch.where(text_mask[..., None], text, 0.0)
        return Output(None if images is None else vision, None if text_ids is None else text)


class _PaddedBlock(nn.Module):
    """The parts of a `MultiwayBlock` that a tower runs through."""

    def __init__(self, block: MultiwayBlock, modalities: Sequence[str]) -> None:
        super().__init__()
        self.num_heads = block.num_heads
        self.attention_in = _reached(block.attention_in, modalities)
        self.attention_out = _reached(block.attention_out, modalities)
        self.ffn = _reached(block.ffn, modalities)

    def forward(self, x: Tensor, num_vision: int, seen: Tensor | None) -> Tensor:
        """Run the layer on (B, S, D), the image's tokens first; `seen` (B or 1, 1, S or 1, S) bool masks the keys."""
        qkv = _through(self.attention_in, x, num_vision)
        q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2))  # (B, H, S, W)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        x = x + _through(self.attention_out, mixed, num_vision)
        return x + _through(self.ffn, x, num_vision)


class _Entry(nn.Module):
    """What is traced: a model on the padded form of its backbone, with named inputs and outputs."""

    def __init__(self, model: AnyModel, tower: Tower) -> None:
        super().__init__()
        self.names = _output_names(model, tower)
        held = "text_backbone" if isinstance(model, ClipModel) and tower == "text" else "backbone"
        backbone = model if isinstance(model, MultiwayTransformer) else getattr(model, held)
        for name, embedding in (("vision", VisionEmbedding), ("text", TextEmbedding)):
            require(
                name not in _MODALITIES[tower] or isinstance(getattr(backbone, f"{name}_embedding", None), embedding),
                f"tower '{tower}': this model was loaded without its {name} tower: load it with parts=None",
            )
        self.model: nn.Module = PaddedTransformer(backbone, tower)
        self.method = "forward"
        if isinstance(model, TaskModel) and model.task in _METHODS:
            self.model = _on(self.model, model, held)
            self.method = _METHODS[model.task][tower]

    def forward(
        self, images: Tensor | None = None, text_ids: Tensor | None = None, text_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Run the model on the inputs of its tower."""
        inputs = {"images": images, "text_ids": text_ids, "text_mask": text_mask}
        out = getattr(self.model, self.method)(**{name: value for name, value in inputs.items() if value is not None})
        if isinstance(out, Output):
            return {name: getattr(out, name) for name in self.names}
        return {self.names[0]: out}


def _output_names(model: AnyModel, tower: Tower) -> tuple[str, ...]:
    """Names of what a tower gives; a ConfigError if the model has no such tower."""
    if tower not in _MODALITIES:
        raise ConfigError(f"unknown tower '{tower}'; {nearest(tower, _MODALITIES)}")
    if model.task is None or model.task == "pretraining":
        return _MODALITIES[tower]
    towers = _METHODS.get(model.task, {})
    if tower not in towers:
        has = f"export its {' or '.join(towers)} tower" if towers else "export its backbone"
        raise ConfigError(f"a {model.task} model has no {tower} tower: {has}")
    return ("embeddings",) if isinstance(model, RetrievalModel) else ("logits",)


def _on(padded: nn.Module, model: TaskModel, held: str) -> nn.Module:
    """The task model with another transformer and no other one; the heads are the same, the given model stays."""
    twin = copy.copy(model)
    heads = {name: part for name, part in model._modules.items() if not isinstance(part, MultiwayTransformer)}
    twin._modules = {**heads, held: padded}
    return twin


def _reached(experts: nn.ModuleDict, modalities: Sequence[str]) -> nn.ModuleDict:
    """The experts that sequences of these modalities run through: one for all rows, or one for each modality."""
    fused = ("fusion",) if len(modalities) > 1 else modalities
    names = next(names for names in (fused, modalities, ("shared",)) if all(name in experts for name in names))
    return nn.ModuleDict({name: experts[name] for name in names})


def _through(experts: nn.ModuleDict, x: Tensor, num_vision: int) -> Tensor:
    """Run rows (B, S, D) through their experts."""
    if len(experts) == 1:
        (expert,) = experts.values()
        out: Tensor = expert(x)
        return out
    return torch.cat([experts["vision"](x[:, :num_vision]), experts["text"](x[:, num_vision:])], dim=1)


def _seen(x: Tensor, num_vision: int, text_mask: Tensor | None, causal_text: bool) -> Tensor | None:
    """Which keys the rows of (B, S, D) see: bool, broadcast to (B, H, S, S); None = all."""
    seen = None
    if text_mask is not None:
        seen = torch.cat([text_mask.new_ones(x.shape[0], num_vision), text_mask], dim=1)[:, None, None]
    if causal_text:
        place = torch.arange(x.shape[1], device=x.device)
        past = (place <= place[:, None]) | (place < num_vision)
        seen = past if seen is None else past & seen
    return seen
