"""Write `pycocoevalcap.json`: captions of ours, their tokens by the Java tokenizer, and their published scores.

Run once, by hand, where Java runs and pycocoevalcap is importable (it brings the Java tokenizer; its own
requirements, pycocotools among them, are not needed):

    pip install --no-deps --target FOLDER pycocoevalcap==1.2
    PYTHONPATH=FOLDER python tests/parity/make_pycocoevalcap_scores.py
"""

# ruff: noqa: RUF001 - signs that look alike are the point of the sentences

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("pycocoevalcap.json")
NUM_MIXED = 600

HARD_SENTENCES = (
    # Brackets, quotes, apostrophes.
    "A man (left) isn't \"happy\" -- don't you think?",
    "The café’s sign says “STOP!” & ‘go’ {now} [please].",
    "«Bonjour» says the „sign‟, ‹quietly› … or not",
    "The women's and the boys' T-shirts, 'em all, rock 'n' roll, ol' Joe's Dunkin' Donuts",
    "It's 5 o'clock and he's sure they're 'bout to say: \"we'd've, y'all, I'm gonna, can't, won't\"",
    "'Tis the cat that cannot; 'twas the dog I wanna see, gimme, lemme, gotta go",
    "O'Brien's cap'n ate s'mores at Xi'an, l'eau d'or, 'til the '90s and in '99 and '99",
    "''double'' ``latex'' quotes `single' and 5'10\" tall, 6'2'' wide",
    # Hyphens and dashes.
    "A black-and-white, four-year-old T-shirt -- well-worn - pre- and post-war, anti- and pro-tank",
    "a dog - cat--bird---fish----cow-----end a—b a–b a‐b a‑b _under_score_ co_ed",
    "A Boeing 747-400 and an F-16, B-52s, 3-D and 3D, A-1, non-U.S. planes",
    # Full stops.
    "The St. Louis Cardinals vs. Mr. Smith Jr. at 5 p.m. on Jan. 5, etc.",
    "Mass. is in the U.S. The mass. The Del. river, the del. key, Calif., Inc., and so on. Fig. 3, No. 5, no. five",
    "Dr. Who's Ph.D. at 10 a.m., a.k.a. J. R. Smith of U.S.A., e.g. here i.e. there",
    "a dog.A cat.a bird . . . and .... ..... end..",
    "wait...5 dogs, AT&T., R&B.; PTY. Ltd., Pty. limited, S&P-500 S&amp;Ls S&Ls",
    "St. Mary's on Sunset Blvd. near Elm St.",
    "vitamin C.",
    "A man stands at gate B.",
    "Two men stand at gate B.",
    "plan A.",
    "the end of line 2.",
    # Numbers, money, measures.
    "1/2 cup, 1 1/2 cups, 3-1/2 in, ½ cup, ¾ and ⅓, 24/7, 9/11/2001, 12-25-14",
    "$5.00, US$ 7, £3, €2, ¥100, 20¢, 50%, #1, # 2, +3 and -4, 1,000,000, 3.14, .5, 10:30",
    "on 12/25-2014 or 25-12/2014, ++44.20.123.4567, o'o O'O, x-U.S.-U.K.e.g. non-U.S.",
    "Call (555) 123-4567 or 555-123-4567 or 555.123.4567 or ++44 20 1234 5678",
    "x² + y³ = 10° ± 5 × 2 ÷ 3, H₂O, 1st 2nd 20s 1990s mp3 A1",
    # Signs, faces, emoji, other scripts.
    "smile :) :-( ;D =P <3 ^_^ -_- (^^) (-.-) >:( <:o) @_@",
    "😀 a dog 🐕 runs ☀ ★ ♥ ❤️ → ✓ ™ © ® • 👨‍👩‍👧 a😀b",
    "cafe\u0301 naïve Ümlaut ŒUVRE İstanbul ΣΊΣΥΦΟΣ straße ﬁne so\u00adft \u00ad \u200bzero\u200bwidth\ufeff",
    "一只狗 在 公园、里。 한국어 개 привет мир हिन्दी कुत्ता שלום عربى ไทย",
    "100 % wow!! really?! yes!!! no? a/b and/or his/her w/ w/o \\ | ~ ^ * ** _ __ ## @@",
    # Addresses and markup.
    "see http://www.example.com/a?b=1, www.foo.co.uk/x.html?y=2 or foo.com. or Foo-Bar.Org, me@foo.com <you@bar.org>",
    "@home #tag #1 C++ c# AT&T at&t R&B file.jpg, 3d.png IMG_0001.JPG a.c",
    "<b>bold</b> <a href='x y'>link</a> <br/> x<y>z << >>",
    "<a href='never closed",
    'before this line\'> and on, <!-- note --> </p> <br clear="all" />',
    "&amp; &lt;tag&gt; &quot;q&quot; caf&eacute; &nbsp; &#39; &mdash; it&apos;s",
    # Nearly nothing.
    "",
    "   ",
    "...",
    "?",
    "a",
    "\ta\u00a0dog\u3000runs\u2003fast  ",
)
"""One per difficulty that captions hold, and some that they hardly do. The order matters: see `tokenize_captions`."""

