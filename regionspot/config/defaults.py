"""Every configuration key that RegionSpot adds to Detectron2's."""

from detectron2.config import CfgNode


def add_regionspot_config(cfg: CfgNode) -> None:
    """Add RegionSpot's keys, with the defaults of the paper's BB variant, to ``cfg``.

    Args:
        cfg: a Detectron2 config, changed in place. The model's keys are in ``MODEL.REGIONSPOT``, those of data and
            training beside Detectron2's.
    """
    cfg.MODEL.REGIONSPOT = CfgNode()
    node = cfg.MODEL.REGIONSPOT

    # The class names: "a,b,c", "@names.txt", "@names.json" (a list, or names with lists of synonyms),
    # "dataset:coco_2017_val", or "" for those of the data set in use.
    node.VOCABULARY = ""

    # The frozen models, by their names in LOCALIZER_REGISTRY and VISION_LANGUAGE_REGISTRY; the keys of SamLocalizer are
    # under SAM, those of ClipVisionLanguageModel under CLIP. Others have the same keys but CUSTOM: docs/models.md lists
    # them, and configs/models has a file for each.
    node.LOCALIZER = CfgNode()
    node.LOCALIZER.NAME = "SamLocalizer"
    node.VISION_LANGUAGE = CfgNode()
    node.VISION_LANGUAGE.NAME = "ClipVisionLanguageModel"

    # Which of SAM's tokens represents a region: "prompt_encoder", "transformer" or "mlp".
    node.TOKEN_STAGE = "transformer"
    # Of the frozen SAM and CLIP, in training, too: "float32", "bf16", or "fp16" (on CUDA). Token stores and cached text
    # embeddings are of one precision.
    node.PRECISION = "float32"
    # True: torch.compile of both image encoders and the attention module; the numbers differ by rounding alone. The
    # first images take a minute more, and it needs a compiler (Triton on a GPU, g++ on a CPU).
    node.COMPILE = False

    _add_inference_config(node)
    _add_proposal_config(node)
    _add_head_config(node)
    _add_sam_config(node)
    _add_clip_config(node)

    _add_integration_config(node)

    # Sigmoid focal loss.
    node.LOSS = CfgNode()
    node.LOSS.FOCAL_ALPHA = 0.25
    node.LOSS.FOCAL_GAMMA = 2.0

    _add_training_config(cfg)


def _add_integration_config(node: CfgNode) -> None:
    # The trained module (paper, section 3.3).
    node.INTEGRATION = CfgNode()
    node.INTEGRATION.DEPTH = 3
    node.INTEGRATION.NUM_HEADS = 8
    node.INTEGRATION.FFN_DIM = 2048
    node.INTEGRATION.DROPOUT = 0.1
    # True: the regions of an image attend to each other. False: each region is decoded alone.
    node.INTEGRATION.REGION_ATTENTION = True
    # Beyond the paper (docs/models.md has what each gains). True: layers normalize what they take instead of what they
    # give, so that deep modules learn.
    node.INTEGRATION.PRE_NORM = False
    # True: each region also gets the mean of CLIP's feature map inside SAM's mask of it. Token stores then need the
    # stage "mask", too, which `regionspot extract` adds.
    node.INTEGRATION.MASK_POOLING = False


def _add_inference_config(node: CfgNode) -> None:
    # Class probabilities from logits: "softmax" over the vocabulary or "sigmoid".
    node.SCORE_FUNCTION = "softmax"
    # Score of a detection: "product" of the proposal's score (if it has one) and the class probability, or either
    # alone: "class" or "proposal" (for the best class only).
    node.SCORE_RULE = "product"
    # Best classes of a region that may become detections; -1 for all.
    node.LABELS_PER_BOX = -1
    # Detections that score below this are dropped; TEST.DETECTIONS_PER_IMAGE limits their number.
    node.SCORE_THRESH_TEST = 0.0
    # Class-wise non-maximum suppression above this IoU; 1 for none.
    node.NMS_THRESH_TEST = 1.0
    # A region is "unknown" if its best class is less probable than THRESHOLD (`regionspot calibrate` finds one), or if
    # one of the BACKGROUND names ("sky", "wall", ...) is more probable than all classes.
    node.UNKNOWN = CfgNode()
    node.UNKNOWN.THRESHOLD = 0.0
    node.UNKNOWN.BACKGROUND = ()
    # Beyond the paper: class probabilities of the module, to the power of 1 - e, times CLIP's own of its dense features
    # inside SAM's mask, to the power of e. ALPHA is e for the names of BASE_VOCABULARY (in any format of VOCABULARY;
    # those that training had), BETA for all others, or for all names with "". With 0 and 0 the module's alone count.
    # Any trained checkpoint can be used; docs/models.md has what this gains.
    node.GEOMETRIC_ENSEMBLE = CfgNode()
    node.GEOMETRIC_ENSEMBLE.ALPHA = 0.0
    node.GEOMETRIC_ENSEMBLE.BETA = 0.0
    node.GEOMETRIC_ENSEMBLE.BASE_VOCABULARY = ""
    # True: Instances also have ``region_embeddings`` (N, text_dim), the normalized semantic tokens, which a dot product
    # compares with text embeddings.
    node.REGION_EMBEDDINGS = False
    # CLIP on crops (MODEL.META_ARCHITECTURE CropBaseline): mask crops instead of box crops; crops per batch.
    node.CROP = CfgNode()
    node.CROP.MASKED = False
    node.CROP.BATCH_SIZE = 64


