"""Language models of Hugging Face's format: read without running code, and a tiny one that is like any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from beit3.errors import BadSampleError, ConfigError, DataMissingError
from beit3.finetune.conversation import Conversation, WritingConfig
from beit3.finetune.language_model import Words, load_language_model, write_tiny_language_model
from beit3.tokenizer.text import TextTokenizer
from tests.conftest import Workspace

LETTERS = {letter: number for number, letter in enumerate("<>abcdefghijklmnopqrstuvwxyzĠ.?:{}")}


@pytest.fixture
def folder(workspace: Workspace, tmp_path: Path) -> Path:
    """A tiny language model over the workspace's text tokenizer."""
    write_tiny_language_model(tmp_path / "tiny", TextTokenizer.load(workspace.text_tokenizer))
    return tmp_path / "tiny"


def letters(before: str = "", after: str = "") -> Words:
    """A tokenizer of single bytes that puts marks around a text, `>` being its end."""
    made = Tokenizer(models.BPE(LETTERS, [], unk_token="<"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if before or after:
        made.post_processor = processors.TemplateProcessing(
            single=f"{before} $A {after}".strip(), special_tokens=[("<", 0), (">", 1)]
        )
    wrapped: Any = PreTrainedTokenizerFast
    return Words(wrapped(tokenizer_object=made, eos_token=">", unk_token="<"))


def test_the_tiny_one_is_read_like_any_other(folder: Path, workspace: Workspace) -> None:
    own = TextTokenizer.load(workspace.text_tokenizer)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, GPT2LMHeadModel)
    ids = tokenizer("red apple").input_ids
    assert ids == own.encode("red apple")
    assert model(input_ids=torch.tensor([ids])).logits.shape == (1, len(ids), len(own))
    assert not list(folder.glob("*.bin"))


def test_the_tiny_one_in_place_is_always_the_same(folder: Path, workspace: Workspace) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    made = load_language_model(f"tiny:{workspace.text_tokenizer}")
    assert torch.equal(before, torch.get_rng_state())
    assert made.source == f"tiny:{workspace.text_tokenizer}"
    for name, value in load_language_model(folder).model.state_dict().items():
        assert torch.equal(value, made.model.state_dict()[name]), name


def test_saving_and_loading_keep_every_weight_and_id(folder: Path, tmp_path: Path) -> None:
    language = load_language_model(folder)
    with torch.no_grad():
        language.model.transformer.h[1].ln_1.weight.add_(1)
    language.save(tmp_path / "again")
    again = load_language_model(tmp_path / "again")
    assert again.words.encode("red apple") == language.words.encode("red apple")
    assert torch.equal(again.model.transformer.h[1].ln_1.weight, language.model.transformer.h[1].ln_1.weight)


@pytest.mark.parametrize(
    ("before", "after", "opening"), [("", "", []), ("<", "", [0]), ("<", ">", [0]), (">", "", [1])]
)
def test_a_text_opens_as_its_tokenizer_opens_it(before: str, after: str, opening: list[int]) -> None:
    """GPT-2, Llama, RoBERTa's layout, and OPT, whose beginning is the id that ends a text elsewhere."""
    words = letters(before, after)
    assert words.end_id == 1
    assert words.opening("") == opening
    assert words.opening("cab") == [*opening, 4, 2, 3]
    assert words.encode("cab") == [4, 2, 3]
    assert words.decode([0, 4, 2, 3, 1, 1]) == "cab"


def spelled(words: Words, ids: list[int]) -> str:
    names = {number: letter for letter, number in LETTERS.items()}
    return "".join(names[index] for index in ids).replace("Ġ", " ")


@pytest.mark.parametrize(
    ("template", "question", "opening", "prompt", "whole"),
    [
        ("{image}", "", "<", "", "a cat>"),
        ("{image}.", "", "<", ".", ". a cat>"),
        ("see: {image} {question} so:", "is it?", "<see: ", " is it? so:", " is it? so: a cat>"),
        ("{image}{question} ", "{image}?", "<", "{image}? ", "{image}? a cat>"),
    ],
)
def test_a_conversation_is_its_template(template: str, question: str, opening: str, prompt: str, whole: str) -> None:
    words = letters("<", ">")
    conversation = Conversation(words, WritingConfig(template=template))
    assert spelled(words, conversation.opening) == opening
    assert spelled(words, conversation.prompt(question)) == prompt
    ids, num_prompt = conversation.example(question, "a cat")
    assert spelled(words, ids) == whole
    assert spelled(words, ids[:num_prompt]) == prompt


def test_a_prompt_is_the_same_with_and_without_its_answer(folder: Path) -> None:
    """Whatever the tokenizer makes of both together."""
    words = load_language_model(folder).words
    conversation = Conversation(words, WritingConfig(template="{image}{question}"))
    for question, answer in (("is it red", "yes"), ("cat", "s and dogs"), ("", "red apple")):
        ids, num_prompt = conversation.example(question, answer)
        assert ids[:num_prompt] == conversation.prompt(question)
        assert words.decode(ids[num_prompt:]) == answer
        assert ids[-1] == words.end_id


def test_long_answers_are_cut_without_an_end_and_long_prompts_refused() -> None:
    words = letters()
    conversation = Conversation(words, WritingConfig(template="{image}{question}", max_text_length=6))
    ids, num_prompt = conversation.example("ab:", "cdefgh")
    assert spelled(words, ids) == "ab: cd"
    assert num_prompt == 3
    assert spelled(words, conversation.example("ab:", "c")[0]) == "ab: c>"
    for ask in (conversation.prompt, lambda question: conversation.example(question, "a")):
        with pytest.raises(BadSampleError, match="6 ids, with room for 5") as caught:
            ask("abcdef")
        assert caught.value.reason == "prompt_too_long"


@pytest.mark.parametrize(
    "template", ["describe it", "{image}{image}", "{question} {image}", "{image}{question}{question}"]
)
def test_templates_without_sense_are_refused(template: str) -> None:
    with pytest.raises(ConfigError, match=r"writing\.template must hold \{image\} once"):
        WritingConfig(template=template)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def pickle_weights(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lose_end(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda folder: (folder / "config.json").unlink(), "cannot be read by transformers"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "cannot be read by transformers"),
        (pickle_weights, "cannot be read by transformers.*safetensors"),
        (lambda folder: change_config(folder, n_layer=3), "lacks 12 weights, such as transformer.h.2"),
        (lambda folder: change_config(folder, vocab_size=7), "cannot be read by transformers"),
        (lose_end, "names no eos_token"),
    ],
)
def test_a_damaged_folder_is_one_line(damage: Callable[[Path], None], line: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ConfigError, match=line) as caught:
        load_language_model(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_code_in_a_folder_is_not_run(folder: Path) -> None:
    (folder / "mine.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass M: pass\n"
    )
    change_config(folder, model_type="mine", auto_map={"AutoConfig": "mine.M", "AutoModelForCausalLM": "mine.M"})
    with pytest.raises(ConfigError, match="cannot be read by transformers"):
        load_language_model(folder)
    assert not list(folder.rglob("ran"))


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "runs/tiny_gpt2", "tiny:none.spm"])
def test_what_does_not_exist_is_one_line_at_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(DataMissingError, match=f"{name.removeprefix('tiny:')} does not exist"):
        load_language_model(name)


@pytest.mark.parametrize("name", ["gpt2", "organisation/name", "hf-hub:runs/name"])
def test_other_names_are_those_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    asked = []

    def refuse(place: str, **options: Any) -> None:
        asked.append((place, options["trust_remote_code"]))
        raise OSError("no connection\nat all")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(DataMissingError, match=f"'{name}' cannot be read by transformers.*no connection at all"):
        load_language_model(name)
    assert asked == [(name.removeprefix("hf-hub:"), False)]
