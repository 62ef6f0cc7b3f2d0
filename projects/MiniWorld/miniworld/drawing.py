"""Draws RegionSpot's predictions in the miniature world."""

import numpy as np
import torch
from PIL import Image

from miniworld.categories import NAMES, NOVEL
from miniworld.experiment import locate_boxes
from miniworld.generator import SIZE, Scene
from regionspot.drawing import draw_attention, draw_labels
from regionspot.modeling import RegionRecognizer
from regionspot.modeling.attention_maps import cross_attention

SCALE = 3  # images are drawn this much larger


@torch.no_grad()
def draw_predictions(recognizer: RegionRecognizer, scenes: list[Scene]) -> dict[str, np.ndarray]:
    """Return (H, W, 3) uint8 images by name: each scene with its predictions, and the attention of two regions.

    A label reads "predicted (true)" where they differ; novel classes have a star.
    """
    recognizer.set_vocabulary(NAMES)
    images = {}
    for index, scene in enumerate(scenes):
        features, located, masks = locate_boxes(recognizer, scene, scene.boxes, SCALE)
        semantic = recognizer.knowledge_integration([located.tokens], features.feature_map)
        [logits] = recognizer.score_images(semantic, dense_embeddings=recognizer.dense_embeddings(features, [located]))
        labels = [
            describe(predicted, true) for predicted, true in zip(logits.argmax(dim=1).tolist(), scene.classes.tolist())
        ]
        large = np.asarray(Image.fromarray(scene.image).resize((SIZE * SCALE, SIZE * SCALE), Image.Resampling.BICUBIC))
        images[f"scene_{index}"] = draw_labels(large, scene.boxes * SCALE, masks.cpu().numpy(), labels)
        if index == 0 and features.feature_map is not None:
            maps = cross_attention(recognizer.knowledge_integration, located.tokens, features.feature_map)
            for region in range(min(2, len(maps))):
                attention, box = maps[region].cpu().numpy(), scene.boxes[region] * SCALE
                images[f"attention_{region}"] = draw_attention(large, attention, box)
    return images


def describe(predicted: int, true: int) -> str:
    """Return a region's label: what was predicted, the truth where it differs, a star for a novel class."""
    star = "*" if true in NOVEL else ""
    return f"{star}{NAMES[predicted]}" if predicted == true else f"{star}{NAMES[predicted]} ({NAMES[true]})"
