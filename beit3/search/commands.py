"""The commands `beit3 embed` and `beit3 search`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from beit3.config import require
from beit3.model.heads import RetrievalModel
from beit3.predict import load
from beit3.search.contact_sheet import check_sheet, contact_sheet, save_sheet
from beit3.search.embed import embed_folder
from beit3.search.index import Index, embed_queries, names_picture
from beit3.search.pictures import printable


def embed(
    folder: Positional[Path],
    *,
    model: str,
    out: Path,
    update: bool = False,
    image_size: int | None = None,
    tokenizer: Path | None = None,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
) -> None:
    """Embed all pictures below a folder and write an index; if interrupted, the same command goes on.

    Args:
        folder: of pictures, with sub-folders.
        model: exchange folder, hf-hub:organisation/name, or released .pth file.
        out: folder of the index.
        update: embed only what is new or changed since the index was made, and drop what is gone.
        image_size: side in pixels; left out, the model's own.
        tokenizer: `.spm` file of a released model; left out, `beit3.spm` beside it.
        device: where the model runs.
    """
    try:
        report = embed_folder(
            folder, model, out, update=update, image_size=image_size, tokenizer=tokenizer, device=device
        )
    except KeyboardInterrupt:
        print("what is embedded is kept: the same command goes on from there", file=sys.stderr)
        raise
    print("\n".join(report.lines(out)))


def search(
    index: Positional[Path],
    queries: Positional[tuple[str, ...]],
    *,
    top: int = 10,
    model: str | None = None,
    sheet: Path | None = None,
) -> None:
    """Print the pictures nearest to each query, with scores (cosines), best first.

    Args:
        index: folder written by `beit3 embed`.
        queries: sentences, or paths of pictures.
        top: pictures of each query.
        model: as for beit3 embed; needed only if the one the index was made with has moved.
        sheet: picture file (.png, .jpg, .webp) to draw the hits on.
    """
    require(bool(queries), "beit3 search needs a sentence or the path of a picture: beit3 search INDEX QUERY ...")
    held = Index.load(index)
    if sheet is not None:
        check_sheet(sheet, queries, held)
    source = model or held.settings.model
    predictor = load(source, image_size=held.settings.image_size, tokenizer=held.settings.tokenizer)
    if not held.made_with(predictor, source):
        changed = f"{held.settings.model} has changed since {index} was made"
        require(model is not None, f"{changed}: embed the folder again, or name the old model with --model")
        print(f"note: {model} is not the model {index} was made with", file=sys.stderr)
    if not isinstance(predictor.model, RetrievalModel) and not all(map(names_picture, queries)):
        print("note: this model was not tuned for retrieval: sentences find little", file=sys.stderr)
    found = held.search(embed_queries(predictor, queries), top)
    for number, (query, hits) in enumerate(zip(queries, found, strict=True)):
        if len(queries) > 1:
            print("\n" * (number > 0) + printable(query))
        print("\n".join(f"{hit.score:.3f}  {printable(_from_here(hit.path))}" for hit in hits))
    if sheet is not None:
        save_sheet(contact_sheet(queries, found), sheet)


def _from_here(path: Path) -> Path:
    """A path below the current folder without what leads there."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
