"""Regions that the page sends, and the prompts that they become."""

import numpy as np
import pytest

from regionspot.app.prompts import MAX_POINTS, MAX_REGIONS, DrawnRegion, group_prompts, parse_regions

BOX = {"box": [1, 2.5, 30, 40]}
POINT = {"points": [[5, 6, 1]]}


def test_regions_of_the_page():
    regions = parse_regions([BOX, POINT, {**BOX, "points": [[5, 6, 0]]}])
    assert regions == [
        DrawnRegion((1, 2.5, 30, 40)),
        DrawnRegion(None, ((5, 6, 1),)),
        DrawnRegion((1, 2.5, 30, 40), ((5, 6, 0),)),
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "no regions: draw a box"),
        ([], "no regions: draw a box"),
        ("boxes", "expected a list"),
        ([[1, 2, 3, 4]], "expected a list"),
        ([{}], "expected a box or points, got neither"),
        ([{"box": [1, 2, 3]}], "expected 4 numbers"),
        ([{"box": [1, 2, 3, "4"]}], "expected 4 numbers"),
        ([{"box": [1, 2, 3, float("nan")]}], "expected 4 numbers"),
        ([{"box": 7}], "expected 4 numbers"),
        ([{"points": [[1, 2]]}], "expected 3 numbers"),
        ([{"points": 5}], f"at most {MAX_POINTS} points"),
        ([{"points": [[1, 2, 1]] * (MAX_POINTS + 1)}], f"at most {MAX_POINTS} points"),
        ([{"points": [[1, 2, 0]]}], "background points alone"),
        ([BOX] * (MAX_REGIONS + 1), f"at most {MAX_REGIONS}, got {MAX_REGIONS + 1}"),
    ],
)
def test_invalid_regions_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        parse_regions(value)


def test_prompts_are_grouped_by_kind():
    two = {"points": [[7, 8, 1], [9, 10, 0]]}
    both = {"box": [0, 0, 9, 9], "points": [[1, 1, 0]]}
    groups = group_prompts(parse_regions([BOX, POINT, both, two, BOX]))
    assert [rows for rows, _ in groups] == [[0, 4], [1, 3], [2]]
    boxes, points, mixed = (prompts for _, prompts in groups)
    assert set(boxes) == {"boxes"} and boxes["boxes"].dtype == np.float32
    np.testing.assert_array_equal(boxes["boxes"], [[1, 2.5, 30, 40]] * 2)
    assert set(points) == {"points", "point_labels"}
    np.testing.assert_array_equal(points["points"], [[[5, 6], [0, 0]], [[7, 8], [9, 10]]])
    np.testing.assert_array_equal(points["point_labels"], [[1, -1], [1, 0]])
    assert set(mixed) == {"boxes", "points", "point_labels"} and mixed["point_labels"].tolist() == [[0]]
