"""One visitor's state, which stays on the server."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from regionspot.app.names import parse_names
from regionspot.app.prompts import parse_regions
from regionspot.app.recognition import EncodedImage, PageModel, Recognition
from regionspot.app.results import to_coco
from regionspot.utils.files import write_json

MAX_EXAMPLES = 500


class Session:
    """A visitor's last image, what was recognized in it, and examples; images before it are not kept."""

    def __init__(self) -> None:
        self.image: EncodedImage | None = None
        self.recognition: Recognition | None = None
        self.examples: dict[str, list[np.ndarray]] = {}  # (text_dim,) float32 embeddings of regions, by name
        self._directory: tempfile.TemporaryDirectory[str] | None = None  # removed with the session

    def set_image(self, model: PageModel, path: str | Path) -> EncodedImage:
        """Read and encode an image; after one that is refused, there is none.

        Raises:
            ValueError: it cannot be read, or is too large.
        """
        self.image = self.recognition = None
        self.image = model.encode(path)
        return self.image

    def find_regions(self, model: PageModel) -> list[dict[str, Any]]:
        """Return the boxes of everything in the image, as the page's board takes them.

        Raises:
            ValueError: no image, or no boxes.
        """
        return [{"box": list(region.box or ())} for region in model.find_regions(self._need_image())]

    def recognize(self, model: PageModel, regions: Any, names: str) -> Recognition:
        """Recognize regions that the page sends over the names of a text and those with examples.

        Raises:
            ValueError: no image, no or invalid regions, no or invalid names.
        """
        image = self._need_image()
        self.recognition = None
        typed = parse_names(names) if names.strip() or not self.examples else []
        means = {name: np.mean(embeddings, axis=0) for name, embeddings in self.examples.items()}
        examples = {name: mean / max(float(np.linalg.norm(mean)), 1e-12) for name, mean in means.items()}
        self.recognition = model.recognize(image, parse_regions(regions), typed, examples)
        return self.recognition

    def add_example(self, index: int, text: str) -> None:
        """Let a region that was recognized be an example of a name, also in the images after this one.

        Raises:
            ValueError: nothing was recognized, not one name, or too many examples.
        """
        if self.recognition is None:
            raise ValueError("no regions: recognize some first, then choose the one that is an example")
        names = parse_names(text) if text.strip() else []
        if len(names) != 1:
            raise ValueError(f"example: expected the name of the region, got {len(names)} names")
        if sum(map(len, self.examples.values())) >= MAX_EXAMPLES:
            raise ValueError(f"example: expected at most {MAX_EXAMPLES}; forget them first")
        self.examples.setdefault(names[0], []).append(self.recognition.predictions.embeddings[index])

    def write_coco(self) -> str:
        """Write what was recognized as a COCO file, and return its path."""
        assert self.recognition is not None
        self._directory = self._directory or tempfile.TemporaryDirectory(prefix="regionspot-")
        stem = Path(self.recognition.image.name).stem
        path = Path(self._directory.name, f"{stem}_coco.json")
        write_json(path, to_coco(self.recognition), indent=None)
        return str(path)

    def _need_image(self) -> EncodedImage:
        if self.image is None:
            raise ValueError("no image: upload one first")
        return self.image
