"""Names of a host detector among those to recognize."""

import logging

import pytest
from detectron2.data import MetadataCatalog

from regionspot.modeling.roi_heads import host_vocabulary
from regionspot.modeling.roi_heads.host_vocabulary import match_names, read_aliases

from ...helpers import ROOT

COCO, LVIS = (MetadataCatalog.get(name).thing_classes for name in ("coco_2017_val", "lvis_v1_val"))


def matched(host, names, aliases=None):
    return {h: names[i] for h, i in zip(host, match_names(host, names, aliases)) if i >= 0}


def test_coco_names_are_found_in_lvis(caplog):
    with caplog.at_level(logging.INFO, host_vocabulary.__name__):
        matches = matched(COCO, LVIS)
    assert len(matches) == 73 and "73 of its 80 names" in caplog.text
    assert sum(host == name for host, name in matches.items()) == 51
    expected = {
        "car": "car_(automobile)",
        "wine glass": "wineglass",
        "orange": "orange_(fruit)",
        "couch": "sofa",
        "tv": "television_set",
        "tie": "necktie",
        "skis": "ski",
        "person": "person",
    }
    assert {host: matches[host] for host in expected} == expected
    missing = {"sports ball", "hot dog", "potted plant", "laptop", "remote", "microwave", "hair drier"}
    assert set(COCO) - matches.keys() == missing
    [warning] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert all(name in warning for name in missing) and "tv -> television_set" in caplog.text


def test_shipped_aliases_fit_coco_and_lvis():
    aliases = read_aliases(ROOT / "configs/aliases/coco_lvis.json", COCO)
    matches = matched(COCO, LVIS, aliases)
    assert len(matches) == 78 and set(COCO) - matches.keys() == {"hot dog", "potted plant"}
    assert matches["laptop"] == "laptop_computer" and set(aliases.values()) <= set(LVIS)


def test_nearest_spelling_wins():
    assert matched(["cup"], ["Cup", "cup", "mug"]) == {"cup": "cup"}
    assert matched(["bow"], ["bow_(weapon)", "bow_(decorative_ribbons)"]) == {}
    assert matched(["Traffic Light"], ["traffic_light"]) == {"Traffic Light": "traffic_light"}
    assert matched(["glass"], ["glasses"]) == {} and matched(["glove"], ["gloves"]) == {"glove": "gloves"}
    assert matched(["woman"], ["person"]) == {"woman": "person"}
    assert matched(["person"], ["woman"]) == {}  # LVIS calls it a synonym, but a person need not be one
    assert match_names(["a", "b"], ["c", "b", "b"]) == (-1, 1)


def test_aliases_come_first():
    aliases = {"cup": "mug", "tv": None, "couch": "a name of another vocabulary"}
    names = ["cup", "mug", "television_set", "sofa"]
    assert matched(["cup", "tv", "couch"], names, aliases) == {"cup": "mug"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSON"),
        ("[]", "JSON object"),
        ('{"cup": 3}', "JSON object"),
        ('{"zebra": "a"}', "named 'zebra'"),
    ],
)
def test_wrong_alias_files_are_refused(tmp_path, content, message):
    path = tmp_path / "aliases.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_aliases(path, ["cup"])
    with pytest.raises(FileNotFoundError, match="HOST_ALIASES"):
        read_aliases(tmp_path / "none.json", ["cup"])
