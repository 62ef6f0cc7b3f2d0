"""One visitor's state, which stays on the server."""

import tempfile
from pathlib import Path
from typing import Any

from regionspot.app.names import parse_names
from regionspot.app.prompts import parse_regions
from regionspot.app.recognition import EncodedImage, PageModel, Recognition
from regionspot.app.results import to_coco
from regionspot.utils.files import write_json


class Session:
    """A visitor's last image and what was recognized in it; images before it are not kept."""

    def __init__(self) -> None:
        self.image: EncodedImage | None = None
        self.recognition: Recognition | None = None
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
        """Recognize regions that the page sends over the names of a text.

        Raises:
            ValueError: no image, no or invalid regions, no or invalid names.
        """
        image = self._need_image()
        self.recognition = None
        self.recognition = model.recognize(image, parse_regions(regions), parse_names(names))
        return self.recognition

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
