"""FCOS of Detectron2's model zoo finds the boxes, RegionSpot names them.

The zoo has no checkpoint of FCOS: train one by the zoo's own config and give it as ``model.detector_weights``.
"""

from .common.naming import name_boxes_of, recipe

optimizer, dataloader, lr_multiplier, train = recipe("COCO-Detection/fcos_R_50_FPN_1x.py")
model = name_boxes_of("COCO-Detection/fcos_R_50_FPN_1x.py")
