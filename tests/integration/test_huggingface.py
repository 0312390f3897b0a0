"""`import beit3.huggingface`: the `Auto` classes read an exchange folder and compute what our own classes compute."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer

import beit3
import beit3.huggingface
from beit3.data.preprocess import Preprocess
from beit3.errors import ConfigError, DataMissingError
from beit3.huggingface import Beit3Config, Beit3Model, Beit3Processor
from beit3.model.build import build_model
from beit3.model.presets import ModelConfig
from beit3.tokenizer.fast import save_fast
from beit3.tokenizer.text import TextTokenizer, train_text_tokenizer

TASKS = [None, "pretraining", "retrieval", "classification", "vqa", "nlvr2", "captioning"]
OPTIONS = {"pretraining": {"codebook_size": 24}, "classification": {"num_classes": 7}, "vqa": {"num_answers": 11}}
TEXTS = ["a red cat", "two small dogs under the tree"]
Write = Callable[[str | None], Path]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_text_tokenizer(iter([*TEXTS, "the blue bird and a house"] * 30), 90)


@pytest.fixture
def write(tokenizer: TextTokenizer, tmp_path: Path) -> Write:
    """Save a tiny model of a task with its preprocessing and tokenizer."""

    def save(task: str | None) -> Path:
        config = ModelConfig(
            width=32,
            num_layers=2,
            num_heads=2,
            ffn_width=48,
            patch_size=8,
            image_size=(24, 16),
            vocab_size=len(tokenizer),
            fusion_layers=1,
        )
        preprocess = Preprocess(image_size=config.image_size, max_text_length=10, mean=(0.4, 0.5, 0.6))
        folder = tmp_path / (task or "backbone")
        model = build_model(config, task, **OPTIONS.get(task or "", {}))
        model.save_pretrained(folder, files={"tokenizer.spm": tokenizer.model, **preprocess.file()})
        return folder

    return save


def processor_of(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]


def pictures() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 255, (30, 50, 3), dtype=np.uint8)) for _ in TEXTS]


def inputs() -> dict[str, torch.Tensor]:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    ids = torch.randint(4, 20, (2, 5)).masked_fill(mask == 0, 1)
    return {"pixel_values": torch.randn(2, 3, 24, 16), "input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_the_config_names_task_and_shape(write: Write) -> None:
    config = AutoConfig.from_pretrained(write("classification"))
    assert isinstance(config, Beit3Config)
    assert (config.task, config.heads, config.model["width"]) == ("classification", {"num_classes": 7}, 32)


@torch.no_grad()
@pytest.mark.parametrize("task", [None, "pretraining"])
def test_states_are_those_of_our_model(task: str | None, write: Write) -> None:
    folder = write(task)
    ours: Any = beit3.load_model(folder)
    model = AutoModel.from_pretrained(folder)
    batch = inputs()
    masked = torch.tensor([[True, False, False, True, False, True]] * 2)
    out = model(**batch, bool_masked_pos=masked)
    expected = ours(batch["pixel_values"], batch["input_ids"], batch["attention_mask"].bool(), masked)
    assert torch.equal(out.vision_hidden_state, expected.vision)
    assert torch.equal(out.text_hidden_state, expected.text)
    assert torch.equal(out.last_hidden_state, torch.cat([expected.vision, expected.text], dim=1))
    assert out.keys() == {"last_hidden_state", "vision_hidden_state", "text_hidden_state"}
    alone = model(pixel_values=batch["pixel_values"])
    assert torch.equal(alone.last_hidden_state, ours(batch["pixel_values"]).vision)
    assert model(input_ids=batch["input_ids"]).last_hidden_state.shape == (2, 5, 32)


@torch.no_grad()
@pytest.mark.parametrize("task", ["classification", "vqa", "nlvr2", "captioning"])
def test_logits_are_those_of_our_model(task: str, write: Write) -> None:
    folder = write(task)
    ours: Any = beit3.load_model(folder)
    model = AutoModel.from_pretrained(folder)
    batch = inputs()
    if task == "nlvr2":
        batch["pixel_values"] = torch.randn(2, 2, 3, 24, 16)
    if task == "classification":
        out, expected = model(batch["pixel_values"]), ours(batch["pixel_values"])
    else:
        out = model(**batch)
        expected = ours(batch["pixel_values"], batch["input_ids"], batch["attention_mask"].bool())
    assert torch.equal(out.logits, expected)
    assert out.keys() == {"logits"}


@torch.no_grad()
def test_embeddings_are_those_of_our_retrieval_model(write: Write) -> None:
    folder = write("retrieval")
    ours: Any = beit3.load_model(folder)
    model = AutoModel.from_pretrained(folder)
    batch = inputs()
    out = model(**batch)
    image = ours.encode_image(batch["pixel_values"])
    text = ours.encode_text(batch["input_ids"], batch["attention_mask"].bool())
    assert torch.equal(out.image_embeds, image)
    assert torch.equal(out.text_embeds, text)
    assert torch.equal(model.get_image_features(batch["pixel_values"]), image)
    assert torch.equal(model.get_text_features(batch["input_ids"], batch["attention_mask"]), text)
    assert model(input_ids=batch["input_ids"]).keys() == {"text_embeds"}


@torch.no_grad()
@pytest.mark.parametrize("task", [None, "pretraining", "retrieval"])
def test_processor_and_model_together_embed_as_the_predictor(task: str | None, write: Write) -> None:
    folder = write(task)
    predictor = beit3.load(folder, device="cpu")
    model, processor = AutoModel.from_pretrained(folder), processor_of(folder)
    batch = processor(images=pictures(), text=TEXTS, return_tensors="pt", padding=True, truncation=True)
    assert {name: value.dtype for name, value in batch.items()} == {
        "pixel_values": torch.float32,
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
    }
    assert batch["pixel_values"].shape == (2, 3, 24, 16)
    image = model.get_image_features(batch["pixel_values"])
    text = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(image, predictor.embed_images(pictures()), rtol=0, atol=1e-6)
    torch.testing.assert_close(text, predictor.embed_texts(TEXTS), rtol=0, atol=1e-6)


def test_the_processor_cuts_pads_and_takes_single_inputs(write: Write, tokenizer: TextTokenizer) -> None:
    processor = processor_of(write(None))
    assert isinstance(processor, Beit3Processor)
    batch = processor(text=["a  red\ncat", TEXTS[1] * 3, ""])
    assert batch["input_ids"].shape == (3, 10)
    assert batch["input_ids"][1].tolist() == [*tokenizer.encode(TEXTS[1] * 3)[:9], 2]
    assert batch["attention_mask"].sum(1).tolist() == [len(tokenizer.encode("a red cat")), 10, 2]
    one = processor(images=pictures()[0], text="a red cat")
    assert one["pixel_values"].shape == (1, 3, 24, 16)
    assert one["input_ids"].tolist() == [tokenizer.encode("a red cat")]
    white = processor(images=Image.new("RGB", (9, 9), "white"))["pixel_values"]
    torch.testing.assert_close(white[0, :, 0, 0], torch.tensor([1.2, 1.0, 0.8]))
    assert one.to(torch.float64)["pixel_values"].dtype == torch.float64


@torch.no_grad()
@pytest.mark.parametrize("task", TASKS)
def test_saving_writes_the_exchange_folder_again(task: str | None, write: Write, tmp_path: Path) -> None:
    folder, copy = write(task), tmp_path / "parent" / "copy"
    (copy / "checkpoint-5").mkdir(parents=True)
    (copy / "model.safetensors.index.json").write_text("{}")
    (copy / "model_ema.safetensors").write_text("somebody's")
    processor_of(folder).save_pretrained(copy)
    AutoModel.from_pretrained(folder).save_pretrained(copy)
    names = {path.name for path in copy.iterdir()}
    assert names == {path.name for path in folder.iterdir()} | {"checkpoint-5", "model_ema.safetensors"}
    for name in ("config.json", "preprocess.json", "tokenizer.spm"):
        assert (copy / name).read_bytes() == (folder / name).read_bytes()
    first, again = beit3.load_model(folder).state_dict(), beit3.load_model(copy).state_dict()
    assert first.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in first.items())


@torch.no_grad()
def test_type_task_and_image_size_are_options_of_loading(write: Write) -> None:
    folder = write("classification")
    assert AutoModel.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert AutoModel.from_pretrained(folder, dtype="bfloat16").dtype == torch.bfloat16
    bare = AutoModel.from_pretrained(folder, task="backbone")
    assert bare.config.task is None
    assert bare(torch.zeros(1, 3, 24, 16)).last_hidden_state.shape == (1, 7, 32)
    larger = AutoModel.from_pretrained(folder, image_size=32)
    assert larger.config.model["image_size"] == [32, 32]
    assert larger(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 7)
    assert not larger.training


def test_a_config_alone_builds_a_model_with_its_own_initialisation(write: Write) -> None:
    folder = write("vqa")
    shape = beit3.load_model(folder).model_config
    torch.manual_seed(3)
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder))  # type: ignore[no-untyped-call]
    torch.manual_seed(3)
    ours = build_model(shape, "vqa", num_answers=11)
    assert all(torch.equal(model.model.state_dict()[name], value) for name, value in ours.state_dict().items())


def test_the_fast_tokenizer_lives_in_the_same_folder(write: Write, tokenizer: TextTokenizer) -> None:
    folder = write(None)
    save_fast(tokenizer, folder)
    assert AutoTokenizer.from_pretrained(folder)(TEXTS[1])["input_ids"] == tokenizer.encode(TEXTS[1])
    assert isinstance(processor_of(folder), Beit3Processor)


def test_a_name_of_the_hub_is_downloaded_by_the_hub_library(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        assert "*.safetensors" in allow_patterns
        asked.append((name, options))
        return str(write("retrieval"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert Beit3Model.from_pretrained("somebody/beit3").model.task == "retrieval"
    assert Beit3Processor.from_pretrained("somebody/beit3", revision="v2").preprocess.image_size == (24, 16)
    private: dict[str, Any] = {
        "token": "secret",
        "cache_dir": "/elsewhere",
        "local_files_only": True,
        "force_download": False,
    }
    Beit3Model.from_pretrained("somebody/beit3", trust_remote_code=False, adapter_kwargs=None, **private)
    Beit3Processor.from_pretrained("somebody/beit3", _from_auto=True, **private)
    assert asked == [
        ("somebody/beit3", {"revision": None}),
        ("somebody/beit3", {"revision": "v2"}),
        ("somebody/beit3", {"revision": None, **private}),
        ("somebody/beit3", {"revision": None, **private}),
    ]


def test_options_of_the_hub_go_through_the_auto_classes(write: Write, tmp_path: Path) -> None:
    folder, options = write("retrieval"), {"token": "x", "cache_dir": str(tmp_path), "local_files_only": True}
    assert AutoModel.from_pretrained(folder, **options).model.task == "retrieval"
    assert isinstance(AutoProcessor.from_pretrained(folder, **options), Beit3Processor)  # type: ignore[no-untyped-call]


@torch.no_grad()
def test_a_tuple_is_returned_when_asked_for(write: Write) -> None:
    model, batch = AutoModel.from_pretrained(write("vqa")), inputs()
    whole, (logits,) = model(**batch, return_dict=True), model(**batch, return_dict=False)
    assert torch.equal(whole.logits, logits)


@torch.no_grad()
def test_nothing_in_is_nothing_out(write: Write) -> None:
    folder = write("retrieval")
    batch = processor_of(folder)(images=[], text=[])
    assert batch["pixel_values"].shape == (0, 3, 24, 16)
    out = AutoModel.from_pretrained(folder)(**batch)
    assert (out.image_embeds.shape, out.text_embeds.shape) == ((0, 32), (0, 32))


def test_an_image_tower_needs_no_tokenizer(write: Write, tmp_path: Path) -> None:
    folder = write("retrieval")
    files = {"preprocess.json": (folder / "preprocess.json").read_bytes()}
    beit3.load_model(folder, parts="vision").save_pretrained(tmp_path / "tower", files)
    processor = processor_of(tmp_path / "tower")
    assert processor(images=pictures())["pixel_values"].shape == (2, 3, 24, 16)
    with pytest.raises(ConfigError, match="reads no text"):
        processor(text="a red cat")


@torch.no_grad()
@pytest.mark.parametrize("task", [None, "retrieval"])
def test_text_features_of_texts_padded_on_the_left_are_refused(task: str | None, write: Write) -> None:
    model, batch = AutoModel.from_pretrained(write(task)), inputs()
    with pytest.raises(ValueError, match="begins with padding"):
        model.get_text_features(batch["input_ids"], batch["attention_mask"].flip(1))


@pytest.mark.parametrize(
    ("missing", "load"),
    [
        ("model.safetensors", AutoModel),
        ("preprocess.json", AutoProcessor),
        ("tokenizer.spm", AutoProcessor),
    ],
)
def test_a_missing_file_is_one_line_that_names_it(missing: str, load: Any, write: Write) -> None:
    folder = write(None)
    (folder / missing).unlink()
    with pytest.raises(DataMissingError, match=f"{missing} does not exist") as caught:
        load.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    for kind in (Beit3Model, Beit3Processor):
        with pytest.raises(DataMissingError, match="none") as caught:
            kind.from_pretrained(tmp_path / "none")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("classification", ("pixel_values", "input_ids"), "takes pixel_values alone"),
        ("vqa", ("pixel_values",), "takes pixel_values and input_ids"),
        ("vqa", ("input_ids",), "takes pixel_values and input_ids"),
        ("retrieval", (), "give pixel_values, input_ids or both"),
    ],
)
def test_wrong_inputs_are_named(task: str, given: tuple[str, ...], message: str, write: Write) -> None:
    model = AutoModel.from_pretrained(write(task))
    batch = inputs()
    with pytest.raises(ConfigError, match=message):
        model(**{name: batch[name] for name in given})
    with pytest.raises(ConfigError, match=f"a {task} model takes no bool_masked_pos"):
        model(**batch, bool_masked_pos=torch.zeros(2, 6, dtype=torch.bool))


def test_options_that_would_be_ignored_are_refused(write: Write, tmp_path: Path) -> None:
    folder = write(None)
    with pytest.raises(ConfigError, match="load_in_8bit: not an option here"):
        AutoModel.from_pretrained(folder, load_in_8bit=True)
    for kind in (Beit3Model, Beit3Processor):
        with pytest.raises(ConfigError, match="proxies, subfolder: not an option here"):
            kind.from_pretrained(folder, subfolder="inner", proxies={"http": "x"})
    with pytest.raises(ConfigError, match="use_fast: not an option of a processor"):
        Beit3Processor.from_pretrained(folder, use_fast=True)
    with pytest.raises(ConfigError, match="push_to_hub: not an option here"):
        AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "copy", push_to_hub=True)
    assert not (tmp_path / "copy").exists()
    processor = processor_of(folder)
    for wrong in ({"padding": "max_length"}, {"max_length": 3}, {"return_tensors": "np"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            processor(text="a red cat", **wrong)
    with pytest.raises(ConfigError, match="give images, text or both"):
        processor()


def test_a_model_of_images_alone_refuses_text(write: Write) -> None:
    folder = write("classification")
    settings = json.loads((folder / "preprocess.json").read_text())
    (folder / "preprocess.json").write_text(json.dumps({**settings, "max_text_length": 0}))
    (folder / "tokenizer.spm").unlink()
    processor = processor_of(folder)
    assert processor(images=pictures())["pixel_values"].shape == (2, 3, 24, 16)
    with pytest.raises(ConfigError, match="reads no text"):
        processor(text="a red cat")


def test_the_package_alone_does_not_import_it(start: Callable[..., subprocess.Popen[str]], root: Path) -> None:
    code = (
        "import sys, beit3, beit3.cli; print('beit3.huggingface' in sys.modules, 'beit3.tokenizer.fast' in sys.modules)"
    )
    out, errors = start(["-c", code], root).communicate()
    assert out.split() == ["False", "False"], errors
