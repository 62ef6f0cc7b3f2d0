"""The plain way to recognize regions: the modules of ``segment_anything``, ``clip`` and PyTorch as they are.

It does what the published release does: one image at a time, in float32; SAM's own forward, with the full-size masks of
all boxes; a full-size mask for each detection, encoded on its own.
"""

from collections.abc import Sequence
from typing import Any

import clip
import torch
from clip.model import CLIP
from detectron2.config import CfgNode
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances
from fvcore.nn import sigmoid_focal_loss
from segment_anything.utils.transforms import ResizeLongestSide
from torch import nn
from torch.nn import functional as F

from regionspot.modeling import RegionRecognizer
from regionspot.modeling.localizers.sam import build_sam, get_sam_size
from regionspot.modeling.vision_language.clip import PIXEL_MEAN, PIXEL_STD, build_clip, get_clip_size


class PlainRecognizer(nn.Module):
    """A recognizer's weights, which it shares where they are float32, in modules of the original packages."""

    def __init__(self, cfg: CfgNode, recognizer: RegionRecognizer) -> None:
        """``cfg`` is the recognizer's. Raises a ValueError where it is not the method of the released checkpoints."""
        super().__init__()
        _check_method(cfg)
        node, integration = cfg.MODEL.REGIONSPOT, recognizer.knowledge_integration
        self.device = recognizer.vision_language.pixel_mean.device
        self.sam = with_weights_of(build_sam(get_sam_size(cfg)), recognizer.localizer.sam, self.device)
        clip_model = recognizer.vision_language.clip_model
        self.clip_model = with_weights_of(build_clip(get_clip_size(cfg)), clip_model, self.device)
        width, depth = integration.to_clip.out_features, node.INTEGRATION.DEPTH
        self.to_clip = with_weights_of(nn.Linear(integration.to_clip.in_features, width), integration.to_clip)
        self.projector = with_weights_of(nn.Linear(width, integration.projector.out_features), integration.projector)
        heads, hidden = node.INTEGRATION.NUM_HEADS, node.INTEGRATION.FFN_DIM
        layer = nn.TransformerDecoderLayer(width, heads, hidden, node.INTEGRATION.DROPOUT)
        self.decoder = with_weights_of(
            nn.TransformerDecoder(layer, depth, nn.LayerNorm(width)), integration.decoder, self.device
        )
        self.mean, self.std = (torch.tensor(x, device=self.device).view(3, 1, 1) for x in (PIXEL_MEAN, PIXEL_STD))
        self.top_k = cfg.TEST.DETECTIONS_PER_IMAGE
        self.transform = ResizeLongestSide(self.sam.image_encoder.img_size)
        self.eval()

    def embed(self, image: torch.Tensor) -> torch.Tensor:
        """Return SAM's (1, C, h, w) embedding of a (3, H, W) uint8 image."""
        return self.sam.image_encoder(self.sam.preprocess(self._resize(image))[None])

    def _resize(self, image: torch.Tensor) -> torch.Tensor:
        resized = self.transform.apply_image(image.permute(1, 2, 0).numpy())
        return torch.as_tensor(resized, device=self.device).permute(2, 0, 1).contiguous()

    def map_features(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Return CLIP's (B, L, width) feature map of (3, H, W) images: what ``visual`` has before ``ln_post``."""
        side, inputs = self.clip_model.visual.input_resolution, []
        for image in images:
            pixels = image.to(self.device).float()[None] / 255
            pixels = F.interpolate(pixels, (side, side), mode="bilinear", align_corners=False)[0]
            inputs.append((pixels - self.mean) / self.std)
        outputs: list[torch.Tensor] = []
        hook = self.clip_model.visual.transformer.register_forward_hook(lambda *call: outputs.append(call[-1]))
        self.clip_model.visual(torch.stack(inputs))
        hook.remove()
        return outputs[0].permute(1, 0, 2)

    def decode(
        self, embedding: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the (N, C) mask tokens and (N, 1, 4h, 4w) mask logits of boxes of an image of (height, width)."""
        tokens: list[torch.Tensor] = []
        hook = self.sam.mask_decoder.transformer.register_forward_hook(lambda *call: tokens.append(call[-1][0][:, 1]))
        scaled = self.transform.apply_boxes_torch(boxes.to(self.device), size)
        sparse, dense = self.sam.prompt_encoder(None, scaled, None)
        logits, _ = self.sam.mask_decoder(embedding, self.sam.prompt_encoder.get_dense_pe(), sparse, dense, False)
        hook.remove()
        return tokens[0], logits

    def full_masks(self, logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Return the (N, 1, height, width) bool masks of all boxes, as SAM's forward ends."""
        input_size = self.transform.get_preprocess_shape(*size, self.transform.target_length)
        return self.sam.postprocess_masks(logits, input_size, size) > self.sam.mask_threshold

    def integrate(self, tokens: torch.Tensor, feature_map: torch.Tensor) -> torch.Tensor:
        """Return (B, N, text_dim) semantic tokens of (B, N, C) tokens and (B, L, width) feature maps."""
        decoded = self.decoder(self.to_clip(tokens).transpose(0, 1), feature_map.transpose(0, 1))
        return self.projector(decoded).transpose(0, 1)

    def logits(self, tokens: torch.Tensor, feature_map: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Return (B, N, K) logits against (K, text_dim) text embeddings."""
        semantic = self.integrate(tokens, feature_map)
        semantic = semantic / (semantic.norm(dim=-1, keepdim=True) + 1e-7)
        return self.clip_model.logit_scale.exp() * semantic @ embeddings.t()

    def select(self, logits: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> Instances:
        """Return the best pairs of box and class, of all, by (N, K) logits."""
        scores, index = logits.softmax(dim=1).flatten().topk(min(self.top_k, logits.numel()))
        rows, classes = index // logits.shape[1], index % logits.shape[1]
        selected = Boxes(boxes.to(self.device)[rows])
        return Instances(size, pred_boxes=selected, scores=scores, pred_classes=classes, rows=rows)

    def to_json(self, detections: Instances, masks: torch.Tensor) -> list[dict[str, Any]]:
        """Return COCO's results, with a mask made and encoded for each detection."""
        detections.pred_masks = masks[detections.rows, 0]
        return instances_to_coco_json(detections.to("cpu"), 0)

    def recognize(
        self,
        embedding: torch.Tensor,
        feature_map: torch.Tensor,
        boxes: torch.Tensor,
        embeddings: torch.Tensor,
        size: tuple[int, int],
    ) -> list[dict[str, Any]]:
        """Return COCO's results of the boxes of an image that both encoders have seen."""
        tokens, logits = self.decode(embedding, boxes, size)
        masks = self.full_masks(logits, size)
        [class_logits] = self.logits(tokens[None], feature_map, embeddings)
        return self.to_json(self.select(class_logits, boxes, size), masks)

    def forward(self, image: torch.Tensor, boxes: torch.Tensor, embeddings: torch.Tensor) -> list[dict[str, Any]]:
        """Return COCO's results of the boxes of a (3, H, W) uint8 image, by (K, text_dim) text embeddings."""
        size = (image.shape[1], image.shape[2])
        return self.recognize(self.embed(image), self.map_features([image]), boxes, embeddings, size)

    def unshared_bytes(self, recognizer: RegionRecognizer) -> tuple[int, int]:
        """Return the bytes of the weights that only the recognizer has, and of those that only this has."""
        modules = (recognizer, self)
        weights = [{x.data_ptr(): x.nbytes for x in [*m.parameters(), *m.buffers()]} for m in modules]
        one, other = weights
        return sum(one[key] for key in one.keys() - other.keys()), sum(other[key] for key in other.keys() - one.keys())


def _check_method(cfg: CfgNode) -> None:
    node = cfg.MODEL.REGIONSPOT
    expected = {"TOKEN_STAGE": "transformer", "SCORE_FUNCTION": "softmax", "LABELS_PER_BOX": -1}
    expected |= {"NMS_THRESH_TEST": 1.0, "SAM.MULTIMASK": False, "CLIP.FEATURES": "feature_map+class_token"}
    expected |= {"INTEGRATION.REGION_ATTENTION": True}
    for key, value in expected.items():
        actual = node
        for part in key.split("."):
            actual = actual[part]
        if actual != value:
            raise ValueError(
                f"MODEL.REGIONSPOT.{key}: the benchmark's plain way is the released method, expected {value!r}, got "
                f"{actual!r}"
            )


def with_weights_of(module: nn.Module, source: nn.Module, device: torch.device | None = None) -> Any:
    """Give a module the weights of another: the same tensors, or copies in float32."""
    state = {key: value.detach().float() for key, value in source.state_dict().items()}
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).to(device or next(iter(state.values())).device)


def plain_loss(logits: torch.Tensor, classes: list[torch.Tensor], cfg: CfgNode) -> torch.Tensor:
    """Return the training loss of (B, N, K) logits: per image the sum over classes, averaged over its regions."""
    node, losses = cfg.MODEL.REGIONSPOT.LOSS, []
    for image_logits, image_classes in zip(logits, classes):
        one_hot = F.one_hot(image_classes, logits.shape[2]).to(logits)
        loss = sigmoid_focal_loss(image_logits, one_hot, node.FOCAL_ALPHA, node.FOCAL_GAMMA, reduction="sum")
        losses.append(loss / len(image_classes))
    return torch.stack(losses).mean()


def encode_names(clip_model: CLIP, templates: Sequence[str], names: list[str]) -> torch.Tensor:
    """Return the text embeddings of names, one name at a time with CLIP's full context."""
    device, embeddings = clip_model.text_projection.device, []
    for name in names:
        prompts = [template.format(name) for template in templates]
        tokens = clip.tokenize(prompts, clip_model.context_length).to(device)
        embeddings.append(clip_model.encode_text(tokens).mean(dim=0))
    return F.normalize(torch.stack(embeddings), dim=1)
