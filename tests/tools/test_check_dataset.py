"""tools/check_dataset.py as a user runs it."""

import json

import pytest

from regionspot_cli.commands import COMMANDS

from ..helpers import write_dataset

CHECK = COMMANDS["check"]


def test_report_and_exit_status(tmp_path, capsys):
    path = write_dataset(tmp_path, 30)
    name = f"{path}:{tmp_path / 'images'}"
    assert CHECK.call(name, "--workers", 2) == 0
    printed = capsys.readouterr()
    assert "30 images, " in printed.out and "all of it can be used" in printed.out
    assert "30/30" in printed.err  # the bar
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "red \x1b[31msquare"
    path = tmp_path / "faults.json"
    path.write_text(json.dumps(content))
    name = f"{path}:{tmp_path / 'images'}"
    for image in (tmp_path / "images").glob("*.png"):
        image.unlink()
    assert CHECK.call(name, "--workers", 0, "--json", tmp_path / "report.json") == 1
    printed = capsys.readouterr().out
    assert "images that cannot be used: 30\n" in printed and printed.count("no such file") == 20
    assert "... and 10 more; --json FILE lists all" in printed and "\x1b" not in printed
    assert len(json.loads((tmp_path / "report.json").read_text())["unusable"]) == 30


def test_invalid_dataset_is_one_line(tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{")
    for name, message in (("lvis_v1_trian", "do you mean lvis_v1_train"), (f"{tmp_path}/bad.json:{tmp_path}", "JSON")):
        with pytest.raises(SystemExit, match="1"):
            CHECK.run([name])
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1
