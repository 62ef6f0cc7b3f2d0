"""The wheel: what is inside, and that it works outside the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from regionspot import model_zoo

from .helpers import ROOT
from .processes import run_program

SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "regionspot", "regionspot_cli", "configs")
USE = """
import sys
sys.path.insert(0, sys.argv[1])
import regionspot
from regionspot import model_zoo
assert all(module.__file__.startswith(sys.argv[1]) for module in (regionspot, model_zoo)), regionspot.__file__
assert model_zoo.get_config("tables/table1/BL-glip.yaml").MODEL.REGIONSPOT.CLIP.NAME == "ViT-L/14"
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    (directory / "sources").mkdir()
    for name in SOURCES:  # copied, because a build leaves files beside the sources
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, directory / "sources" / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, directory / "sources")
    return build(directory)


def build(directory):
    """Build by the hook that pip and `python -m build` call, offline."""
    code = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    command = [sys.executable, "-W", "ignore", "-c", code, str(directory)]
    output = subprocess.run(command, cwd=directory / "sources", check=True, capture_output=True, text=True).stdout
    return directory / output.split()[-1]


def test_wheel_has_configs_and_commands(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [entry_points] = [name for name in names if name.endswith("entry_points.txt")]
        assert "regionspot = regionspot_cli.__main__:main" in archive.read(entry_points).decode()
    configs = {name.split("/configs/")[1] for name in names if name.startswith("regionspot/model_zoo/configs/")}
    assert configs == {str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.*")}
    for place in ("report/templates", "app/assets"):
        assert {str(path.relative_to(ROOT)) for path in (ROOT / "regionspot" / place).iterdir()} <= set(names)
    for package in ("regionspot", "regionspot_cli"):
        modules = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert modules == {name for name in names if name.startswith(f"{package}/") and name.endswith(".py")}


def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "use.py").write_text(USE)
    run_program(tmp_path, tmp_path / "use.py", tmp_path / "site", imports_again=True)
    command, environment = [sys.executable, "-m", "regionspot_cli", "--help"], {"PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    assert "predict" in result.stdout


def test_model_zoo_names_the_shipped_configs():
    path = Path(model_zoo.get_config_file("RegionSpot-BB.yaml"))
    assert path.samefile(ROOT / "configs" / "RegionSpot-BB.yaml")
    assert model_zoo.get_config("RegionSpot-BL.yaml", ["SEED", "3"]).SEED == 3
    with pytest.raises(ValueError, match=r"'BB.yaml': not in the model zoo; expected one of RegionSpot-BB-stage1.yaml"):
        model_zoo.get_config_file("BB.yaml")
