"""Time and memory of every stage of recognition, and of text embeddings, against the plain way in the same run."""

from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from torch.nn import functional as F

from regionspot.config import load_config
from regionspot.modeling import RegionRecognizer
from regionspot.modeling.frozen import get_dtype
from regionspot.modeling.masks import RegionMasks
from regionspot.structures import ImageFeatures, Prompts
from regionspot.vocabulary import get_templates
from tools.benchmarks.measure import Meter
from tools.benchmarks.plain import PlainRecognizer, encode_names
from tools.benchmarks.table import Table

SIZE = (480, 640)  # of the image, pixels
NUM_NAMES = 1203  # of LVIS, where the vocabulary is not what is measured


def random_boxes(num_boxes: int) -> torch.Tensor:
    """Return (N, 4) float XYXY boxes inside the image."""
    corners = torch.rand(num_boxes, 2, 2) * torch.tensor([SIZE[1] * 0.9, SIZE[0] * 0.9])
    return torch.cat([corners.min(dim=1).values, corners.max(dim=1).values + 20], dim=1)


@dataclass
class Models:
    """Ours and the plain way, with the same weights."""

    recognizer: RegionRecognizer
    plain: PlainRecognizer

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "Models":
        torch.manual_seed(0)
        recognizer = build_model(cfg).eval().recognizer  # random weights cost as much as trained ones
        recognizer.classifier.text_encoder.templates = ("{}",)  # how the embeddings came about does not matter here
        return cls(recognizer, PlainRecognizer(cfg, recognizer))

    def build_table(self, cfg: CfgNode, repeats: int, batch: int = 1) -> Table:
        """Return an empty table, which knows what these models' weights take and what the device could do."""
        meter = Meter(self.plain.device, repeats, bool(cfg.MODEL.REGIONSPOT.get("COMPILE")))
        table = Table(meter, batch, get_dtype(cfg.MODEL.REGIONSPOT.PRECISION))
        table.own_bytes, table.plain_bytes = self.plain.unshared_bytes(self.recognizer)
        return table


@torch.no_grad()
def benchmark_model(models: Models, args: Namespace, table: Table) -> None:
    """Measure every stage on ``table.batch`` equal images.

    Args:
        args: numbers of ``boxes``, with each of which are measured all of ``names``; with how many of them also the
            ``whole``, in the plain way, too (by default with all); ``plain_boxes``, with more of which the plain way of
            the rest is left out: it takes minutes, and more memory than many machines have.
    """
    recognizer, plain = models.recognizer, models.plain
    image = torch.randint(256, (3, *SIZE), dtype=torch.uint8)
    images = [image] * table.batch
    recognizer.set_vocabulary([str(i) for i in range(NUM_NAMES)])
    features = recognizer.encode_images(images)  # warms up
    table.add("SAM image encoder", lambda: recognizer.localizer.encode_images(images), lambda: plain.embed(image))
    table.add(
        "CLIP image encoder",
        lambda: recognizer.vision_language.encode_images(images),
        lambda: plain.map_features([image]),
    )
    vocabularies = [random_embeddings(k, recognizer.vision_language.text_dim).to(plain.device) for k in args.names]
    encoder_flops = sum(row.get("flops", 0) for row in table.rows)
    for number in args.boxes:
        stages = _Stages(models, table, images, features, random_boxes(number), number <= args.plain_boxes)
        stages.measure_localizer()
        for embeddings in vocabularies:
            stages.measure_classifier(embeddings)
        stages.measure_masks()
        stages.measure_embedded()
        if number in (args.whole or args.boxes):
            stages.measure_whole(encoder_flops, stages.with_plain or bool(args.whole))


def random_embeddings(num_names: int, dim: int) -> torch.Tensor:
    """Return (K, dim) text embeddings: 20,000 names take long to encode, and their number is all that matters."""
    return F.normalize(torch.randn(num_names, dim), dim=1)


