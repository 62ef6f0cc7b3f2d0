"""The page in a browser: upload, draw, recognize, change the names, download; mistakes; nothing from the network."""

import json
import shutil
import socket
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regionspot.app.prompts import parse_regions

from ..helpers import NAMES, draw_scene

if find_spec("gradio") is None:  # its import takes seconds
    pytest.skip("no Gradio: pip install 'regionspot[app]'", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium on this machine", allow_module_level=True)

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
MAX_UPLOAD = 1_000_000
SECONDS = 60_000  # milliseconds until a test gives up


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    from regionspot.app.page import Page, launch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        page = Page(model, NAMES)
        yield launch(page, "127.0.0.1", port, MAX_UPLOAD)
        page.blocks.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """A new visitor; fails if the page asks anyone but the server, or opens a dialog."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(SECONDS)
    elsewhere, dialogs = [], []
    page.on("request", lambda request: elsewhere.append(request.url))
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(address)
    page.wait_for_selector("#board .tools")
    yield page
    page.close()
    assert not [url for url in elsewhere if not url.startswith((address, "data:", "blob:"))]
    assert not dialogs


def wait_for_status(page, text):
    expected = json.dumps(text)
    page.wait_for_function(f"document.querySelector('#status textarea').value.includes({expected})")
    return page.locator("#status textarea").input_value()


def upload(page, path):
    page.set_input_files("#upload input[type=file]", str(path))
    wait_for_status(page, "pixels: draw boxes")
    page.wait_for_selector("#board .stage img[src]")


def drag(page, size, box):
    """Draw a box, XYXY in pixels of an image of (width, height), with the mouse."""
    frame = page.locator("#board svg").bounding_box()
    scale = np.array([frame["width"] / size[0], frame["height"] / size[1]] * 2)
    x0, y0, x1, y1 = (np.array(box) * scale + [frame["x"], frame["y"]] * 2).tolist()
    page.mouse.move(x1, y1)  # from the lower right: any two corners will do
    page.mouse.down()
    page.mouse.move((x0 + x1) / 2, (y0 + y1) / 2)
    page.mouse.move(x0, y0)
    page.mouse.up()
    return 1 / scale[:2].min()  # pixels of the image in one of the screen


def click(page, mode, x, y):
    """Choose a tool and click at a fraction of the image's width and height."""
    page.click(f"#board [data-mode={mode}]")
    frame = page.locator("#board svg").bounding_box()
    page.mouse.click(frame["x"] + x * frame["width"], frame["y"] + y * frame["height"])


def recognize(page, status):
    page.click("button:has-text('Recognize')")
    return wait_for_status(page, status)


def cell(page, row, column):
    return page.locator(f"#table [data-testid=cell-{row}-{column}]")


def shown_names(page, count):
    """Return the names in a table that must have ``count`` rows."""
    cell(page, count - 1, 1).wait_for()
    assert cell(page, count, 1).count() == 0
    return [cell(page, row, 1).inner_text() for row in range(count)]


def download(page):
    with page.expect_download() as download:
        page.click("#download")
    return download.value.suggested_filename, json.loads(Path(download.value.path()).read_text())


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "scene.png"
    Image.fromarray(draw_scene(0)[0]).save(path)
    return path


def test_draw_recognize_rename_download(page, model, scene):
    upload(page, scene)
    drag(page, (64, 48), [10, 8, 40, 32])
    click(page, "point", 0.5, 0.25)
    click(page, "exclude", 0.9, 0.9)
    recognize(page, "Regions: 2, names: 4")
    name, content = download(page)
    assert name == "scene_coco.json" and [category["name"] for category in content["categories"]] == NAMES
    x, y, width, height = content["annotations"][0]["bbox"]
    assert [x, y, x + width, y + height] == pytest.approx([10, 8, 40, 32], abs=0.2)
    drawn = [{"box": [x, y, x + width, y + height]}, {"points": [[32, 12, 1], [57.6, 43.2, 0]]}]
    expected = model.recognize(model.encode(scene), parse_regions(drawn), NAMES).predictions
    assert shown_names(page, 2) == expected.class_names
    scores = [annotation["score"] for annotation in content["annotations"]]
    assert scores == pytest.approx(expected.scores.tolist(), abs=0.02)
    page.wait_for_selector("#drawing img")
    page.wait_for_selector("#attention img")

    page.fill("#names textarea", 'zebra, "cup, red"')
    recognize(page, "Regions: 2, names: 2")
    assert set(shown_names(page, 2)) <= {"zebra", "cup, red"}
    assert [category["name"] for category in download(page)[1]["categories"]] == ["zebra", "cup, red"]


def test_everything_undo_and_clear(page, scene):
    upload(page, scene)
    page.click("button:has-text('Everything')")
    wait_for_status(page, "Regions: 4, names: 4")
    assert page.locator("#board .count").inner_text() == "4 regions"
    assert len(download(page)[1]["annotations"]) == 4
    page.click("#board [data-action=undo]")
    recognize(page, "Regions: 3, names: 4")
    page.click("#board [data-action=clear]")
    recognize(page, "Error: no regions")


def test_attention_of_a_row_and_a_region_as_example(page, scene):
    upload(page, scene)
    drag(page, (64, 48), [2, 2, 20, 20])
    drag(page, (64, 48), [30, 8, 60, 40])
    recognize(page, "Regions: 2")
    first = page.locator("#attention img").get_attribute("src")
    cell(page, 1, 1).click()
    wait_for_status(page, "Region 2")
    page.wait_for_function(f"document.querySelector('#attention img').getAttribute('src') != {json.dumps(first)}")
    assert page.locator("#region input").input_value().startswith("2: ")

    page.fill("#example textarea", "my <b>gadget</b>")
    page.click("button:has-text('Add example')")
    wait_for_status(page, "to use the example")
    assert page.locator("#examples textarea").input_value() == "my <b>gadget</b> (1)"
    recognize(page, "Regions: 2, names: 5")
    assert shown_names(page, 2)[1] == "my <b>gadget</b>"
    page.click("button:has-text('Forget examples')")
    wait_for_status(page, "text again")
    recognize(page, "Regions: 2, names: 4")


def test_large_image_turned_by_exif(page, tmp_path):
    array = np.full((900, 2400, 3), 90, np.uint8)
    array[200:400, 300:700] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # shown 900 pixels wide and 2400 high
    Image.fromarray(array).save(tmp_path / "turned.jpg", exif=exif)
    upload(page, tmp_path / "turned.jpg")
    frame = page.locator("#board svg").bounding_box()
    assert frame["height"] < 900 and frame["height"] / frame["width"] == pytest.approx(2400 / 900, rel=0.01)
    box = [500, 300, 700, 700]  # of the bright rectangle, upright
    pixel = drag(page, (900, 2400), box)
    recognize(page, "Regions: 1")
    content = download(page)[1]
    assert (content["images"][0]["width"], content["images"][0]["height"]) == (900, 2400)
    x, y, width, height = content["annotations"][0]["bbox"]
    assert [x, y, x + width, y + height] == pytest.approx(box, abs=pixel)


def test_names_are_text_not_html(page, scene):
    attack = "<img src=x onerror=alert(1)>"
    names = [attack, "${alert(2)}", "{{alert 3}}", "</script><script>alert(4)</script>", 'it\'s, "quoted"']
    upload(page, scene)
    drag(page, (64, 48), [10, 8, 40, 32])
    for name in names:
        page.fill("#names textarea", '"' + name.replace('"', '""') + '"')
        recognize(page, "Regions: 1, names: 1")
        page.wait_for_function(f"document.querySelector('#table').innerText.includes({json.dumps(name)})")
        assert shown_names(page, 1) == [name] and page.locator("#region input").input_value() == f"1: {name}"
        assert download(page)[1]["categories"] == [{"id": 1, "name": name}]
    page.fill("#names textarea", f"{attack} " * 40)
    assert attack in recognize(page, "Error: ")
    assert page.locator("img[src=x]").count() == 0


def test_file_name_is_text_not_html(page, scene, tmp_path):
    path = tmp_path / "<img src=x onerror=alert(1)>.png"
    shutil.copy(scene, path)
    upload(page, path)
    assert page.locator("img[src=x]").count() == 0


def test_mistakes_are_lines_of_the_page(page, scene, tmp_path):
    assert recognize(page, "Error: ") == "Error: no image: upload one first"
    upload(page, scene)
    assert "no regions: draw a box" in recognize(page, "Error: no regions")
    drag(page, (64, 48), [10, 8, 40, 32])
    page.fill("#names textarea", "")
    assert "type at least one" in recognize(page, "Error: no names")

    (tmp_path / "text.jpg").write_text("no image")
    page.click("#upload [aria-label=Clear]")
    wait_for_status(page, "Upload an image.")
    page.set_input_files("#upload input[type=file]", str(tmp_path / "text.jpg"))
    status = wait_for_status(page, "cannot be read")
    assert status.startswith("Error: image text.jpg cannot be read") and str(tmp_path) not in status
    assert not page.locator("#board .stage").is_visible()
    assert "Traceback" not in page.inner_text("body")


def test_files_over_the_limit_are_refused(page, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (800, 800, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > MAX_UPLOAD
    page.set_input_files("#upload input[type=file]", str(tmp_path / "large.png"))
    page.wait_for_selector("text=maximum allowed size")
    assert page.locator("#status textarea").input_value() == "Upload an image."


def test_bugs_show_no_details(page, model, scene, monkeypatch):
    def fail(path):
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(model, "encode", fail)
    page.set_input_files("#upload input[type=file]", str(scene))
    wait_for_status(page, "Error: something went wrong inside")
    assert "secret" not in page.content()
