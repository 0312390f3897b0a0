"""Text tokenizer of the embedded emoji corpus.

Command:  beit3 train tokenizers/text_emoji.py --data DATA       (DATA: `beit3 prepare emoji --out DATA`)
Cost:     one second on a CPU
Result:   about 2,000 pieces; every caption in a few ids
"""

from beit3.config import replace
from beit3.pretrain.text_tokenizer import TextTokenizerRun


def recipe() -> TextTokenizerRun:
    """Unigram pieces over captions and keywords of the seen concepts."""
    return TextTokenizerRun(name="text_emoji", corpora=("text",), vocab_size=2000, character_coverage=1.0)


def debug() -> TextTokenizerRun:
    """A few hundred pieces."""
    return replace(recipe(), name="text_emoji_debug", vocab_size=300)
