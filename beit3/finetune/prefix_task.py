"""What the yardsticks share that read a frozen image tower through a language model (ClipCap, LLaVA).

Index files in, a connector trained and perhaps the language model, texts written and measured, a `PictureReader` out.
Pictures are prepared as for evaluation, without chance: as published, and the tower's features stay the same.

Shapes: B pictures, T ids of the longest prompt with its answer.

    loss = mean over the ids of all answers of -log p(id | picture, prompt, ids before it)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from beit3.config import config
from beit3.data.index_files import CaptioningRow, CaptioningTrainingRow, Index, Row, Text, read_index, read_picture
from beit3.data.preprocess import Preprocess
from beit3.errors import BadSampleError
from beit3.finetune.captioning import measure_captions
from beit3.finetune.common import Predictions, TextBatch, pad_texts
from beit3.finetune.conversation import Conversation, WritingConfig
from beit3.finetune.image_tower import Pooling, load_image_tower
from beit3.finetune.index_task import IndexConfig, IndexTask
from beit3.finetune.picture_reader import PictureReader, open_language_model, read_reader_settings
from beit3.model.prefix_language_model import ConnectorConfig
from beit3.train.task import Work

C = TypeVar("C", bound="PrefixConfig")
R = TypeVar("R", bound=Row)


@config
class PrefixConfig(IndexConfig):
    """Tower, language model and data."""

    tower: str
    """As `load_image_tower` takes it: exchange folder, released file, "hf-hub:...", "timm:NAME"."""
    pooling: Pooling = "auto"
    """Of the tower's feature, for a connector that reads it."""
    tower_pretrained: bool = True
    """False: random weights of a tower of timm, the baseline."""
    language_model: str = "gpt2"
    """As `load_language_model` takes it: folder, name on the Hub, "tiny:FILE.spm"."""
    connector: ConnectorConfig = ConnectorConfig()
    writing: WritingConfig = WritingConfig()
    init_from: Path | None = None
    """Export of an earlier run between the same tower and language model: its weights go on. None: random connector."""
    activation_checkpointing: bool = False
    """Recompute the blocks of a trained language model in the backward pass: less memory, a third more work."""

    @property
    @abstractmethod
    def trains_language_model(self) -> bool:
        """Whether the language model is trained beside the connector."""


@dataclass(frozen=True, slots=True)
class PrefixBatch(TextBatch):
    """Pictures with prompts, and their answers in training."""

    targets: Tensor
    """(B, T) bool, ids to learn"""
    rows: tuple[Any, ...]
    """What the index says of each picture."""


class Said(NamedTuple):
    """What a row gives a language model."""

    question: Text
    answer: Text | None
    """To learn; None in evaluation."""


class _Example(NamedTuple):
    image: Tensor
    ids: list[int]
    num_prompt: int
    row: Any


class SpokenExamples(Generic[R]):
    """Pictures with prompts, and answers in training.

    Args:
        index: the rows.
        preprocess: of the tower.
        conversation: makes ids.
        say: takes question and answer out of a row.
    """

    def __init__(
        self, index: Index[R], preprocess: Preprocess, conversation: Conversation, say: Callable[[R], Said]
    ) -> None:
        self.index = index
        self._preprocess = preprocess
        self._conversation = conversation
        self._say = say

    def __len__(self) -> int:
        return len(self.index)

    def load(self, index: int) -> _Example:
        """Read and prepare one example."""
        row = self.index[index]
        question, answer = self._say(row)
        if answer is None:
            ids = self._conversation.prompt(_spelled(question))
            num_prompt = len(ids)
        else:
            ids, num_prompt = self._conversation.example(_spelled(question), _spelled(answer))
        return _Example(self._preprocess(read_picture(row.image_path)), ids, num_prompt, row)

    def collate(self, examples: list[_Example]) -> PrefixBatch:
        """Lay examples side by side."""
        ids, mask = pad_texts([example.ids for example in examples])
        starts = torch.tensor([example.num_prompt for example in examples])
        targets = mask & (torch.arange(ids.shape[1]) >= starts[:, None])
        images = torch.stack([example.image for example in examples])
        return PrefixBatch(images, ids, mask, targets, tuple(example.row for example in examples))


