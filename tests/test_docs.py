"""The commands of the README and the guides work: what is in ```sh blocks is run, at tiny sizes."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from regionspot import model_zoo
from regionspot.config import load_config

from .helpers import ROOT, TINY, draw_scene, frozen_overrides, released_state, run, write_user_files
from .processes import run_program

GUIDES = sorted((ROOT / "docs").glob("*.md"))
PROGRAMS = {
    "regionspot": ROOT / "regionspot_cli" / "__main__.py",
    "python": ROOT / "tools" / "benchmarks" / "__main__.py",
}
# the export of a layer takes seconds
ONE_LAYER = ["SAM.CUSTOM.DEPTH", "1", "SAM.CUSTOM.GLOBAL_ATTN_INDEXES", "[0]", "SAM.CUSTOM.DECODER_DEPTH", "1"]
ONE_LAYER += ["CLIP.CUSTOM.LAYERS", "1", "INTEGRATION.DEPTH", "1"]
ONE_LAYER[::2] = [f"MODEL.REGIONSPOT.{key}" for key in ONE_LAYER[::2]]
SHORT = {"SOLVER.MAX_ITER": "12"}  # in place of what a guide says
SERVERS = {"app": "--check"}  # commands that would never end, and the option with which they only start


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def commands(path):
    lines = "".join(blocks(path, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A user's files, by the names that the guides use; BB and BL are tiny here."""
    directory = tmp_path_factory.mktemp("user")
    model = write_user_files(directory, *ONE_LAYER)
    annotations = json.loads((directory / "my_val.json").read_text())
    results = [{key: a[key] for key in ("image_id", "category_id", "bbox")} for a in annotations["annotations"]]
    (directory / "results.json").write_text(json.dumps([{**entry, "score": 0.5} for entry in results]))
    (directory / "boxes.json").write_text((directory / "results.json").read_text())
    torch.save({"model": released_state(model)}, directory / "regionspot_bb.pth")
    Image.fromarray(draw_scene(0, (480, 640))[0]).save(directory / "cup.jpg")
    [names] = blocks(ROOT / "docs" / "find.md", "json")
    (directory / "names.json").write_text(names)
    overrides = [*ONE_LAYER, *frozen_overrides(directory), "SOLVER.WARMUP_ITERS", "3", "SOLVER.STEPS", "()"]
    for name in ("BB", "BL"):
        write_config(directory / "configs" / f"RegionSpot-{name}.yaml", TINY, overrides)
    sam2 = [
        "LOCALIZER.NAME",
        "Sam2Localizer",
        "SAM.NAME",
        f"{ROOT}/tests/modeling/localizers/tiny/sam2.json",
        "SAM.WEIGHTS",
        "",
    ]
    sam2[::2] = [f"MODEL.REGIONSPOT.{key}" for key in sam2[::2]]
    write_config(directory / "configs" / "models" / "SAM2.1-T.yaml", TINY, sam2)
    data = f"('{directory}/my_val.json:{directory}/my_images',)"
    overrides = [*ONE_LAYER, *frozen_overrides(directory), "DATASETS.TEST", data, "INPUT.MIN_SIZE_TEST", "96"]
    host = directory / "projects" / "RegionSpotRCNN" / "configs" / "mask_rcnn_R_50_FPN.yaml"
    write_config(host, ROOT / "tests" / "tiny_rcnn.yaml", overrides)
    return directory


def write_config(path: Path, base: Path, overrides: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(load_config(base, overrides).dump())


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_guide_starts_with_a_command(path):
    if path.stem == "api":
        return
    first = re.search(r"```(\w*)\n", path.read_text())
    assert first and first[1] == "sh"


@pytest.mark.parametrize("path", [ROOT / "README.md", *GUIDES], ids=lambda path: path.stem)
def test_commands_work(path, directory, monkeypatch):
    monkeypatch.setattr(model_zoo, "CONFIGS", directory / "configs")  # the default config is tiny, too
    outputs = []
    for command in commands(path):
        if command[0] == "make":
            subprocess.run([*command, "--dry-run", "PYTHON=python"], cwd=ROOT, check=True, capture_output=True)
            continue
        if command == ["python", "server.py"]:
            continue  # tests/test_serve.py starts it
        program, *arguments = command
        if program == "python":
            assert arguments[:2] == ["-m", "tools.benchmarks"]
            arguments = arguments[2:]
        arguments = [SHORT.get(arguments[i - 1], argument) for i, argument in enumerate(arguments)]
        if program == "regionspot" and arguments[0] in SERVERS:
            arguments.insert(1, SERVERS[arguments[0]])
        outputs.append(run_program(directory, PROGRAMS.get(program, ROOT / program), *arguments))
    check = {"train": check_training, "README": check_prediction, "export": check_export}.get(path.stem)
    if check:
        check(directory, outputs)


def check_training(directory, outputs):
    _, extracted, _, resumed, evaluated, inaccurate, _ = outputs
    assert "8 images" in extracted
    [printed] = re.findall(r"DATASETS:\n.*\n.*\n", extracted)
    (directory / "printed.yaml").write_text(f"_BASE_: {TINY}\n{printed}")
    assert load_config(directory / "printed.yaml").DATASETS.TRAIN == ("my.json:my_images",)
    assert load_config(directory / "printed.yaml").DATASETS.TOKEN_STORES_TRAIN == ("tokens/my-my_images",)
    assert torch.load(directory / "output" / "mine" / "model_final.pth", weights_only=True)["iteration"] == 11
    assert "Starting training from iteration 12" in resumed  # of a run that was done
    assert "protocol: coco on my_val.json:my_images" in evaluated and "images: 8 of 8" in evaluated
    assert json.loads((directory / "output" / "mine" / "metrics.json").read_text().splitlines()[-1])["bbox/AP"] >= 0
    assert "PROPOSAL_FILES_TRAIN: ('boxes.json',)\nINPUT:\n  BOX_JITTER: 0.1" in inaccurate
    assert torch.load(directory / "output" / "inaccurate" / "model_final.pth", weights_only=True)["iteration"] == 11


def check_export(directory, outputs):
    assert "probabilities" in outputs[0] and "opset 20" in outputs[0]
    [snippet] = blocks(ROOT / "docs" / "export.md", "python")
    path = f"PYTHONPATH={directory / 'output' / 'cups'}"  # this alone: the file imports nothing of the checkout
    printed = run(directory, "env", path, sys.executable, "-c", f"{snippet}\nprint(result.masks.shape, len(result))")
    assert "(2, 480, 640)" in printed and "(1, 480, 640) 1" in printed


def check_prediction(directory, outputs):
    regions = json.loads((directory / "output" / "mine" / "cup.json").read_text())["regions"]
    assert len(regions) == 2 and (directory / "output" / "mine" / "cup.png").is_file()


@pytest.mark.parametrize(
    ("path", "vocabulary"),
    [(ROOT / "README.md", ["cup", "saucer", "spoon"]), (ROOT / "docs" / "predict.md", ["cup", "spoon"])],
    ids=["README", "predict"],
)
def test_inference_in_python(directory, monkeypatch, path, vocabulary):
    [snippet] = blocks(path, "python")
    monkeypatch.chdir(directory)
    monkeypatch.setattr(model_zoo, "CONFIGS", directory / "configs")
    scope = {}
    exec(snippet, scope)
    assert scope["result"].masks.shape == (1, 480, 640) and scope["result"].vocabulary == vocabulary


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120 and len(text.split()) <= 1000


@pytest.mark.parametrize("path", [ROOT / "README.md", *GUIDES], ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target