FRAGMENTS = (
    "a A I the The man Man dog's women's can't Cannot wanna 'tis y'all he's They're we've etc Etc St st "
    "Mr Jr Mass mass U.S u.s. U.S.-U.K a.m. Ph.D No no Fig 5 12 3.5 1,000 1/2 10:30 12/25/2014 555-1234 "
    "(555)123-4567 $ US$ # #tag @home me@x.com http://a.b/c?d=e, www.foo.co.uk/x foo.com foo.org/bar. "
    "file.jpg C++ AT&T x&amp;y &lt; &quot; &eacute; <b> <br/> :) ;D <3 ^_^ (^^) t-shirt a--b --- ---- "
    "----- - -- ... .... . … !! ?! ? ! ; : , ' '' ` `` \" “ ” ‘ ’ « ( ) [ ] { } / // \\ | ~ ^ _ * ** % & + "
    "= < > << ½ x² £ € ¢ ° ™ ★ 😀 é É ß 日本語 'em 'till '90s '99 ol' cont'd. li'l d'oh Cap'n c'est pro- 's "
    "'t n't N'Sync Shi'ite nor'easter c'mon and/or 5'10 1990s B-52 747-400 3-D e.g. i.e. p. Alex. Blvd. "
    "Jan. Jan.5 Inc., Ltd; x.: About Two IF So so "
)
SEPARATORS = (*(" " * 12), "", "", "", ",", ", ", ".", ". ", "  ", "\u00a0", "'", '"', "-", "/", "!", "&")

