"""Frozen features of annotated regions on disk, so that training need not run SAM, nor CLIP, nor read pictures."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from regionspot.utils.files import atomic_path


class TokenStore:
    """Position-aware tokens, and optionally feature maps, of the annotated boxes of a data set.

    One safetensors file: ``image_ids`` (I,), ``offsets`` (I + 1,), ``boxes`` (N, 4) float32 XYXY in the picture's
    pixels, ``tokens`` (N, D) float16, ``feature_maps`` (I, L, W) float16. Its metadata say of which frozen parts.
    """

    def __init__(self, path: str | Path, origin: dict[str, str] | None = None) -> None:
        """
        Args:
            path: the file.
            origin: what the features must be of, as it was given to ``write``; None takes any.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a damaged file, or one of another origin.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"token store {path}: no such file; extract the tokens first")
        try:
            with safe_open(path, framework="pt") as file:
                self.origin: dict[str, str] = json.loads((file.metadata() or {}).get("origin", "{}"))
                content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"token store {path} is damaged ({error}); extract the tokens again") from error
        for key, wanted in (origin or {}).items():
            if self.origin.get(key) != wanted:
                raise ValueError(
                    f"token store {path} is of another {key}: expected {wanted[:40]}, "
                    f"got {self.origin.get(key, 'none')[:40]}; extract the tokens again"
                )
        self.path = str(path)
        self.rows = {int(image_id): row for row, image_id in enumerate(content["image_ids"])}
        self.offsets, self.boxes, self.tokens = content["offsets"], content["boxes"], content["tokens"]
        self.feature_maps: torch.Tensor | None = content.get("feature_maps")

    def get(self, image_id: int, boxes: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``tokens`` (n, D) float32 and, if they are stored, ``feature_map`` (L, W) float32 of an image.

        Args:
            image_id: the image.
            boxes: (n, 4) its boxes, which must be those that the tokens were extracted for.

        Raises:
            KeyError: the image is not in the store.
            ValueError: its boxes are others.
        """
        if image_id not in self.rows:
            raise KeyError(f"token store {self.path}: no image {image_id}; was it extracted from the same annotations?")
        row = self.rows[image_id]
        start, stop = self.offsets[row], self.offsets[row + 1]
        if self.boxes[start:stop].shape != boxes.shape or not torch.allclose(self.boxes[start:stop], boxes, atol=0.01):
            raise ValueError(
                f"token store {self.path}: image {image_id} has other boxes than when the tokens were extracted "
                f"({stop - start} then, {len(boxes)} now); extract them again"
            )
        features = {"tokens": self.tokens[start:stop].float()}
        if self.feature_maps is not None:
            features["feature_map"] = self.feature_maps[row].float()
        return features

    @staticmethod
    def write(path: str | Path, images: list[dict[str, Any]], origin: dict[str, str]) -> None:
        """Write a store.

        Args:
            path: the file; it appears whole or not at all.
            images: for each image ``image_id``, ``boxes``, ``tokens`` and, optionally, ``feature_map``.
            origin: what the features are of.
        """
        lengths = torch.tensor([0] + [len(image["boxes"]) for image in images])
        content = {
            "image_ids": torch.tensor([image["image_id"] for image in images]),
            "offsets": lengths.cumsum(0),
            "boxes": torch.cat([image["boxes"] for image in images]).float(),
            "tokens": torch.cat([image["tokens"] for image in images]).half(),
        }
        if images[0].get("feature_map") is not None:
            content["feature_maps"] = torch.stack([image["feature_map"] for image in images]).half()
        with atomic_path(path) as temporary:
            save_file(content, temporary, metadata={"origin": json.dumps(origin)})
