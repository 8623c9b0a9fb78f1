"""Raised sentences name no option: how to type the remedy is the hint's part."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp8pack import errors

PACKAGE = Path(__file__).parents[1] / "fp8pack"
ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}


def sentences(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The fixed text of the first argument of every error that is made, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS and node.args:
            parts = [part for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)]
            yield node.lineno, "".join(part.value for part in parts if isinstance(part.value, str))


def files() -> list[Path]:
    """Every file of the package."""
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_sentence_names_an_option(path: Path) -> None:
    found = sentences(ast.parse(path.read_text(encoding="utf-8")))
    assert [(line, text) for line, text in found if f" {text}".find(" --") >= 0 or " -o" in f" {text} "] == []


def test_the_sentences_are_found() -> None:
    tree = ast.parse(
        'raise InputError(f"{file}: use" f" --ignore {name}", "a hint with --only")\nraise ValueError("--x")'
    )
    assert list(sentences(tree)) == [(1, ": use --ignore ")]
    assert sum(len(list(sentences(ast.parse(path.read_text(encoding="utf-8"))))) for path in files()) > 100
