"""How a picture, a question and an answer lie in the text of a language model.

A template such as "USER: {image} {question} ASSISTANT:" holds the picture's place once; what stands before it is the
opening of every sequence, what follows is the prompt, and the answer comes behind the prompt.
"""

from __future__ import annotations

from beit3.config import check_types, config, require
from beit3.errors import BadSampleError
from beit3.finetune.language_model import Words

_IMAGE, _QUESTION = "{image}", "{question}"


@config
class WritingConfig:
    """How texts are put to a language model, and how it writes."""

    template: str = _IMAGE
    """The words around a picture: `{image}` once, `{question}` at most once behind it."""
    max_text_length: int = 64
    """Longest prompt and answer together, in ids, in training; longer answers are cut."""
    max_new_tokens: int = 32
    """Longest text that is written, in ids."""
    num_beams: int = 5
    """1 is greedy."""
    length_penalty: float = 1.0
    """A beam's log-probability is divided by its length to this power."""

    def __post_init__(self) -> None:
        check_types(self, "writing")
        for name in ("max_text_length", "max_new_tokens", "num_beams"):
            require(getattr(self, name) >= 1, f"writing.{name} must be at least 1, not {getattr(self, name)}")
        before, _, after = self.template.partition(_IMAGE)
        require(
            self.template.count(_IMAGE) == 1 and before.count(_QUESTION) == 0 and after.count(_QUESTION) <= 1,
            f"writing.template must hold {_IMAGE} once, and {_QUESTION} at most once behind it, not '{self.template}'",
        )

    @property
    def asks(self) -> bool:
        """Whether a question belongs to each picture."""
        return _QUESTION in self.template


class Conversation:
    """Makes ids of questions and answers.

    Args:
        words: of the language model.
        config: the template and the longest text.
    """

    def __init__(self, words: Words, config: WritingConfig) -> None:
        before, _, after = config.template.partition(_IMAGE)
        self.words = words
        self.opening = words.opening(before)
        self.asks = config.asks
        self.max_length = config.max_text_length
        self._start, _, self._end = after.partition(_QUESTION)

    def prompt(self, question: str = "") -> list[int]:
        """Ids behind the picture, up to where the answer begins.

        Raises:
            BadSampleError: `prompt_too_long`, no room is left for an answer.
        """
        return self._prompt(self._text(question))

    def example(self, question: str, answer: str) -> tuple[list[int], int]:
        """A prompt with its answer and the id that ends it; an answer that does not fit is cut, end and all.

        Returns:
            All ids, and how many of them are the prompt.

        Raises:
            BadSampleError: `prompt_too_long`.
        """
        text = self._text(question)
        prompt = self._prompt(text)
        gap = " " if text and not text[-1].isspace() else ""
        whole = self.words.encode(f"{text}{gap}{answer}")
        # Read in one piece, so that the answer's first word has its space; but the prompt must be what it is alone.
        fits = whole[: len(prompt)] == prompt
        ids = whole if fits else [*prompt, *self.words.encode(f"{gap}{answer}")]
        return [*ids, self.words.end_id][: self.max_length], len(prompt)

    def _text(self, question: str) -> str:
        return f"{self._start}{question}{self._end}"

    def _prompt(self, text: str) -> list[int]:
        ids = self.words.encode(text)
        if len(ids) >= self.max_length:
            raise BadSampleError("prompt_too_long", f"{len(ids)} ids, with room for {self.max_length - 1}")
        return ids
