"""The house rules: who imports whom, how long files and functions are, what never occurs, which words are used."""

import ast
import functools
import re

import pytest

from .helpers import ROOT

PACKAGE = sorted((ROOT / "regionspot").rglob("*.py"))
PROJECTS = sorted((ROOT / "projects").rglob("*.py"))
COMMANDS = sorted([*(ROOT / "regionspot_cli").glob("*.py"), *(ROOT / "tools").rglob("*.py")])
SHIPPED = [*PACKAGE, *COMMANDS, *PROJECTS, ROOT / "setup.py"]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PLACES = ("regionspot", "regionspot_cli", "projects", "tools", "docs", "tests", "datasets", "configs")
FILES = [path for place in PLACES for path in (ROOT / place).rglob("*.*") if path.suffix in (".py", ".md", ".yaml")]
TEXTS = [*sorted(FILES), *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile"))]
# Old names that still work, the text of an old file, and keys of other programs' files.
EXEMPT = ('"--picture', "boxes of the picture, cut to it", "was_cancelled", "<folder>")

# What each room may import of the others; a room may always import itself.
GROUND = {"structures", "vocabulary", "vocabulary_entries", "checkpoint", "utils"}
MAY_IMPORT = {
    "config": {"utils"},
    "utils": set(),
    "structures": {"utils"},
    "vocabulary": {"utils", "vocabulary_entries"},
    "vocabulary_entries": {"utils"},
    "data": GROUND | {"config"},
    "modeling": GROUND | {"config"},
    "evaluation": GROUND | {"config", "data"},
    "report": GROUND | {"config", "data", "evaluation", "modeling", "drawing"},
    "checkpoint": {"utils"},
    "model_zoo": {"checkpoint", "config"},
    "app": GROUND | {"config", "drawing", "modeling", "predictor", "report"},
    "engine": GROUND | {"config", "data", "modeling", "evaluation", "drawing"},
    "export": GROUND | {"config", "modeling"},
    "predictor": GROUND | {"config", "modeling"},
    "prediction": GROUND | {"config", "data", "drawing", "modeling", "predictor"},
    "drawing": {"utils"},
    "visualization": {"drawing", "utils"},
    "index": GROUND | {"config", "data", "modeling", "engine", "prediction", "predictor", "report", "evaluation"},
}


@functools.cache
def tree(path):
    return ast.parse(path.read_text())


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    own = parts[1]
    if own == "__init__":
        return
    for node in ast.walk(tree(path)):
        names = (
            [node.module]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        for name in names:
            assert not (isinstance(node, ast.ImportFrom) and node.level), "imports are absolute"
            if name and name.split(".")[0] == "regionspot":
                assert room(name) in MAY_IMPORT[own] | {own}, f"{own} may not import {name}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[1] if len(node.body) > 1 and ast.get_docstring(node) else node.body[0]
            assert node.end_lineno - first.lineno + 1 <= 50, node.name


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_never_occurs(path):
    text = path.read_text()
    assert not re.search(
        r"\.cuda\(\)|import \*|\bsys\.path\b|^\s*pickle\.load|weights_only=False|torch\.jit\.load\(", text, re.MULTILINE
    )
    assert "torch.load(" not in text or "weights_only=True" in text
    if path in PACKAGE:
        assert not re.search(r"^\s*print\(", text, re.MULTILINE)


def test_modules_have_docstrings():
    for path in PACKAGE:
        if path.name != "__init__.py" or path.read_text().strip():
            assert ast.get_docstring(tree(path)), path


def read_glossary():
    """Return what CONTRIBUTING.md's glossary refuses: a pattern of words, and names of variables and functions."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Glossary")[1].split("\n## ")[0]
    cells = [line.split("|")[2] for line in section.splitlines() if line.startswith("| ")]
    terms = [term.strip() for cell in cells[2:] for term in cell.split(",")]  # after heading and rule
    words = [term.replace(" ", "[ _]").replace("*", "[a-z]*") for term in terms if not term.startswith("`")]
    names = {term.strip("`") for term in terms if term.startswith("`")}
    return re.compile(rf"(?<![a-z])(?:{'|'.join(words)})(?![a-z])", re.IGNORECASE), names


def test_glossary_matches_words_alone():
    words, names = read_glossary()
    assert "theirs" in names and len(names) > 5
    for text in ("two Pictur" + "es", "a_fold" + "er", "recogni" + "sed", "it goes" + " on", "li" + "es in"):
        assert words.search(text), text
    for text in ("pictured", "recognizes", "lies inside", "centered", "amendment", "license"):
        assert not words.search(text), text


def test_words_of_the_glossary():
    words, _ = read_glossary()
    wrong = []
    for path in TEXTS:
        text = path.read_text()
        if path.name == "CONTRIBUTING.md":
            text = re.sub(r"(?s)## Glossary.*?(?=\n## )", "", text)
        for line in text.splitlines():
            if (match := words.search(line)) and not any(exempt in line for exempt in EXEMPT):
                wrong.append(f"{path.relative_to(ROOT)}: {match[0]}: {line.strip()}")
    assert not wrong, "\n".join(wrong)


def test_names_of_the_glossary():
    _, refused = read_glossary()
    wrong = []
    for path in [*SHIPPED, *TESTS]:
        for node in ast.walk(tree(path)):
            is_variable = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            name = getattr(node, "id", "") if is_variable else getattr(node, "arg", "") or getattr(node, "name", "")
            if name in refused and not isinstance(node, ast.keyword):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not wrong, "\n".join(wrong)


def test_test_names_are_short():
    for path in TESTS:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert len(node.name) <= 60, f"{path.relative_to(ROOT)}: {node.name}"


def test_import_without_detectron2(monkeypatch):
    import importlib
    import importlib.util

    import regionspot

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="make detectron2"):
        importlib.reload(regionspot)
