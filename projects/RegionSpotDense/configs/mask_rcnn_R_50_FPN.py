"""``RegionSpotROIHeads``, by explicit arguments, in the place of the ROI heads of the model zoo's Mask R-CNN.

Any other ``GeneralizedRCNN`` of a lazy config, such as ViTDet, takes them in the same way.
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from regionspot import RegionSpotRCNN, RegionSpotROIHeads
from regionspot.modeling.roi_heads.host import BoxSelection, HostImages

from .common.naming import load_detector, recipe
from .common.naming import recognizer as _recognizer

_ZOO = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py"
optimizer, dataloader, lr_multiplier, train = recipe(_ZOO)
dataloader.train.mapper.use_instance_mask = False  # SAM's masks are not trained
_rcnn = model_zoo.get_config(_ZOO).model
_rcnn["_target_"] = RegionSpotRCNN  # which freezes the detector around the head
_rcnn.roi_heads = L(RegionSpotROIHeads)(
    recognizer=_recognizer,
    host_images=L(HostImages)(
        pixel_mean="${...pixel_mean}", pixel_std="${...pixel_std}", input_format="${...input_format}"
    ),
    boxes=L(BoxSelection)(nms_thresh=0.7, top_k=100),
    masks=True,
    freeze=True,
    **{key: _rcnn.roi_heads[key] for key in ("num_classes", "batch_size_per_image", "positive_fraction")},
    proposal_matcher=_rcnn.roi_heads.proposal_matcher,
)
model = L(load_detector)(detector=_rcnn, weights=model_zoo.get_checkpoint_url(_ZOO))
