import json

import pytest

from regionspot.vocabulary import clean_name, get_phrases, get_templates, load_vocabulary

COCO = {"categories": [{"id": 7, "name": "zebra"}, {"id": 2, "name": "cup"}]}


def test_names_from_every_source(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffcup\n\n wooden table \n")
    (tmp_path / "b.json").write_text('["cup", "wooden table"]')
    (tmp_path / "c.json").write_text(json.dumps(COCO))
    for source in (["cup", "wooden table"], "cup, wooden table", f"@{tmp_path / 'a.txt'}", str(tmp_path / "b.json")):
        assert load_vocabulary(source) == ["cup", "wooden table"]
    assert load_vocabulary(str(tmp_path / "c.json")) == ["cup", "zebra"]  # in the order of the ids
    assert load_vocabulary("dataset:coco_2017_val")[:2] == ["person", "bicycle"]
    with pytest.raises(ValueError, match="'dataset:nobodys': expected a registered data set"):
        load_vocabulary("dataset:nobodys")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no class names"),
        ('["a", ""]', "number 1 is ''"),
        ('["a", 3]', "number 1 is 3"),
        ("7", "got int"),
        ('{"a": 1}', "synonyms of 'a' as a list of strings, got 1"),
        ('{"a": []}', "synonyms of 'a': no class names"),
        ('{"a": ["b", ""]}', "synonyms of 'a': name number 1 is ''"),
        ('{"": ["b"]}', "name number 0 is ''"),
        ('{"categories": [{"id": 1}]}', "id and a name"),
    ],
)
def test_invalid_files_are_refused(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_vocabulary(f"@{tmp_path / 'x.json'}")


def test_synonyms_from_mappings_and_files(tmp_path):
    synonyms = {"cup": ["cup", "mug"], "table": "desk"}
    (tmp_path / "a.json").write_text(json.dumps(synonyms))
    for source in (synonyms, str(tmp_path / "a.json"), load_vocabulary(synonyms)):
        names = load_vocabulary(source)
        assert list(names) == ["cup", "table"] and get_phrases(names) == [("cup", "mug"), ("desk",)]
        assert names != ["cup", "table"]
    assert load_vocabulary({"cup": "cup"}) == ["cup"] and get_phrases(["cup"]) == [("cup",)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (5, "expected class names, got 5"),
        (None, "expected class names, got None"),
        ("dataset:", "registered data set"),
        ({}, "no class names"),
        ({"cup": 5}, "as a list of strings, got 5"),
        ([["cup", "mug"]], "name number 0"),
    ],
)
def test_invalid_vocabulary_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        load_vocabulary(source)


def test_missing_file_and_empty_list_are_refused():
    with pytest.raises(FileNotFoundError, match="names.txt"):
        load_vocabulary("@names.txt")
    with pytest.raises(FileNotFoundError, match="~nobody_x.txt"):
        load_vocabulary("~nobody_x.txt")
    with pytest.raises(ValueError, match="at least one"):
        load_vocabulary(" , ")


def test_clean_name_styles():
    assert clean_name("arctic_(type_of_shoe)") == "arctic_(type_of_shoe)"
    assert [clean_name(n) for n in ("floor-other-merged", "door-stuff", "tree-merged")] == ["floor", "door", "tree"]
    assert clean_name("arctic_(type_of_shoe)", "readable") == "arctic type of shoe"


def test_81_templates_with_one_placeholder():
    templates = get_templates("all")
    assert len(templates) == len(set(templates)) == 81 and templates[0] == "{}."
    assert all(template.count("{}") == 1 for template in templates)


@pytest.mark.parametrize("source", ["dataset:", "dataset:no_such_set", "", ",", 5, None, 1.5, [5], [""]], ids=repr)
def test_empty_vocabulary_is_refused(source):
    with pytest.raises(ValueError, match="vocabulary"):
        load_vocabulary(source)


@pytest.mark.parametrize("source", ["~no_such_user/x.txt", "~x.txt", "@~x.json"])
def test_unknown_home_directory_is_no_file(source):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_vocabulary(source)


def test_deeply_nested_json_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[" * 500_000)
    with pytest.raises(ValueError, match="not JSON"):
        load_vocabulary(f"@{tmp_path}/x.json")
