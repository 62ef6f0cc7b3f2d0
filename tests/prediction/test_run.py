"""Runs over many images: killed and resumed, with images that cannot be used, and what they may take of memory."""

import json
import os
import signal
import sys
import time

import numpy as np
import pytest
from PIL import Image

from regionspot.prediction import parts as parts_module
from regionspot_cli.commands import COMMANDS

from ..helpers import NAMES, ROOT, TINY, draw_scene, extra_memory, write_dataset
from ..processes import Program
from .test_sources import write_video

BOXES = "3,30,60,40;8,5,30,20"
SCRIPT = ROOT / "regionspot_cli" / "__main__.py"


def write_images(directory, count, size=(48, 64)):
    directory.mkdir()
    for i in range(count):
        Image.fromarray(draw_scene(i % 8, size)[0]).save(directory / f"{i:03}.png")
    return directory


def command(photos, output, *options):
    arguments = ["--config-file", TINY, "--input", photos, "--vocabulary", ",".join(NAMES), "--output", output]
    return [str(x) for x in (*arguments, "--boxes", BOXES, "--batch-size", "3", "--workers", "1", *options)]


def predict(photos, output, *options):
    COMMANDS["predict"].call(*command(photos, output, *options))


def files(output):
    """Return the bytes of all outputs by name."""
    paths = [path for path in output.rglob("*") if path.is_file() and not path.name.startswith(".run")]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


def lines(output):
    return [json.loads(line) for path in sorted((output / ".parts").glob("*.jsonl")) for line in path.open()]


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    monkeypatch.setattr(parts_module, "PART_IMAGES", 6)


def test_killed_run_resumes_with_the_same_bytes(tmp_path):
    photos = write_images(tmp_path / "photos", 24)
    predict(photos, tmp_path / "whole", "--format", "drawing,json")
    program = Program(tmp_path, SCRIPT, "predict", *command(photos, "killed", "--format", "drawing,json"))
    parts = tmp_path / "killed" / ".parts"
    deadline = time.monotonic() + 120
    while len(list(parts.glob("*.jsonl"))) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(program.process.pid, signal.SIGKILL)
    program.wait()
    finished = {path: path.stat().st_mtime_ns for path in parts.glob("*.jsonl")}
    assert 1 <= len(finished) < 4, program.output()
    predict(photos, tmp_path / "killed", "--format", "drawing,json")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert len(lines(tmp_path / "whole")) == 24 and len(files(tmp_path / "whole")) == 48 + 4 + 2
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in finished.items())  # not done twice


def test_number_of_workers_changes_nothing(tmp_path):
    photos = write_images(tmp_path / "photos", 10)
    for workers in ("0", "2"):
        predict(photos, tmp_path / workers, "--format", "json", "--workers", workers)
    assert files(tmp_path / "0") == files(tmp_path / "2")


def test_video_of_one_frame_is_read_by_a_worker(tmp_path):
    """It is not read before the worker is forked, which would wait forever for the threads of an inherited decoder."""
    write_video(tmp_path / "clip.mp4", num_frames=1)
    program = Program(tmp_path, SCRIPT, "predict", *command(tmp_path / "clip.mp4", "out", "--workers", "2"))
    program.process.join(60)
    program.process.terminate()  # with its worker; nothing if it has ended
    assert program.wait() == 0, program.output()
    assert (tmp_path / "out" / "clip.mp4#000000.json").is_file()


def test_other_settings_are_refused(tmp_path, monkeypatch):
    photos = write_images(tmp_path / "photos", 2)
    output = tmp_path / "out"
    predict(photos, output, "--format", "json", "--score-threshold", "1")
    predict(photos, output, "--format", "json")  # a few images are soon recognized again
    assert json.loads((output / "000.json").read_text())["regions"]
    monkeypatch.setattr(parts_module, "FEW_IMAGES", 1)
    predict(photos, output, "--format", "drawing,json", "--overwrite")
    predict(photos, output, "--format", "json,drawing")  # their order is no setting
    predict(photos, output, "--format", "json", "--overwrite")
    before = files(output)
    for options, word in (
        (["--score-threshold", "0.1"], "filter was"),
        (["--vocabulary", "cup"], "vocabulary was"),
        (["MODEL.REGIONSPOT.SCORE_FUNCTION", "sigmoid"], "config was"),
        (["--batch-size", "2"], "batch size was 3, and is now 2"),
    ):
        with pytest.raises(ValueError, match=f"run with other settings; {word}"):
            predict(photos, output, "--format", "json", *options)
    assert files(output) == before
    predict(photos, output, "--format", "json", "--overwrite", "--batch-size", "2")
    (photos / "new.png").write_bytes((photos / "000.png").read_bytes())
    with pytest.raises(ValueError, match="images was"):
        predict(photos, output, "--format", "json", "--batch-size", "2")


