import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pycocotools.mask as mask_api
import pytest
import torch

from regionspot import visualization
from regionspot.drawing import DrawingStyle, draw_labels, draw_regions
from regionspot.drawing.palette import get_colors, name_color, text_color, vocabulary_colors
from regionspot.utils.rle import encode_masks

NAMES = ["cup", "saucer", "spoon", "wooden table", "napkin"]


def make_regions(num_regions, size=(400, 600), seed=0, with_masks=False):
    """Regions at random places; some are partly outside."""
    rng = np.random.default_rng(seed)
    height, width = size
    centers, sides = rng.uniform(0, 1, (num_regions, 2)) * (width, height), rng.uniform(0.02, 0.4, (num_regions, 2))
    sides = sides * (width, height)
    boxes = np.concatenate([centers - sides / 2, centers + sides / 2], axis=1).astype(np.float32)
    classes = rng.integers(0, len(NAMES), num_regions)
    rles = [ellipse(box, size) for box in boxes] if with_masks else None
    return SimpleNamespace(
        boxes=boxes,
        classes=classes,
        class_names=[NAMES[label] for label in classes],
        scores=rng.uniform(0.2, 1, num_regions).astype(np.float32),
        rles=rles,
        vocabulary=NAMES,
    )


def ellipse(box, size):
    rows, columns = np.mgrid[: size[0], : size[1]]
    x, y, w, h = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]
    mask = ((columns - x) / (w / 2)) ** 2 + ((rows - y) / (h / 2)) ** 2 <= 1
    return mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))


def one_region(box, name="cup", score=0.9, **more):
    boxes, scores = np.array([box], np.float32), np.array([score], np.float32)
    return SimpleNamespace(boxes=boxes, class_names=[name], scores=scores, **more)


def gray(height=400, width=600):
    return np.full((height, width, 3), 90, np.uint8)


def count(image, color):
    return int((image == color).all(axis=2).sum())


def test_boxes_have_the_color_of_their_name():
    image = gray()
    style = DrawingStyle(labels=False, line_width=3)
    drawn = draw_regions(image, one_region([100, 50, 301, 250]), style)
    color = name_color("cup")
    assert (drawn[50:53, 100:301] == color).all() and (drawn[247:250, 100:301] == color).all()
    assert (drawn[50:250, 100:103] == color).all() and (drawn[50:250, 298:301] == color).all()
    assert count(drawn, color) == 201 * 200 - 195 * 194  # and nothing else
    assert count(drawn, (90, 90, 90)) == image.shape[0] * image.shape[1] - count(drawn, color)
    assert (image == 90).all(), "the caller's image stays as it is"


def test_masks_have_contours_and_true_colors_inside():
    region = one_region([100, 50, 300, 250], rles=[ellipse([100, 50, 300, 250], (400, 600))])
    drawn = draw_regions(gray(), region, DrawingStyle(labels=False))
    color = name_color("cup")
    assert count(drawn, color) > 500 and (drawn[100:200, 150:250] == 90).all()
    assert (drawn[50:60, 100:120] == 90).all(), "no box"
    filled = draw_regions(gray(), region, DrawingStyle(labels=False, fill=0.5))
    np.testing.assert_allclose(filled[150, 200], (np.array(color) + 90) / 2, atol=1)
    assert (filled[60, 110] == 90).all()
    boxed = draw_regions(gray(), region, DrawingStyle(labels=False, outline="box", fill=0.5))
    assert (boxed[50, 100:300] == color).all() and (boxed[150, 200] == filled[150, 200]).all()
    bare = draw_regions(gray(), region, DrawingStyle(labels=False, outline="none"))
    assert (bare == 90).all()


def test_bool_masks_and_rles_are_drawn_the_same():
    regions = make_regions(5, with_masks=True)
    expected = draw_regions(gray(), regions)
    masks = np.stack([mask_api.decode(rle) for rle in regions.rles]).astype(bool)
    others = SimpleNamespace(**{**vars(regions), "rles": encode_masks(torch.from_numpy(masks))})
    assert (draw_regions(gray(), others) == expected).all()
    del others.rles
    others.masks = masks
    assert (draw_regions(gray(), others) == expected).all()


def test_an_empty_mask_is_drawn_as_its_box():
    empty = mask_api.encode(np.zeros((400, 600), np.uint8, order="F"))
    drawn = draw_regions(gray(), one_region([100, 50, 300, 250], rles=[empty]), DrawingStyle(labels=False, fill=0.5))
    assert (drawn[50, 100:300] == name_color("cup")).all()


def test_drawing_is_deterministic_and_small_regions_are_on_top():
    regions = make_regions(50, with_masks=True)
    style = DrawingStyle(legend="right", fill=0.2)
    assert (draw_regions(gray(), regions, style) == draw_regions(gray(), regions, style)).all()
    for order in ([0, 1], [1, 0]):
        boxes = np.array([[100, 100, 200, 200], [100, 100, 140, 140]], np.float32)[order]
        names = [["large", "small"][row] for row in order]
        drawn = draw_labels(gray(), boxes, None, names, DrawingStyle(labels=False))
        assert (drawn[100, 100:140] == name_color("small")).all() and (drawn[100, 140:200] == name_color("large")).all()


