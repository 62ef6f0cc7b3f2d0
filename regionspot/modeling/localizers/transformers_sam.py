"""What localizers share whose SAM is one of the library ``transformers``."""

import copy
import importlib
import json
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode
from torch import nn

from regionspot.modeling.localizers.prompted import PromptedLocalizer
from regionspot.modeling.localizers.transformers_decoder import (
    TransformersPromptDecoder,
    pack_features,
    unpack_features,
)
from regionspot.structures import Prompts
from regionspot.utils.files import expand_user

# What in a config names code, or weights, that transformers or timm would then fetch or read.
_SOURCES = {"auto_map", "backbone", "use_pretrained_backbone", "checkpoint_path", "pretrained_cfg_overlay"}
_SOURCES |= {"attn_implementation", "_attn_implementation"}  # kernels on the hub
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TransformersLocalizer(PromptedLocalizer):
    """A frozen SAM of ``transformers``; a family's class says which.

    ``MODEL.REGIONSPOT.SAM.NAME`` is one of ``sizes``, or the path of a JSON file in the library's own format, the
    ``config.json`` of a model on the Hugging Face hub.

    Attributes:
        model_class, config_class: names in ``transformers``.
        packages: what is needed beside this package.
        sizes: by name, what the config has beside its defaults.
        decoder_class: decodes prompts with the library's mask decoder.
        mean, std: of RGB in [0, 1], as in the library's image processor.
    """

    model_class: ClassVar[str]
    config_class: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ("transformers",)
    sizes: ClassVar[dict[str, dict[str, Any]]]
    decoder_class: ClassVar[type[TransformersPromptDecoder]]
    mean: ClassVar[tuple[float, ...]] = IMAGENET_MEAN
    std: ClassVar[tuple[float, ...]] = IMAGENET_STD
    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, *args: Any, **arguments: Any) -> None:
        """Arguments are ``PromptedLocalizer``'s; ``sam`` is the library's model, any size."""
        super().__init__(*args, **arguments)
        for name, values in (("pixel_mean", self.mean), ("pixel_std", self.std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    @classmethod
    def build_sam(cls, cfg: CfgNode) -> nn.Module:
        return cls.build(cfg.MODEL.REGIONSPOT.SAM.NAME)

    @classmethod
    def build(cls, name: str) -> nn.Module:
        """Return a model with random weights, float32.

        Args:
            name: one of ``sizes``, or the path of a JSON file.

        Raises:
            ImportError: a package is not installed.
            ValueError: no such size or file, or a file that is no config of this family.
        """
        content = cls._read_size(name)
        library = cls._import_library(name)
        try:
            model = getattr(library, cls.model_class)(getattr(library, cls.config_class)(**content))
        except Exception as error:  # the library checks types and sizes with errors of many kinds
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"MODEL.REGIONSPOT.SAM.NAME {name!r} is no config of a {cls.model_class} ({reason})"
            ) from error
        return model.float()  # a file may name a dtype

    @classmethod
    def _import_library(cls, name: str) -> Any:
        for package in cls.packages:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise ImportError(
                    f"{cls.__name__} {name!r} needs the package {package}: pip install 'regionspot[models]'"
                ) from error
        return importlib.import_module("transformers")

    @classmethod
    def _read_size(cls, name: str) -> dict[str, Any]:
        """Return the arguments of the library's config class."""
        if name in cls.sizes:
            return copy.deepcopy(cls.sizes[name])  # the library changes what it is given
        path = expand_user(name)
        if path.suffix != ".json" or not path.is_file():
            raise ValueError(
                f"MODEL.REGIONSPOT.SAM.NAME: expected one of {', '.join(cls.sizes)}, or the JSON file of a "
                f"{cls.config_class}; got {name!r}"
            )
        return cls._select_config(_read_json(path))

    @classmethod
    def _select_config(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Return the part of a file's content that is the model's config."""
        return content

    @property
    def image_encoder(self) -> nn.Module:
        return self.sam.vision_encoder

    @property
    def prompt_dim(self) -> int:
        return self.sam.mask_decoder.hidden_size

    @property
    def image_size(self) -> int:
        return self.sam.prompt_encoder.input_image_size

    @property
    def mask_prompt_size(self) -> tuple[int, int]:
        height, width = self.sam.prompt_encoder.image_embedding_size
        return 4 * height, 4 * width

    @property
    @abstractmethod
    def _feature_sizes(self) -> list[tuple[int, int]]:
        """(c, k) of the features that are packed behind the embeddings, (B, c, k * h, k * w)."""

    @abstractmethod
    def _read_features(self, output: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return (B, C, h, w) embeddings and the features from what the image encoder returns."""

    def _encode(self, images: list[torch.Tensor]) -> torch.Tensor:
        inputs = torch.stack([self._preprocess(image) for image in images])
        embeddings, features = self._read_features(self._run_step(self.image_encoder, inputs.to(self.dtype)))
        return pack_features(embeddings.float(), [x.float() for x in features])

    def _preprocess(self, image: torch.Tensor) -> torch.Tensor:
        """Return (3, S, S) float32; padded at the right and bottom with zeros, that is the mean."""
        pixels = (self._resize(image).float() / 255 - self.pixel_mean) / self.pixel_std
        height, width = pixels.shape[1:]
        return nn.functional.pad(pixels, (0, self.image_size - width, 0, self.image_size - height))

    def _prompt_decoder(self, embeddings: torch.Tensor, prompts: Prompts) -> TransformersPromptDecoder:
        embeddings, features = unpack_features(embeddings, self.prompt_dim, self._feature_sizes)
        if prompts.masks is None:
            embeddings = embeddings + self.sam.prompt_encoder.no_mask_embed.weight[:, :, None, None]
        position = self.sam.get_image_wide_positional_embeddings()
        parts = [x.to(self.dtype) for x in (embeddings, position, *features)]
        return self.decoder_class(self.sam.mask_decoder, parts[0], parts[1], parts[2:])

    def _encode_prompts(self, prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor | None]:
        # the library has a dimension of images in front
        points, labels, boxes = (
            None if x is None else x[None] for x in (prompts.points, prompts.point_labels, prompts.boxes)
        )
        labels = None if labels is None else labels.long()  # the library looks them up
        sparse, dense = self.sam.prompt_encoder(points, labels, boxes, prompts.masks)
        if sparse is None:  # masks alone
            sparse = dense.new_zeros(1, len(prompts), 0, self.prompt_dim)
        return sparse[0].to(self.dtype), None if prompts.masks is None else dense.to(self.dtype)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"MODEL.REGIONSPOT.SAM.NAME {str(path)!r} is no JSON file ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"MODEL.REGIONSPOT.SAM.NAME {str(path)!r}: expected a JSON object")
    for key, value in _nested_items(content):
        if (key in _SOURCES and value) or (key == "architecture" and ":" in str(value)):
            raise ValueError(
                f"MODEL.REGIONSPOT.SAM.NAME {str(path)!r}: {key!r} is refused; a config must not fetch anything"
            )
    return content


def _nested_items(content: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(content, list):
        for value in content:
            yield from _nested_items(value)
    elif isinstance(content, dict):
        yield from content.items()
        for value in content.values():
            yield from _nested_items(value)
