"""Every recipe builds, says how it is run, and is found by path or by name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

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
