"""What a file or folder holds: a model, a tokenizer, prepared data, checkpoints; and a page about a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from tyro.conf import Positional

from beit3.checkpoint_info import CheckpointReport, describe_checkpoints, holds_checkpoints
from beit3.config import require
from beit3.data.shard_writer import PrepareReport
from beit3.data.shards import REPORT_FILE
from beit3.data.source import TOKENIZER_FILE, find_source
from beit3.data.verify import verify_folder
from beit3.data.visual_codes import SETTINGS_FILE, CodeTable
from beit3.errors import BadDataError, ConfigError, DataMissingError
from beit3.model.build import AnyModel
from beit3.model.exchange import CONFIG_FILE, read_tensors
from beit3.model.released_files import read_official
from beit3.model.store import load_model
from beit3.model_info import describe_model, describe_tensors
from beit3.tokenizer.official import is_visual_tokenizer, load_visual_tokenizer
from beit3.tokenizer.teachers import KINDS, TeacherConfig, read_teacher
from beit3.tokenizer.text import TextTokenizer
from beit3.tokenizer.vqkd import VQKD
from beit3.tokenizer_page import load_pictures, write_tokenizer_page
from beit3.train.folder import EXPORT, RUN_FILE

Held = VQKD | AnyModel | TextTokenizer | CodeTable | PrepareReport | CheckpointReport | ConfigError
"""What a source holds; a `ConfigError` says why weights are none of these."""


def info(
    source: Positional[Path],
    *,
    page: Path | None = None,
    images: Path | None = None,
    number: int = 2000,
    teacher: str | None = None,
    teacher_size: int = 224,
    verify: bool = False,
) -> None:
    """Say what a file or folder holds; for a visual tokenizer, write a page of what its codes mean.

    Args:
        source: folder of a run or its export, "hf-hub:organisation/name", released `.pth` file, `.spm` file, prepared
            data, recorded codes, or the `checkpoints` of a run or one of them, whose files are verified.
        page: HTML file to write about a visual tokenizer; needs `images`.
        images: prepared folder whose pictures the page shows.
        number: pictures of the page, drawn at random.
        teacher: KIND:NAME of the teacher to compare with, such as clip:openai/clip-vit-base-patch16 or timm:FOLDER;
            left out, the one the tokenizer's folder names. Released files name none.
        teacher_size: side in pixels of what that teacher sees.
        verify: read every byte of prepared data and name what is damaged.

    Raises:
        BadDataError: prepared data are damaged.
    """
    require((page is None) == (images is None), "a page needs both --page and --images")
    require(number >= 1, f"--number must be at least 1, not {number}")
    place, held, lines = open_source(source)
    print("\n".join(lines))
    if isinstance(held, ConfigError):
        raise held
    if isinstance(held, CheckpointReport):
        held.require_whole()
    if verify:
        require(isinstance(held, PrepareReport), f"{source} is no prepared data: --verify reads those alone")
        _verify(place)
    if page is None or images is None:
        return
    if not isinstance(held, VQKD):
        raise ConfigError(f"{source} is no visual tokenizer: pages are written about those alone")
    own = read_teacher(place) if place.is_dir() else None
    compared = own if teacher is None else _parse_teacher(teacher, teacher_size)
    pictures = load_pictures(images, held.config.image_size, number)
    lead = f"{_tokenizer_line(held)}. Shown on {len(pictures):,} pictures of {images.name}."
    title = f"Visual tokenizer {place.parent.name if place.name == EXPORT else place.stem}"
    run = place.parent if place.name == EXPORT else None
    write_tokenizer_page(page, held, pictures, title=title, lead=lead, teacher=compared, run=run)
    print(f"{page}: written")


def _verify(folder: Path) -> None:
    """Compare prepared data with what was recorded when they were written."""
    damaged = verify_folder(folder)
    print("\n".join(damaged) if damaged else "  verified    every file and sample is as it was written")
    if damaged:
        raise BadDataError(f"{folder} is damaged ({len(damaged)} lines above): restore it, or prepare it again")


def open_source(source: Path) -> tuple[Path, Held, list[str]]:
    """Open whatever a source is; also returns the place within a run's folder, and what to say of it.

    Raises:
        DataMissingError: the source does not exist, or is a run that has not finished.
        ConfigError: it is none of the known kinds, or damaged.
    """
    source = find_source(source).path
    if (source / RUN_FILE).is_file() or (source / EXPORT).is_dir():
        if not (source / EXPORT).is_dir():
            raise DataMissingError(f"{source} is a run that has not finished: call `beit3 train` with --resume first")
        source = source / EXPORT
    if (source / TOKENIZER_FILE).is_file() and not (source / CONFIG_FILE).is_file():
        source = source / TOKENIZER_FILE
    if (source / REPORT_FILE).is_file():
        report = _read_report(source / REPORT_FILE)
        return source, report, report.lines()
    if (source / SETTINGS_FILE).is_file():
        codes = CodeTable(source)
        return source, codes, _describe_codes(source, codes)
    if source.suffix == ".spm":
        text = TextTokenizer.load(source)
        return source, text, [f"{source}: text tokenizer", f"  ids         {len(text):,}, <mask> is {text.mask_id}"]
    if not (source / CONFIG_FILE).is_file() and holds_checkpoints(source):
        checkpoints = describe_checkpoints(source)
        return source, checkpoints, checkpoints.lines
    deepspeed = (source / "latest").is_file() or any(source.glob("mp_rank_*"))
    if not (source / CONFIG_FILE).is_file() and not source.is_file() and not deepspeed:
        raise ConfigError(f"{source} holds no model, tokenizer, prepared data, codes or checkpoints")
    return source, *_open_weights(source)


def _open_weights(place: Path) -> tuple[Held, list[str]]:
    """Load a visual tokenizer or a model; of what is neither, the tensors are described."""
    source = find_source(place)
    tensors = read_tensors(place) if source.is_folder else read_official(place)
    if source.is_visual_tokenizer or (not source.is_folder and is_visual_tokenizer(tensors)):
        tokenizer = load_visual_tokenizer(place)
        teacher = read_teacher(place) if source.is_folder else None
        return tokenizer, _describe_tokenizer(place, tokenizer, teacher)
    try:
        model = load_model(place)
    except ConfigError as error:
        return error, [f"{place}: no model", describe_tensors(tensors)]
    return model, [*describe_model(source, model), describe_tensors(tensors)]


def _read_report(path: Path) -> PrepareReport:
    try:
        return PrepareReport(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}): prepare the data again") from error


def _describe_codes(source: Path, codes: CodeTable) -> list[str]:
    record = codes.settings
    crops = f"{record['crops']} crops each, {record['codebook_size']:,} codes"
    return [f"{source}: visual tokens of {len(codes):,} pictures, {crops}, tokenizer {record['tokenizer']}"]


def _describe_tokenizer(source: Path, tokenizer: VQKD, teacher: TeacherConfig | None) -> list[str]:
    lines = [f"{source}: visual tokenizer (VQ-KD)", f"  shape       {_tokenizer_line(tokenizer)}"]
    values = tokenizer.quantize.statistics()
    if float(tokenizer.quantize.usage.sum()):
        use = f"{float(values['codebook_use']):.1%}, perplexity {float(values['perplexity']):,.0f}"
        lines.append(f"  use         {use} (moving average of training)")
    if teacher is not None:
        named = "" if teacher.kind == "efficientnet_lite0" else f" {teacher.name}"
        lines.append(f"  teacher     {teacher.kind}{named} at {teacher.image_size} pixels")
    return [*lines, f"  parameters  {sum(parameter.numel() for parameter in tokenizer.parameters()):,}"]


def _parse_teacher(text: str, size: int) -> TeacherConfig:
    kind, _, name = text.partition(":")
    for known in KINDS:
        if kind == known:
            return TeacherConfig(kind=known, name=name, image_size=size)
    raise ConfigError(f"--teacher takes KIND:NAME with a KIND of {', '.join(KINDS)}, not '{text}'")


def _tokenizer_line(tokenizer: VQKD) -> str:
    own = tokenizer.config
    height, width = own.image_size
    return (
        f"{own.codebook_size:,} codes of {own.code_width}, {height} x {width} pixels in patches of {own.patch_size}, "
        f"encoder of {own.depth} layers and decoder of {own.decoder_depth}, width {own.width}"
    )
