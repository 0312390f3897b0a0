"""The table in `README.md` is the fault catalogue: every row is there, and every test that it names exists."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROWS = 64
_ROW = re.compile(r"^\| (\d+) \|(.+)\|(.+)\|(.+)\|$", re.MULTILINE)
_NAME = re.compile(r"`([\w/]+\.py)::(test_\w+)`")


def rows() -> dict[int, tuple[str, str, str]]:
    """Fault, what happens, and tests, by number."""
    found = [(int(match[1]), match.groups()[1:]) for match in _ROW.finditer((HERE / "README.md").read_text("utf-8"))]
    assert len({number for number, _ in found}) == len(found), "a number stands twice"
    return {number: (fault.strip(), happens.strip(), tests) for number, (fault, happens, tests) in found}


@functools.cache
def names_in(file: str) -> frozenset[str]:
    """Functions of a test file; files of this folder go without theirs."""
    path = HERE / file if "/" not in file else HERE.parent / file
    assert path.is_file(), f"{file} does not exist"
    return frozenset(
        node.name for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)
    )


def test_the_catalogue_is_whole() -> None:
    assert list(rows()) == list(range(1, ROWS + 1)), "in order, none left out"
    for number, (fault, happens, _) in rows().items():
        assert len(fault) > 5, number
        assert len(happens) > 4, number


@pytest.mark.parametrize("number", range(1, ROWS + 1))
def test_a_row_names_tests_that_exist(number: int) -> None:
    cell = rows()[number][2]
    named = _NAME.findall(cell)
    assert named, "no test"
    assert not _NAME.sub("", cell).strip(), "something that is no name of a test"
    assert len(set(named)) == len(named)
    for file, name in named:
        assert name in names_in(file), f"{file} has no {name}"


def test_every_test_that_is_told_of_beside_the_rows_exists() -> None:
    for file, name in _NAME.findall((HERE / "README.md").read_text("utf-8")):
        assert name in names_in(file), f"{file} has no {name}"


def test_every_file_of_this_folder_stands_in_the_catalogue() -> None:
    text = (HERE / "README.md").read_text("utf-8")
    for path in HERE.glob("test_*.py"):
        assert f"`{path.name}" in text, path.name