def _add_proposal_config(node: CfgNode) -> None:
    node.PROPOSALS = CfgNode()
    # Source of the boxes at inference: "gt" (the annotated ones), "file" (DATASETS.PROPOSAL_FILES_TEST),
    # "sam_automatic" (SAM's masks for a grid of points), "detector", or "auto": a file if there is one, else gt.
    node.PROPOSALS.SOURCE = "auto"
    # DATASETS.PROPOSAL_FILES_TRAIN, one file per training set, adds boxes to the annotated ones in training: those with
    # at least this IoU with an annotated box are regions of its class. Token stores must be extracted with the same
    # files (`regionspot extract --proposals`).
    node.PROPOSALS.IOU_THRESH_TRAIN = 0.5
    # Best boxes kept per image, from any source but gt; -1 for all.
    node.PROPOSALS.TOP_K = -1

    # Arguments of segment_anything's SamAutomaticMaskGenerator.
    node.PROPOSALS.SAM_AUTOMATIC = CfgNode()
    node.PROPOSALS.SAM_AUTOMATIC.POINTS_PER_SIDE = 32
    node.PROPOSALS.SAM_AUTOMATIC.PRED_IOU_THRESH = 0.88
    node.PROPOSALS.SAM_AUTOMATIC.STABILITY_SCORE_THRESH = 0.95
    node.PROPOSALS.SAM_AUTOMATIC.BOX_NMS_THRESH = 0.7

    # Config of any Detectron2 detector (a path, or a name in the model zoo), its weights ("" for the config's), the
    # output to take, "boxes" or "rpn", and overrides of its config ("KEY", value, ...).
    node.PROPOSALS.DETECTOR = CfgNode()
    node.PROPOSALS.DETECTOR.CONFIG_FILE = ""
    node.PROPOSALS.DETECTOR.WEIGHTS = ""
    node.PROPOSALS.DETECTOR.OUTPUT = "boxes"
    node.PROPOSALS.DETECTOR.OPTS = ()


def _add_head_config(node: CfgNode) -> None:
    # RegionSpot as the head of another detector, its host (MODEL.ROI_HEADS.NAME RegionSpotROIHeads). As for any head,
    # thresholds are MODEL.ROI_HEADS.{SCORE,NMS}_THRESH_TEST, MODEL.MASK_ON adds masks, and MODEL.WEIGHTS is the host's
    # file; PROPOSALS.TOP_K limits the boxes per image, SAM.PROMPT_CHUNK how many are decoded at once. With VOCABULARY
    # "" the names are those of the first of DATASETS.TEST; training uses those of DATASETS.TRAIN.
    node.HEAD = CfgNode()
    # The host's config, a path or a name in Detectron2's model zoo, which this config overrides. It sets the zoo's
    # weights, and a GeneralizedRCNN becomes a RegionSpotRCNN. Only ``load_config`` reads it; leave it "" if you merge
    # the host's config yourself.
    node.HEAD.HOST_CONFIG = ""
    # A RegionSpot checkpoint, released or your own, read when the model is built; "" leaves the attention random.
    node.HEAD.WEIGHTS = ""
    # True: only the knowledge integration learns; training needs MODEL.META_ARCHITECTURE RegionSpotRCNN, which freezes
    # the rest. False: the host is also trained, with its own losses.
    node.HEAD.FREEZE_HOST = True
    # Boxes to recognize: the "proposals" of the host's RPN, or these "refined" by the host's box regression.
    node.HEAD.BOXES = "proposals"
    # Their scores: "objectness" from the RPN, or "foreground" from the host's box head (only with "refined").
    node.HEAD.BOX_SCORE = "objectness"
    # Class-agnostic non-maximum suppression of the boxes above this IoU; 1 for none.
    node.HEAD.BOX_NMS_THRESH = 1.0
    # The host's own ROI heads, for "refined" and HOST_VOCABULARY: StandardROIHeads, CascadeROIHeads, Res5ROIHeads.
    # HOST_CONFIG sets it; "" is StandardROIHeads.
    node.HEAD.HOST = ""
    # The host's classes, in its order, in any format of VOCABULARY: their detections are the host's, all others are
    # RegionSpot's; with "" all are. Names that are spelled differently are matched by normalization and LVIS's
    # synonyms; the log lists the matches.
    node.HEAD.HOST_VOCABULARY = ""
    # A JSON object from names of the host to the names they correspond to, or to null for none; it overrides all other
    # matches. "" for none. configs/aliases/coco_lvis.json is an example.
    node.HEAD.HOST_ALIASES = ""
    # Where detections of host and RegionSpot have more IoU than this, only the better score stays; 1 keeps both, as
    # class-wise suppression does.
    node.HEAD.MERGE_NMS_THRESH = 1.0


