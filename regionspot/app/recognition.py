"""What the page computes, apart from the page: one model for all sessions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from PIL import Image

from regionspot.app.prompts import DrawnRegion, group_prompts
from regionspot.drawing import DrawingStyle, draw_attention, draw_regions, enlarge
from regionspot.modeling.attention_maps import cross_attention
from regionspot.modeling.localizers.prompted import PromptedLocalizer
from regionspot.modeling.masks import RegionMasks
from regionspot.modeling.proposal_sources import SamAutomaticProposals
from regionspot.modeling.region_predictions import RegionPredictions, name_regions
from regionspot.predictor import RegionSpotPredictor
from regionspot.structures import ImageFeatures, Prompts, read_proposals
from regionspot.utils.images import FORMATS, to_rgb_array

MAX_FOUND = 100  # boxes that "Everything" draws, the best ones: more hide the image
MAX_PIXELS = 64_000_000  # of an image: a small file may hold gigabytes of pixels
MAX_SIDE = 1000  # pixels of what the page shows


@dataclass
class EncodedImage:
    """An image with what the encoders make of it.

    Attributes:
        name: of its file, without directories.
        array: (H, W, 3) uint8 RGB, upright.
        view: the same at the size that the page shows.
        features: of ``RegionSpotPredictor.encode``.
    """

    name: str
    array: np.ndarray
    view: np.ndarray
    features: ImageFeatures


@dataclass
class Recognition:
    """What was recognized in an image: N regions and their predictions, in the same order."""

    image: EncodedImage
    regions: list[DrawnRegion]
    predictions: RegionPredictions


class PageModel:
    """A model that any number of sessions use at the same time; it holds nothing of any of them."""

    def __init__(self, cfg: CfgNode) -> None:
        """Build the model of ``cfg`` and load its weights, see ``RegionSpotPredictor``."""
        self.predictor = RegionSpotPredictor(cfg)
        self._deep_range = tuple(cfg.INPUT.DEEP_RANGE)
        top_k = cfg.MODEL.REGIONSPOT.PROPOSALS.TOP_K
        self._top_k = min(top_k, MAX_FOUND) if top_k >= 0 else MAX_FOUND
        self._source: Any = self.predictor.model.proposal_source
        localizer = self.predictor.recognizer.localizer
        if self._source is None and isinstance(localizer, PromptedLocalizer):
            settings = {key.lower(): value for key, value in cfg.MODEL.REGIONSPOT.PROPOSALS.SAM_AUTOMATIC.items()}
            self._source = SamAutomaticProposals(localizer, **settings)

    @property
    def has_attention(self) -> bool:
        """Whether regions attend to a feature map."""
        return self.predictor.recognizer.knowledge_integration.with_features

    def encode(self, path: str | Path) -> EncodedImage:
        """Read and encode an image.

        Raises:
            ValueError: not an image, a damaged one, or one of more than ``MAX_PIXELS``.
        """
        path = Path(path)
        try:
            check_size(path)
            array = to_rgb_array(path, self._deep_range)
        except (ValueError, FileNotFoundError) as error:  # visitors need not know where the server keeps their files
            raise ValueError(str(error).replace(str(path), path.name)) from error
        return EncodedImage(path.name, array, resize_to_view(array), self.predictor.encode(array))

    @torch.no_grad()
    def find_regions(self, image: EncodedImage) -> list[DrawnRegion]:
        """Return the boxes of everything in an image, the best first: of SAM's masks, or of the config's detector.

        Raises:
            ValueError: nothing was found, or the model has no source of boxes.
        """
        if self._source is None:
            raise ValueError("everything: this model finds no boxes; draw them")
        tensor = torch.from_numpy(image.array.copy()).permute(2, 0, 1)  # (3, H, W)
        if isinstance(self._source, SamAutomaticProposals):  # SAM's encoder has seen the image already
            [proposals] = self._source([tensor], image.features.embeddings)
        else:
            [proposals] = self._source([tensor])
        boxes = read_proposals(proposals, self._top_k)[0].tensor.tolist()
        if not boxes:
            raise ValueError("everything: no objects were found in this image; draw boxes or click points")
        return [DrawnRegion((x0, y0, x1, y1)) for x0, y0, x1, y1 in boxes]

    def recognize(
        self,
        image: EncodedImage,
        regions: list[DrawnRegion],
        names: Sequence[str],
        examples: Mapping[str, np.ndarray] | None = None,
    ) -> Recognition:
        """Recognize regions over class names; regions of one kind (boxes, points, both) are predicted together.

        Args:
            image: of the regions.
            regions: at least one.
            names: that CLIP's text encoder embeds.
            examples: (text_dim,) float32 normalized embeddings of names that examples define, which replace those of
                the text.

        Raises:
            ValueError: an invalid region, or names that CLIP cannot take.
        """
        examples = examples or {}
        names = [*names, *(name for name in examples if name not in names)]
        groups = group_prompts(regions)
        parts = [
            self.predictor.predict(**prompts, vocabulary=list(names), features=image.features) for _, prompts in groups
        ]
        order = np.argsort([row for rows, _ in groups for row in rows])
        predictions = join_predictions(parts, order)
        return Recognition(image, regions, self._compare(predictions, examples) if examples else predictions)

    @torch.no_grad()
    def _compare(self, predictions: RegionPredictions, examples: Mapping[str, np.ndarray]) -> RegionPredictions:
        """Score regions again, with the embeddings of examples in place of those of their names."""
        recognizer = self.predictor.recognizer
        names, text = recognizer.encode_vocabulary(predictions.vocabulary)  # (K, text_dim)
        embeddings = text.clone()  # the text encoder keeps its own
        for name, embedding in examples.items():
            embeddings[names.index(name)] = torch.from_numpy(embedding).to(embeddings)
        own = predictions.dense_embeddings
        dense = None if own is None else torch.from_numpy(own).to(text)
        logits = recognizer.score(torch.from_numpy(predictions.embeddings).to(text), embeddings, True, dense, names)
        top_k = predictions.top_classes.shape[1]
        return replace(predictions, **name_regions(recognizer.rule, names, logits, len(recognizer.background), top_k))

    @torch.no_grad()
    def draw_attention(self, recognition: Recognition, index: int) -> np.ndarray:
        """Draw what a region attends to in the feature map: (H, W, 3) uint8 RGB, the view's size."""
        features, recognizer = recognition.image.features, self.predictor.recognizer
        rows, prompts = next(group for group in group_prompts(recognition.regions) if index in group[0])
        tensors = {name: torch.from_numpy(array) for name, array in prompts.items()}
        [located] = recognizer.locate(features, [Prompts(**tensors)])
        assert features.feature_map is not None
        integration = recognizer.knowledge_integration
        [weights] = cross_attention(integration, located.tokens, features.feature_map, [rows.index(index)])
        box = recognition.predictions.boxes[index] * _view_scale(recognition.image)
        return draw_attention(recognition.image.view, weights.float().cpu().numpy(), box)

    def draw(self, recognition: Recognition) -> np.ndarray:
        """Draw the masks and numbered names of an image: (H, W, 3) uint8 RGB, the view's size."""
        image, predictions = recognition.image, recognition.predictions
        numbered = [f"{number} {name}" for number, name in enumerate(predictions.class_names, 1)]
        shown = replace(
            predictions,
            boxes=predictions.boxes * _view_scale(image),
            image_size=(image.view.shape[0], image.view.shape[1]),  # of the masks, too
            class_names=numbered,
            vocabulary=numbered,  # neighboring regions have distinct colors
        )
        has_masks = "sam" not in self.predictor.random_parts  # else they mean nothing
        style = DrawingStyle(fill=0.3) if has_masks else DrawingStyle(outline="box")
        return draw_regions(image.view, shown, style)


