"""What `beit3 info` says of a model: task, shapes, counts by tower, how it is stored, what is missing around it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from beit3.data import labels as label_files
from beit3.data.preprocess import FILE as PREPROCESS_FILE
from beit3.data.preprocess import Preprocess
from beit3.errors import ConfigError
from beit3.model.exchange import CONFIG_FILE, read_tensors
from beit3.model.heads import AnyModel
from beit3.model.released_files import read_official
from beit3.model.store import load_model
from beit3.predict import RELEASED_TOKENIZER, TOKENIZER_FILE
from beit3.tokenizer.text import TextTokenizer


def load_described(source: Path) -> tuple[AnyModel, list[str]]:
    """Load a model and describe it; one that cannot be loaded is described by its tensors, then refused.

    Raises:
        ConfigError: what is wrong with the source.
    """
    tensors = read_tensors(source) if (source / CONFIG_FILE).is_file() else read_official(source)
    try:
        model = load_model(source)
    except ConfigError:
        print("\n".join([f"{source}: no model", _stored(tensors)]))
        raise
    return model, _describe(source, model, tensors)


def _describe(source: Path, model: AnyModel, tensors: Mapping[str, Tensor]) -> list[str]:
    config, is_folder = model.model_config, (source / CONFIG_FILE).is_file()
    height, width = config.image_size
    part = "" if model.part is None else f", {model.part} tower alone"
    rows, columns = config.grid
    return [
        f"{source}: {model.task or 'backbone'}{part}, {'exchange folder' if is_folder else 'released layout'}",
        f"  shape       {config.num_layers} layers of {config.width}, {config.num_heads} heads, FFN {config.ffn_width}",
        f"  attention   {config.attention}, {config.fusion_layers} fusion layers"
        + ("" if config.final_norm else ", no final norm"),
        f"  pictures    {height} x {width} pixels in {rows} x {columns} patches of {config.patch_size}; "
        + _preparation(source, model),
        f"  texts       {config.vocab_size:,} rows of words, at most {config.max_text_length} ids; "
        + _tokenizer(source, is_folder),
        *_outputs(source, model),
        f"  parameters  {model.num_parameters:,} ({_by_tower(model)})",
        _stored(tensors),
    ]


def _preparation(source: Path, model: AnyModel) -> str:
    if (source / CONFIG_FILE).is_file() and not (source / PREPROCESS_FILE).is_file():
        return f"no {PREPROCESS_FILE}"
    known = (source / PREPROCESS_FILE).is_file()
    found = Preprocess.read(source) if known else Preprocess.of_task(model.model_config, model.task)
    return f"{found.resize}, mean {' '.join(f'{value:g}' for value in found.mean)}" + (
        "" if known else " (as released)"
    )


def _tokenizer(source: Path, is_folder: bool) -> str:
    path = source / TOKENIZER_FILE if is_folder else source.with_name(RELEASED_TOKENIZER)
    return f"{path.name} has {len(TextTokenizer.load(path)):,} ids" if path.is_file() else f"no {path.name}"


def _outputs(source: Path, model: AnyModel) -> list[str]:
    lines = []
    for option, number in model.head_options.items():
        name = option.removeprefix("num_").replace("_size", " codes")
        labels = source / label_files.FILE
        known = f"; {labels.name} names {len(label_files.read_labels(labels)):,}" if labels.is_file() else ""
        lines.append(f"  outputs     {number:,} {name}{known}")
    return lines


def _by_tower(model: AnyModel) -> str:
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if model.task is not None and not name.startswith("backbone."):
            counts["heads"] += parameter.numel()
        else:
            counts[next((tower for tower in ("vision", "text", "fusion") if tower in name), "shared")] += (
                parameter.numel()
            )
    return ", ".join(
        f"{name} {counts[name] / 1e6:,.1f}M" for name in ("vision", "text", "shared", "fusion", "heads") if counts[name]
    )


def _stored(tensors: Mapping[str, Tensor]) -> str:
    types = Counter(str(value.dtype).removeprefix("torch.") for value in tensors.values())
    size = sum(value.nbytes for value in tensors.values())
    return f"  stored      {len(tensors):,} tensors as {' and '.join(types)}, {size / 1e6:,.1f} MB"
