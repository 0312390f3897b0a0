"""A language model connected to a frozen image tower in two stages: the yardstick LLaVA (2304.08485, 2310.03744).

`align` trains the projector of the patches on captions, in front of a frozen language model. `instruct` goes on from
there, trains projector and language model on questions, and is measured by the answers that are written.
Difference from the published code: patches are read behind the tower's final norm, not before its last block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Self

from beit3.config import config, replace, require
from beit3.data.index_files import Fields, Index, VQARow, VQATrainingRow, read_index
from beit3.data.labels import find_labels, read_labels
from beit3.data.texts import clean_text
from beit3.errors import BadSampleError
from beit3.finetune.common import Predictions
from beit3.finetune.conversation import WritingConfig
from beit3.finetune.prefix_task import PrefixBatch, PrefixConfig, PrefixTask, Said, SpokenExamples
from beit3.finetune.vqa import measure_consensus
from beit3.metrics.vqa_accuracy import normalize_answer
from beit3.model.prefix_language_model import ConnectorConfig

ALIGN_TEMPLATE = "{image} Describe the picture."
INSTRUCT_TEMPLATE = "{image} {question} Answer:"


@config
class LanguageBridgeConfig(PrefixConfig):
    """LLaVA's choices."""

    stage: Literal["align", "instruct"]
    """`align`: captions, the projector alone; `instruct`: questions, projector and language model."""
    connector: ConnectorConfig = ConnectorConfig(kind="llava_mlp")
    writing: WritingConfig = WritingConfig(template=ALIGN_TEMPLATE, num_beams=1)
    labels: Path | None = None
    """`labels.json` with the answers that the index files' labels number, in the data folder or elsewhere; the best
    label of a row is what is learned. None: the answer that most people gave."""

    def __post_init__(self) -> None:
        PrefixConfig.__post_init__(self)
        require(
            self.writing.asks == (self.stage == "instruct"),
            "writing.template must hold {question} in the stage instruct, and only there",
        )

    @property
    def trains_language_model(self) -> bool:
        """In the second stage."""
        return self.stage == "instruct"

    def build(self) -> LanguageBridge:
        """Build the Task, with random or given weights."""
        return LanguageBridge(self)

    def in_folder(self, data: Path) -> Self:
        """With the labels that lie in the data folder."""
        return self if self.labels is None else replace(self, labels=find_labels(self.labels, data))


class AnsweredRow(VQARow):
    """A question with at least one answer that people gave."""

    __slots__ = ()

    @classmethod
    def parse(cls, fields: Fields) -> AnsweredRow:
        """Read a row."""
        row = super().parse(fields)
        if not any(answer.strip() for answer in row.answers):
            raise BadSampleError("no_answer", f"question {row.qid}")
        return row


class LanguageBridge(PrefixTask[LanguageBridgeConfig]):
    """Describe pictures (`align`) or answer questions about them (`instruct`).

    Its folder is read by `beit3.finetune.picture_reader.load_picture_reader`; `init_from` of the second stage takes
    the first one's.
    """

    def __init__(self, config: LanguageBridgeConfig) -> None:
        super().__init__(config)
        self.answers = None if config.labels is None else read_labels(config.labels)

    def examples(self, paths: Sequence[Path], *, training: bool) -> SpokenExamples[Any]:
        """Captions, or questions; those for training need an answer."""
        if self.config.stage == "align":
            return super().examples(paths, training=training)
        kind: type[VQARow] = VQARow
        if training:
            kind = AnsweredRow if self.answers is None else VQATrainingRow
        num_labels = None if self.answers is None else len(self.answers)
        index: Index[VQARow] = read_index(paths, kind, num_labels=num_labels)
        return self.spoken(index, partial(_answer_to_learn, self.answers) if training else _question_to_answer)

    def predict(self, batch: PrefixBatch) -> Predictions:
        """A caption for each picture, or an answer to each question."""
        if self.config.stage == "align":
            return super().predict(batch)
        return [
            {
                "question_id": row.qid,
                "answer": text,
                "score": self._soft_score(row, text),
                "target": _target(self.answers, row),
                "answers": list(row.answers),
                "answer_type": row.answer_type,
                "known": self.answers is not None and bool(row.labels),
            }
            for row, text in zip(batch.rows, self.write(batch), strict=True)
        ]

    def _soft_score(self, row: VQARow, text: str) -> float:
        """What the label of this name is worth; 0 if there is none."""
        names = {} if self.answers is None else {self.answers[label]: score for label, score in _labels(row)}
        return names.get(text, 0.0)

    def measure(self, predictions: Predictions) -> dict[str, float]:
        """Of answers: mean soft score, share of exact matches, and consensus accuracy, where the truth is known.

        `score` is what `beit3.finetune.vqa` measures; `exact_match` compares normalised answers with the one that
        would have been learned.
        """
        if self.config.stage == "align":
            return super().measure(predictions)
        metrics: dict[str, float] = {}
        if any(row["known"] for row in predictions):
            metrics["score"] = fmean(row["score"] for row in predictions)
        if pairs := [(row["answer"], row["target"]) for row in predictions if row["target"] is not None]:
            metrics["exact_match"] = fmean(normalize_answer(left) == normalize_answer(right) for left, right in pairs)
        return metrics | measure_consensus(predictions)


def _answer_to_learn(answers: Sequence[str] | None, row: VQARow) -> Said:
    return Said(row.text, clean_text(_target(answers, row)))


def _question_to_answer(row: VQARow) -> Said:
    return Said(row.text, None)


def _target(answers: Sequence[str] | None, row: VQARow) -> str | None:
    """The best label by name; without names what most people answered, the first of equals; None if unknown."""
    if answers is not None:
        return answers[max(_labels(row), key=lambda pair: pair[1])[0]] if row.labels else None
    said = Counter(answer for answer in row.answers if answer.strip())
    return said.most_common(1)[0][0] if said else None


def _labels(row: VQARow) -> list[tuple[int, float]]:
    return list(zip(row.labels, row.scores, strict=True))
