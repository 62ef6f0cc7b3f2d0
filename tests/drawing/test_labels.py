"""Where labels are, and what they read."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from regionspot.drawing.fonts import PRIMARY, layout_text, shorten_text, split_into_runs
from regionspot.drawing.labels import place_labels
from regionspot.drawing.placement import LabelPlacer, intersections

from .test_regions import make_regions


def rectangles_of(labels):
    return np.array([[p.x0, p.y0, p.x1, p.y1] for p in (label.placement for label in labels)]).reshape(-1, 4)


def check_places(labels, size):
    rectangles = rectangles_of(labels)
    assert (rectangles[:, :2] >= 0).all() and (rectangles[:, 2:] <= [size[1], size[0]]).all()
    assert (rectangles[:, 2:] > rectangles[:, :2]).all()
    common = intersections(rectangles, rectangles)
    np.fill_diagonal(common, 0)
    assert common.max(initial=0) == 0
    for label, (x0, y0, x1, y1) in zip(labels, rectangles):
        assert label.text.width < x1 - x0 and label.text.height <= y1 - y0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_regions", "least"), [(1, 1), (30, 20), (200, 20)])
def test_labels_are_inside_without_overlap(num_regions, least, seed):
    size = (400, 600)
    regions = make_regions(num_regions, size, seed)
    order = np.argsort(-regions.scores).tolist()
    texts = [f"{name} {score:.0%}" for name, score in zip(regions.class_names, regions.scores)]
    numbers = list(range(1, num_regions + 1))
    labels = place_labels(texts, regions.boxes, order, size, 12)
    assert len(labels) >= least
    check_places(labels, size)
    rectangles = rectangles_of(labels)
    assert (rectangles[:, 2:] - rectangles[:, :2]).prod(axis=1).sum() <= 0.3 * size[0] * size[1]
    # the highest scores have labels: who has none is not before all who have one
    named = {label.placement.region for label in labels}
    first_half = set(order[: max(1, min(num_regions, least) // 2)])
    assert first_half <= named
    numbered = place_labels(texts, regions.boxes, order, size, 12, numbers=numbers)
    check_places(numbered, size)
    assert len(numbered) > len(labels) or len(labels) == num_regions
    assert all(label.number == label.placement.region + 1 for label in numbered if label.number)


def test_leaders_join_labels_and_regions():
    # ten regions at one place: at most a few labels are beside it
    box = np.array([[280, 180, 320, 220]] * 14, np.float32)
    labels = place_labels(["a wooden table"] * 14, box, range(14), (400, 600), 14)
    check_places(labels, (400, 600))
    leaders = [label.placement for label in labels if label.placement.leader]
    assert len(labels) >= 12 and 0 < len(leaders) < len(labels)
    for place in leaders:
        x0, y0, x1, y1 = place.leader
        assert place.x0 <= x0 < place.x1 and place.y0 <= y0 < place.y1
        assert 280 <= x1 <= 320 and 180 <= y1 <= 220


def test_a_label_is_above_its_box_where_there_is_space():
    placer = LabelPlacer(np.array([[100, 50, 200, 150], [300, 5, 400, 90]], np.float32), (400, 600))
    above, inside = placer.place(0, (60, 14)), placer.place(1, (60, 14))
    assert (above.x0, above.y0, above.leader) == (100, 36, None)
    assert (
        inside.y0 >= 0
        and inside.leader is None
        and intersections(
            np.array([[inside.x0, inside.y0, inside.x1, inside.y1]]), placer.boxes[1:].round() + [-60, -14, 60, 14]
        ).max()
        == 60 * 14
    )


def test_labels_leave_small_regions_free():
    boxes = np.array([[100, 100, 300, 300], [100, 86, 130, 99]], np.float32)  # a small one where the label would be
    place = LabelPlacer(boxes, (400, 600)).place(0, (60, 14))
    assert intersections(np.array([[place.x0, place.y0, place.x1, place.y1]]), boxes[1:]).max() == 0


def test_long_names_are_cut():
    text = shorten_text("a very long name " * 20, 12, 150)
    assert 100 < text.width <= 150 and text.runs[-1][0].endswith("…")
    assert shorten_text("cup", 12, 150) == layout_text("cup", 12)
    labels = place_labels(["a very long name " * 20], np.array([[10, 100, 60, 160]]), [0], (200, 300), 12)
    assert labels[0].placement.x1 - labels[0].placement.x0 <= 0.45 * 300
    # "w…" would say nothing
    assert not place_labels(["wooden table"], np.array([[0, 0, 40, 40]]), [0], (50, 50), 12)


def draw(text):
    canvas = Image.new("L", (600, 60))
    laid_out = layout_text(text, 24)
    laid_out.draw(ImageDraw.Draw(canvas), (10, 5), 255)
    return np.asarray(canvas), laid_out


@pytest.mark.parametrize(
    "first, second",
    [
        ("😀", "🧀"),
        ("แก้ว", "กาแฟ"),
        ("猫", "犬"),
        ("كوب", "قهوة"),
        ("שולחן", "כיסא"),
        ("कप", "चम्मच"),
        ("\ue000", "\ue001"),
        ("cup, $5", "cup, $6"),
        ("<b>&amp;", "<b>&"),
        ("'", '"'),
        ("é", "e"),
        ("Ā", "A"),
        ("x²", "x2"),
        ("\U0001f9c0", "\U0001fae0"),
        ("\ud800a", "\ud800b"),
    ],
)
def test_any_script_is_drawn_and_differs(first, second):
    (one, laid_out), (two, _) = draw(first), draw(second)
    assert one.any() and two.any() and (one != two).any()
    columns = np.flatnonzero(one.any(axis=0))
    assert columns[0] >= 8 and columns[-1] <= 10 + laid_out.width + 2, "the width is that of the drawing"
    rows = np.flatnonzero(one.any(axis=1))
    assert rows[0] >= 4 and rows[-1] <= 5 + laid_out.height + 1


def test_characters_without_a_font_are_written_as_codes():
    assert split_into_runs("\ue000 x") == [("U+E000 x", PRIMARY)]
    assert split_into_runs("cup 93%") == [("cup 93%", PRIMARY)] and split_into_runs("") == []
    assert [runs for runs, _ in layout_text("a\tb\n\x07c\u200d\ufe0f", 12).runs] == ["a b c"]


def test_right_to_left_names_are_one_run():
    assert len(layout_text("שולחן 93%", 12).runs) == 1 and len(layout_text("كوب قهوة 93%", 12).runs) == 1
