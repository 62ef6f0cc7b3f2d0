"""RegionSpot from an export, by onnxruntime: NumPy and Pillow, no PyTorch and nothing of regionspot.

This file can be copied; `regionspot export` puts it beside the models.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

HERE = Path(__file__).parent
FORMAT = 1  # of model.json
PADDING, BOX_CORNERS = -1, (2, 3)  # SAM's labels of points; 1 is foreground, 0 background
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow would clip them at 255


@dataclass(frozen=True)
class ImageFeatures:
    """What the image encoders give for one image: SAM's embeddings, CLIP's feature map, and its (height, width)."""

    image_embeddings: np.ndarray
    feature_map: np.ndarray | None
    size: tuple[int, int]


@dataclass
class RegionPredictions:
    """What RegionSpot recognizes in N regions of an image, in the order of the prompts; as its own predictor's."""

    boxes: np.ndarray  # (N, 4) float32, XYXY, original pixels: the prompts', or those around the predicted masks
    classes: np.ndarray  # (N,) int64, index of the best class in the vocabulary
    class_names: list[str]  # of the best classes, "unknown" for unknown regions
    scores: np.ndarray  # (N,) float32, probability of the best class
    top_classes: np.ndarray  # (N, k) int64, the k best classes, best first
    top_scores: np.ndarray  # (N, k) float32
    logits: np.ndarray  # (N, K) float32
    embeddings: np.ndarray  # (N, D) float32, L2-normalized, in the space of the text embeddings
    predicted_ious: np.ndarray  # (N,) float32, SAM's own estimate of each mask's IoU
    vocabulary: list[str]  # K class names
    unknown: np.ndarray  # (N,) bool, regions of no class
    image_size: tuple[int, int]  # (height, width)
    mask_logits: np.ndarray | None  # (N, h, w) float32 over SAM's square input; None when not asked for
    resize_mask: Callable[[np.ndarray], np.ndarray]  # (h, w) logits to an (H, W) bool mask

    def __len__(self) -> int:
        return len(self.class_names)

    @cached_property
    def masks(self) -> np.ndarray | None:
        """(N, H, W) bool, original pixels; None when not asked for. All are computed when first read, and cached."""
        if self.mask_logits is None:
            return None
        return np.array([self.mask(i) for i in range(len(self))], bool).reshape(-1, *self.image_size)

    def mask(self, index: int) -> np.ndarray:
        """Return the mask of one region, (H, W) bool, original pixels; a ValueError if they were not asked for."""
        if self.mask_logits is None:
            raise ValueError("no masks: predict them by with_masks=True")
        return self.resize_mask(self.mask_logits[index])


