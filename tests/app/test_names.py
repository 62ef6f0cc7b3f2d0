"""Names as people type them."""

import pytest

from regionspot.app.names import MAX_NAMES, format_names, parse_names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cup, spoon", ["cup", "spoon"]),
        ("cup\r\n\n spoon \n", ["cup", "spoon"]),
        ("cup, spoon,\nsaucer", ["cup", "spoon", "saucer"]),
        ("cup, cup\ncup", ["cup"]),
        ('"cup, red", spoon', ["cup, red", "spoon"]),
        ("5\" pipe, it's", ['5" pipe', "it's"]),
        ('"open, cup\nspoon', ["open, cup", "spoon"]),
        ("<b>cup</b>\tred", ["<b>cup</b> red"]),
        ("@/etc/passwd, dataset:x", ["@/etc/passwd", "dataset:x"]),  # names, not files of the server
    ],
)
def test_names_of_a_text(text, names):
    assert parse_names(text) == names


@pytest.mark.parametrize("text", ["", " \n,, "])
def test_no_names_are_refused(text):
    with pytest.raises(ValueError, match="no names: type at least one"):
        parse_names(text)


def test_too_many_names_are_refused():
    text = ",".join(map(str, range(MAX_NAMES)))
    assert len(parse_names(text)) == MAX_NAMES
    with pytest.raises(ValueError, match=f"at most {MAX_NAMES} names, got {MAX_NAMES + 1}"):
        parse_names(f"{text},one more")


def test_names_survive_the_text():
    names = ["cup", "cup, red", '"quoted"', '5" pipe', "<img src=x>", "it's", '", "']
    assert parse_names(format_names(names)) == names
