import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from regionspot.data.tokens.writer import StoreWriter
from regionspot.index import IndexClassifier, RegionIndex, search_index
from regionspot.index.contact_sheet import CELL, TITLE, crop_region, draw_contact_sheet
from regionspot.index.region_table import RegionTable
from regionspot.index.search import combine, embed_region, embed_texts, mean_embedding, parse_region
from regionspot.index.store import INDEX
from regionspot.modeling.postprocessing import DetectionRule
from regionspot_cli.classify_index import named_columns

from ..helpers import extra_memory
from .conftest import random_index_shards

ORIGIN = {
    "inputs": {"source": ""},
    "scoring": {"score_function": "softmax", "score_rule": "product", "unknown_threshold": 0.0, "background": []},
    "logit_scale": 4.6,
    "trained": {},
    "text": {},
    "sam": None,
    "clip": None,
    "proposals": None,
}


def random_index(directory, num_regions, dim=16, shard_regions=100, planted=None):
    writer = StoreWriter(directory, {**ORIGIN, "dim": dim}, -(-num_regions // shard_regions), INDEX)
    random_index_shards(writer, num_regions, dim, shard_regions, planted)
    assert writer.finish()
    return RegionIndex(directory)


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_search_equals_sorting_all_similarities(tmp_path, chunk):
    index = random_index(tmp_path, 333)
    queries = torch.nn.functional.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    result = search_index(index, 3 * queries, top_k=10, chunk=chunk)
    similarities = queries @ index.embeddings(range(333)).t()
    expected, rows = similarities.sort(dim=1, descending=True)
    np.testing.assert_allclose(result.scores, expected[:, :10].numpy(), atol=1e-6)
    assert np.array_equal(result.rows, rows[:, :10].numpy())
    assert search_index(index, queries, top_k=500, chunk=chunk).rows.shape == (5, 333)


def test_planted_region_comes_first(tmp_path):
    query = torch.nn.functional.normalize(torch.arange(16.0), dim=0)
    index = random_index(tmp_path, 250, planted={237: query, 3: query * 0.9 + 0.1 * torch.eye(16)[0]})
    result = search_index(index, query[None], top_k=2)
    assert result.rows[0].tolist() == [237, 3] and result.scores[0, 0] == pytest.approx(1, abs=1e-3)
    [region] = index.regions([237])
    assert region.image == "2.png" and region.key == 237


def test_region_finds_itself(index, predictor, image_set):
    image = image_set.images[4]
    row = [x.row for x in index.regions(range(len(index))) if x.image == image.name][1]
    # indexed with the other regions of its image, to which it attends
    [alone] = predictor.predict_images([image.path], [image.boxes])
    result = search_index(index, torch.from_numpy(alone.embeddings[1:2]), top_k=1)
    assert result.rows[0, 0] == row and result.scores[0, 0] == pytest.approx(1, abs=2e-3)


def test_queries(predictor, image_set):
    image = image_set.images[0]
    [expected] = predictor.predict_images([image.path], [image.boxes[:1]])
    region = embed_region(predictor, image.path, image.boxes[0])
    np.testing.assert_allclose(region.numpy(), expected.embeddings[0], atol=1e-5)
    whole = embed_region(predictor, image.path)
    np.testing.assert_allclose(whole.numpy(), embed_region(predictor, image.path, [0, 0, 64, 48]).numpy(), atol=1e-5)
    text = embed_texts(predictor, ["cup", "mug"])
    _, embeddings = predictor.recognizer.encode_vocabulary({"cup": ["cup", "mug"]})
    np.testing.assert_allclose(text.numpy(), embeddings[0].numpy(), atol=1e-5)
    mean = torch.full((32,), 0.1)
    both = combine(text, [region], mean)[0]
    centered = torch.nn.functional.normalize(region - mean, dim=0)
    np.testing.assert_allclose(both, torch.nn.functional.normalize(text + centered, dim=0), atol=1e-5)
    np.testing.assert_allclose(combine(None, [region], mean)[0], region, atol=1e-5)
    with pytest.raises(ValueError, match="no query"):
        combine(None, [])


def test_mean_embedding(tmp_path):
    index = random_index(tmp_path, 333)
    np.testing.assert_allclose(mean_embedding(index), index.embeddings(range(333)).mean(dim=0), atol=1e-6)


@pytest.mark.parametrize("text", ["cup.jpg", "cup.jpg:1,2,3", ":1,2,3,4", "cup.jpg:a,b,c,d"])
def test_invalid_region_is_refused(text):
    with pytest.raises(ValueError, match=r"--region: expected image.jpg:x0,y0,x1,y1"):
        parse_region(text)


def test_region_may_have_a_colon_in_its_path():
    path, box = parse_region("C:/a.jpg:1,2,3.5,4")
    assert str(path) == "C:/a.jpg" and box == [1, 2, 3.5, 4]


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_classify_equals_predict(index, predictor, image_set, function, monkeypatch):
    names = ["cup", "red square", "green disc", "a wooden table"]
    background = ["sky"]
    recognizer, usable = predictor.recognizer, [x for x in image_set.images if len(x.boxes)]

    def predict():
        return [
            predictor.predict_images([x.path], [x.boxes], [x.proposal_scores], names, top_k=3, with_masks=False)[0]
            for x in usable
        ]

    monkeypatch.setattr(recognizer, "rule", DetectionRule(function))
    threshold = float(np.median(np.concatenate([x.scores for x in predict()])))
    rule = DetectionRule(function, unknown_thresh=threshold)
    monkeypatch.setattr(recognizer, "rule", rule)
    monkeypatch.setattr(recognizer, "background", background)
    recognizer.classifier.add("background of MODEL.REGIONSPOT.UNKNOWN", background)
    embeddings = recognizer.encode_vocabulary(names)[1]
    classifier = IndexClassifier(index, embeddings, recognizer.encode_vocabulary(background)[1], rule)
    chunks = list(classifier.classify(top_k=3, chunk=2))
    merged = {key: np.concatenate([getattr(x, key) for x in chunks]) for key in ("top_scores", "top_classes")}
    unknown = np.concatenate([x.unknown for x in chunks])
    detection = np.concatenate([x.detection_scores for x in chunks])
    expected = predict()
    scores = np.concatenate([x.top_scores for x in expected])
    # float16 embeddings move logits by a hundredth; where two names are that close, either may come first
    np.testing.assert_allclose(merged["top_scores"], scores, atol=0.02)
    is_clear = scores[:, 0] - scores[:, 1] > 0.03
    assert is_clear.sum() >= 3
    assert np.array_equal(
        merged["top_classes"][is_clear, 0], np.concatenate([x.top_classes for x in expected])[is_clear, 0]
    )
    np.testing.assert_allclose(detection, np.concatenate([x.detection_scores for x in expected]), atol=0.02)
    expected_unknown = np.concatenate([x.unknown for x in expected])
    assert (unknown == expected_unknown).mean() > 0.85 and 0 < expected_unknown.sum() < len(unknown)


def test_memory_is_bounded(tmp_path):
    small = random_index(tmp_path / "small", 20_000, dim=64, shard_regions=10_000)
    large = random_index(tmp_path / "large", 300_000, dim=64, shard_regions=10_000)
    names = torch.nn.functional.normalize(torch.randn(200, 64), dim=1)

    def use(index):
        search_index(index, names[:10], 5, chunk=2000)
        for _ in IndexClassifier(index, names).classify(chunk=2000):
            pass

    # 38 MB of embeddings; mapped files count while they are open
    assert extra_memory(lambda: use(large)) < extra_memory(lambda: use(small)) + 12e6


def test_wrong_sizes_are_refused(index):
    with pytest.raises(ValueError, match=r"queries: expected shape \(Q, 32\), got \(1, 8\)"):
        search_index(index, torch.ones(1, 8))
    with pytest.raises(ValueError, match="top_k: expected at least 1, got 0"):
        search_index(index, torch.ones(1, 32), 0)
    with pytest.raises(ValueError, match=r"embeddings of names: expected shape \(K, 32\), got \(0, 32\)"):
        IndexClassifier(index, torch.ones(0, 32))
    with pytest.raises(IndexError, match="expected regions 0 to"):
        index.regions([len(index)])


def test_contact_sheet(index, image_set, tmp_path):
    regions = index.regions([0, 1, 2, len(index) - 1])
    sheet = draw_contact_sheet(regions, ["1", "2", "3", "4"], image_set.root, columns=3)
    assert sheet.shape == (2 * (CELL + TITLE), 3 * CELL, 3)
    image = np.asarray(Image.open(image_set.root / regions[0].image))
    center = image[tuple(((regions[0].box[[1, 0]] + regions[0].box[[3, 2]]) / 2).astype(int))]
    drawn = sheet[TITLE + CELL // 2, CELL // 2]
    assert np.abs(drawn.astype(int) - center).max() < 40
    gray = draw_contact_sheet(regions, ["1", "2", "3", "4"], tmp_path, columns=3)
    assert (gray[TITLE + CELL // 2, CELL // 2] == 128).all()


def test_crop_at_the_edge_of_the_image():
    image = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    assert crop_region(image, np.array([-5.0, -5, 5, 5]), 0).shape == (5, 5, 3)
    assert crop_region(image, np.array([29.9, 19.9, 40, 40]), 0).shape == (1, 1, 3)
    assert np.array_equal(crop_region(image, np.array([10.0, 5, 20, 15]), 0.1), image[4:16, 9:21])


@pytest.mark.parametrize("num_regions", [0, 5])
def test_table_of_no_regions_has_the_same_columns(tmp_path, num_regions):
    index = random_index(tmp_path / "index", num_regions)
    classifier = IndexClassifier(index, torch.eye(16)[:3])
    with RegionTable(tmp_path / "names.parquet") as table:
        for columns in named_columns(index, classifier, ["a", "b", "c"], top_k=2):
            table.write(columns)
    written = parquet.read_table(tmp_path / "names.parquet")
    assert written.num_rows == num_regions
    text = ["image", "name", "name_2"]
    assert [field.name for field in written.schema if field.type == "string"] == text
    numbers = ["region", "x0", "y0", "x1", "y1", "score", "detection_score", "score_2"]
    assert [field.name for field in written.schema if field.type != "string"] == numbers
    assert {str(written.schema.field(name).type) for name in numbers[1:]} == {"float"}
