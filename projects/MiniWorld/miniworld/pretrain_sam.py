"""Trains the miniature SAM: from boxes and points to masks, without any class."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from miniworld.generator import SIZE, draw_scene, drawing_pool
from regionspot.modeling.localizers import Localizer
from regionspot.modeling.localizers.build_sam import SamSize, build_sam
from regionspot.modeling.localizers.sam import SamLocalizer
from regionspot.structures import Prompts

SAM_SIZE = SamSize(
    embed_dim=128,
    depth=4,
    num_heads=4,
    global_attn_indexes=(0, 1, 2, 3),
    image_size=SIZE,
    patch_size=12,
    prompt_dim=128,
    decoder_mlp_dim=256,
)
SIDE = SIZE // SAM_SIZE.patch_size * 4  # of the low-resolution masks


def draw_masks(arguments: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return image, boxes and (N, 64, 64) uint8 mask coverage of a (seed, index)."""
    seed, index = arguments
    scene = draw_scene("masks", index, seed)
    coverage = scene.masks.reshape(len(scene.masks), SIDE, SIZE // SIDE, SIDE, SIZE // SIDE).mean(axis=(2, 4))
    return scene.image, scene.boxes, np.rint(coverage * 255).astype(np.uint8)


class SamPretraining(nn.Module):
    """SAM and its loss."""

    model: Any

    def __init__(self, directory: Path, seed: int, num_scenes: int, workers: int) -> None:
        """
        Args:
            directory: not used: scenes are drawn again at each start, which takes seconds.
            seed: of the scenes and of the training.
            num_scenes: how many to draw.
            workers: drawing processes.
        """
        super().__init__()
        with drawing_pool(workers) as pool:
            drawn = pool.imap(draw_masks, [(seed, i) for i in range(num_scenes)], chunksize=32)
            self.scenes = list(tqdm(drawn, total=num_scenes, desc="drawing scenes"))
        self.seed = seed
        self.model = self.build()

    @staticmethod
    def build() -> Any:
        return build_sam(SAM_SIZE)

    def batch(self, iteration: int, progress: float, size: int) -> dict[str, list]:
        """Return a batch: images, and for four objects of each a slightly jittered box, or a point inside."""
        rng = np.random.default_rng([self.seed, iteration])
        batch: dict[str, list] = {"images": [], "prompts": [], "coverage": []}
        for i in rng.integers(0, len(self.scenes), size):
            image, boxes, coverage = self.scenes[i]
            chosen = rng.permutation(len(boxes))[:4]
            boxes, coverage = boxes[chosen], coverage[chosen]
            prompts = self._boxes(rng, boxes) if rng.random() < 0.7 else self._points(rng, coverage)
            if rng.random() < 0.5:
                image, prompts, coverage = flip(image, prompts, coverage)
            batch["images"].append(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1))
            batch["prompts"].append(prompts)
            batch["coverage"].append(torch.from_numpy(np.ascontiguousarray(coverage)).float() / 255)
        return batch

    @staticmethod
    def _boxes(rng: np.random.Generator, boxes: np.ndarray) -> Prompts:
        sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        jittered = boxes + rng.normal(0, 0.04, boxes.shape) * sides
        return Prompts(boxes=torch.from_numpy(np.clip(jittered, 0, SIZE).astype(np.float32)))

    @staticmethod
    def _points(rng: np.random.Generator, coverage: np.ndarray) -> Prompts:
        points = []
        for mask in coverage:
            y, x = np.argwhere(mask >= min(200, mask.max()))[rng.integers((mask >= min(200, mask.max())).sum())]
            points.append([[(x + 0.5) * SIZE / SIDE, (y + 0.5) * SIZE / SIDE]])
        return Prompts(points=torch.tensor(points), point_labels=torch.ones(len(points), 1))

    def forward(self, images: list[torch.Tensor], prompts: list[Prompts], coverage: list[torch.Tensor]) -> torch.Tensor:
        """Return the loss: masks by focal and dice loss, their predicted IoU by its error.

        The single mask is trained on boxes; of the several masks the best is, on boxes and points alike.
        """
        device = self.model.device
        embeddings = self._encode([image.to(device) for image in images])
        batch = zip(embeddings, [prompt.to(device) for prompt in prompts], [target.to(device) for target in coverage])
        return torch.stack([self._loss(*image) for image in batch]).mean()

    def _encode(self, images: list[torch.Tensor]) -> Sequence[Any]:
        """Return the embeddings of each image, as ``_decode`` takes them."""
        inputs = torch.stack([self.model.preprocess(image.float()) for image in images])
        return self.model.image_encoder(inputs).split(1)

    def _loss(self, embedding: Any, prompts: Prompts, target: torch.Tensor) -> torch.Tensor:
        masks, ious = self._decode(embedding, prompts)  # (N, 4, s, s), (N, 4)
        loss = mask_loss(masks, target[:, None])  # (N, 4)
        with torch.no_grad():
            real = soft_iou(masks > 0, target[:, None] > 0.5)
        single = loss[:, 0].mean() if prompts.boxes is not None else 0
        return single + loss[:, 1:].min(dim=1).values.mean() + F.mse_loss(ious, real)

    def _decode(self, embedding: torch.Tensor, prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
        sam = self.model
        points = None if prompts.points is None else (prompts.points, prompts.point_labels)
        sparse, dense = sam.prompt_encoder(points=points, boxes=prompts.boxes, masks=None)
        masks, ious = sam.mask_decoder.predict_masks(embedding, sam.prompt_encoder.get_dense_pe(), sparse, dense)
        return masks.float(), ious.float()

    def state(self) -> dict[str, torch.Tensor]:
        """Return the weights that are kept."""
        return self.model.state_dict()

    def report(self) -> dict[str, float]:
        return report_sam(self.model)


def flip(image: np.ndarray, prompts: Prompts, coverage: np.ndarray) -> tuple[np.ndarray, Prompts, np.ndarray]:
    """Flip image, prompts and masks horizontally."""
    if prompts.boxes is not None:
        x0, y0, x1, y1 = prompts.boxes.unbind(1)
        prompts = Prompts(boxes=torch.stack([SIZE - x1, y0, SIZE - x0, y1], dim=1))
    elif prompts.points is not None:
        points = torch.stack([SIZE - prompts.points[..., 0], prompts.points[..., 1]], dim=-1)
        prompts = Prompts(points=points, point_labels=prompts.point_labels)
    return image[:, ::-1], prompts, coverage[..., ::-1]


def mask_loss(masks: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return (N, M) focal plus dice losses of (N, M, s, s) logits against (N, 1, s, s) coverage."""
    target = target.expand_as(masks)
    probability = masks.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(masks, target, reduction="none")
    focal = (entropy * (probability - target).abs() ** 2).mean(dim=(2, 3))
    overlap = (probability * target).sum(dim=(2, 3))
    dice = 1 - (2 * overlap + 1) / (probability.sum(dim=(2, 3)) + target.sum(dim=(2, 3)) + 1)
    return 20 * focal + dice


def soft_iou(masks: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return (N, M) IoU of (N, M, s, s) and (N, 1, s, s) bool masks."""
    overlap = (masks & target).sum(dim=(2, 3))
    return overlap / (masks | target).sum(dim=(2, 3)).clamp(min=1)


@torch.no_grad()
def report_sam(
    sam: Any, kind: Callable[..., Localizer] = SamLocalizer, num_scenes: int = 60, seed: int = 1
) -> dict[str, float]:
    """Return mean IoUs at full size, on scenes of another seed: of boxes, and of the best mask of one point.

    Args:
        sam: the model.
        kind: the class of its localizer.
        num_scenes: of the evaluation.
        seed: of the world; training uses another.
    """
    training, gradients = sam.training, [p.requires_grad for p in sam.parameters()]
    ious: dict[str, list] = {"box_iou": [], "point_iou": []}
    for multimask, key in ((False, "box_iou"), (True, "point_iou")):
        localizer = kind(sam=sam, multimask=multimask)
        for index in range(num_scenes):
            scene = draw_scene("masks", index, seed)
            target = torch.from_numpy(scene.masks).to(sam.device)
            embedding = localizer.encode_images([torch.from_numpy(scene.image).permute(2, 0, 1)])
            if multimask:
                inside = [np.argwhere(mask)[mask.sum() // 2][::-1] for mask in scene.masks]
                points = torch.tensor(np.array(inside, np.float32))[:, None]
                prompts = Prompts(points=points, point_labels=torch.ones(len(points), 1))
            else:
                prompts = Prompts(boxes=torch.from_numpy(scene.boxes))
            [output] = localizer(embedding, [prompts.to(target.device)], with_masks=True)
            masks = localizer.upsample_masks(output.masks, (SIZE, SIZE), (SIZE, SIZE))
            ious[key] += soft_iou(masks[:, None], target[:, None])[:, 0].tolist()
    sam.train(training)
    for parameter, gradient in zip(sam.parameters(), gradients):
        parameter.requires_grad_(gradient)
    return {key: float(np.mean(values)) for key, values in ious.items()}