def test_low_scores_are_left_out():
    regions = make_regions(20)
    regions.scores[:] = np.linspace(0.1, 0.9, 20)
    style = DrawingStyle(score_threshold=0.5)
    kept = regions.scores >= 0.5
    rest = SimpleNamespace(
        boxes=regions.boxes[kept],
        class_names=[name for name, keep in zip(regions.class_names, kept) if keep],
        scores=regions.scores[kept],
        vocabulary=NAMES,
    )
    drawn = draw_regions(gray(), regions, style)
    assert 0 < kept.sum() < 20 and (drawn != draw_regions(gray(), regions)).any()
    # placement avoids all boxes, also those that are left out: only outlines are compared
    no_labels = DrawingStyle(score_threshold=0.5, labels=False)
    assert (draw_regions(gray(), regions, no_labels) == draw_regions(gray(), rest, DrawingStyle(labels=False))).all()


def test_no_regions():
    drawn = draw_regions(gray(), make_regions(0), DrawingStyle(legend="right", fill=0.5))
    assert (drawn == gray()).all()


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (3, 700)])
@pytest.mark.parametrize("legend", ["none", "right", "below"])
def test_tiny_images(size, legend):
    image = gray(*size)
    drawn = draw_regions(image, one_region([0, 0, size[1], size[0]]), DrawingStyle(legend=legend))
    assert (drawn[0, 0] == name_color("cup")).all()
    assert (drawn.shape == image.shape) == (legend == "none")


def test_a_box_at_the_border_is_whole():
    drawn = draw_regions(gray(), one_region([-50, -1e6, 700, 400]), DrawingStyle(labels=False, line_width=2))
    color = name_color("cup")
    assert (drawn[0] == color).all() and (drawn[-2:] == color).all() and (drawn[:, -1] == color).all()
    outside = draw_regions(gray(), one_region([900, 900, 950, 950]), DrawingStyle(line_width=2))
    assert outside.shape == (400, 600, 3)


def test_the_legend_has_all_classes_and_keeps_the_image():
    regions = make_regions(20)
    plain = draw_regions(gray(), regions)
    right = draw_regions(gray(), regions, DrawingStyle(legend="right"))
    below = draw_regions(gray(), regions, DrawingStyle(legend="below"))
    assert (right[:400, :600] == plain).all() and right.shape[0] == 400 and right.shape[1] > 600
    assert (below[:400, :600] == plain).all() and below.shape[0] > 400
    for part in (right[:, 600:], below[400:]):
        for name in set(regions.class_names):
            assert count(part, vocabulary_colors(tuple(NAMES))[name]) > 50
    assert draw_regions(gray(), regions, DrawingStyle(legend="auto")).shape == (400, 600, 3)
    crowded = draw_regions(gray(), make_regions(200), DrawingStyle(legend="auto"))
    assert crowded.shape[1] > 600


def test_colors_of_names():
    other = vocabulary_colors(("spoon", "car", "cup"))
    vocabulary = tuple(f"class {index}" for index in range(1500))
    colors = vocabulary_colors(vocabulary)
    own = [colors[name] for name in vocabulary]
    assert all(a != b for k in (1, 2, 3) for a, b in zip(own, own[k:]))
    is_kept = [colors[name] == name_color(name) for name in vocabulary]
    assert 0.6 < np.mean(is_kept) < 1, "most names have their own color in any vocabulary"
    assert len(set(other.values())) == 3 and len(set(own)) > 50
    names = ["cup", "unknown", "unheard of"]
    assert get_colors(names, ["cup"])[1] == (150, 150, 150) and get_colors(names, None)[2] == name_color("unheard of")
    assert get_colors(["unknown"], ["unknown"]) != [(150, 150, 150)], "a class of that name"
    assert text_color((255, 255, 255)) == (0, 0, 0) and text_color((0, 0, 90)) == (255, 255, 255)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory can be reset on Linux only")
def test_memory_does_not_grow_with_the_masks():
    size = (1500, 2000)
    regions = make_regions(12, size, with_masks=True)
    many = SimpleNamespace(
        boxes=np.tile(regions.boxes, (15, 1)),
        class_names=regions.class_names * 15,
        scores=np.tile(regions.scores, 15),
        rles=regions.rles * 15,  # 540 MB at full size
    )
    draw_regions(gray(*size), regions)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_megabytes()
    draw_regions(gray(*size), many, DrawingStyle(fill=0.5))
    assert peak_megabytes() - before < 120


def peak_megabytes():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": np.zeros((2, 4), np.float32)}, r"boxes \(N, 4\) and scores \(N,\) of 1 names, got shapes \(2, 4\)"),
        ({"boxes": np.full((1, 4), np.nan, np.float32)}, "finite boxes"),
        ({"rles": [{"size": [400, 601], "counts": "P" * 20}]}, "mask 0: "),
        ({"rles": []}, "masks: expected 1, one of each region, got 0"),
        ({"masks": np.zeros((1, 4, 4), bool)}, r"masks: expected shape \(N, 400, 600\)"),
    ],
)
def test_invalid_regions_are_refused(change, message):
    region = one_region([100, 50, 300, 250])
    vars(region).update(change)
    with pytest.raises(ValueError, match=message):
        draw_regions(gray(), region)


@pytest.mark.parametrize(
    "options", [{"fill": 1.5}, {"legend": "left"}, {"outline": "contour"}, {"line_width": 0}, {"score_threshold": 2}]
)
def test_invalid_styles_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DrawingStyle(**options)


def test_old_module_warns():
    with pytest.warns(DeprecationWarning, match="use regionspot.drawing.draw_labels"):
        assert visualization.draw_labels is draw_labels
    with pytest.warns(DeprecationWarning, match="use regionspot.drawing.draw_regions"):
        drawn = visualization.draw_regions(gray(), one_region([100, 50, 300, 250]), False)
    assert (drawn == draw_regions(gray(), one_region([100, 50, 300, 250]))).all()
    with pytest.raises(AttributeError, match="has no attribute 'draw_nothing'"):
        visualization.draw_nothing  # noqa: B018