def _add_training_config(cfg: CfgNode) -> None:
    # Token stores (tools/extract_tokens.py), one for each of DATASETS.TRAIN, or () to run SAM in training. Of stores of
    # several localizers in one directory, the configured one's is taken.
    cfg.DATASETS.TOKEN_STORES_TRAIN = ()
    # Shares of the training sets, such as (1.0, 1.0, 1.0) for equally many images of each; () for their sizes.
    cfg.DATASETS.TRAIN_RATIO = ()

    # True: leave out images that cannot be read. Training replaces them by the next image, evaluation counts them as
    # images without detections; both list them at the end. False: the first one is an error.
    cfg.DATALOADER.SKIP_UNREADABLE = False

    # With stored tokens only CLIP sees the image: a JPEG may then be decoded at a half, a quarter or an eighth of its
    # size, as long as the shorter side keeps this many pixels (for example CLIP's input size). 0 decodes it fully.
    cfg.INPUT.REDUCED_JPEG = 0
    # Images with more than 8 bits per channel (depth, thermal, 12-bit cameras) are scaled to 8: the (lowest, highest)
    # value, such as (0, 65535), becomes 0 and 255; () uses those of each image.
    cfg.INPUT.DEEP_RANGE = ()

    # Beyond the paper: each side of the boxes to learn from is moved by a normal error whose standard deviation is this
    # share of the box's width or height, so that inaccurate boxes cost less accuracy. 0.0 for none. Token stores must
    # then hold copies of the same strength, which `regionspot extract` adds.
    cfg.INPUT.BOX_JITTER = 0.0

    # "AdamW" (the paper's) or "SGD" (Detectron2's).
    cfg.SOLVER.OPTIMIZER = "AdamW"
    # The IMS_PER_BATCH images of a step are processed in this many batches, to save memory.
    cfg.SOLVER.ACCUMULATE = 1
    # Mixed precision (SOLVER.AMP.ENABLED): "bf16" (CPUs, and GPUs since Ampere) or "fp16" (older GPUs). A step whose
    # gradients overflow in fp16 is skipped; 100 in a row end the run.
    cfg.SOLVER.AMP.DTYPE = "bf16"
    # Number of last checkpoints kept beside model_final and model_best; 0 keeps all.
    cfg.SOLVER.CHECKPOINTS_KEPT = 5
    # Exponential moving average of the attention module; evaluation, the best checkpoint and inference use it.
    cfg.SOLVER.EMA = CfgNode()
    cfg.SOLVER.EMA.ENABLED = False
    cfg.SOLVER.EMA.DECAY = 0.9998
    # Images per batch in evaluation and extraction; SAM.ENCODER_BATCH_SIZE limits how many SAM encodes at once.
    cfg.TEST.BATCH_SIZE = 1
    # "fixed" evaluates LVIS by fixed AP (10,000 detections per class over the data set) instead of the standard AP. It
    # needs many detections per image: raise TEST.DETECTIONS_PER_IMAGE, or set it to -1.
    cfg.TEST.PROTOCOL = ""
    # Images of each test set, evenly spaced, whose annotated regions are recognized before each evaluation in training:
    # the log gets their loss and top-1 accuracy, and TensorBoard drawings of the first few. 0 for none.
    cfg.TEST.VALIDATION_IMAGES = 200
    # The metric that selects model_best.pth in training (with TEST.EVAL_PERIOD), such as "bbox/AP" or, with several
    # test sets, "lvis_v1_val/bbox/AP" (by default the first set's); "" saves none.
    cfg.TEST.BEST_METRIC = "bbox/AP"

    # An experiment tracker that gets the log's numbers, "wandb" or "mlflow", if it is installed; "" for none.
    cfg.TRACKER = CfgNode()
    cfg.TRACKER.NAME = ""
    cfg.TRACKER.PROJECT = "regionspot"