def check_size(path: Path) -> None:
    """Refuse an image of more than ``MAX_PIXELS`` by its header; files that are no images are the reader's to refuse.

    Raises:
        ValueError: too many pixels.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise ValueError(f"image {path}: too large, {error}") from error
    except Exception:
        return
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"image {path}: expected at most {MAX_PIXELS // 10**6} million pixels, got {width} x {height}; resize it"
        )


def resize_to_view(array: np.ndarray) -> np.ndarray:
    """Return an image, (H, W, 3) uint8 RGB, at the size that the page shows: neither tiny nor huge."""
    small = Image.fromarray(array)
    small.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return enlarge(np.asarray(small))[0]


def _view_scale(image: EncodedImage) -> np.ndarray:
    """Return (4,) factors from boxes in original pixels to boxes in the view."""
    height, width = image.array.shape[:2]
    x, y = image.view.shape[1] / width, image.view.shape[0] / height
    return np.array([x, y, x, y], np.float32)


def join_predictions(parts: Sequence[RegionPredictions], order: np.ndarray) -> RegionPredictions:
    """Return the predictions of several calls for the same image and names as one; ``order`` sorts their regions."""
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {"class_names": [name for part in parts for name in part.class_names]}
    for field in fields(RegionPredictions):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], np.ndarray):
            joined[field.name] = np.concatenate(values)
        elif isinstance(values[0], RegionMasks):
            logits = torch.cat([value.tensor for value in values])
            rows = torch.arange(len(logits), device=logits.device)
            joined[field.name] = RegionMasks(logits, rows, values[0].upsample)
    return replace(parts[0], **joined)[order]  # the rest is the same for all regions
