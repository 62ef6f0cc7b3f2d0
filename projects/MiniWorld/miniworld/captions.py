"""Captioned pictures, and the batches that the miniature CLIP learns from."""

import json
import multiprocessing
import signal
from pathlib import Path

import clip
import numpy as np
import torch
from tqdm import tqdm

from miniworld.categories import CATEGORIES, COLORS, NAMES, PATTERNS, SHAPES
from miniworld.generator import Scene, draw_captioned
from regionspot.modeling.vision_language.clip import PIXEL_MEAN, PIXEL_STD
from regionspot.vocabulary import get_templates

WORDS = (*PATTERNS, *COLORS, *SHAPES)
CONTEXT = 40  # tokens of the longest caption, with room to spare


def halve(scene: Scene) -> np.ndarray:
    """Return the (96, 96, 3) uint8 picture of a scene."""
    pixels = scene.image.astype(np.uint16).reshape(96, 2, 96, 2, 3)
    return ((pixels.sum(axis=(1, 3)) + 2) // 4).astype(np.uint8)


def spread_of(index: np.ndarray | int) -> np.ndarray | float:
    """Return how far from the middle the objects of picture ``index`` lie: evenly spread over 0 to 1."""
    return index * 0.6180339887 % 1


def draw_picture(arguments: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
    """Return the picture and the categories, largest first, of a (seed, index)."""
    seed, index = arguments
    scene = draw_captioned(index, seed, float(spread_of(index)))
    return halve(scene), [int(scene.classes[i]) for i in np.argsort(-scene.masks.sum(axis=(1, 2)))]


class CaptionedPictures:
    """Captioned pictures in memory, drawn once and kept in a directory."""

    def __init__(self, directory: Path, number: int, seed: int, workers: int) -> None:
        path = directory / f"captioned_{seed}_{number}.npy"
        if not path.is_file():
            self._draw(path, number, seed, workers)
        self.images = np.load(path)
        self.labels: list[list[int]] = json.loads(path.with_suffix(".json").read_text())
        self.single = np.array([len(classes) == 1 for classes in self.labels])
        self.spread = spread_of(np.arange(number))

    @staticmethod
    def _draw(path: Path, number: int, seed: int, workers: int) -> None:
        images, labels = np.zeros((number, 96, 96, 3), np.uint8), []
        with multiprocessing.get_context("spawn").Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            drawn = pool.imap(draw_picture, [(seed, i) for i in range(number)], chunksize=64)
            for i, (image, classes) in enumerate(tqdm(drawn, total=number, desc="drawing captioned pictures")):
                images[i] = image
                labels.append(classes)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(labels))
        with path.with_suffix(".tmp").open("wb") as file:
            np.save(file, images)
        path.with_suffix(".tmp").replace(path)

    def batch(self, seed: int, iteration: int, progress: float, size: int) -> dict[str, torch.Tensor]:
        """Return a batch, a function of its arguments alone.

        It starts with single objects in the middle; by three fifths of the way they lie anywhere, and pictures of
        several objects join after one fifth.

        Args:
            seed: of the training.
            iteration: number of the batch.
            progress: part of the training that is over, 0 to 1.
            size: pictures in the batch.

        Returns:
            ``images`` (B, 3, 96, 96) float, ``tokens`` (B, L) int64, ``words`` (B, W) float (which of ``WORDS`` the
            caption holds), ``same`` (B, B) float (which captions say the same).
        """
        rng = np.random.default_rng([seed, iteration])
        eligible = (self.spread <= 0.1 + 1.5 * progress) & (self.single | (progress > 0.2))
        chosen = rng.choice(np.flatnonzero(eligible), size)
        images = np.stack([self.images[i, :, :: rng.choice([-1, 1])] for i in chosen])  # mirrored at random
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
    """Return (W,) float32: which of ``WORDS`` the caption of some categories holds."""
    spoken = {word for label in classes for word in CATEGORIES[label]}
    return np.array([word in spoken for word in WORDS], np.float32)


def to_input(images: np.ndarray) -> torch.Tensor:
    """Return normalized (B, 3, 96, 96) float input of (B, 96, 96, 3) uint8 pictures."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(PIXEL_MEAN).view(3, 1, 1)) / torch.tensor(PIXEL_STD).view(3, 1, 1)
