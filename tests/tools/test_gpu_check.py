"""tests/gpu_check.py: its checks, on the CPU in place of a GPU, and its message where there is none."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from .. import gpu_check


@pytest.fixture
def setting(tmp_path, monkeypatch):
    for catalog in (DatasetCatalog, MetadataCatalog):  # the miniature world is registered again
        monkeypatch.setattr(catalog, "data", dict(catalog.data))
    return gpu_check.Setting("cpu", tmp_path, scenes=4, steps=4, images=2)


def test_checks_agree_with_themselves(setting, capsys):
    names = ["training, bf16", "frozen parts, bf16", "resuming", "extraction", "stored tokens", "evaluation"]
    passed = gpu_check.run_checks(setting, names)
    lines = capsys.readouterr().out.splitlines()
    assert passed and [line[:20].strip() for line in lines] == names, lines
    assert all(" s  peak " in line and " GB  ok " in line for line in lines)
    assert [line.endswith("none, to the bit") for line in lines] == [False, False, True, True, True, True]


def test_failed_check_does_not_stop_others(setting, capsys, monkeypatch):
    monkeypatch.setitem(gpu_check.CHECKS, "demo", lambda _: gpu_check.expect(0.2, 0.1, "error"))
    monkeypatch.setitem(gpu_check.CHECKS, "resuming", lambda _: "ran")
    assert not gpu_check.run_checks(setting, ["demo", "resuming"])
    output = capsys.readouterr().out
    assert "FAILED" in output and "AssertionError: error 2.0e-01 (at most 1e-01)" in output and "ok      ran" in output
    with pytest.raises(AssertionError, match="nan"):
        gpu_check.expect(float("nan"), 0.1, "error")


def test_without_cuda_it_says_so(capsys):
    assert gpu_check.main([]) == 0
    assert capsys.readouterr().out == "gpu-check: this machine has no CUDA, so there is nothing to check\n"
