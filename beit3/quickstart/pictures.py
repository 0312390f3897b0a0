"""What the quickstart shows: hidden patches, hidden words, search results.

Shapes: P patch side, (h, w) grid of N patches, K codes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from markupsafe import Markup, escape
from PIL import Image

from beit3.data.emoji import HELD_OUT_VENDOR, TRAIN_VENDORS, EmojiCell, load_cells
from beit3.data.transforms import EvalResize, normalize
from beit3.model.heads import PretrainingModel
from beit3.predict import Predictor
from beit3.pretrain.masking import MaskConfig, block_mask
from beit3.tokenizer.vqkd import VQKD
from beit3.tokenizer_page import CodeBook
from beit3.train.report import Pixels, Section, inline_picture, tile

_SEED = 0


def training_codebook(tokenizer: VQKD) -> CodeBook:
    """Codes of the embedded corpus's training pictures."""
    view = EvalResize(tokenizer.config.image_size)
    cells = [cell for vendor in TRAIN_VENDORS for cell in load_cells(vendor, heldout=False)]
    return CodeBook(tokenizer, torch.stack([view(cell.image) for cell in cells]))


@torch.inference_mode()
def show_hidden_patches(
    section: Section, model: PretrainingModel, predictor: Predictor, book: CodeBook, number: int = 12
) -> None:
    """Held-out pictures with hidden patches, and the codes predicted for them."""
    random.seed(_SEED)
    np.random.seed(_SEED)
    config = model.backbone.config
    cells = _drawn(number)
    pictures = torch.stack([EvalResize(config.image_size)(cell.image) for cell in cells])
    count = MaskConfig().num_patches(config.grid)
    mask = torch.from_numpy(np.stack([block_mask(config.grid, count).reshape(-1) for _ in cells]))
    captions = [cell.caption for cell in cells]
    ids, text_mask = predictor.tokenizer.encode_batch(captions, predictor.preprocess.max_text_length)
    means = book.mean_patches()
    alone = model(images=normalize(pictures), image_mask=mask)
    paired = model(images=normalize(pictures), image_mask=mask, text_ids=ids, text_mask=text_mask)
    view = EvalResize(book.tokenizer.config.image_size)
    codes = book.tokenizer.tokenize(torch.stack([view(cell.image) for cell in cells]))
    columns = []
    for row in range(number):
        original = pictures[row].permute(1, 2, 0).numpy()
        hidden = np.flatnonzero(mask[row].numpy()).tolist()
        grey = np.full((*means.shape[1:],), 160, dtype=np.uint8)
        columns.append(original)
        columns.append(_patched(original, hidden, [grey] * len(hidden), config.patch_size))
        for found in (alone, paired):
            assert found.vision is not None
            guesses = model.mim_head(found.vision[row, 1:][hidden]).argmax(-1)
            columns.append(_patched(original, hidden, [means[int(code)] for code in guesses], config.patch_size))
        columns.append(_patched(original, hidden, [means[int(codes[row, p])] for p in hidden], config.patch_size))
    sheet = [columns[row * 5 + kind] for kind in range(5) for row in range(number)]
    section.picture(
        tile(sheet, number, gap=4),
        "Rows: held-out picture; what the model saw; predicted codes from the picture alone; predicted codes with the "
        "caption beside it; the true codes. A code is drawn as the average of the training patches that share it.",
        scale=2,
    )


def _patched(picture: Pixels, places: Sequence[int], patches: Sequence[Pixels], side: int) -> Pixels:
    """A copy of a picture with some patches replaced."""
    out = picture.copy()
    columns = picture.shape[1] // side
    for place, patch in zip(places, patches, strict=True):
        top, left = place // columns * side, place % columns * side
        out[top : top + side, left : left + side] = np.asarray(Image.fromarray(patch).resize((side, side)))
    return out


def show_hidden_words(section: Section, predictor: Predictor, number: int = 12) -> None:
    """Captions of held-out pictures with one word hidden, filled with the right picture, a wrong one, and none."""
    cells = [cell for cell in _drawn(6 * number) if len(cell.caption.split()) in (2, 3)][:number]
    rows = []
    for place, cell in enumerate(cells):
        words = cell.caption.split()
        hidden = place % len(words)
        length = len(predictor.tokenizer.encode(words[hidden])) - 2
        text = " ".join([*words[:hidden], *["<mask>"] * length, *words[hidden + 1 :]])
        wrong = cells[(place + len(cells) // 2) % len(cells)].image
        cases = [predictor.fill_mask(text, image, top=3) for image in (cell.image, wrong, None)]
        shown = [_candidates(case) for case in cases]
        rows.append([inline_picture(np.asarray(cell.image)), text, words[hidden], *shown])
    section.table(
        ["picture", "text shown", "hidden", "with the right picture", "with a wrong picture", "without"], rows, 6
    )


def _candidates(case: list[list[tuple[str, float]]]) -> Markup:
    """The three best pieces of each mask."""
    lines = [", ".join(f"{piece.replace(chr(0x2581), ' ').strip()} {value:.0%}" for piece, value in m) for m in case]
    return Markup("<br>").join(lines)


def show_gallery(section: Section, predictor: Predictor, number: int = 10, top: int = 5) -> None:
    """Captions found for held-out pictures, and held-out pictures found for captions."""
    cells = load_cells(HELD_OUT_VENDOR, heldout=False)
    images = predictor.embed_images([cell.image for cell in cells])
    texts = predictor.embed_texts([cell.caption for cell in cells])
    chosen = random.Random(_SEED).sample(range(len(cells)), number)
    rows = []
    for place in chosen:
        best = (images[place] @ texts.T).topk(top).indices.tolist()
        rows.append([inline_picture(np.asarray(cells[place].image)), *(_marked(cells, hit, place) for hit in best)])
    section.table(["picture", *(f"caption {rank}" for rank in range(1, top + 1))], rows, top + 1)
    rows = []
    for place in chosen:
        best = (texts[place] @ images.T).topk(top).indices.tolist()
        found = [
            inline_picture(np.asarray(cells[hit].image)) + Markup("<br>") + _marked(cells, hit, place) for hit in best
        ]
        rows.append([escape(cells[place].caption), *found])
    section.table(["caption", *(f"picture {rank}" for rank in range(1, top + 1))], rows, top + 1)


def _marked(cells: Sequence[EmojiCell], hit: int, place: int) -> Markup:
    style = "right" if cells[hit].caption == cells[place].caption else "wrong"
    return Markup('<span class="{}">{}</span>').format(style, cells[hit].caption)


def _drawn(number: int) -> list[EmojiCell]:
    return random.Random(_SEED).sample(load_cells(HELD_OUT_VENDOR, heldout=False), number)
