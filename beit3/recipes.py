"""Recipes: Python files that return a run. They are opened by path, never imported by name.

`pretrain/mdm_base.py` is the file's `recipe()`; `pretrain/mdm_base.py:large` its function `large`;
`recipe:pretrain/mdm_base` the copy that comes with an installed package.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from beit3.config import Run, nearest
from beit3.errors import ConfigError
from beit3.pretrain.text_tokenizer import TextTokenizerRun

AnyRun = Run | TextTokenizerRun
_PREFIX = "recipe:"
_PACKAGE = Path(__file__).parent


def load_recipe(address: str) -> AnyRun:
    """Build the run that `FILE[:variant]` or `recipe:FOLDER/NAME[:variant]` describes.

    Raises:
        ConfigError: no such file or variant; the message holds the nearest valid one.
    """
    packaged = address.startswith(_PREFIX)
    name, _, variant = address.removeprefix(_PREFIX).partition(":")
    path = _packaged(name) if packaged else Path(name)
    if not path.is_file():
        known = list_recipes()
        raise ConfigError(f"unknown recipe '{address}'; {nearest(name.removesuffix('.py'), known)}")
    functions = variants(_open(path))
    chosen = variant or "recipe"
    if chosen not in functions:
        raise ConfigError(f"{path} has no variant '{chosen}'; {nearest(chosen, functions)}")
    return functions[chosen]()


def list_recipes() -> list[str]:
    """Names of all recipes that come with the package, such as `pretrain/mdm_base`."""
    root = _root()
    found = (path for folder in ("tokenizers", "pretrain", "finetune") for path in (root / folder).glob("*.py"))
    return sorted(str(path.relative_to(root).with_suffix("")) for path in found)


def variants(module: ModuleType) -> dict[str, Callable[[], AnyRun]]:
    """Functions of a recipe that return a run, by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    }


def _root() -> Path:
    """Where the recipe folders lie: in the package when installed, beside it in a clone."""
    inside = _PACKAGE / "_recipes"
    return inside if inside.is_dir() else _PACKAGE.parent


def _packaged(name: str) -> Path:
    return _root() / f"{name.removesuffix('.py')}.py"


def _open(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_recipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where python looks for what classes of a recipe are made of
    spec.loader.exec_module(module)
    assert isinstance(module, ModuleType)
    return module
