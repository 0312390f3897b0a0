"""Ask questions about a picture.

    python examples/ask.py MODEL PICTURE "what is on the table?" ["how many people are there?" ...]

MODEL: a VQA model, such as the released beit3_base_patch16_480_vqa.pth with beit3.spm beside it. The release names no
answers: `beit3 convert FILE OUT --labels answer2label.txt` keeps the list that its data preparation wrote.
"""

import sys

import beit3


def main(source: str, picture: str, *questions: str) -> None:
    """Print the three likeliest answers to each question."""
    predictor = beit3.load(source)
    rankings = predictor.answer([picture] * len(questions), list(questions), top=3)
    for question, ranking in zip(questions, rankings, strict=True):
        print(question, " / ".join(f"{answer} ({score:.0%})" for answer, score in ranking))


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