class OnnxRegionPredictor:
    """``regionspot.RegionSpotPredictor`` over an export: ``set_image`` once, ``predict`` as often as you like.

    ``set_image`` and then ``predict`` is for one thread; any may call ``encode``, and ``predict`` with its result.
    """

    def __init__(self, directory: str | Path = HERE, providers: list[str] | None = None, chunk: int = 16) -> None:
        """
        Args:
            directory: what ``regionspot export`` wrote; by default that of this file.
            providers: onnxruntime's execution providers; by default CUDA if there is one, and the CPU.
            chunk: regions decoded at once, about 30 MB each at SAM's full size.
        """
        self.directory, self.chunk = Path(directory), chunk
        if not (self.directory / "model.json").is_file():
            raise FileNotFoundError(f"{directory}: no model.json; expected a directory that `regionspot export` wrote")
        self.description: dict[str, Any] = json.loads((self.directory / "model.json").read_text(encoding="utf-8"))
        if (version := self.description["format"]) != FORMAT:
            raise ValueError(f"{directory}: expected format {FORMAT}, got {version}; export the model again")
        stored = np.load(self.directory / "text_embeddings.npy", allow_pickle=False)
        self._embeddings, self._background = np.split(stored, [len(self.description["names"])])
        self._models = self._load(providers)
        self._features: ImageFeatures | None = None
        self._vocabulary = self._look_up(self.description["names"])

    def _load(self, providers: list[str] | None) -> dict[str, Any]:
        import onnxruntime  # here, as a subclass may run the models in another way

        known = onnxruntime.get_available_providers()
        providers = providers or [x for x in ("CUDAExecutionProvider", "CPUExecutionProvider") if x in known]
        files = {name: str(self.directory / model["file"]) for name, model in self.description["models"].items()}
        return {name: onnxruntime.InferenceSession(file, providers=providers) for name, file in files.items()}

    def _run(self, model: str, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self._models[model].run(None, inputs)

    @property
    def vocabulary(self) -> list[str]:
        """Class names in use."""
        return list(self._vocabulary[0])

    def set_vocabulary(self, names: str | list[str], text_embeddings: np.ndarray | None = None) -> None:
        """Recognize ``names`` from now on: some of the export's, a list or "a,b,c".

        With their (K, D) ``text_embeddings``, as ``RegionRecognizer.encode_vocabulary`` returns them, they may be any.
        """
        self._vocabulary = self._look_up(names, text_embeddings)

    def _look_up(self, source: Any, text_embeddings: np.ndarray | None = None) -> tuple[list[str], np.ndarray]:
        names = [name.strip() for name in source.split(",")] if isinstance(source, str) else list(source)
        if not names or "" in names:
            raise ValueError(f"vocabulary: expected class names, got {source!r}")
        if text_embeddings is not None:
            embeddings, expected = np.asarray(text_embeddings, np.float32), (len(names), self._embeddings.shape[1])
            if embeddings.shape != expected or not np.isfinite(embeddings).all() or not embeddings.any(axis=1).all():
                raise ValueError(f"text_embeddings: expected finite numbers {expected}, got shape {embeddings.shape}")
            return names, embeddings
        rows = {name: row for row, name in enumerate(self.description["names"])}
        if unknown := [name for name in names if name not in rows]:
            raise ValueError(
                f"vocabulary: no text embedding of {', '.join(unknown[:5])} in this export of {len(rows)} names; add "
                "it by `regionspot export --vocabulary`, or call set_vocabulary(names, text_embeddings)"
            )
        return names, self._embeddings[[rows[name] for name in names]]

    def encode(self, image: str | Path | Image.Image | np.ndarray) -> ImageFeatures:
        """Return the features of an image, which is a path, a PIL image, or an (H, W, 3) uint8 RGB array."""
        array = _to_rgb(image)
        inputs = {"sam_image": sam_input(array, self.description["sam"])}
        if self.description["clip"] is not None:
            inputs["clip_image"] = clip_input(array, self.description["clip"])
        embeddings, *feature_map = self._run("image_encoders", inputs)
        return ImageFeatures(embeddings, feature_map[0] if feature_map else None, (array.shape[0], array.shape[1]))

    def set_image(self, image: str | Path | Image.Image | np.ndarray) -> None:
        """Encode an image, as ``encode`` does, for the next calls of ``predict``."""
        self._features = None  # after an image that is refused, the previous one must not be used
        self._features = self.encode(image)

    def predict(
        self,
        boxes: Any = None,
        points: Any = None,
        point_labels: Any = None,
        vocabulary: str | list[str] | None = None,
        top_k: int = 5,
        with_masks: bool = True,
        features: ImageFeatures | None = None,
    ) -> RegionPredictions:
        """Recognize N regions of an image, each given by a box, by points, or by both.

        Args:
            boxes: (N, 4), XYXY, original pixels.
            points, point_labels: (N, P, 2), XY, original pixels; (N, P): 1 foreground (default), 0 background, -1 none.
            vocabulary: see ``set_vocabulary``: with ``features`` for this call only, else from now on.
            top_k: number of best classes to return for each region.
            with_masks: whether to keep the masks, which are computed anyway.
            features: the result of ``encode``; by default that of ``set_image``.
        """
        if (used := features or self._features) is None:
            raise RuntimeError("no image is set: call set_image(image) first, or give features=encode(image)")
        if top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {top_k}")
        clipped, coords, labels = self._prompts(boxes, points, point_labels, used.size)
        names, embeddings = self._vocabulary if vocabulary is None else self._look_up(vocabulary)
        if features is None:
            self._vocabulary = names, embeddings
        tokens, ious, mask_logits = self._decode(used, coords, labels)
        resize_mask = self._mask_resizer(mask_logits.shape[1:], used.size)
        if clipped is None:
            clipped = np.array([_box_around(resize_mask(x)) for x in mask_logits], np.float32).reshape(-1, 4)
        logits, semantic = self._classify(tokens, used, embeddings)
        is_softmax = self.description["score_function"] == "softmax"
        probabilities = _softmax(logits) if is_softmax else 1 / (1 + np.exp(-logits))
        # background names count in the probabilities, but are no answers
        known, best = probabilities[:, : len(names)], probabilities.max(axis=1)
        unknown = (best < self.description["unknown_threshold"]) | (known.max(axis=1) < best)
        top = np.argsort(-known, axis=1, kind="stable")[:, :top_k]
        scores = np.take_along_axis(known, top, axis=1)
        return RegionPredictions(
            boxes=clipped,
            classes=top[:, 0],
            class_names=["unknown" if u else names[i] for i, u in zip(top[:, 0], unknown)],
            scores=scores[:, 0],
            top_classes=top,
            top_scores=scores,
            logits=logits[:, : len(names)],
            embeddings=semantic,
            predicted_ious=ious,
            vocabulary=list(names),
            unknown=unknown,
            image_size=used.size,
            mask_logits=mask_logits if with_masks else None,
            resize_mask=resize_mask,
        )

    def _prompts(
        self, boxes: Any, points: Any, point_labels: Any, size: tuple[int, int]
    ) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        """Return the clipped boxes, and all prompts as (N, P, 2) points of SAM's input with their (N, P) labels."""
        if boxes is None and points is None:
            raise ValueError("no prompts: expected boxes, points or both")
        height, width = size
        clipped, parts = None, []
        if points is not None:
            parts.append(_check_points(points, point_labels, size))
        if boxes is not None:
            clipped = _check_boxes(boxes, size).clip(0, np.array([width, height] * 2, np.float32))
            parts.append((clipped.reshape(-1, 2, 2), np.tile(BOX_CORNERS, (len(clipped), 1))))
        else:  # SAM pads regions without a box
            num_regions = len(parts[0][0])
            parts.append((np.zeros((num_regions, 1, 2), np.float32), np.full((num_regions, 1), PADDING)))
        coords, labels = zip(*parts)
        if len({len(part) for part in coords}) > 1:
            raise ValueError(f"expected as many boxes as regions of points, got {[len(part) for part in coords]}")
        input_height, input_width = _input_size(size, self.description["sam"]["size"])
        # the sides of SAM's input are whole pixels: x and y have factors of their own
        factors = np.array([input_width / width, input_height / height], np.float32)
        return clipped, np.concatenate(coords, axis=1) * factors, np.concatenate(labels, axis=1).astype(np.int64)

    def _decode(self, features: ImageFeatures, coords: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
        """Return the (N, D) tokens, (N,) IoUs and (N, h, w) mask logits of prompts, a chunk at a time."""
        outputs, inputs = [], {"image_embeddings": features.image_embeddings}
        for start in range(0, len(coords), self.chunk):
            inputs["point_coords"] = coords[start : start + self.chunk]
            inputs["point_labels"] = labels[start : start + self.chunk]
            outputs.append(self._run("region_decoder", inputs))
        if not outputs:
            side, dim = 4 * features.image_embeddings.shape[-1], self.description["token_dim"]
            return [np.zeros(shape, np.float32) for shape in ((0, dim), (0,), (0, side, side))]
        return [np.concatenate(parts) for parts in zip(*outputs)]

    def _classify(self, tokens: np.ndarray, features: ImageFeatures, embeddings: np.ndarray) -> list[np.ndarray]:
        """Return the (N, K + number of background names) logits and (N, D) semantic embeddings."""
        inputs = {"tokens": tokens, "text_embeddings": np.concatenate([embeddings, self._background])}
        if not len(tokens):
            return [np.zeros((0, length), np.float32) for length in inputs["text_embeddings"].shape]
        if features.feature_map is not None:
            inputs["feature_map"] = features.feature_map
        return self._run("region_classifier", inputs)

    def _mask_resizer(self, shape: tuple[int, ...], size: tuple[int, int]) -> Callable[[np.ndarray], np.ndarray]:
        """Return what resizes (h, w) mask logits to SAM's input, removes its padding, and resizes that to the image."""
        side = self.description["sam"]["size"]
        sides = zip(shape, _input_size(size, side), size)
        rows, columns = (_linear(n, side)[:, :inside] @ _linear(inside, output) for n, inside, output in sides)
        return partial(_resize_mask, rows, columns, self.description["sam"]["mask_threshold"])


def sam_input(image: np.ndarray, sizes: dict[str, Any]) -> np.ndarray:
    """Return (1, 3, S, S) float32 of an (H, W, 3) uint8 image: its longer side resized to S, normalized, padded."""
    height, width = _input_size((image.shape[0], image.shape[1]), sizes["size"])
    if image.shape[:2] != (height, width):
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    padded = np.zeros((sizes["size"], sizes["size"], 3), np.float32)
    padded[:height, :width] = _normalize(image.astype(np.float32), sizes)
    return np.ascontiguousarray(padded.transpose(2, 0, 1)[None])


def clip_input(image: np.ndarray, sizes: dict[str, Any]) -> np.ndarray:
    """Return (1, 3, s, s) float32 of an (H, W, 3) uint8 image: resized without its aspect ratio, normalized."""
    # bilinear without antialias: the released models were trained that way
    first, second, weight = _taps(image.shape[0], sizes["size"])
    rows = image[first] * (1 - weight)[:, None, None] + image[second] * weight[:, None, None]
    first, second, weight = _taps(image.shape[1], sizes["size"])
    resized = rows[:, first] * (1 - weight)[:, None] + rows[:, second] * weight[:, None]
    return np.ascontiguousarray(_normalize(resized / np.float32(255), sizes).transpose(2, 0, 1)[None])


def _normalize(pixels: np.ndarray, sizes: dict[str, Any]) -> np.ndarray:
    return (pixels - np.array(sizes["pixel_mean"], np.float32)) / np.array(sizes["pixel_std"], np.float32)


def _taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the two pixels that each of ``size`` pixels of a resized row is between, and the weight of the second."""
    places = np.maximum((np.arange(size, dtype=np.float32) + 0.5) * np.float32(length / size) - 0.5, 0)
    first = np.minimum(places.astype(np.int64), length - 1)
    return first, np.minimum(first + 1, length - 1), (places - first).astype(np.float32)


def _linear(length: int, size: int) -> np.ndarray:
    """Return the (length, size) matrix that resizes a row."""
    matrix, columns = np.zeros((length, size), np.float32), np.arange(size)
    first, second, weight = _taps(length, size)
    matrix[first, columns] = 1 - weight
    matrix[second, columns] += weight
    return matrix


def _resize_mask(rows: np.ndarray, columns: np.ndarray, threshold: float, logits: np.ndarray) -> np.ndarray:
    return rows.T @ logits @ columns > threshold


def _input_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = side / max(size)
    return max(int(size[0] * scale + 0.5), 1), max(int(size[1] * scale + 0.5), 1)


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _box_around(mask: np.ndarray) -> tuple[int, ...]:
    rows, columns = np.where(mask)
    return (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else (0, 0, 0, 0)


def _check_boxes(boxes: Any, size: tuple[int, int]) -> np.ndarray:
    array = np.array(boxes, np.float32) if len(boxes) else np.zeros((0, 4), np.float32)
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"boxes: expected shape (N, 4), XYXY in pixels, got {array.shape}")
    first, last = array[:, :2], array[:, 2:]
    is_valid = np.isfinite(array) & np.hstack([first < np.minimum(last, [size[1], size[0]]), last > 0])
    if not is_valid.all():
        index = int(is_valid.all(axis=1).argmin())
        raise ValueError(f"boxes: number {index}, {array[index].tolist()}, has no area in the image {size}, XYXY")
    return array


def _check_points(points: Any, labels: Any, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    array = np.array(points, np.float32)
    if array.ndim != 3 or array.shape[2] != 2 or not array.shape[1]:
        raise ValueError(f"points: expected shape (N, P, 2), XY in pixels, got {array.shape}")
    checked = np.ones(array.shape[:2]) if labels is None else np.array(labels)
    if checked.shape != array.shape[:2] or not np.isin(checked, (-1, 0, 1)).all() or (checked == -1).all(axis=1).any():
        raise ValueError(f"point_labels: expected 1, 0 or -1 (padding) of shape {array.shape[:2]}, not -1 alone")
    is_inside = ((array >= 0) & (array < [size[1], size[0]])).all(axis=2) | (checked == -1)
    if not is_inside.all():
        raise ValueError(f"points: {array[~is_inside][0].tolist()} is outside the image {size}, height and width")
    return array, checked


def _to_rgb(image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    if isinstance(image, (str, Path)):
        with Image.open(image) as opened:
            return _to_rgb(opened)
    if isinstance(image, Image.Image):
        if image.mode in DEEP_MODES:
            raise ValueError(f"image: expected 8 bits a channel, got mode {image.mode}; convert it first")
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"image: expected (H, W, 3) uint8 RGB, got shape {image.shape} and dtype {image.dtype}")
    return image
