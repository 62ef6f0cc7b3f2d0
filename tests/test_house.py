"""The house rules: who imports whom, how long files and functions are, what never occurs."""

import ast
import re

import pytest

from .helpers import ROOT

PACKAGE = sorted((ROOT / "regionspot").rglob("*.py"))
PROJECTS = sorted((ROOT / "projects").rglob("*.py"))
COMMANDS = sorted([*(ROOT / "regionspot_cli").glob("*.py"), *(ROOT / "tools").rglob("*.py")])
SHIPPED = [*PACKAGE, *COMMANDS, *PROJECTS, ROOT / "setup.py"]
EVERY = [*SHIPPED, *sorted((ROOT / "tests").rglob("*.py"))]

# What each room may import of the others; a room may always import itself.
GROUND = {"structures", "vocabulary", "checkpoint", "utils"}
MAY_IMPORT = {
    "config": {"utils"},
    "utils": set(),
    "structures": {"utils"},
    "vocabulary": {"utils"},
    "data": GROUND | {"config"},
    "modeling": GROUND | {"config"},
    "evaluation": GROUND | {"config", "data"},
    "checkpoint": {"utils"},
    "model_zoo": {"checkpoint", "config"},
    "engine": GROUND | {"config", "data", "modeling", "evaluation"},
    "predictor": GROUND | {"config", "modeling"},
    "visualization": GROUND | {"predictor", "modeling"},
}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    own = parts[1]
    if own == "__init__":
        return
    for node in ast.walk(ast.parse(path.read_text())):
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
    for node in ast.walk(ast.parse(text)):
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


def test_every_module_says_what_it_is_for():
    for path in PACKAGE:
        if path.name != "__init__.py" or path.read_text().strip():
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_without_detectron2_the_import_says_how_to_get_it(monkeypatch):
    import importlib
    import importlib.util

    import regionspot

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="make detectron2"):
        importlib.reload(regionspot)
