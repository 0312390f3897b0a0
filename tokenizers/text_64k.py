"""Text tokenizer of official size: 64,000 unigram pieces, 64,002 ids.

Command:  beit3 train tokenizers/text_64k.py --data DATA         (DATA/text: `beit3 prepare text ... --out DATA/text`)
Cost:     hours on one machine for a corpus of some gigabytes
Note:     to continue from official weights take their `beit3.spm` instead; ids must be the same
"""

from beit3.config import replace
from beit3.pretrain.text_tokenizer import TextTokenizerRun


def recipe() -> TextTokenizerRun:
    """Over the texts and the captions of the pretraining data."""
    return TextTokenizerRun(name="text_64k", corpora=("text", "pairs"), vocab_size=64_000)


def debug() -> TextTokenizerRun:
    """A few hundred pieces."""
    return replace(recipe(), name="text_64k_debug", vocab_size=300)