class PrefixTask(IndexTask[PrefixBatch], Generic[C]):
    """A connector (and perhaps a language model) trained behind a frozen tower; it describes pictures.

    Checkpoints hold what is trained; `save` writes a folder for `beit3.finetune.picture_reader.load_picture_reader`:
    the connector as safetensors, the names of tower and language model, and the language model itself if it was
    trained, in Hugging Face's format.
    """

    def __init__(self, config: C) -> None:
        super().__init__()
        self.config = config
        tower = load_image_tower(config.tower, pooling=config.pooling, pretrained=config.tower_pretrained)
        start = config.init_from
        self.reader = PictureReader(
            tower,
            open_language_model(config.language_model, start),
            config.connector,
            config.writing,
            trains_language_model=config.trains_language_model,
            owns_language_model=start is not None and read_reader_settings(start)["owns_language_model"],
        )
        if start is not None:
            self.reader.start_from(start)
        self.model = self.reader.model
        self.keep_frozen(tower)
        if config.activation_checkpointing:
            words, newer = self.model.language_model, "activation_checkpointing_enable"
            # The older name goes with version 6 of transformers; the newer one came within version 5.
            getattr(words, newer if hasattr(words, newer) else "gradient_checkpointing_enable")()
        self._connector_flops = _count_flops(self.reader)

    def examples(self, paths: Sequence[Path], *, training: bool) -> SpokenExamples[Any]:
        """Captions of index files to learn, or pictures to describe."""
        if training:
            return self.spoken(read_index(paths, CaptioningTrainingRow), _caption_to_learn)
        return self.spoken(read_index(paths, CaptioningRow), _picture_to_describe)

    def spoken(self, index: Index[R], say: Callable[[R], Said]) -> SpokenExamples[R]:
        """Rows of an index as this task's language model reads them."""
        return SpokenExamples(index, self.reader.tower.preprocess, self.reader.conversation, say)

    def predict(self, batch: PrefixBatch) -> Predictions:
        """A caption for each picture."""
        return [
            {"image_id": row.image_id, "caption": text, "references": list(row.captions)}
            for row, text in zip(batch.rows, self.write(batch), strict=True)
        ]

    def measure(self, predictions: Predictions) -> dict[str, float]:
        """`measure_captions` of a whole set."""
        return measure_captions(predictions)

    def forward(self, batch: PrefixBatch) -> dict[str, Tensor]:
        """Cross-entropy of the answers' ids."""
        features = self.reader.features(batch.images)
        loss, accuracy = self.model.loss(features, batch.text_ids, batch.text_mask, batch.targets)
        return {"loss": loss, "accuracy": accuracy}

    def evaluate(self, loader: Iterable[PrefixBatch]) -> dict[str, float]:
        """Metrics of all batches, and the share of the rows that `eval_loader` left out."""
        return self.measure([row for batch in loader for row in self.predict(batch)]) | self.left_out()

    def write(self, batch: PrefixBatch) -> list[str]:
        """What the language model says behind each prompt."""
        return self.reader.continue_prompts(batch.images, batch.text_ids, batch.text_mask)

    def work(self, batch: PrefixBatch) -> Work:
        """Images, places of the language model and useful operations of a step.

        The tower runs forward alone; a frozen language model has no gradients of weights, two thirds of the work.
        """
        lengths = [self.reader.start_length + length for length in batch.lengths]
        times = 3 if self.model.trains_language_model else 2
        flops = times * sum(self.model.forward_flops(length) for length in lengths)
        flops += len(batch.images) * (self.reader.tower.flops + 3 * self._connector_flops)
        return Work(len(batch.images), sum(lengths), flops)

    def save(self, folder: Path) -> None:
        """Write the folder of the reader."""
        self.reader.save(folder)


def _caption_to_learn(row: CaptioningTrainingRow) -> Said:
    return Said("", row.text)


def _picture_to_describe(row: CaptioningRow) -> Said:
    return Said("", None)


def _spelled(text: Text) -> str:
    """A text of words; ids belong to another tokenizer than the language model's."""
    if not isinstance(text, str):
        raise BadSampleError("text_as_token_ids", "a language model has ids of its own: write `text` into the index")
    return text


def _count_flops(reader: PictureReader) -> float:
    """Operations of the connector for one picture."""
    features = reader.features(torch.zeros(1, 3, *reader.tower.preprocess.image_size, dtype=torch.uint8))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reader.model.connector(features)
    return float(counter.get_total_flops())
