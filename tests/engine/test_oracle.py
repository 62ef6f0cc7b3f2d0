"""Every registered name, end to end: a model that knows the truth has AP 100 and one that is always wrong has AP 0.

The data sets are tiny, in the official formats and trees. The truth is looked up by category *name* in the JSON.
"""

import json
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin as detectron2_builtin

from regionspot.data.datasets.builtin import register_all
from regionspot.modeling.masks import RleMasks
from regionspot.modeling.meta_arch import RegionSpot
from regionspot.modeling.recognizer import RegionRecognizer
from regionspot.modeling.vision_language.text_encoder import TextEncoder
from regionspot.utils.files import directory_name
from regionspot_cli.commands import COMMANDS

from ..helpers import TINY
from ..official_trees import ODINW, Truth, write_official_trees
from ..processes import run_program

SETS = [*(f"odinw_{name}" for name in ODINW), "miniworld", "coco_2017", "objects365_v1", "objects365_v2"]
SETS += ["openimages_v6", "lvis_v1", "v3det"]  # by number of names: each evaluation reads those cached so far
TEST = [f"odinw_{name}_test" for name in ODINW] + ["miniworld_test"]
TEST += [*(f"{name}_val" for name in SETS[:-1]), "lvis_v1_train", "lvis_v1_minival", "v3det_val"]
TRAIN = [f"{name}_train" for name in SETS]
ONE_CLASS = tuple(f"odinw_{name}_" for name, (_, _, classes) in ODINW.items() if len(classes) == 1)
WITH_MASKS = ("coco", "lvis", "miniworld")
BY_PATH = ["coco_2017_val", "lvis_v1_val", "objects365_v2_val", "openimages_v6_val", "odinw_PascalVOC_val"]


def resolve(path: str) -> str:
    return str(Path(path).resolve())


