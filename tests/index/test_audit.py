import json

import numpy as np
import pytest
import torch

from regionspot.data import register_json_dataset
from regionspot.data.coco_io import AnnotationFile
from regionspot.data.tokens.writer import StoreWriter
from regionspot.index import IndexClassifier, RegionIndex, build_index, dataset_images
from regionspot.index import audit as audit_module
from regionspot.index.audit import Audit, annotated_labels, audit_labels, calibrate
from regionspot.index.audit_files import AuditWriter
from regionspot.index.store import INDEX

from ..helpers import NAMES, write_dataset
from .conftest import random_index_shards
from .test_search import ORIGIN


def index_of(directory, embeddings, shard_regions=40):
    """Write an index of these (N, D) embeddings."""
    count, dim = embeddings.shape
    writer = StoreWriter(directory, {**ORIGIN, "dim": dim}, -(-count // shard_regions), INDEX)
    random_index_shards(writer, count, dim, shard_regions, dict(enumerate(embeddings)))
    writer.finish()
    return RegionIndex(directory)


def audit_of(directory, cosines, labels, names):
    """Audit regions whose cosine similarities with ``names`` (K, D) are those of their embeddings."""
    classifier = IndexClassifier(index_of(directory, cosines), names)
    return audit_labels(classifier, np.arange(len(labels)), labels)


def test_perfect_model_ranks_planted_errors_first(tmp_path):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 8, 200)
    labels, planted = truth.copy(), rng.permutation(200)[:10]
    labels[planted] = (truth[planted] + rng.integers(1, 8, 10)) % 8
    audit = audit_of(tmp_path, torch.eye(8)[truth], labels, torch.eye(8))
    assert set(audit.ranked().tolist()) == set(planted.tolist())
    assert set(audit.ranked(only_suspicious=False)[:10].tolist()) == set(planted.tolist())
    assert np.array_equal(audit.suggested[planted], truth[planted])
    assert audit.suspicion.min() >= 0 and audit.suspicion.max() <= 1


def test_confused_names_are_no_reason_for_suspicion(tmp_path):
    # the model prefers class 1 to class 0 for all objects of class 0, by a little
    mixed = torch.tensor([[0.700, 0.704, 0.0]])
    embeddings = torch.cat([mixed.repeat(20, 1), torch.eye(3)[1].repeat(20, 1), torch.eye(3)[2].repeat(20, 1)])
    labels = np.repeat([0, 1, 2], 20)
    labels[5] = 2  # an object of class 0
    audit = audit_of(tmp_path, torch.nn.functional.normalize(embeddings, dim=1), labels, torch.eye(3))
    assert audit.ranked().tolist() == [5] and audit.ranked(only_suspicious=False)[0] == 5
    assert audit.suggested[5] == 0


def test_class_without_annotations_is_not_suggested(tmp_path):
    audit = audit_of(tmp_path, torch.eye(3)[[0, 0, 1, 1]], np.array([0, 0, 1, 1]), torch.eye(3))
    assert not audit.is_suspicious.any() and (audit.suggested != 2).all()


def test_calibration_recovers_scale_and_bias():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 5, generator=generator)
    true_bias = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0])
    labels = torch.multinomial((0.5 * logits + true_bias).softmax(dim=1), 1, generator=generator)[:, 0]
    scale, bias = calibrate(logits, labels)
    assert float(scale) == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(bias - bias.mean(), true_bias, atol=0.2, rtol=0)


def test_calibration_samples_a_large_index(tmp_path, monkeypatch):
    monkeypatch.setattr(audit_module, "MAX_FITTED", 8 * 30)
    labels = np.arange(200) % 8
    classifier = IndexClassifier(index_of(tmp_path, torch.eye(8)[labels]), torch.eye(8))
    logits, sampled = audit_module._sample(classifier, torch.from_numpy(labels))
    assert len(logits) == len(sampled) == 29 and torch.equal(logits.argmax(dim=1), sampled)


def test_one_class_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected annotated regions of at least two classes"):
        audit_of(tmp_path, torch.eye(3), np.zeros(3, np.int64), torch.eye(3)[:1])


@pytest.fixture(scope="module")
def audited(predictor, index_cfg, tmp_path_factory):
    """An annotation file in another order than its images', with a crowd, and the index of its boxes."""
    directory = tmp_path_factory.mktemp("audit")
    path = write_dataset(directory / "data")
    content = json.loads(path.read_text())
    content["annotations"].reverse()
    content["images"] = content["images"][3:] + content["images"][:3]
    content["annotations"][2]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    register_json_dataset("audited", path, directory / "data" / "images")
    index = build_index(predictor, index_cfg, dataset_images("audited"), directory / "index", 3, show_progress=False)
    return index, AnnotationFile(path), content, directory


def test_labels_of_an_index_of_annotations(audited):
    index, file, content, _ = audited
    annotations, labels = annotated_labels(index, file)
    assert len(labels) == len(content["annotations"]) - 1 and 2 not in annotations
    ids = sorted(category["id"] for category in content["categories"])
    for region, position, label in zip(index.regions(range(len(index))), annotations, labels):
        annotation = content["annotations"][position]
        x, y, width, height = annotation["bbox"]
        assert region.image_id == annotation["image_id"] and region.box.tolist() == [x, y, x + width, y + height]
        assert ids[label] == annotation["category_id"]


def test_files_of_an_audit(audited, tmp_path):
    index, file, content, directory = audited
    annotations, labels = annotated_labels(index, file)
    count = len(labels)
    suspicion = np.linspace(0.1, 0.999, count)
    columns = (np.zeros(count, np.float32), np.ones(count, np.float32))
    ratios = np.log(suspicion / (1 - suspicion))
    audit = Audit(annotations, labels, (labels + 1) % 4, ratios, *columns)
    writer = AuditWriter(index, file, audit)
    writer.write_coco(tmp_path / "suspicious.json")
    written = json.loads((tmp_path / "suspicious.json").read_text())
    num_suspicious = int((suspicion >= 0.95).sum())
    assert num_suspicious
    assert [x["suspicion"] for x in written["annotations"]] == sorted(
        suspicion[suspicion >= 0.95].round(4), reverse=True
    )
    first = written["annotations"][0]
    original = content["annotations"][annotations[-1]]
    assert {key: first[key] for key in original} == original
    suggested = next(x for x in content["categories"] if x["id"] == first["suggested_category_id"])
    assert first["suggested"] == suggested["name"] and first["suggested_category_id"] != first["category_id"]
    assert {x["id"] for x in written["images"]} == {x["image_id"] for x in written["annotations"]}
    assert AnnotationFile(tmp_path / "suspicious.json").annotations().images.shape == (num_suspicious,)

    writer.write_csv(tmp_path / "suspicious.csv")
    lines = (tmp_path / "suspicious.csv").read_text().splitlines()
    assert len(lines) == num_suspicious + 1
    assert (
        lines[1].split(",")[:3] == ["1", "0.999", str(original["id"])] and lines[1].split(",")[5] == first["suggested"]
    )

    writer.write_page(tmp_path / "audit.html", str(directory / "data" / "images"))
    page = (tmp_path / "audit.html").read_text()
    assert page.count("data:image/jpeg") == len({x.image for x in writer.regions}) + num_suspicious
    assert "suspicious label" in page and "looks like" in page and "attend" not in page
    assert len(AuditWriter(index, file, audit, top_k=3).rows) == 3


def test_names_are_those_of_the_file(audited):
    assert sorted(category.class_name for category in audited[1].categories) == sorted(NAMES)