def test_other_content_of_region_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "FEW_IMAGES", 1)
    annotations = write_dataset(tmp_path / "data", num_scenes=2)
    data, images, output = tmp_path / "data", tmp_path / "data" / "images", tmp_path / "out"
    (data / "labels").mkdir()
    for name in ("0", "1"):
        (data / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (data / "boxes.json").write_text(json.dumps([[1, 2, 30, 40]]))
    for inputs, option, word in (
        (images, ("--boxes", data / "boxes.json"), "files"),
        (images, ("--regions", data / "labels"), "files"),
        (f"{annotations}:{images}", ("--regions", "gt"), "annotations"),
    ):
        arguments = ["--config-file", TINY, "--input", inputs, "--output", output, "--vocabulary", "a", *option]
        COMMANDS["predict"].call(*arguments, "--format", "json", "--workers", 0, "--overwrite")
        path = {"gt": annotations, data / "labels": data / "labels" / "1.txt"}.get(option[1], option[1])
        path.write_text(f"{path.read_text()}\n")
        with pytest.raises(ValueError, match=f"run with other settings; {word} was"):
            COMMANDS["predict"].call(*arguments, "--format", "json", "--workers", 0)


def test_run_that_failed_before_its_first_part_may_change(tmp_path):
    photos = write_images(tmp_path / "photos", 2)
    (tmp_path / "other.pth").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"other\.pth"):
        predict(photos, tmp_path / "out", "MODEL.WEIGHTS", str(tmp_path / "other.pth"))
    predict(photos, tmp_path / "out")
    assert len(lines(tmp_path / "out")) == 2


def test_unusable_images_cost_a_line_each(tmp_path, capsys):
    photos = write_images(tmp_path / "photos", 9)
    clean = tmp_path / "clean"
    predict(photos, clean, "--format", "json")
    (photos / "002.png").write_bytes((photos / "002.png").read_bytes()[:100])
    (photos / "004.png").write_text("no image")
    (photos / "007.png").unlink()
    (photos / "007.png").symlink_to("gone")
    Image.new("RGB", (4, 4)).save(photos / "005.png")  # its boxes are outside
    predict(photos, tmp_path / "out", "--format", "json")
    said = capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "predict_summary.json").read_text())
    assert [entry["image"] for entry in summary["unreadable"]] == ["002.png", "004.png", "005.png", "007.png"]
    assert "4 images could not be used:" in said and all(f"  00{i}.png: " in said for i in (2, 4, 5, 7))
    assert summary["images"] == 9 and summary["regions"] == 10
    for number in (0, 1, 3, 6, 8):
        expected, got = (json.loads((x / f"00{number}.json").read_text()) for x in (clean, tmp_path / "out"))
        assert [x["label"] for x in got["regions"]] == [x["label"] for x in expected["regions"]]
        np.testing.assert_allclose(got["regions"][0]["logits"], expected["regions"][0]["logits"], atol=1e-4)
    assert not (tmp_path / "out" / "002.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / ".parts").glob("*.jsonl")}
    predict(photos, tmp_path / "out", "--format", "json")
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in finished.items())  # nothing is tried again
    Image.fromarray(draw_scene(7)[0]).save(photos / "fixed.png")
    (photos / "fixed.png").replace(photos / "007.png")
    predict(photos, tmp_path / "out", "--format", "json")
    summary = json.loads((tmp_path / "out" / "predict_summary.json").read_text())
    assert [entry["image"] for entry in summary["unreadable"]] == ["002.png", "004.png", "005.png"]
    assert (tmp_path / "out" / "007.json").is_file()
    assert [path.stat().st_mtime_ns == time_ns for path, time_ns in sorted(finished.items())] == [True, False]


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 alone")
def test_names_that_are_not_utf8_are_escaped(tmp_path):
    photos = write_images(tmp_path / "photos", 2)
    for i, name in enumerate((b"caf\xe9.png", b"th\xe9.png")):
        (photos / f"00{i}.png").rename(photos / os.fsdecode(name))
    (photos / os.fsdecode(b"th\xe9.png")).write_text("no image")
    paths = b"\n".join(sorted(os.fsencode(path) for path in photos.iterdir()))
    (tmp_path / "list.txt").write_bytes(paths)
    for inputs in (photos, f"@{tmp_path}/list.txt"):
        output = tmp_path / f"out{len(str(inputs))}"
        predict(inputs, output, "--format", "drawing,json,labelme,yolo,crops,results,coco,csv,parquet")
        assert "caf\\udce9.png,1,1" in (output / "regions.csv").read_text()
        content = json.loads((output / os.fsdecode(b"caf\xe9.json")).read_text())
        assert content["image"] == f"{photos}/caf\\udce9.png" and len(content["regions"]) == 2
        [failed] = json.loads((output / "predict_summary.json").read_text())["unreadable"]
        assert failed["image"] == "th\\udce9.png" and "cannot be read" in failed["reason"]


