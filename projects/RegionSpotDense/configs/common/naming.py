"""What the configs here share: RegionSpot's recognizer, its training recipe, and both around a dense detector."""

import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from regionspot import RegionRecognizer
from regionspot.config import load_config
from regionspot.model_zoo import get_config_file

from ...named_detector import NamedDetector, load_detector  # noqa: F401

recognizer = L(RegionRecognizer.from_pretrained)(
    # overrides are RegionSpot's: [KEY, value, ...]
    cfg=L(load_config)(config_file=get_config_file("RegionSpot-BB.yaml"), overrides=[]),
    weights="",  # a RegionSpot checkpoint, released or one's own
)


def recipe(zoo_config: str) -> tuple[DictConfig, ...]:
    """Return optimizer, dataloader, lr_multiplier and train: the zoo's, with the rates of RegionSpot's paper."""
    zoo, optimizer = model_zoo.get_config(zoo_config), model_zoo.get_config("common/optim.py").AdamW
    optimizer.lr, optimizer.weight_decay, optimizer.params.weight_decay_norm = 2.5e-5, 1e-4, 1e-4
    zoo.train.init_checkpoint = ""  # of RegionSpot, or of a run of train_net.py; the detector's is detector_weights
    zoo.train.device = "cuda" if torch.cuda.is_available() else "cpu"
    zoo.train.seed, zoo.train.clip_gradients = 0, 1.0  # norm of the gradient over all that learns
    zoo.train.accumulate = 1  # batches per step
    zoo.train.amp.dtype = "bf16"  # or "fp16", on CUDA only
    zoo.train.ema = {"enabled": False, "decay": 0.9998}  # of the attention module, when nothing else learns
    zoo.dataloader.train._target_ = "regionspot.data.build.build_mapped_loader"  # resumes exactly
    zoo.dataloader.train.accumulate = "${train.accumulate}"
    return optimizer, zoo.dataloader, zoo.lr_multiplier, zoo.train


def name_boxes_of(zoo_config: str, detector_weights: str = "") -> DictConfig:
    """Return the model: a detector whose boxes RegionSpot names.

    Args:
        zoo_config: a Python config of the model zoo, such as COCO-Detection/retinanet_R_50_FPN_1x.py.
        detector_weights: file or URL of the detector's checkpoint.
    """
    zoo = model_zoo.get_config(zoo_config)
    return L(NamedDetector)(
        detector=zoo.model,
        recognizer=recognizer,
        input_format=zoo.dataloader.train.mapper.image_format,
        detector_weights=detector_weights,
        masks=False,
        freeze=True,
        box_nms_thresh=0.7,
        top_k=-1,
    )
