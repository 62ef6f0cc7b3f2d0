"""From the keys of official files to those of the models of ``transformers``.

Meta's SAM 2 and the authors' SAM-HQ have files of their own, with keys as in ``segment_anything``. Files on the Hugging
Face hub have the library's keys, often of a video model, whose memory is left out here.
"""

import re
from collections.abc import Sequence

import torch

State = dict[str, torch.Tensor]
Rules = Sequence[tuple[str, str]]

POSITION = "positional_embedding"
_POSITIONS = (f"shared_image_embedding.{POSITION}", f"prompt_encoder.shared_embedding.{POSITION}")
# What the image path has of a model with memory.
_USED = ("vision_encoder.", "prompt_encoder.", "mask_decoder.", "shared_image_embedding.", "no_memory_embedding")


def _numbered(old: str, new: str, names: dict[int, str]) -> list[tuple[str, str]]:
    """Return rules for the numbered parts of a sequence that have names in the library."""
    return [(rf"^{re.escape(old)}{number}\.", f"{new}{name}.") for number, name in names.items()]


# Prompt encoder and mask decoder, which SAM-HQ and SAM 2 have from SAM.
_SHARED_RULES: Rules = [
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", _POSITIONS[1]),
    (r"^prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
    *_numbered(
        "prompt_encoder.mask_downscaling.",
        "prompt_encoder.mask_embed.",
        {0: "conv1", 1: "layer_norm1", 3: "conv2", 4: "layer_norm2", 6: "conv3"},
    ),
    *_numbered(
        "mask_decoder.output_upscaling.",
        "mask_decoder.upscale_",
        {0: "conv1", 1: "layer_norm", 3: "conv2"},
    ),
    (r"^(mask_decoder\.transformer\.layers\.\d+)\.norm(\d)\.", r"\1.layer_norm\2."),
    (r"^mask_decoder\.transformer\.norm_final_attn\.", "mask_decoder.transformer.layer_norm_final_attn."),
    # MLPs of three layers, of which the first and the last have names
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|\w+_head|hf_mlp))\.layers\.0\.", r"\1.proj_in."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|\w+_head|hf_mlp))\.layers\.2\.", r"\1.proj_out."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|\w+_head|hf_mlp))\.layers\.1\.", r"\1.layers.0."),
]
_SAM_HQ_RULES: Rules = [
    (r"^image_encoder\.blocks\.(\d+)\.norm(\d)\.", r"vision_encoder.layers.\1.layer_norm\2."),
    (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
    (r"^image_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
    *_numbered(
        "image_encoder.neck.",
        "vision_encoder.neck.",
        {0: "conv1", 1: "layer_norm1", 2: "conv2", 3: "layer_norm2"},
    ),
    (r"^image_encoder\.", "vision_encoder."),
    *_SHARED_RULES,
    (r"^mask_decoder\.hf_token\.", "mask_decoder.hq_token."),
    (r"^mask_decoder\.hf_mlp\.", "mask_decoder.hq_mask_mlp."),
    *_numbered("mask_decoder.compress_vit_feat.", "mask_decoder.compress_vit_", {0: "conv1", 1: "norm", 3: "conv2"}),
    *_numbered("mask_decoder.embedding_encoder.", "mask_decoder.encoder_", {0: "conv1", 1: "norm", 3: "conv2"}),
    *_numbered("mask_decoder.embedding_maskfeature.", "mask_decoder.mask_", {0: "conv1", 1: "norm", 3: "conv2"}),
]
_SAM2_RULES: Rules = [
    (r"^no_mem_embed$", "no_memory_embedding"),
    (r"^image_encoder\.trunk\.blocks\.(\d+)\.norm(\d)\.", r"vision_encoder.backbone.blocks.\1.layer_norm\2."),
    (r"^image_encoder\.trunk\.patch_embed\.proj\.", "vision_encoder.backbone.patch_embed.projection."),
    (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"^sam_(prompt_encoder|mask_decoder)\.", r"\1."),
    *_SHARED_RULES,
    (r"\.mlp\.layers\.0\.", ".mlp.proj_in."),
    (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
    (r"^(mask_decoder\..*)\.out_proj\.", r"\1.o_proj."),
]
_SAM3_RULES: Rules = [
    (r"^detector_model\.vision_encoder\.backbone\.", "vision_encoder.backbone."),
    (r"^tracker_neck\.", "vision_encoder.neck."),
    (r"^tracker_model\.", ""),
]


def rename_sam_hq(state: State) -> State:
    """Return the weights of the authors' file, or of one on the hub, under the keys of ``SamHQModel``."""
    if any(key.startswith("image_encoder.") for key in state):
        state = _rename(state, _SAM_HQ_RULES)
    return _with_positions(state)


def rename_sam2(state: State) -> State:
    """Return the weights of Meta's file, or of one on the hub, under the keys of ``Sam2Model``."""
    if any(key.startswith("sam_mask_decoder.") for key in state):
        state = _rename(state, _SAM2_RULES)
        points = [f"prompt_encoder.point_embed.{i}.weight" for i in range(4)]  # (1, C) each
        if all(key in state for key in points):
            state["prompt_encoder.point_embed.weight"] = torch.cat([state.pop(key) for key in points])
    return _with_positions(_select_used(state))


def rename_sam3(state: State) -> State:
    """Return the weights of the hub's file under the keys of ``Sam3TrackerModel``."""
    if any(key.startswith("tracker_model.") for key in state):
        state = _rename(state, _SAM3_RULES)
    return _with_positions(_select_used(state))


def _rename(state: State, rules: Rules) -> State:
    """Apply all rules, in their order, to each key."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def _select_used(state: State) -> State:
    return {key: value for key, value in state.items() if key.startswith(_USED)}


def _with_positions(state: State) -> State:
    """Add the second name of the positional encoding's matrix, which files may have once."""
    present = [state[key] for key in _POSITIONS if key in state]
    return {**state, **dict.fromkeys(_POSITIONS, present[0])} if present else state
