"""RetinaNet of Detectron2's model zoo finds the boxes, RegionSpot names them."""

from detectron2 import model_zoo

from .common.naming import name_boxes_of, recipe

optimizer, dataloader, lr_multiplier, train = recipe("COCO-Detection/retinanet_R_50_FPN_1x.py")
model = name_boxes_of(
    "COCO-Detection/retinanet_R_50_FPN_1x.py",
    detector_weights=model_zoo.get_checkpoint_url("COCO-Detection/retinanet_R_50_FPN_1x.py"),
)
