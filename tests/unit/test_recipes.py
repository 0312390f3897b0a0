"""Every recipe builds, says how it is run, and is found by path or by name."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from beit3.cli import run_command
from beit3.config import Run
from beit3.errors import ConfigError
from beit3.pretrain.text_tokenizer import TextTokenizerRun
from beit3.recipes import list_recipes, load_recipe

ROOT = Path(__file__).parents[2]
FILES = [path for folder in ("tokenizers", "pretrain", "finetune") for path in sorted((ROOT / folder).glob("*.py"))]
NAMES = [f"{path.parent.name}/{path.stem}" for path in FILES]


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    """Public functions of a file, by name, without running it."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}


VARIANTS = [(path, name) for path in FILES for name in functions(path)]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_recipe_has_a_debug_variant(path: Path) -> None:
    assert {"recipe", "debug"} <= functions(path).keys()


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_header_says_how_it_is_run(path: Path) -> None:
    header = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    lines = [line for line in header.splitlines() if line.startswith("Command:")]
    assert len(lines) == 1
    assert f"{path.parent.name}/{path.name}" in lines[0]


@pytest.mark.parametrize(("path", "variant"), VARIANTS, ids=[f"{p.stem}:{v}" for p, v in VARIANTS])
def test_every_variant_builds(path: Path, variant: str) -> None:
    run = load_recipe(f"{path}:{variant}")
    assert isinstance(run, (Run, TextTokenizerRun))
    if variant == "debug" and isinstance(run, Run):
        assert run.loop.steps == 2


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_variants_of_a_recipe_have_folders_of_their_own(path: Path) -> None:
    names = [load_recipe(f"{path}:{variant}").name for variant in functions(path)]
    assert len(set(names)) == len(names)


# Variant: learning rate, layer decay, drop path, weight decay, global batch, image size, epochs, warm-up epochs, rows.
PUBLISHED = {
    "imagenet_base": (7e-4, 0.65, 0.15, 0.05, 1024, 224, 50, 5, 1_281_167),
    "imagenet_base:large": (2e-4, 0.8, 0.25, 0.05, 1024, 224, 50, 5, 1_281_167),
    "vqav2_base": (3e-5, None, 0.1, 0.01, 128, 480, 10, 1, 640_000),
    "vqav2_base:large": (2e-5, None, 0.15, 0.01, 128, 480, 10, 1, 640_000),
    "nlvr2_base": (7e-4, 0.65, 0.2, 0.2, 256, 224, 20, 5, 86_373),
    "nlvr2_base:large": (3e-4, 0.85, 0.2, 0.2, 256, 224, 20, 5, 86_373),
    "nlvr2_base:indomain": (5e-4, 0.65, 0.2, 0.2, 256, 224, 20, 5, 86_373),
    "nlvr2_base:indomain_large": (1e-4, 0.85, 0.2, 0.2, 256, 224, 20, 5, 86_373),
    "captioning_base": (4e-5, None, 0.1, 0.05, 256, 480, 10, 1, 566_747),
    "captioning_base:large": (8e-6, None, 0.1, 0.05, 256, 480, 10, 1, 566_747),
    "captioning_base:nocaps": (1e-5, None, 0.1, 0.05, 256, 480, 10, 1, 566_747),
    "captioning_base:nocaps_large": (8e-6, None, 0.1, 0.05, 256, 480, 10, 1, 566_747),
    "retrieval_base": (2e-4, 0.65, 0.2, 0.05, 3072, 384, 15, 3, 566_747),
    "retrieval_base:large": (5e-5, 0.85, 0.2, 0.05, 3072, 384, 15, 3, 566_747),
    "retrieval_base:flickr30k": (1e-4, 0.65, 0.2, 0.05, 3072, 384, 20, 5, 145_000),
    "retrieval_base:flickr30k_large": (5e-5, 0.85, 0.2, 0.05, 3072, 384, 20, 5, 145_000),
}


