"""The page: Gradio's components, and what happens when they are used."""

import functools
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
import gradio as gr  # noqa: E402

from regionspot.app.names import format_names  # noqa: E402
from regionspot.app.recognition import MAX_SIDE, PageModel, Recognition  # noqa: E402
from regionspot.app.results import HEADERS, TYPES, WIDTHS, to_choices, to_rows  # noqa: E402
from regionspot.app.session import Session  # noqa: E402
from regionspot.report.panels import embed  # noqa: E402
from regionspot.utils.command_line import user_error  # noqa: E402

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).with_name("assets")
SUFFIXES = [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".jp2"]
KEPT = 3600  # seconds that uploads and sessions are kept after their last use
MAX_SESSIONS = 20  # whose images are kept
MAX_WAITING = 20  # requests that wait for the model
# Without fonts from the network.
THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
HELP = "Drop an image, draw boxes or click points on it, type names, and press *Recognize*."


class Page:
    """The page's components and their handlers; ``blocks`` is what Gradio serves."""

    def __init__(self, model: PageModel, names: Sequence[str] = ()) -> None:
        """
        Args:
            model: shared by all sessions.
            names: class names to start with.
        """
        self.model = model
        with gr.Blocks(title="RegionSpot", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as self.blocks:
            self.session = gr.State(None, time_to_live=KEPT)
            gr.Markdown(f"# RegionSpot\n{HELP}")
            if parts := model.predictor.random_parts:
                gr.Markdown(f"**No weights for {', '.join(parts)}: names and masks mean nothing.**")
            with gr.Row():
                with gr.Column():
                    self._add_inputs(names)
                with gr.Column():
                    self._add_results()
            self._connect()

    def _add_inputs(self, names: Sequence[str]) -> None:
        self.upload = gr.File(label="Image", file_types=SUFFIXES, height=120, elem_id="upload")
        self.board = gr.HTML(
            value=[],
            source=None,
            html_template=(ASSETS / "board.html").read_text(encoding="utf-8"),
            css_template=(ASSETS / "board.css").read_text(encoding="utf-8"),
            js_on_load=(ASSETS / "board.js").read_text(encoding="utf-8"),
            apply_default_css=False,
            elem_id="board",
        )
        self.names = gr.Textbox(
            label="Names, separated by commas or lines",
            info='A name with a comma is in double quotes: "cup, red".',
            value=format_names(names),
            lines=3,
            max_lines=8,
            elem_id="names",
        )
        with gr.Row():
            self.recognize = gr.Button("Recognize", variant="primary")
            self.everything = gr.Button("Everything")
        self.status = gr.Textbox(label="Status", value="Upload an image.", interactive=False, elem_id="status")

    def _add_results(self) -> None:
        buttons: Any = ["download", "fullscreen"]  # not "share"
        self.drawing = gr.Image(label="Regions", interactive=False, buttons=buttons, elem_id="drawing")
        self.table = gr.Dataframe(
            headers=HEADERS,
            datatype=TYPES,
            column_widths=WIDTHS,
            interactive=False,
            wrap=True,
            show_label=False,
            elem_id="table",
        )
        self.download = gr.DownloadButton("Download as COCO", interactive=False, elem_id="download")
        has_attention = self.model.has_attention
        self.region = gr.Dropdown(
            label="Region, or click a row of the table", choices=[], interactive=True, elem_id="region"
        )
        self.attention = gr.Image(
            label="What the region attends to",
            interactive=False,
            buttons=buttons,
            visible=has_attention,
            elem_id="attention",
        )
        with gr.Row():
            self.example = gr.Textbox(label="The chosen region is an example of", elem_id="example")
            self.examples = gr.Textbox(label="Names with examples", interactive=False, elem_id="examples")
        with gr.Row():
            self.add = gr.Button("Add example")
            self.forget = gr.Button("Forget examples")

    def _connect(self) -> None:
        """Say which handler each event calls: one at a time uses the model, whichever event it is of."""
        common: dict[str, Any] = {
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "api_visibility": "private",
            "show_progress_on": [self.status, self.drawing],
        }
        results = [self.session, self.status, self.drawing, self.table, self.download, self.region, self.attention]
        loaded = [*results, self.board]
        self.upload.upload(self.one_line(self.load), [self.session, self.upload], loaded, **common)
        self.upload.clear(self.one_line(self.load), [self.session, self.upload], loaded, **common)
        drawn = [self.session, self.board, self.names]
        for event in (self.recognize.click, self.names.submit):
            event(self.one_line(self.recognize_regions), drawn, results, **common)
        everything = self.one_line(self.find_and_recognize)
        self.everything.click(everything, [self.session, self.names], loaded, **common)
        attended = [self.session, self.status, self.region, self.attention]
        self.region.input(self.one_line(self.attend), [self.session, self.region], attended, **common)
        chosen, listed = [self.session, self.region, self.example], [self.session, self.status, self.examples]
        self.add.click(self.one_line(self.add_example), chosen, listed, **common)
        self.example.submit(self.one_line(self.add_example), chosen, listed, **common)
        self.forget.click(self.one_line(self.forget_examples), [self.session], listed, **common)
        self.table.select(self.one_line(self.attend_to_row), [self.session], attended, **common)

    def one_line(self, handler: Callable[..., dict]) -> Callable[..., dict]:
        """Return a handler whose errors are a line of the page: a mistake as it is, a bug without its details."""

        @functools.wraps(handler)
        def handle(session: Session | None, *inputs: Any, **arguments: Any) -> dict:
            session = session or Session()
            try:
                return {self.session: session, self.status: "", **handler(session, *inputs, **arguments)}
            except Exception as error:
                line = user_error(error)
                if line is None:
                    logger.exception("a bug in %s", handler.__name__)
                    line = "something went wrong inside; the server's log says what"
                return {self.session: session, self.status: f"Error: {line}"}

        return handle

    def load(self, session: Session, path: str | None) -> dict:
        """Show an uploaded image, to draw on; without one, or with one that cannot be read, nothing is shown."""
        empty = {**self._no_results(), self.board: gr.HTML(value=[], source=None)}
        session.image = session.recognition = None
        if not path:
            return {**empty, self.status: "Upload an image."}
        try:
            image = session.set_image(self.model, path)
        except ValueError as error:
            return {**empty, self.status: f"Error: {error}"}
        height, width = image.array.shape[:2]
        source = {"url": embed(image.view, MAX_SIDE), "width": width, "height": height}
        return {
            **empty,
            self.board: gr.HTML(value=[], source=source),
            self.status: f"{image.name}, {width} x {height} pixels: draw boxes or click points.",
        }

    def recognize_regions(self, session: Session, regions: Any, names: str) -> dict:
        """Recognize what is drawn."""
        return self._show(session, session.recognize(self.model, regions, names))

    def find_and_recognize(self, session: Session, names: str) -> dict:
        """Draw the boxes of everything, and recognize them; boxes are drawn even if the names are no good."""
        regions = session.find_regions(self.model)
        board = {self.board: gr.update(value=regions)}
        try:
            return {**board, **self.recognize_regions(session, regions, names)}
        except ValueError as error:
            return {**board, self.status: f"Error: {error}"}

    def attend(self, session: Session, index: int | None) -> dict:
        """Show what the chosen region attends to."""
        if session.recognition is None or index is None:
            raise ValueError("no regions: recognize some first")
        shown = {self.status: f"Region {index + 1}: {session.recognition.predictions.class_names[index]}"}
        return {**shown, **self._attention(session.recognition, index)}

    def attend_to_row(self, session: Session, event: gr.SelectData) -> dict:
        """Show what the region of a row of the table attends to, however the table is sorted."""
        index = int(event.row_value[0]) - 1
        return {self.region: index, **self.attend(session, index)}

    def add_example(self, session: Session, index: int | None, name: str) -> dict:
        """Let the chosen region be an example of a name."""
        session.add_example(0 if index is None else index, name)
        listed = ", ".join(f"{name} ({len(examples)})" for name, examples in session.examples.items())
        return {self.examples: listed, self.status: "Press Recognize to use the example, in this image or another."}

    def forget_examples(self, session: Session) -> dict:
        """Go back to names alone."""
        session.examples.clear()
        return {self.examples: "", self.status: "Names are text again: press Recognize."}

    def _show(self, session: Session, recognition: Recognition) -> dict:
        return {
            self.drawing: self.model.draw(recognition),
            self.table: to_rows(recognition),
            self.download: gr.DownloadButton(value=session.write_coco(), interactive=True),
            self.region: gr.Dropdown(choices=to_choices(recognition), value=0),
            self.status: f"Regions: {len(recognition.regions)}, names: {len(recognition.predictions.vocabulary)}.",
            **self._attention(recognition, 0),
        }

    def _attention(self, recognition: Recognition, index: int) -> dict:
        if not self.model.has_attention:  # then its image is not in the page
            return {}
        return {self.attention: self.model.draw_attention(recognition, index)}

    def _no_results(self) -> dict:
        return {
            self.drawing: None,
            self.table: [],
            self.download: gr.DownloadButton(value=None, interactive=False),
            self.region: gr.Dropdown(choices=[], value=None),
            self.attention: None,
        }


def launch(page: Page, host: str, port: int, max_upload: int) -> str:
    """Serve a page in the background, and return its address; nothing of it leaves ``host``.

    Args:
        page: the page.
        host: address to listen on; "127.0.0.1" is this machine alone.
        port: its port.
        max_upload: bytes of the largest file that can be uploaded.

    Raises:
        OSError: the port is in use.
    """
    page.blocks.queue(max_size=MAX_WAITING)
    with suppress(OSError):
        _, address, _ = page.blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            max_file_size=max_upload,
            state_session_capacity=MAX_SESSIONS,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            pwa=False,
            footer_links=[],
            theme=THEME,
        )
        return address
    raise OSError(f"nothing can listen on {host}:{port}: another program may use the port; give another --port")
