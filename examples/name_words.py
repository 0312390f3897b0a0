"""What a SuperClass model names in held-out pictures: its likeliest words beside the true caption, on one page.

    beit3 train pretrain/superclass_emoji.py --data DATA
    python examples/name_words.py runs/superclass_emoji/export DATA/test_vendor words.html [NUMBER]

MODEL: folder of a SuperClass model; PAIRS: a prepared folder of pairs, as `beit3 prepare` writes it.
"""

import random
import sys
from pathlib import Path

import numpy as np
from markupsafe import Markup

import beit3
from beit3.data.images import decode_image
from beit3.data.shards import load_prepared
from beit3.data.texts import clean_text
from beit3.train.report import Report, inline_picture

WORDS = 8
SIDE = 64
"""Pixels of a picture on the page."""


def main(source: str, pairs: str, page: str, number: str = "40") -> None:
    """Name the words of some pictures, drawn with a fixed seed, and write the page."""
    predictor = beit3.load(source)
    samples = list(load_prepared(Path(pairs)))
    chosen = random.Random(0).sample(samples, min(int(number), len(samples)))
    pictures = [decode_image(sample.image or b"") for sample in chosen]
    assert predictor.words is not None
    rows, found = [], 0
    for sample, picture, ranking in zip(chosen, pictures, predictor.predict_words(pictures, top=WORDS), strict=True):
        caption = clean_text(sample.text)
        true = {predictor.words.subwords.word(index) for index in predictor.words.subwords.encode(caption)}
        shown = [
            Markup("<b>{} {:.0f}</b>" if word in true else "{} {:.0f}").format(word, 100 * chance)
            for word, chance in ranking
        ]
        found += any(word in true for word, _ in ranking)
        thumbnail = np.asarray(picture.resize((SIDE, SIDE)))
        rows.append([inline_picture(thumbnail), caption, Markup(", ").join(shown)])
    report = Report("Words in pictures", f"{source} on {pairs}: chances in percent, words of the true caption in bold.")
    section = report.section(f"{len(rows)} pictures")
    section.text(f"Of {len(rows)} pictures, {found} have a word of their caption among the likeliest {WORDS}.")
    section.table(["picture", "true caption", "likeliest words"], rows, text_columns=3)
    report.save(Path(page))
    print(f"{page}: {found} of {len(rows)} pictures have a word of their caption among the likeliest {WORDS}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