@pytest.mark.parametrize("address", PUBLISHED)
def test_released_recipes_have_the_published_settings(address: str) -> None:
    rate, decay, drop_path, weight_decay, batch_size, size, epochs, warmup, rows = PUBLISHED[address]
    run = load_recipe(f"recipe:finetune/{address}")
    assert isinstance(run, Run)
    task: Any = run.task
    assert (run.optim.lr, run.optim.layer_decay, run.optim.weight_decay) == (rate, decay, weight_decay)
    assert (task.model.drop_path, task.batch_size, task.model.image_size) == (drop_path, batch_size, (size, size))
    assert run.loop.steps == pytest.approx(epochs * rows / batch_size, rel=1e-3)
    assert run.optim.warmup_steps == pytest.approx(warmup * rows / batch_size, rel=3e-3)
    large, indomain = "large" in address, "indomain" in address
    kind = "_itc" if "retrieval" in address else "_indomain" if indomain else ""
    assert str(task.init_from) == f"beit3_{'large' if large else 'base'}{kind}_patch16_224.pth"
    assert (task.model.width, task.model.num_layers) == ((1024, 24) if large else (768, 12))
    part = "nocaps" if "nocaps" in address else "flickr30k" if "flickr30k" in address else ""
    assert part in task.eval
    assert ("flickr30k" in task.train) == (part == "flickr30k")


# Variant: learning rate, layer decay, drop path, weight decay, batch, image size, steps, warm-up steps.
# ViTDet's and BEiT v2's configurations; of giant BEiT-3's paper, in multiples of the patch of 14. Epochs: rows / batch.
DENSE = {
    "coco_detection_base": (1e-4, 0.7, 0.1, 0.1, 64, 1024, 184_375, 250),
    "coco_detection_base:large": (1e-4, 0.8, 0.4, 0.1, 64, 1024, 184_375, 250),
    "coco_detection_base:mask_rcnn": (1e-4, 0.7, 0.1, 0.1, 64, 1024, 184_375, 250),
    "coco_detection_base:objects365": (5e-5, 0.7, 0.1, 0.1, 64, 1024, 20 * 118_287 / 64, 250),
    "coco_detection_base:objects365_large": (5e-5, 0.8, 0.4, 0.1, 64, 1024, 20 * 118_287 / 64, 250),
    "coco_detection_base:giant": (5e-5, 0.9, 0.6, 0.1, 64, 1274, 20 * 118_287 / 64, 250),
    "objects365_base": (1e-4, 0.7, 0.1, 0.1, 64, 1024, 15 * 1_742_289 / 64, 250),
    "objects365_base:large": (1e-4, 0.8, 0.4, 0.1, 64, 1024, 15 * 1_742_289 / 64, 250),
    "objects365_base:giant": (1e-4, 0.9, 0.6, 0.1, 64, 1022, 15 * 1_742_289 / 64, 250),
    "ade20k_base": (5e-5, 0.75, 0.15, 0.05, 16, 512, 160_000, 1500),
    "ade20k_base:large": (4e-5, 0.9, 0.2, 0.05, 16, 512, 160_000, 1500),
    "ade20k_base:mask2former": (5e-5, 0.75, 0.15, 0.05, 16, 512, 160_000, 1500),
    "ade20k_base:giant": (1e-5, 0.95, 0.5, 0.05, 16, 896, 80_000, 1500),
}


@pytest.mark.parametrize("address", DENSE)
def test_recipes_of_detection_and_segmentation_have_the_published_settings(address: str) -> None:
    rate, decay, drop_path, weight_decay, batch_size, size, steps, warmup = DENSE[address]
    run = load_recipe(f"recipe:finetune/{address}")
    assert isinstance(run, Run)
    task: Any = run.task
    assert (run.optim.lr, run.optim.layer_decay, run.optim.weight_decay) == (rate, decay, weight_decay)
    assert (run.optim.betas, run.optim.warmup_steps) == ((0.9, 0.999), warmup)
    assert (task.model.drop_path, task.batch_size, task.model.image_size) == (drop_path, batch_size, (size, size))
    assert run.loop.steps == pytest.approx(steps, abs=1)
    size_name = address.partition(":")[2].removeprefix("objects365_")
    shape = {"large": (1024, 24), "giant": (1408, 40)}.get(size_name, (768, 12))
    assert (task.model.width, task.model.num_layers) == shape
    if "ade20k" not in address:
        assert (task.window_size, task.num_global_layers, task.view.scale) == (14, 4, (0.1, 2.0))
        assert task.stages == (1 if "mask_rcnn" in address else 3)