class Oracle:
    """Replaces logits, and masks where they are annotated, by the truth; nothing else of the model."""

    def __init__(self, truth: Truth, wrong: bool = False) -> None:
        self.truth, self.wrong, self.seen = truth, wrong, []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        forward, inference, loss = RegionSpot.forward, RegionSpot.inference, RegionRecognizer.loss

        def record(model, batch):
            self.batch = batch
            return forward(model, batch)

        def record_and_mask(model, batch, **options):
            self.batch = batch
            return [self.mask(*pair) for pair in zip(batch, inference(model, batch, **options))]

        def record_loss(recognizer, images, boxes, classes, keys, *stored):
            for image, labels, key in zip(self.batch, classes, keys):
                names = recognizer.classifier.get_names(key)
                self.seen.append((key, image["file_name"], [names[label] for label in labels.tolist()]))
            return loss(recognizer, images, boxes, classes, keys, *stored)

        patch.setattr(RegionSpot, "forward", record)
        patch.setattr(RegionSpot, "inference", record_and_mask)
        patch.setattr(RegionRecognizer, "loss", record_loss)
        # the oracle knows a region by its box
        patch.setattr(RegionRecognizer, "region_embeddings", lambda _, __, boxes, *___: [x.tensor for x in boxes])
        patch.setattr(RegionRecognizer, "score_images", self.score_images_method())
        patch.setattr(TextEncoder, "encode", lambda encoder, names: torch.ones(len(names), 32) / 32**0.5)

    def score_images_method(self):
        score_embeddings = RegionRecognizer.score_images

        def score_images(recognizer, boxes, *arguments, **options):
            if any(image_boxes.shape[1] != 4 for image_boxes in boxes):  # real embeddings, in training
                return score_embeddings(recognizer, boxes, *arguments, **options)
            logits = []
            for image, image_boxes in zip(self.batch, boxes):
                path = image["file_name"]
                rows = self.truth.annotations_of(path, image_boxes.numpy())
                known = (self.truth.others if self.wrong else self.truth.names)[resolve(path)]
                vocabulary = recognizer.vocabulary
                columns = [next(i for i, name in enumerate(vocabulary) if name in known[row]) for row in rows]
                logits.append(torch.zeros(len(rows), len(vocabulary)))
                logits[-1][range(len(rows)), columns] = 50.0
            return logits

        return score_images

    def mask(self, image, output):
        instances = output["instances"]
        if instances.has("pred_masks_rle"):
            path = image["file_name"]
            rows = self.truth.annotations_of(path, instances.pred_boxes.tensor.numpy())
            masks = self.truth.masks[resolve(path)]
            if all(masks):
                instances.pred_masks_rle = RleMasks(masks[row] for row in rows)
        return output


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    return write_official_trees(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def truth(trees):
    return Truth(trees)


@pytest.fixture(scope="module")
def by_path(trees):
    """Registered name -> the same file as "annotations.json:directory"."""
    v2 = trees.root / "by_path" / "images"
    v2.mkdir(parents=True)
    (v2 / "v1").symlink_to(trees.root / "objects365_v2" / "val")
    roots = {name: trees.files[name][1] for name in BY_PATH} | {"objects365_v2_val": v2.parent}
    return {name: f"{trees.files[name][0]}:{root}" for name, root in roots.items()}


@pytest.fixture(scope="module")
def run(trees, tmp_path_factory):
    """Return a function that runs train_net in this process as if it had been started with the trees' root."""

    def run(names, *overrides, oracle=None, evaluate=True):
        output = tmp_path_factory.mktemp("output")
        key = "TEST" if evaluate else "TRAIN"
        pairs = [f"DATASETS.{key}", repr(tuple(names)), "OUTPUT_DIR", str(output), *map(str, overrides)]
        arguments = ["--config-file", str(TINY), *(["--eval-only"] if evaluate else []), *pairs]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("REGIONSPOT_CACHE", str(output / "cache"))
            patch.setattr(DatasetCatalog, "data", {})
            patch.setattr(MetadataCatalog, "data", {})
            detectron2_builtin.register_all_coco(str(trees.root))
            detectron2_builtin.register_all_lvis(str(trees.root))
            register_all(trees.root)
            if oracle:
                oracle.install(patch)
            return COMMANDS["train"].call(*arguments), output

    return run


@pytest.fixture(scope="module")
def right(run, truth, by_path):
    return run([*by_path.values(), *TEST], "MODEL.MASK_ON", True, oracle=Oracle(truth))[0]


@pytest.fixture(scope="module")
def wrong(run, truth):
    return run(TEST, "MODEL.REGIONSPOT.SCORE_THRESH_TEST", 0.5, oracle=Oracle(truth, wrong=True))[0]


@pytest.mark.parametrize("name", TEST)
def test_truth_has_ap_100(right, name):
    result = right[name]
    tasks = ("bbox", "segm") if name.startswith(WITH_MASKS) else ("bbox",)
    assert set(result) == {*tasks, "region"}
    for task in tasks:
        assert result[task]["AP"] == pytest.approx(100, abs=1e-6)
    assert result["region"]["top1"] == 100


def test_class_0_is_annotated(trees):
    for name in TEST:
        content = json.loads(trees.files[name][0].read_text())
        used = {annotation["category_id"] for annotation in content["annotations"]}
        first, last = (f(category["id"] for category in content["categories"]) for f in (min, max))
        assert name.startswith("miniworld") or {first, last} <= used


@pytest.mark.parametrize("name", [name for name in TEST if not name.startswith(ONE_CLASS)])
def test_wrong_classes_have_ap_0(wrong, name):
    assert wrong[name]["bbox"]["AP"] < 1e-6 and wrong[name]["region"]["top1"] == 0


def test_registered_name_and_path_are_the_same_dataset(right, by_path):
    for name, path in by_path.items():
        assert json.dumps(right[name]) == json.dumps(right[path])  # NaN is NaN


@pytest.fixture(scope="module")
def honest(run, by_path):
    """Results files of a model without an oracle, by name."""
    names = [*by_path, *by_path.values()]
    _, output = run(names, "MODEL.MASK_ON", True)
    return {name: results_of(output, name) for name in names}


def results_of(output, name):
    [path] = (output / "inference" / directory_name(name)).glob("*_instances_results.json")
    return path.read_bytes()


@pytest.mark.parametrize("name", BY_PATH)
def test_registered_name_and_path_same_results_file(honest, by_path, name):
    assert len(honest[name]) > 1000 and honest[name] == honest[by_path[name]]


def test_training_uses_class_names_of_the_file(run, trees, truth):
    """Two steps, each with every image of every data set once."""
    oracle, images = Oracle(truth), sum(len(trees.images[name]) for name in TRAIN)
    run(TRAIN, "SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", images, "DATASETS.TEST", (), oracle=oracle, evaluate=False)
    assert {name for name, _, _ in oracle.seen} == set(TRAIN) and len(oracle.seen) == 2 * images
    for _, path, names in oracle.seen:
        expected = truth.names[resolve(path)]
        assert len(names) == len(expected) > 0
        for actual, known in zip(names, expected):
            assert actual in known


def test_names_registered_at_import_in_new_process(trees, tmp_path, monkeypatch):
    """Detectron2 and the project read $DETECTRON2_DATASETS when they are imported."""
    names = ("lvis_v1_val", "coco_2017_val", "objects365_v2_val")
    (tmp_path / "evaluate.py").write_text(
        "import sys, pytest; from regionspot_cli.commands import COMMANDS\n"
        "from tests.engine.test_oracle import Oracle; from tests.official_trees import OfficialTrees, Truth\n"
        "Oracle(Truth(OfficialTrees.load(sys.argv[1]))).install(pytest.MonkeyPatch())\n"
        "COMMANDS['train'].call(*sys.argv[2:])\n"
    )
    listing = trees.save(tmp_path / "trees.json", names)
    pairs = ["DATASETS.TEST", repr(names), "OUTPUT_DIR", str(tmp_path)]
    monkeypatch.setenv("DETECTRON2_DATASETS", str(trees.root))
    options = ["--eval-only", "--config-file", TINY, *pairs]
    run_program(tmp_path, tmp_path / "evaluate.py", listing, *options, imports_again=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [results[name]["bbox"]["AP"] for name in names] == pytest.approx([100, 100, 100], abs=1e-6)
