"""Captioning by a frozen language model that reads a frozen image tower: the yardstick ClipCap (2111.09734).

Only the mapper between them is trained, so the score says how much of a picture lies in the tower's feature.
Differences from the published code: captions end with the language model's own end, not at a full stop; the id 0
counts like any other; the learning rate falls along a cosine, not a line.
"""

from __future__ import annotations

from beit3.config import config, require
from beit3.finetune.prefix_task import PrefixConfig, PrefixTask


@config
class PrefixCaptioningConfig(PrefixConfig):
    """ClipCap's choices."""

    finetunes_language_model: bool = False
    """Train the language model too; the paper then takes `connector.kind` clipcap_mlp and a prefix of 10."""

    def __post_init__(self) -> None:
        PrefixConfig.__post_init__(self)
        require(not self.writing.asks, "captioning asks no question: leave {question} out of writing.template")

    @property
    def trains_language_model(self) -> bool:
        """As chosen."""
        return self.finetunes_language_model

    def build(self) -> PrefixCaptioning:
        """Build the Task, with random or given weights."""
        return PrefixCaptioning(self)


class PrefixCaptioning(PrefixTask[PrefixCaptioningConfig]):
    """Describe pictures; measured by CIDEr-D, BLEU and ROUGE-L of captions found by beam search.

    Its folder is read by `beit3.finetune.picture_reader.load_picture_reader`.
    """