@pytest.mark.parametrize("published", [PUBLISHED, DENSE], ids=["released", "dense"])
def test_every_variant_of_official_size_is_compared_with_what_was_published(published: dict[str, Any]) -> None:
    stems = {address.partition(":")[0] for address in published}
    files = [path for path in FILES if path.parent.name == "finetune" and path.stem in stems]
    assert {f"{p.stem}:{v}" for p in files for v in functions(p)} - {f"{p.stem}:debug" for p in files} == {
        address if ":" in address else f"{address}:recipe" for address in published
    }


def test_released_weights_fill_the_recipes_of_detection_and_segmentation() -> None:
    """Their attention is decoupled; giant was not released, and begins from a run of one's own."""
    for address in DENSE:
        run = load_recipe(f"recipe:finetune/{address}")
        assert isinstance(run, Run)
        task: Any = run.task
        variant = address.partition(":")[2]
        giant, detector = variant == "giant", variant.startswith("objects365")
        assert task.model.attention == ("shared" if giant else "decoupled"), address
        assert (task.init_from.suffix == ".pth") == (not giant and not detector), address
        if detector:
            before = load_recipe(f"recipe:finetune/objects365_base{':large' if variant.endswith('large') else ''}")
            assert isinstance(before, Run)
            theirs: Any = before.task
            assert (task.init_from, task.model) == (before.folder / "export", theirs.model), address


def test_all_recipes_are_listed() -> None:
    assert list_recipes() == sorted(NAMES)


@pytest.mark.parametrize("address", ["pretrain/mdm_emoji", "pretrain/mdm_emoji.py"])
@pytest.mark.parametrize("variant", ["", ":debug"])
def test_a_packaged_recipe_goes_by_name_from_anywhere(
    address: str, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(f"recipe:{address}{variant}") == load_recipe(f"{ROOT / 'pretrain/mdm_emoji.py'}{variant}")


@pytest.mark.parametrize(
    ("address", "nearest"),
    [
        ("recipe:pretrain/mdm_emojy", "pretrain/mdm_emoji"),
        ("pretrain/mdm_emojis.py", "pretrain/mdm_emoji"),
        ("recipe:tokenizers/vqkd_emoj:debug", "tokenizers/vqkd_emoji"),
    ],
)
def test_an_unknown_recipe_names_the_nearest(address: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown recipe '{address}'; did you mean '{nearest}'"):
        load_recipe(address)


def test_an_unknown_variant_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"has no variant 'debgu'; did you mean 'debug'\?"):
        load_recipe("recipe:pretrain/mdm_emoji:debgu")


def test_private_and_imported_functions_are_no_variants(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from beit3.config import replace\n"
        "from beit3.pretrain.text_tokenizer import TextTokenizerRun\n"
        "def recipe(): return TextTokenizerRun(name='mine', corpora=('text',))\n"
        "def _part(): pass\n"
    )
    assert load_recipe(str(file)).name == "mine"
    for variant in ("_part", "replace", "TextTokenizerRun"):
        with pytest.raises(ConfigError, match=f"no variant '{variant}'"):
            load_recipe(f"{file}:{variant}")


OWN_TASK = '''
"""A recipe with an objective of its own."""
from beit3.config import Run, config
from beit3.pretrain.text_tokenizer import TextTokenizerRun
from beit3.config import TaskConfig

@config
class OwnConfig(TaskConfig):
    """What is mine."""

    margin: float = 0.5
    """Its width."""

    def build(self):
        return None

def recipe() -> Run:
    return Run(name="own", task=OwnConfig())
'''


def test_a_recipe_may_define_a_task_of_its_own_and_its_fields_are_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(OWN_TASK)
    assert run_command(["train", str(tmp_path / "own.py"), "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--task.margin" in shown
    assert "Its width." in shown