def test_skipped_video_is_no_unusable_image(tmp_path):
    photos = write_images(tmp_path / "photos", 1)
    (photos / "no.mp4").write_text("no video")
    predict(f"{photos}/*", tmp_path / "out", "--format", "json")
    summary = json.loads((tmp_path / "out" / "predict_summary.json").read_text())
    assert summary["images"] == 1 and [x["image"] for x in summary["unreadable"]] == [str(photos / "no.mp4")]
    (photos / "000.png").unlink()
    with pytest.raises(ValueError, match="none of the images could be used; the first: video"):
        predict(f"{photos}/*", tmp_path / "other", "--format", "json")


def test_images_without_an_entry_are_listed(tmp_path):
    photos = write_images(tmp_path / "photos", 3)
    (tmp_path / "boxes.json").write_text(json.dumps({"000.png": [[3, 3, 20, 20]], "002.png": []}))
    predict(photos, tmp_path / "out", "--boxes", str(tmp_path / "boxes.json"))
    summary = json.loads((tmp_path / "out" / "predict_summary.json").read_text())
    assert summary["without_regions"] == ["001.png"] and summary["unreadable"] == [] and summary["regions"] == 1


def test_two_runs_in_a_directory_are_refused(tmp_path):
    photos = write_images(tmp_path / "photos", 2)
    program = Program(tmp_path, ROOT / "tests" / "prediction" / "hold_lock.py", tmp_path / "out")
    while "held" not in program.output():
        assert program.process.is_alive()
        time.sleep(0.02)
    with pytest.raises(ValueError, match="another run is at work there"):
        predict(photos, tmp_path / "out")
    program.process.kill()
    program.wait()
    predict(photos, tmp_path / "out")


def test_interruption_says_how_to_resume(tmp_path):
    photos = write_images(tmp_path / "photos", 400)
    program = Program(tmp_path, SCRIPT, "predict", *command(photos, "out"))
    while not list((tmp_path / "out" / ".parts").glob("*.jsonl")):
        assert program.process.is_alive(), program.output()
        time.sleep(0.02)
    os.kill(program.process.pid, signal.SIGTERM)
    assert program.wait() == 143
    last = program.output().splitlines()[-1]
    assert last.startswith("interrupted: finished images are kept; to resume: ") and "--batch-size 3" in last
    assert "Traceback" not in program.output()


def test_full_disk_keeps_what_was_written(tmp_path, monkeypatch):
    photos = write_images(tmp_path / "photos", 20)
    original = parts_module.PartStore.write

    def write(self, part, lines):
        if part == 2:
            raise OSError(28, "No space left on device")
        original(self, part, lines)

    monkeypatch.setattr(parts_module.PartStore, "write", write)
    with pytest.raises(OSError, match="No space left"):
        predict(photos, tmp_path / "out", "--format", "json")
    assert len(lines(tmp_path / "out")) == 12
    monkeypatch.undo()
    monkeypatch.setattr(parts_module, "PART_IMAGES", 6)
    predict(photos, tmp_path / "out", "--format", "json")
    assert len(lines(tmp_path / "out")) == 20


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    size = (600, 800)
    sizes = []
    for count in (8, 56):
        photos = write_images(tmp_path / f"photos{count}", count, size)
        outputs = iter(range(9))
        call = lambda: predict(photos, tmp_path / f"{count}-{next(outputs)}", "--format", "json", "--workers", "0")  # noqa: E731, B023
        sizes.append(extra_memory(call))
    image_bytes = size[0] * size[1] * 3
    assert sizes[1] - sizes[0] < 28 * image_bytes  # of 48 more images
