"""Which weights `predict` uses where RegionSpot's own are not at hand."""

from detectron2.config import CfgNode

from regionspot.checkpoint.fetch import KNOWN_WEIGHTS

BASELINE = (
    "MODEL.WEIGHTS is not set: CLIP ON MASK CROPS names the regions, a baseline of the paper, NOT RegionSpot. "
    "For RegionSpot give its weights (the README says where they are): MODEL.WEIGHTS regionspot_bb.pth"
)


def leave_absent_weights(cfg: CfgNode) -> str:
    """Set the known weights that are not in the cache directory to "": these parts stay random.

    Returns:
        What would be fetched, with sizes; "" if nothing is absent.
    """
    absent = []
    for part in ("SAM", "CLIP"):
        name = cfg.MODEL.REGIONSPOT[part].WEIGHTS
        known = KNOWN_WEIGHTS.get(name)
        if known is not None and not known.path.is_file():
            absent.append(f"{part} {name} ({known.megabytes} MB)")
            cfg.MODEL.REGIONSPOT[part].WEIGHTS = ""
    return " and ".join(absent)


def use_baseline_without_weights(cfg: CfgNode) -> bool:
    """Let CLIP on mask crops name the regions if SAM and CLIP have weights, but RegionSpot itself has none."""
    node = cfg.MODEL
    if node.META_ARCHITECTURE != "RegionSpot" or node.WEIGHTS:
        return False
    if not (node.REGIONSPOT.SAM.WEIGHTS and node.REGIONSPOT.CLIP.WEIGHTS):
        return False
    node.META_ARCHITECTURE, node.REGIONSPOT.CROP.MASKED = "CropBaseline", True
    return True