IMAGES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a red fox sleeps in the snow", ("a red fox sleeps in the snow", "A fox is asleep, curled up in the snow.")),
    (
        "a man riding a wave on top of a surfboard",
        (
            "A man rides a wave on his surfboard.",
            "The surfer's balancing on a big wave!",
            "A man in a wet-suit surfing",
            "surfer on a wave",
            "A person riding a large ocean wave on a white surfboard in the late afternoon.",
        ),
    ),
    ("a a a a a a a", ("A clock tower.", 'a tall clock-tower with a "Roman" face')),
    ("", ("An empty caption was generated for this one.",)),
    ("...", ("Nothing but punctuation came out here.", "...")),
    ("a cat", ("A cat (black & white) is lying on Mr. Smith's laptop.", "cat on a laptop", "a cat")),
    (
        "two dogs are playing with a ball in the park near the old bench and a very tall tree with no leaves on it",
        ("Two dogs play with a ball.", "2 dogs playing in the park"),
    ),
    ("A plate of food with 1/2 a sandwich & fries.", ("A plate with half a sandwich and fries", "1/2 sandwich, fries")),
    ('a stop sign that says "STOP"', ("A stop sign which reads 'stop'", "The sign says “STOP!”", "red stop sign")),
    (
        "a woman is talking on a cell-phone",
        ("A woman talks on her cellphone.", "woman talking on a cell phone", "a lady"),
    ),
    ("a train traveling down train tracks", ("A train travels down the tracks.", "a train on the train tracks")),
    ("train tracks", ("A train travels down the tracks at 5 p.m.", "The U.S. train isn't moving")),
    ("the the cat sat", ("the cat sat on the mat", "the cat the cat")),
    ("a bowl of fruit :)", ("A bowl full of fruit :-)", "bowl of bananas, apples, oranges, etc.")),
    ("ein Hund läuft über die Straße", ("Ein Hund läuft über die Straße.", "ein Hund rennt")),
    ("a giraffe standing next to a tree", ("A giraffe standing next to a tree.",)),
    ("a group of people standing around", ("People stand around a table.", "a group of friends", "people standing")),
    ("a toilet in a bathroom", ("A white toilet sits in a small bathroom.", "A toilet in a bathroom.", "toilet")),
    (
        "a bird perched on a branch",
        ("A bird's on a branch", "bird perched on branch", "A bird perched on a tree branch."),
    ),
    ("zzz qqq xxx", ("A completely different caption.", "Another one, different from both.")),
)
"""A generated caption and the human ones of each image, all hand-written."""


def mixed_sentences(count: int, seed: int) -> list[str]:
    """Fragments put together at random, the same for the same seed."""
    draw, fragments = random.Random(seed), FRAGMENTS.split()
    return [
        "".join(draw.choice(fragments) + draw.choice(SEPARATORS) for _ in range(draw.randint(1, 8)))
        for _ in range(count)
    ]


def java_tokens(captions: Sequence[str]) -> list[str]:
    """Tokens of captions by pycocoevalcap, that is by Java."""
    tokenizer = importlib.import_module("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    found = tokenizer.tokenize({place: [{"caption": caption}] for place, caption in enumerate(captions)})
    return [found[place][0] for place in range(len(captions))]


def published_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Scores of tokenised captions by pycocoevalcap: of the set, and of each image for ROUGE-L and CIDEr."""
    bleu = importlib.import_module("pycocoevalcap.bleu.bleu").Bleu(4)
    rouge = importlib.import_module("pycocoevalcap.rouge.rouge").Rouge()
    cider = importlib.import_module("pycocoevalcap.cider.cider").Cider()
    given = {place: [caption] for place, caption in enumerate(candidates)}
    known = {place: list(captions) for place, captions in enumerate(references)}
    rouge_l, rouge_l_each = rouge.compute_score(known, given)
    cider_d, cider_d_each = cider.compute_score(known, given)
    bleus = bleu.compute_score(known, given, verbose=0)[0]
    return {
        "set": {
            **{f"bleu_{n}": float(score) for n, score in enumerate(bleus, start=1)},
            "rouge_l": float(rouge_l),
            "cider": float(cider_d),
        },
        "rouge_l": [float(score) for score in rouge_l_each],
        "cider": [float(score) for score in cider_d_each],
    }


def main() -> None:
    """Write the file and say how large it is."""
    sentences = [*HARD_SENTENCES, *mixed_sentences(NUM_MIXED, seed=20)]
    candidates = java_tokens([caption for caption, _ in IMAGES])
    flat = iter(java_tokens([caption for _, captions in IMAGES for caption in captions]))
    references = [[next(flat) for _ in captions] for _, captions in IMAGES]
    content = {
        "sentences": list(zip(sentences, java_tokens(sentences), strict=True)),
        "images": [{"candidate": caption, "references": captions} for caption, captions in IMAGES],
        "tokens": {"candidates": candidates, "references": references},
        "scores": published_scores(candidates, references),
    }
    FILE.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{FILE.name}: {len(sentences)} sentences, {len(IMAGES)} images, {FILE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
