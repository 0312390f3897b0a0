"""The rules of the house: imports point one way, nothing shadows another package, functions stay short."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "beit3"
RECIPE_FOLDERS = ("tokenizers", "pretrain", "finetune")
LONGEST_FUNCTION = 60

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "model": {"config"},
    "tokenizer": {"config", "model"},
    "metrics": {"config"},
    "train": {"config"},
    "data": {"config", "model", "tokenizer", "metrics"},
    "pretrain": {"config", "model", "tokenizer", "metrics", "data", "train"},
    "finetune": {"config", "model", "tokenizer", "metrics", "data", "train", "pretrain"},
    "recipes": {"config", "pretrain", "finetune"},
    "predict": {"config", "model", "tokenizer", "metrics", "data", "train", "pretrain", "finetune"},
}
"""What each room may import, besides itself and `errors`; rooms that are not named here import anything."""

MODULES = sorted(PACKAGE.rglob("*.py"))
RECIPES = [path for folder in RECIPE_FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]


def room(parts: tuple[str, ...]) -> str:
    """First name below the package."""
    return parts[0] if parts else ""


def room_of(path: Path) -> str:
    return room(path.relative_to(PACKAGE).with_suffix("").parts)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_typing_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(path: Path, *, typing_too: bool = False) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it; those for type checkers alone only if asked."""
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if is_typing_guard(node) and not typing_too:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        todo += ast.iter_child_nodes(node)


def own_imports(path: Path) -> set[str]:
    """Rooms of the package that a file imports, for type checkers too."""
    names = (name.split(".") for name in imports(path, typing_too=True))
    return {room(tuple(name[1:])) for name in names if name[0] == "beit3"}


def test_the_walk_sees_the_imports_it_must_judge() -> None:
    assert {"model", "tokenizer", "data", "train", "config"} <= own_imports(
        PACKAGE / "pretrain" / "masked_data_modeling.py"
    )
    assert "beit3.pretrain.export.export_model" in set(imports(PACKAGE / "pretrain" / "contrastive.py"))
    assert len(MODULES) > 30
    assert len(RECIPES) >= 4


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    own = room_of(path)
    if own in ALLOWED:
        wrong = own_imports(path) - ALLOWED[own] - {own, "errors"}
        assert not wrong, f"{module_name(path)} imports {sorted(wrong)}"


def test_there_are_no_circles_between_rooms() -> None:
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        graph.setdefault(room_of(path), set()).update(own_imports(path) - {room_of(path)})
    done: set[str] = set()
    while ready := {name for name, needs in graph.items() if name not in done and needs & graph.keys() <= done}:
        done |= ready
    assert done == graph.keys(), f"circle among {sorted(graph.keys() - done)}"


def test_the_loop_knows_no_objective() -> None:
    for path in sorted((PACKAGE / "train").glob("*.py")):
        assert own_imports(path) <= {"train", "config", "errors"}, module_name(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipes_import_only_the_package_and_the_standard_library(path: Path) -> None:
    foreign = {name.split(".")[0] for name in imports(path, typing_too=True)} - {"beit3"} - sys.stdlib_module_names
    assert not foreign


@pytest.mark.parametrize("folder", [*RECIPE_FOLDERS, "tests"])
def test_folders_beside_the_package_are_no_packages(folder: str) -> None:
    assert not list((ROOT / folder).rglob("__init__.py"))


@pytest.mark.parametrize("folder", RECIPE_FOLDERS)
def test_a_recipe_folder_says_where_the_code_is(folder: str) -> None:
    first = (ROOT / folder / "README.md").read_text(encoding="utf-8").splitlines()[0]
    assert "beit3/" in first


def test_no_module_is_named_like_one_that_someone_else_imports() -> None:
    """Whoever starts Python in one of these folders would import ours instead."""
    taken = sys.stdlib_module_names | (importlib.metadata.packages_distributions().keys() - {"beit3"})
    folders = [PACKAGE, *(path for path in PACKAGE.rglob("*") if (path / "__init__.py").exists())]
    folders += [ROOT / name for name in RECIPE_FOLDERS]
    clashes = [
        str(path.relative_to(ROOT))
        for folder in folders
        for path in folder.iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists()) and path.stem in taken
    ]
    assert not clashes


def test_types_are_checked_wherever_there_is_code() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(settings["tool"]["mypy"]["files"]) == {"beit3", "tests", "examples", "benchmarks", *RECIPE_FOLDERS}


@pytest.mark.parametrize("folder", [".", "beit3", *RECIPE_FOLDERS])
def test_hugging_face_imports_from_every_folder_of_the_clone(folder: str) -> None:
    code = "from tokenizers import Tokenizer; from transformers import AutoTokenizer; print(Tokenizer, AutoTokenizer)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tokenizers.Tokenizer" in done.stdout


def test_running_a_file_of_the_package_says_how_to_run_it() -> None:
    done = subprocess.run([sys.executable, "beit3/__main__.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.strip() == "use: python -m beit3"


def test_nothing_of_the_package_listens() -> None:
    """No server, and no socket of its own: what torch.distributed opens for the ranks of a run is all."""
    servers = {"fastapi", "flask", "gradio", "http.server", "socketserver", "streamlit", "tornado", "uvicorn", "xmlrpc"}
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        assert not servers & {part for name in names for part in (name, name.partition(".")[0])}, path
        calls = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not calls & {"listen", "create_server", "serve_forever"}, path


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_functions_are_short(path: Path) -> None:
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    long = {
        node.name: length
        for node in functions
        if node.end_lineno and (length := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION
    }
    assert not long
