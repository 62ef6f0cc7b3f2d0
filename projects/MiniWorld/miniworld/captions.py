"""Captioned images, and the batches that the miniature CLIP learns from."""

import json
from pathlib import Path

import clip
import numpy as np
import torch
from tqdm import tqdm

from miniworld.categories import CATEGORIES, COLORS, NAMES, PATTERNS, SHAPES
from miniworld.generator import Scene, draw_captioned, drawing_pool
from regionspot.modeling.vision_language.clip import PIXEL_MEAN, PIXEL_STD
from regionspot.vocabulary import get_templates

WORDS = (*PATTERNS, *COLORS, *SHAPES)
CONTEXT = 40  # tokens of the longest caption, with some margin


def halve(scene: Scene) -> np.ndarray:
    """Return the (96, 96, 3) uint8 image of a scene."""
    pixels = scene.image.astype(np.uint16).reshape(96, 2, 96, 2, 3)
    return ((pixels.sum(axis=(1, 3)) + 2) // 4).astype(np.uint8)


def spread_of(index: np.ndarray | int) -> np.ndarray | float:
    """Return how far from the center the objects of image ``index`` may be: evenly spread over 0 to 1."""
    return index * 0.6180339887 % 1


def draw_image(arguments: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
    """Return the image and the categories, largest first, of a (seed, index)."""
    seed, index = arguments
    scene = draw_captioned(index, seed, float(spread_of(index)))
    return halve(scene), [int(scene.classes[i]) for i in np.argsort(-scene.masks.sum(axis=(1, 2)))]


class CaptionedImages:
    """Captioned images in memory, drawn once and kept in a directory."""

    def __init__(self, directory: Path, num_images: int, seed: int, workers: int) -> None:
        path = directory / f"captioned_{seed}_{num_images}.npy"
        if not path.is_file():
            self._draw(path, num_images, seed, workers)
        self.images = np.load(path)
        self.labels: list[list[int]] = json.loads(path.with_suffix(".json").read_text())
        self.single = np.array([len(classes) == 1 for classes in self.labels])
        self.spread = spread_of(np.arange(num_images))

    @staticmethod
    def _draw(path: Path, num_images: int, seed: int, workers: int) -> None:
        images, labels = np.zeros((num_images, 96, 96, 3), np.uint8), []
        with drawing_pool(workers) as pool:
            drawn = pool.imap(draw_image, [(seed, i) for i in range(num_images)], chunksize=64)
            for i, (image, classes) in enumerate(tqdm(drawn, total=num_images, desc="drawing captioned images")):
                images[i] = image
                labels.append(classes)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(labels))
        with path.with_suffix(".tmp").open("wb") as file:
            np.save(file, images)
        path.with_suffix(".tmp").replace(path)

    def batch(self, seed: int, iteration: int, progress: float, size: int) -> dict[str, torch.Tensor]:
        """Return a batch, a function of its arguments alone.

        It starts with single objects in the center; after three fifths of the training they are anywhere, and images of
        several objects join after one fifth.

        Args:
            seed: of the training.
            iteration: index of the batch.
            progress: share of the training that is done, 0 to 1.
            size: images in the batch.

        Returns:
            ``images`` (B, 3, 96, 96) float, ``tokens`` (B, L) int64, ``words`` (B, W) float (which of ``WORDS`` the
            caption contains), ``same`` (B, B) float (which captions name the same categories).
        """
        rng = np.random.default_rng([seed, iteration])
        eligible = (self.spread <= 0.1 + 1.5 * progress) & (self.single | (progress > 0.2))
        chosen = rng.choice(np.flatnonzero(eligible), size)
        images = np.stack([self.images[i, :, :: rng.choice([-1, 1])] for i in chosen])  # randomly flipped
        tokens = clip.tokenize([self._caption(rng, self.labels[i]) for i in chosen], CONTEXT)
        keys = [tuple(sorted(self.labels[i])) for i in chosen]
        return {
            "images": to_input(images),
            "tokens": tokens[:, : int(tokens.argmax(dim=1).max()) + 1],
            "words": torch.from_numpy(np.stack([words_of(self.labels[i]) for i in chosen])),
            "same": torch.tensor([[float(a == b) for b in keys] for a in keys]),
        }

    @staticmethod
    def _caption(rng: np.random.Generator, classes: list[int]) -> str:
        template = get_templates("all")[rng.integers(81)]
        return template.format(" and a ".join(NAMES[i] for i in rng.permutation(classes)))


def words_of(classes: list[int]) -> np.ndarray:
    """Return (W,) float32: which of ``WORDS`` the caption of some categories contains."""
    spoken = {word for label in classes for word in CATEGORIES[label]}
    return np.array([word in spoken for word in WORDS], np.float32)


def to_input(images: np.ndarray) -> torch.Tensor:
    """Return normalized (B, 3, 96, 96) float input of (B, 96, 96, 3) uint8 images."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(PIXEL_MEAN).view(3, 1, 1)) / torch.tensor(PIXEL_STD).view(3, 1, 1)
