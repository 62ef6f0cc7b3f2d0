"""An audit as files: COCO JSON, CSV, and a page with the most suspicious labels."""

import csv
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from regionspot.data.coco_io import AnnotationFile
from regionspot.index.audit import Audit
from regionspot.index.contact_sheet import crop_region
from regionspot.index.store import RegionIndex
from regionspot.report.page import Section, render
from regionspot.report.panels import EmbeddedImage, Panel, embed, make_panel
from regionspot.report.tables import Table
from regionspot.report.worst_images import ImageErrors, Region
from regionspot.utils.files import atomic_path, write_json

COLUMNS = (
    *("rank", "suspicion", "annotation_id", "image", "label", "suggested", "label_score", "suggested_score"),
    *("x0", "y0", "x1", "y1"),
)
CROP = 140  # side of a crop in the page, pixels
CROPS = "The suspicious regions:"


class AuditWriter:
    """Writes the most suspicious labels of an audit."""

    def __init__(self, index: RegionIndex, file: AnnotationFile, audit: Audit, top_k: int | None = None) -> None:
        """
        Args:
            index: of the annotated boxes.
            file: the annotations.
            audit: of all regions of the index.
            top_k: number of most suspicious labels; by default all that are suspicious enough.
        """
        self.file, self.audit, self.names = file, audit, [category.class_name for category in file.categories]
        self.rows = audit.ranked() if top_k is None else audit.ranked(only_suspicious=False)[:top_k]
        self.regions = index.regions(self.rows)
        self.entries = [self._entry(int(row)) for row in self.rows]

    def _entry(self, row: int) -> dict[str, Any]:
        audit, suggested = self.audit, self.file.categories[int(self.audit.suggested[row])]
        raw = self.file.sections["annotations"][int(audit.annotations[row])]
        return {
            **msgspec.json.decode(raw),
            "suspicion": round(float(audit.suspicion[row]), 4),
            "suggested": suggested.class_name,
            "suggested_category_id": suggested.id,
            "label_score": round(float(audit.label_scores[row]), 4),
            "suggested_score": round(float(audit.suggested_scores[row]), 4),
        }

    def write_coco(self, path: str | Path) -> None:
        """Write the labels as a COCO data set of their own: their images, and the annotations, worst first."""
        kept = {entry["image_id"] for entry in self.entries}
        rows = np.flatnonzero(np.isin(self.file.images.ids, list(kept)))
        images = [msgspec.json.decode(self.file.sections["images"][row]) for row in rows.tolist()]
        categories = [msgspec.json.decode(raw) for raw in self.file.sections["categories"]]
        write_json(path, {"images": images, "annotations": self.entries, "categories": categories}, indent=None)

    def write_csv(self, path: str | Path) -> None:
        """Write a row of ``COLUMNS`` for each label, worst first; boxes are XYXY in pixels."""
        with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for rank, (row, entry, region) in enumerate(zip(self.rows, self.entries, self.regions), 1):
                label = self.names[self.audit.labels[row]]
                scores = (entry["label_score"], entry["suggested_score"])
                box = [round(float(x), 2) for x in region.box]
                words = (entry.get("id", ""), region.image, label, entry["suggested"])
                writer.writerow([rank, entry["suspicion"], *words, *scores, *box])

    def write_page(self, path: str | Path, images: str, num_images: int = 20) -> None:
        """Write an HTML page with the pairs of names and the images of the most suspicious labels."""
        numbers: dict[str, list[int]] = defaultdict(list)
        for number, region in enumerate(self.regions):
            numbers[region.image].append(number)
        panels = [self._panel(numbers[name], images) for name in list(numbers)[:num_images]]
        text = (
            f"{len(self.rows):,} of {len(self.audit.labels):,} labels; suspicion is the probability of the "
            "other name if it or the label is right, calibrated on all labels."
        )
        sections = [
            Section("summary", "Suspicious labels", texts=[text], tables=[self._labels()]),
            Section("pairs", "Pairs of names", tables=[self._pairs()]),
        ]
        sections += [Section("images", "Images, the most suspicious first", images=panels)] if panels else []
        with atomic_path(path) as temporary:
            temporary.write_text(render(f"Labels of {self.file.path.name}", sections), encoding="utf-8")

    def _labels(self) -> Table:
        titles = [("image", "text"), ("label", "text"), ("looks like", "text"), ("suspicion, %", "percent")]
        rows = [
            [region.image, self.names[self.audit.labels[row]], entry["suggested"], 100 * entry["suspicion"]]
            for row, region, entry in zip(self.rows, self.regions, self.entries)
        ]
        return Table("labels", titles, rows, is_searchable=True)

    def _pairs(self) -> Table:
        pairs = Counter(
            (self.names[self.audit.labels[row]], entry["suggested"]) for row, entry in zip(self.rows, self.entries)
        )
        titles = [("label", "text"), ("looks like", "text"), ("regions", "count")]
        return Table("pairs", titles, [[*pair, count] for pair, count in pairs.most_common()], is_searchable=True)

    def _panel(self, numbers: list[int], directory: str) -> Panel:
        first = self.regions[numbers[0]]
        objects, suggestions = [], []
        for number in numbers:
            region, entry = self.regions[number], self.entries[number]
            x0, y0, x1, y1 = region.box.tolist()
            box, label = (x0, y0, x1 - x0, y1 - y0), self.names[self.audit.labels[self.rows[number]]]
            objects.append(Region(box, label, "wrong", text=f"looks like {entry['suggested']}"))
            suggestions.append(Region(box, entry["suggested"], "right", entry["suggested_score"]))
        errors = ImageErrors(first.image_id, first.image, first.image_size, 0, 0, objects, suggestions)
        panel = make_panel(errors, directory, lambda array, _: self._crops(array, numbers))
        title = f"{first.image}: {len(numbers)} suspicious label{'s' * (len(numbers) > 1)}"
        return replace(panel, title=title, caption="what they look like", errors=[], attention_title=CROPS)

    def _crops(self, image: np.ndarray, numbers: list[int]) -> list[EmbeddedImage]:
        captions = [
            f"{self.names[self.audit.labels[self.rows[n]]]}; looks like {self.entries[n]['suggested']}" for n in numbers
        ]
        crops = [crop_region(image, self.regions[n].box) for n in numbers]
        return [EmbeddedImage(embed(crop, CROP), caption) for crop, caption in zip(crops, captions)]