class _Stages:
    """What depends on the boxes: all of ours takes a batch of images, the plain way one."""

    def __init__(
        self,
        models: Models,
        table: Table,
        images: list[torch.Tensor],
        features: ImageFeatures,
        boxes: torch.Tensor,
        with_plain: bool,
    ) -> None:
        assert features.embeddings is not None and features.feature_map is not None
        self.recognizer, self.plain = models.recognizer, models.plain
        self.table, self.images, self.features, self.boxes = table, images, features, boxes
        self.with_plain = with_plain
        self.name = f"{len(boxes)} box{'es' * (len(boxes) > 1)}"
        self.all_boxes = [Boxes(boxes)] * len(images)
        self.add = partial(table.add, unit="regions", number=len(boxes))
        self.prompts = [Prompts(boxes=boxes)] * len(images)
        self.located = self.recognizer.locate(features, self.prompts, with_masks=True)
        self.tokens = [output.tokens for output in self.located]
        # as the plain way has them: its own would take its memory, too, where it is left out
        self.embedding, self.feature_map = features.embeddings[:1].float(), features.feature_map[:1]

    def measure_localizer(self) -> None:
        locate = partial(self.recognizer.locate, self.features, self.prompts)
        plain = partial(self.plain.decode, self.embedding, self.boxes, SIZE) if self.with_plain else None
        measured = self.add(f"{self.name}: tokens", locate, plain)
        # SAM's own decoder always makes the masks, too
        self.add(f"{self.name}: tokens, masks", partial(locate, with_masks=True), measured)

    def measure_classifier(self, embeddings: torch.Tensor) -> None:
        """Measure from tokens to detections."""
        recognizer, plain = self.recognizer, self.plain
        vocabularies = [embeddings] * len(self.images)

        def classify() -> None:
            all_logits = recognizer.classify(self.tokens, self.features.feature_map, vocabularies)
            for logits, boxes in zip(all_logits, self.all_boxes):
                recognizer.rule.detect(boxes.to(logits.device), logits, None, SIZE)

        def classify_plainly() -> None:
            [logits] = plain.logits(self.tokens[0][None], self.feature_map, embeddings)
            plain.select(logits, self.boxes, SIZE)

        name = f"{self.name}: {len(embeddings):,} names"
        self.add(name, classify, classify_plainly if self.with_plain else None)

    def measure_masks(self) -> None:
        """Measure from mask logits to the RLEs of the detections."""
        upsampler = self.recognizer.localizer.mask_upsampler(SIZE)
        embeddings, logits = self.recognizer.classifier.embeddings, [output.masks for output in self.located]
        [scores] = self.plain.logits(self.tokens[0][None], self.feature_map, embeddings)
        detections = self.plain.select(scores, self.boxes, SIZE)
        assert logits[0] is not None
        first_logits = logits[0][:, None]

        def encode() -> None:
            for image_logits in logits:
                assert image_logits is not None
                RegionMasks(image_logits, detections.rows, upsampler).to_rles(*SIZE)

        def encode_plainly() -> None:
            self.plain.to_json(detections, self.plain.full_masks(first_logits, SIZE))

        self.add(f"{self.name}: masks to RLE", encode, encode_plainly if self.with_plain else None)

    def measure_embedded(self) -> None:
        """Measure all of it, with masks as RLE, of images that both encoders have seen."""
        recognizer, plain = self.recognizer, self.plain
        recognize = partial(recognizer.recognize, self.images, self.all_boxes, masks="rle", features=self.features)
        arguments = (self.embedding, self.feature_map, self.boxes, recognizer.classifier.embeddings, SIZE)
        plainly = partial(plain.recognize, *arguments) if self.with_plain else None
        self.add(f"{self.name}: embedded image to result", recognize, plainly)

    def measure_whole(self, encoder_flops: float, with_plain: bool) -> None:
        """Measure all of it with both encoders; they and the rest were counted already."""
        recognizer, embeddings = self.recognizer, self.recognizer.classifier.embeddings
        plainly = partial(self.plain, self.images[0], self.boxes, embeddings) if with_plain else None
        rest = self.table.rows[-1].get("flops", 0)
        flops = encoder_flops + rest if rest else 0
        recognize = partial(recognizer, self.images, self.all_boxes, masks="rle")
        self.add(f"{self.name}: image to result", recognize, plainly, flops=flops)


@torch.no_grad()
def benchmark_text(models: Models, templates: tuple[str, ...], num_names: int, table: Table) -> None:
    """Measure text embeddings of a vocabulary against one class at a time with the full context."""
    encoder, names = models.recognizer.classifier.text_encoder, [f"wooden thing {i}" for i in range(num_names)]
    encoder.templates = templates
    encoder.encode(names[:1])
    add = partial(table.add, unit="names")
    plainly = partial(encode_names, models.plain.clip_model, templates, names)
    add(f"text embeddings of {num_names} names", lambda: encoder.encode(names), plainly, number=num_names)
    encoder(names)
    add("the same from the cache", lambda: encoder(names), number=num_names)
    many = [str(i) for i in range(NUM_NAMES)]
    encoder.templates = ("{}",)
    encoder(many)
    add(f"{NUM_NAMES} names from the cache", lambda: encoder(many), number=NUM_NAMES)


def main(args: Namespace) -> dict[str, Any]:
    cfg = load_config(args.config_file, args.opts)
    if args.benchmark == "model":
        models = Models.from_config(cfg)
        table = models.build_table(cfg, args.repeats, args.batch)
        benchmark_model(models, args, table)
    else:
        models = Models.from_config(cfg)
        table = models.build_table(cfg, args.repeats)
        templates = get_templates(cfg.MODEL.REGIONSPOT.CLIP.TEMPLATES)
        benchmark_text(models, templates, args.names, table)
    return table.finish(args, precision=cfg.MODEL.REGIONSPOT.PRECISION)