def _add_sam_config(node: CfgNode) -> None:
    node.SAM = CfgNode()
    # "vit_b", "vit_l", "vit_h", or "custom" with the sizes below. For other localizers a name of theirs such as
    # "sam2.1_hiera_tiny" or "mobile_sam", or the path of a JSON file, as config.json of a model on the hub.
    node.SAM.NAME = "vit_b"
    # A known name (such as "vit_b": downloaded once), a path, a URL, or "" for random weights.
    node.SAM.WEIGHTS = "vit_b"
    # Prompts decoded at once, fewer on a CPU; limits the memory (12 MB a prompt at full size, 35 MB with masks).
    node.SAM.PROMPT_CHUNK = 64
    # Images encoded at once; limits the memory (0.3 GB per image at full size in float32) for any batch size.
    node.SAM.ENCODER_BATCH_SIZE = 1
    # True: decode SAM's multiple masks, and take token and mask of the one with the best predicted IoU.
    node.SAM.MULTIMASK = False

    node.SAM.CUSTOM = CfgNode()
    node.SAM.CUSTOM.IMAGE_SIZE = 1024
    node.SAM.CUSTOM.PATCH_SIZE = 16
    node.SAM.CUSTOM.EMBED_DIM = 768
    node.SAM.CUSTOM.DEPTH = 12
    node.SAM.CUSTOM.NUM_HEADS = 12
    node.SAM.CUSTOM.WINDOW_SIZE = 14
    node.SAM.CUSTOM.GLOBAL_ATTN_INDEXES = [2, 5, 8, 11]
    node.SAM.CUSTOM.PROMPT_DIM = 256
    node.SAM.CUSTOM.DECODER_DEPTH = 2
    node.SAM.CUSTOM.DECODER_NUM_HEADS = 8
    node.SAM.CUSTOM.DECODER_MLP_DIM = 2048
    node.SAM.CUSTOM.NUM_MULTIMASKS = 3


def _add_clip_config(node: CfgNode) -> None:
    node.CLIP = CfgNode()
    # "ViT-B/16", "ViT-L/14", "ViT-L/14@336px", or "custom" with the sizes below. For OpenClipVisionLanguageModel one of
    # open_clip.list_models(), such as "ViT-B-16-SigLIP", or the path of a JSON file in open_clip's format of configs.
    node.CLIP.NAME = "ViT-B/16"
    # A known name (as above: downloaded once), a path, a URL, or "" for random weights. Known names of open_clip's
    # weights are "<model>/<tag>" of open_clip.list_pretrained(), such as "ViT-B-16-SigLIP/webli".
    node.CLIP.WEIGHTS = "ViT-B/16"
    # What the regions attend to: "none", "feature_map" or "feature_map+class_token".
    node.CLIP.FEATURES = "feature_map+class_token"
    # Prompt templates around a class name: "all" (81, averaged), "one" ("a photo of a {}.") or "none" (the bare name).
    node.CLIP.TEMPLATES = "all"
    # "dataset": names as they are, without "-other", "-merged", "-stuff" (the published numbers depend on it).
    # "readable": also without underscores and brackets.
    node.CLIP.NAME_STYLE = "dataset"
    # Prompts encoded at once.
    node.CLIP.TEXT_BATCH_SIZE = 256

    node.CLIP.CUSTOM = CfgNode()
    node.CLIP.CUSTOM.IMAGE_SIZE = 224
    node.CLIP.CUSTOM.PATCH_SIZE = 16
    # CLIP has one head per 64 channels, so both widths are multiples of 64.
    node.CLIP.CUSTOM.WIDTH = 768
    node.CLIP.CUSTOM.LAYERS = 12
    node.CLIP.CUSTOM.TEXT_WIDTH = 512
    node.CLIP.CUSTOM.TEXT_LAYERS = 12
    node.CLIP.CUSTOM.EMBED_DIM = 512
    node.CLIP.CUSTOM.CONTEXT_LENGTH = 77
