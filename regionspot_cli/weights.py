"""Which weights `predict` uses where RegionSpot's own are not at hand."""

from detectron2.config import CfgNode

from regionspot.checkpoint.fetch import find_known_weights

BASELINE = (
    "MODEL.WEIGHTS is not set: CLIP ON MASK CROPS names the regions, a baseline of the paper, NOT RegionSpot. "
    "For RegionSpot give its weights (the README says where they are): MODEL.WEIGHTS regionspot_bb.pth"
)


def leave_absent_weights(cfg: CfgNode) -> str:
    """Set the known weights that are not in the cache directory to "": these parts stay random.

    Returns:
        What would be fetched, with sizes; "" if nothing is absent.

    Raises:
        FileNotFoundError: the tokenizer's files are absent, without which no name can be encoded.
    """
    _check_tokenizer(cfg)
    absent = []
    for part in ("SAM", "CLIP"):
        name = cfg.MODEL.REGIONSPOT[part].WEIGHTS
        known = find_known_weights(name)
        if known and not any(file.path.is_file() for file in known):
            absent.append(f"{part} {name}" + (f" ({known[0].megabytes} MB)" if known[0].megabytes else ""))
            cfg.MODEL.REGIONSPOT[part].WEIGHTS = ""
    return " and ".join(absent)


def _check_tokenizer(cfg: CfgNode) -> None:
    node = cfg.MODEL.REGIONSPOT
    if node.VISION_LANGUAGE.NAME != "OpenClipVisionLanguageModel":
        return
    from regionspot.modeling.vision_language.open_clip_models import read_open_clip_config
    from regionspot.modeling.vision_language.open_clip_text import find_absent_files

    source = read_open_clip_config(node.CLIP.NAME, node.CLIP.WEIGHTS).tokenizer
    absent = find_absent_files(source) if source else []
    if absent:
        raise FileNotFoundError(
            f"--cached-weights-only: the tokenizer of {node.CLIP.NAME} ({source} of the Hugging Face hub) is not on "
            f"this machine. Run once without the option, or put its files here: {', '.join(map(str, absent))}"
        )


def use_baseline_without_weights(cfg: CfgNode) -> bool:
    """Let CLIP on mask crops name the regions if SAM and CLIP have weights, but RegionSpot itself has none."""
    node = cfg.MODEL
    if node.META_ARCHITECTURE != "RegionSpot" or node.WEIGHTS:
        return False
    if not (node.REGIONSPOT.SAM.WEIGHTS and node.REGIONSPOT.CLIP.WEIGHTS):
        return False
    node.META_ARCHITECTURE, node.REGIONSPOT.CROP.MASKED = "CropBaseline", True
    return True
