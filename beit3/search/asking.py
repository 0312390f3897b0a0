"""The commands `beit3 caption` and `beit3 answer`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from tyro.conf import Positional

from beit3.config import require
from beit3.predict import Predictor, load
from beit3.search.picture_rows import Device, Verb, at_model_size, run, settings_of


def caption(
    pictures: Positional[tuple[Path, ...]],
    *,
    model: str,
    out: Path | None = None,
    num_beams: int = 3,
    max_length: int = 32,
    length_penalty: float = 0.6,
    official: bool = False,
    image_size: int | None = None,
    tokenizer: Path | None = None,
    device: Device = "auto",
) -> None:
    """Describe pictures in a sentence each.

    Args:
        pictures: files and folders.
        model: exchange folder, hf-hub:organisation/name, or released .pth file of a captioning model.
        out: file of JSON lines (with scores) instead of the screen; pictures that are in it already, with the same
            model and settings, are left alone.
        num_beams: beams of the search.
        max_length: places of a text; a caption has three words less at most.
        length_penalty: power of the length that scores are divided by.
        official: search exactly as the released code, which may write `<unk>` and `<mask>`.
        image_size: side in pixels; left out, the model's own.
        tokenizer: `.spm` file of a released model; left out, `beit3.spm` beside it.
        device: where the model runs.
    """
    search: dict[str, Any] = {"num_beams": num_beams, "max_length": max_length, "length_penalty": length_penalty}
    search["official"] = official

    def describe(predictor: Predictor, images: Mapping[Path, Tensor]) -> list[dict[str, Any]]:
        """Captions and scores of a batch of pictures."""
        found = predictor.caption_scores(list(images.values()), **search)
        return [{"caption": text, "score": score} for text, score in found]

    run(
        pictures,
        lambda: load(model, device, image_size=image_size, tokenizer=tokenizer),
        Verb("captioning", at_model_size, describe, lambda row: str(row["caption"]), ("caption", "score")),
        settings_of(model=model, **search, image_size=image_size, tokenizer=tokenizer),
        out,
    )


def answer(
    pictures: Positional[tuple[Path, ...]],
    *,
    question: str,
    model: str,
    top: int = 1,
    out: Path | None = None,
    image_size: int | None = None,
    tokenizer: Path | None = None,
    labels: Path | None = None,
    device: Device = "auto",
) -> None:
    """Answer a question about pictures.

    Args:
        pictures: files and folders.
        question: asked of each of them.
        model: exchange folder, hf-hub:organisation/name, or released .pth file of a VQA model.
        top: answers for each.
        out: file of JSON lines instead of the screen; pictures that are in it already, with the same question, model
            and settings, are left alone.
        image_size: side in pixels; left out, the model's own.
        tokenizer: `.spm` file of a released model; left out, `beit3.spm` beside it.
        labels: names of the answers: `labels.json` or the released `answer2label.txt`.
        device: where the model runs.
    """
    require(top >= 1, f"--top must be at least 1, not {top}")

    def ask(predictor: Predictor, images: Mapping[Path, Tensor]) -> list[dict[str, Any]]:
        """The ranked answers of each picture."""
        found = predictor.answer(list(images.values()), [question] * len(images), top)
        return [{"answers": ranking} for ranking in found]

    def show(row: Mapping[str, Any]) -> str:
        """One row as a line for people."""
        return ", ".join(f"{name} ({score:.2f})" for name, score in row["answers"])

    run(
        pictures,
        lambda: load(model, device, image_size=image_size, tokenizer=tokenizer, labels=labels),
        Verb("answering", at_model_size, ask, show, ("answers",)),
        settings_of(question=question, model=model, top=top, image_size=image_size, tokenizer=tokenizer, labels=labels),
        out,
    )
