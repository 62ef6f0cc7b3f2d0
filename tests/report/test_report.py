"""The report against the evaluations that it is of: numbers, escaping, size, errors."""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.report import write_report
from regionspot.report.analysis import analyze_run
from regionspot.report.run import open_runs
from regionspot_cli.commands import COMMANDS

from ..evaluation.reference import make_world, write_world

HOSTILE = [
    "<script>alert(1)</script>",
    'a "quoted" name',
    "one, two",
    "x & y's",
    "</script><b>",
    "${1} {{ 2 }}",
    "猫 🐈",
]


class Page(HTMLParser):
    """What a browser finds in a page: the tables, all tags, and where links lead."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.links, self.tables, self.text = [], [], {}, []
        self._table, self._is_data = "", False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.links += [values[key] for key in ("src", "href") if key in values]
        self._table = values.get("data-table", self._table)
        self._is_data = tag == "script" and values.get("type") == "application/json"

    def handle_data(self, data):
        if self._is_data:
            self.tables[self._table] = json.loads(data)
            self._is_data = False
        else:
            self.text.append(data)

    def rows(self, name):
        """Return the rows of a table as dicts."""
        titles = [title for title, _ in self.tables[name]["columns"]]
        return [dict(zip(titles, row)) for row in self.tables[name]["rows"]]


def evaluate(directory, world, predictions, *arguments):
    """Evaluate predictions with the command line; return the directory of the evaluation."""
    annotations, results = write_world(directory, world, predictions)
    paths = ["--annotations", annotations, "--predictions", results, "--output", directory / "out"]
    COMMANDS["evaluate-predictions"].call(*paths, *arguments)
    return directory / "out"


def draw_images(directory, world):
    directory.mkdir()
    for image in world["images"]:
        array = np.full((image["height"], image["width"], 3), 120, np.uint8)
        Image.fromarray(array).save(directory / image["file_name"])


def report(path, *runs, **options):
    write_report(runs, path, **options)
    return Page(path)


@pytest.fixture(scope="module")
def world():
    return make_world(3, masks=True, detections=25)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, world):
    """Two evaluations of the same annotations, the second without every third detection."""
    directory = tmp_path_factory.mktemp("runs")
    first = evaluate(directory / "first", *world)
    second = evaluate(directory / "second", world[0], [p for k, p in enumerate(world[1]) if k % 3])
    draw_images(directory / "images", world[0])
    return first, second, directory / "images"


def metrics(run):
    return json.loads((run / "metrics.json").read_text())


def class_ap(run, task):
    with (run / f"per_class_{task}.csv").open(newline="") as file:
        return {row["name"]: float(row["AP"]) if row["AP"] else None for row in csv.DictReader(file)}


def test_numbers_are_the_evaluators(runs, tmp_path):
    first, second, images = runs
    page = report(tmp_path / "r.html", first, second, images=images)
    first_name, second_name = "first", "second"  # both directories are called "out"
    rows = {(row[""], row["run"]): row for row in page.rows("metrics")}
    for task, title in (("bbox", "boxes"), ("segm", "masks")):
        for name, run in ((first_name, first), (second_name, second)):
            expected = metrics(run)[task]
            assert {key: rows[title, name][key] for key in expected} == expected
        [row] = [row for row in page.rows("differences") if row[""] == title]
        for key in ("AP", "APr"):
            assert row[key] == metrics(second)[task][key] - metrics(first)[task][key] != 0
    aps = [class_ap(run, "bbox") for run in (first, second)]
    for row in page.rows("classes"):
        assert row[f"AP {first_name}"] == aps[0][row["class"]] and row[f"AP {second_name}"] == aps[1][row["class"]]
        assert row["mask AP"] == class_ap(first, "segm")[row["class"]]
    assert {row["class"] for row in page.rows("classes")} >= {name for name, ap in aps[0].items() if ap is not None}
    for row in page.rows("frequencies"):
        assert row[f"AP {first_name}"] == metrics(first)["bbox"][f"AP{row['frequency'][0]}"]


def test_curves_enclose_ap(runs):
    first, *_ = runs
    [run] = open_runs([first])
    analysis = analyze_run(run, GroundTruth(run.record.annotations))
    assert analysis.curves.mean(axis=1) * 100 == pytest.approx([run.tasks["bbox"]["AP50"], run.tasks["bbox"]["AP"]])
    assert analysis.ap50 == pytest.approx(run.tasks["bbox"]["AP50"], abs=1e-9)


def test_run_does_not_differ_from_itself(runs, tmp_path):
    first, *_ = runs
    page = report(tmp_path / "r.html", first, first)
    differences = [value for row in page.tables["differences"]["rows"] for value in row[2:]]
    points = [i for i, (_, kind) in enumerate(page.tables["classes"]["columns"]) if kind == "points"]
    differences += [row[i] for row in page.tables["classes"]["rows"] for i in points]
    assert len(differences) > 20 and set(differences) <= {0.0, None}
    for _, _, *values in page.tables["errors"]["rows"]:
        assert values[:2] == values[2:]
    assert "The runs differ" not in "".join(page.text)


def test_names_are_escaped(tmp_path):
    world, predictions = make_world(3, categories=len(HOSTILE), images=12)
    for category, name in zip(world["categories"], HOSTILE):
        category["name"] = name
    for image in world["images"]:
        image["file_name"] = f"<i>{image['id']}</i>.jpg"
    page = report(tmp_path / "r.html", evaluate(tmp_path / "run <u>", world, predictions))
    shown = {row["class"] for row in page.rows("classes")}
    assert shown <= set(HOSTILE) and len(shown) > 4
    assert not {"b", "i", "u"} & set(page.tags) - {"b"} and page.tags.count("b") == 1  # that of the protocol
    assert page.tags.count("script") == len(page.tables) + 1
    text = "".join(page.text)
    assert all(name in text for name in shown) and "<i>" in text


def test_page_needs_no_other_file(runs, tmp_path):
    first, second, images = runs
    page = report(tmp_path / "r.html", first, second, images=images, num_images=3)
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in page.links)
    assert sum(link.startswith("data:") for link in page.links) == 3 and "link" not in page.tags
    assert not re.search(r"https?://|@import|url\(", (tmp_path / "r.html").read_text())


def test_size_is_bounded(tmp_path):
    """1203 classes: 30 rows are elements, the others are data; more detections do not make the page larger."""
    sizes = []
    for detections in (20, 80):
        world, predictions = make_world(0, images=150, categories=1203, detections=detections)
        path = tmp_path / f"{detections}.html"
        page = report(path, evaluate(tmp_path / str(detections), world, predictions), num_images=5)
        sizes.append(path.stat().st_size)
        assert page.tags.count("tr") < 130 and len(page.tables["classes"]["rows"]) > 100
        assert page.tags.count("article") == 5 and len(page.tables["confusion"]["rows"]) <= 300
    assert max(sizes) < 1.3 * min(sizes) and max(sizes) < 400_000


def test_missing_images_are_named(runs, tmp_path):
    first, _, images = runs
    shutil.copytree(images, tmp_path / "images")
    for path in sorted((tmp_path / "images").iterdir())[:-1]:
        path.unlink()
    page = report(tmp_path / "r.html", first, images=tmp_path / "images")
    problems = [text for text in page.text if "no such file; --images DIR" in text]
    assert len(problems) == page.tags.count("article") - 1 >= 2
    (tmp_path / "images").joinpath(sorted(images.iterdir())[-1].name).write_bytes(b"no image")
    page = report(tmp_path / "r.html", first, images=tmp_path / "images")
    assert any("cannot be read" in text for text in page.text)


def test_changed_predictions_are_refused(tmp_path, world):
    run = evaluate(tmp_path / "run", *world)
    (tmp_path / "run" / "results.json").write_text(json.dumps(world[1][: len(world[1]) // 2]))
    with pytest.raises(ValueError, match="files changed after the evaluation; evaluate again"):
        report(tmp_path / "r.html", run)
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match="its predictions .*results.json are not there"):
        report(tmp_path / "r.html", run)
    assert not (tmp_path / "r.html").exists()


def test_other_annotations_are_refused(tmp_path, world, runs):
    other = evaluate(tmp_path / "other", *make_world(4))
    with pytest.raises(ValueError, match="expected evaluations of the same annotations"):
        report(tmp_path / "r.html", runs[0], other)
    same = evaluate(tmp_path / "copy", *world)  # another path, the same content
    report(tmp_path / "r.html", runs[0], same)


def test_directories_without_an_evaluation(tmp_path, runs):
    with pytest.raises(FileNotFoundError, match="evaluation.json: no such file; expected the directory of an evalu"):
        open_runs([tmp_path])
    for name in ("a", "b"):
        shutil.copytree(runs[0], tmp_path / "inference" / name)
    with pytest.raises(ValueError, match="has 2 evaluations: give one of .*inference/a, .*inference/b"):
        open_runs([tmp_path])
    shutil.rmtree(tmp_path / "inference" / "b")
    [run] = open_runs([tmp_path])
    assert run.name == tmp_path.name and run.directory == tmp_path / "inference" / "a"
    (run.directory / "evaluation.json").write_text('{"metric": 3}')
    with pytest.raises(ValueError, match=r"evaluation.json: damaged \(.*\); evaluate again"):
        open_runs([tmp_path])


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["a/x", "a/y"], ["x", "y"]),
        (["x/out", "y/out"], ["x", "y"]),
        (["x/1/inference/val", "y/1/inference/val"], ["x", "y"]),
        (["a/x/b/out", "a/y/c/out"], ["x/b", "y/c"]),
        (["x", "x"], ["x (1)", "x (2)"]),
        (["one"], ["one"]),
    ],
)
def test_runs_have_names_of_their_own(tmp_path, runs, places, names):
    for place in dict.fromkeys(places):
        shutil.copytree(runs[0], tmp_path / "runs" / place)
    assert [run.name for run in open_runs([tmp_path / "runs" / place for place in places])] == names


def test_different_rules_are_warned_about(tmp_path, world, runs):
    fixed = evaluate(tmp_path / "fixed", *world, "--protocol", "fixed")
    text = "".join(report(tmp_path / "r.html", runs[0], fixed).text)
    assert "The runs differ in metric: " in text and "lvis; " in text and "10000 detections per class" in text
    assert "The runs differ in predictions" not in text


def test_set_in_cocos_format(tmp_path):
    world, predictions = make_world(3)
    for image in world["images"]:
        del image["neg_category_ids"]
    page = report(tmp_path / "r.html", evaluate(tmp_path / "run", world, predictions))
    [row] = page.rows("metrics")
    assert row["AP"] == metrics(tmp_path / "run" / "out")["bbox"]["AP"] and "APr" not in row


@pytest.mark.parametrize("empty", ["detections", "annotations"])
def test_nothing_to_show(tmp_path, empty):
    world, predictions = make_world(3)
    if empty == "annotations":
        world["annotations"] = []
    page = report(tmp_path / "r.html", evaluate(tmp_path / "run", world, [] if empty == "detections" else predictions))
    assert {row["AP"] for row in page.rows("metrics")} == ({0.0} if empty == "detections" else {None})


def test_command(runs, tmp_path, capsys):
    COMMANDS["report"].call(runs[0], "--output", tmp_path / "sub" / "r.html", "--images", runs[2], "--worst", 2)
    assert "r.html: 0.0 MB, opens in any browser" in capsys.readouterr().out
    assert Page(tmp_path / "sub" / "r.html").tags.count("article") == 2
    with pytest.raises(SystemExit):
        COMMANDS["report"].call(runs[0], "--output", tmp_path / "r.html", "--worst", -1)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_tables_sort_in_a_browser(runs, tmp_path):
    page = report(tmp_path / "r.html", runs[0], runs[1])
    columns = [title for title, _ in page.tables["classes"]["columns"]]
    index = columns.index("objects")
    html = (tmp_path / "r.html").read_text()
    click = f"document.querySelectorAll('[data-table=classes] th button')[{index}].click();"
    expected = sorted((row["objects"] for row in page.rows("classes")), reverse=True)
    for clicks, values in ((1, expected), (2, expected[::-1])):
        path = tmp_path / "clicked.html"
        path.write_text(html.replace("</body>", f"<script>{click * clicks}</script></body>"))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={tmp_path / 'profile'}"]
        result = subprocess.run([CHROMIUM, *flags, f"file://{path}"], capture_output=True, text=True, check=True)
        table = result.stdout.split('data-table="classes"')[1].split("</table>")[0]
        cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("<tr")[2:]]
        assert [int(row[index]) for row in cells] == values
