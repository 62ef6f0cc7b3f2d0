"""The plain way to recognize regions: the modules of ``segment_anything`` and ``clip`` as their authors call them."""

import clip
import torch
from pycocotools import mask as mask_utils
from segment_anything.modeling import Sam
from torch.nn import functional as F

from regionspot.modeling import RegionRecognizer
from regionspot.modeling.vision_language.text_encoder import TextEncoder

PLAIN_CHUNK = 100  # boxes decoded at once: 1000 would need more memory than most machines have


class PlainRecognizer:
    """The same weights and numbers as a recognizer's, for one image."""

    def __init__(self, recognizer: RegionRecognizer) -> None:
        self.recognizer = recognizer
        self.sam: Sam = recognizer.localizer.sam
        self.device = self.sam.pixel_mean.device

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Return SAM's (1, C, h, w) embedding of a (3, H, W) image that has SAM's input size already."""
        return self.sam.image_encoder(self.sam.preprocess(image.to(self.device).float())[None])

    def decode(self, embedding: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (N, C) mask tokens and (N, 1, 4h, 4w) mask logits, which SAM's decoder always makes."""
        tokens, masks = [], []
        hook = self.sam.mask_decoder.transformer.register_forward_hook(lambda *call: tokens.append(call[-1][0][:, 1]))
        for part in boxes.split(PLAIN_CHUNK):
            sparse, dense = self.sam.prompt_encoder(None, part, None)
            position = self.sam.prompt_encoder.get_dense_pe()
            masks.append(self.sam.mask_decoder(embedding, position, sparse, dense, False)[0])
        hook.remove()
        return torch.cat(tokens), torch.cat(masks)

    def rles(self, logits: torch.Tensor, input_size: tuple[int, int], size: tuple[int, int]) -> list[dict]:
        """Return the masks' RLEs by way of full-size masks."""
        rles: list[dict] = []
        for part in logits.split(PLAIN_CHUNK):
            masks = self.sam.postprocess_masks(part, input_size, size) > self.sam.mask_threshold
            rles += mask_utils.encode(masks[:, 0].permute(1, 2, 0).cpu().numpy().astype("uint8", order="F"))
        return rles

    def recognize(self, image: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, list]:
        """Return (N, K) logits and the RLEs of boxes in SAM's input."""
        tokens, masks = self.decode(self.encode(image), boxes)
        feature_map = self.recognizer.vision_language.encode_images([image])
        [logits] = self.recognizer.classify([tokens], feature_map)
        return logits, self.rles(masks, (image.shape[1], image.shape[2]), size)


def encode_names(encoder: TextEncoder, names: list[str]) -> torch.Tensor:
    """Return the text embeddings of names, one name at a time with CLIP's full context."""
    device, embeddings = encoder.clip_model.text_projection.device, []
    for name in names:
        prompts = [template.format(name) for template in encoder.templates]
        tokens = clip.tokenize(prompts, encoder.clip_model.context_length).to(device)
        embeddings.append(encoder.clip_model.encode_text(tokens).float().mean(dim=0))
    return F.normalize(torch.stack(embeddings), dim=1)
