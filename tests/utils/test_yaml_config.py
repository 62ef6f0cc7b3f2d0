"""Invalid YAML and invalid overrides: one sentence each, and nothing is fetched."""

import urllib.request

import pytest

from regionspot.config import load_config
from regionspot.modeling.localizers.build_sam import get_sam_size

from ..helpers import TINY, tiny_config

DEEP = 600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected KEY: value, got an empty file"),
        ("# nothing\n", "got an empty file"),
        ("- MODEL\n- 5\n", "got a list"),
        ("MODEL", "got a str"),
        ("5", "got a int"),
        ("1: 2", "got a dict"),
        ("\x00\x01", "not readable as YAML"),
        ("a: [1", "not readable as YAML"),
        ("a: &a [*a]", "not readable as YAML"),
        ("a: &a {b: *a}", "not readable as YAML"),
        ("[" * DEEP + "]" * DEEP, "not readable as YAML"),
        ("a: !!python/object/apply:os.system ['touch bomb']", "not readable as YAML"),
        ("a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)), "not readable"),
        ("_BASE_: http://127.0.0.1:9/a.yaml", "_BASE_: expected a path.*nothing is fetched"),
        ("_BASE_: [https://127.0.0.1:9/a.yaml]", "_BASE_: expected a path"),
        ("_BASE_: 5", "_BASE_: expected a path, got 5"),
        ("_BASE_: {a: 1}", "_BASE_: expected a path"),
        ("_BASE_: bad.yaml", "its _BASE_ leads back to it"),
        ("_BASE_: other.yaml", "its _BASE_ leads back to it"),
        ("MODEL: 5", "MODEL: expected keys below it, got 5"),
        ("MODEL: null", "MODEL: expected keys below it, got None"),
        ("MODEL: [1]", "MODEL"),
        ("MODEL: {REGIONSPOT: null}", "MODEL.REGIONSPOT: expected <class '.*CfgNode'>, got <class 'NoneType'>"),
        ("MODEL: {1: 2}", "bad.yaml"),
        ("SOLVER: {MAX_ITER: ten}", "MAX_ITER"),
        ("SOLVER: {MAX_ITER: null}", "SOLVER.MAX_ITER: expected <class 'int'>, got nothing"),
        ("SOLVER: {MAX_ITER: 2020-01-01}", "bad.yaml"),
        ("DATASETS: {TRAIN: [5]}", "DATASETS.TRAIN: expected names, got 5"),
        ("DATASETS: {PROPOSAL_FILES_TEST: [[a]]}", "PROPOSAL_FILES_TEST: expected names"),
        ("DATASETS: {TRAIN_RATIO: [a]}", "TRAIN_RATIO: expected numbers, got 'a'"),
        ("SOLVER: {STEPS: [a]}", "SOLVER.STEPS: expected numbers, got 'a'"),
        ("INPUT: {MIN_SIZE_TRAIN: [[5]]}", "INPUT.MIN_SIZE_TRAIN: expected numbers"),
        ("SOLVER: {CHECKPOINT_PERIOD: 0}", "SOLVER.CHECKPOINT_PERIOD: expected at least 1"),
        ("VERSION: x", "bad.yaml"),
        ("VERSION: 99", "VERSION: expected 2, got 99"),
        ("VERSION: 1", "VERSION: expected 2, got 1"),
        ("NO_SUCH_KEY: 1", "NO_SUCH_KEY"),
    ],
)
def test_invalid_config_is_one_sentence(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_: pytest.fail("fetched"))
    (tmp_path / "bad.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text("_BASE_: [bad.yaml]")
    with pytest.raises(ValueError, match=f"(?s)bad.yaml.*{message}|other.yaml.*{message}") as caught:
        load_config(tmp_path / "bad.yaml")
    assert len(str(caught.value)) < 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yaml", "other.yaml"]


@pytest.mark.parametrize(
    "overrides", [["SOLVER.MAX_ITER"], ["SOLVER.MAX_ITER", "None"], ["MODEL", "5"], ["", "1"], ["MODEL.DEVICE", "x"]]
)
def test_wrong_overrides_are_one_sentence(overrides):
    with pytest.raises(ValueError, match="config .*tiny.yaml"):
        load_config(TINY, overrides)


@pytest.mark.parametrize("value", [-1, 0, 5, 2**70])
def test_impossible_sam_sizes_are_refused(value):
    with pytest.raises(ValueError, match=r"MODEL.REGIONSPOT.SAM.CUSTOM: expected sizes .*IMAGE_SIZE"):
        get_sam_size(tiny_config("MODEL.REGIONSPOT.SAM.CUSTOM.IMAGE_SIZE", value))


def test_missing_base_names_both_files(tmp_path):
    (tmp_path / "a.yaml").write_text("_BASE_: b.yaml")
    with pytest.raises(FileNotFoundError, match="b.yaml.*no such file .*_BASE_ of .*a.yaml"):
        load_config(tmp_path / "a.yaml")


def test_base_files_are_merged_in_order(tmp_path):
    (tmp_path / "a.yaml").write_text("SOLVER: {MAX_ITER: 7, BASE_LR: 0.5}\nSEED: 1")
    (tmp_path / "b.yaml").write_text("SEED: 2")
    (tmp_path / "c.yaml").write_text("_BASE_: [a.yaml, b.yaml]\nSOLVER: {MAX_ITER: 9}")
    cfg = load_config(tmp_path / "c.yaml")
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SEED) == (9, 0.5, 2)


def test_section_over_a_value_of_the_base_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("SEED: 1")
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml\nSEED: {A: 1}")
    with pytest.raises(ValueError, match="b.yaml.*SEED: expected a value as in _BASE_, got keys below it"):
        load_config(tmp_path / "b.yaml")
