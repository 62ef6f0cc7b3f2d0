"""The vision-language models at tiny sizes, by the config overrides that choose them."""

import json
from pathlib import Path

import timm
from timm.models import Eva, VisionTransformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

VISION_LANGUAGE, CLIP = "MODEL.REGIONSPOT.VISION_LANGUAGE.NAME", "MODEL.REGIONSPOT.CLIP."
# by name; those of open_clip with what they change in SIZES
MEMBERS: dict[str, dict | None] = {
    "clip": None,
    "openclip": {},
    "quickgelu": {"quick_gelu": True},
    "metaclip2": {
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "ls_init_value": 0.5},
        "text_cfg": {"hf_tokenizer_name": "tokenizer", "pool_type": "eos", "eos_id": 1, "vocab_size": 99},
    },
    "eva": {
        "custom_text": True,
        "vision_cfg": {"image_size": 32, "timm_model_name": "tiny_eva", "timm_pool": "token", "timm_proj": None},
    },
    "siglip": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 32, "timm_model_name": "tiny_siglip", "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {
            "context_length": 64,
            "vocab_size": 99,
            "hf_tokenizer_name": "tokenizer",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        },
    },
}
OPEN_CLIP = [name for name, sizes in MEMBERS.items() if sizes is not None]
# those of tests/tiny.yaml, in open_clip's words
SIZES: dict = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}
SENTENCES = ["a photo of a red square.", "a green disc", "blue squares, white discs", "cup and saucer", "wooden table"]


def tiny_eva(num_classes=0, global_pool="token", **_):
    """As timm's eva02_base_patch16_clip_224."""
    return Eva(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, qkv_fused=False, mlp_ratio=2, swiglu_mlp=True,
        scale_mlp=True, scale_attn_inner=True, use_rot_pos_emb=True, ref_feat_shape=(4, 4), num_classes=num_classes,
        global_pool=global_pool,
    )  # fmt: skip


def tiny_siglip(num_classes=0, global_pool="map", **_):
    """As timm's vit_base_patch16_siglip_224."""
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, mlp_ratio=2, class_token=False,
        num_classes=num_classes, global_pool=global_pool,
    )  # fmt: skip


for function in (tiny_eva, tiny_siglip):
    timm.models.register_model(function)


def write_tokenizer(directory: Path, sentences: list[str] = SENTENCES) -> None:
    """Write a SentencePiece-like tokenizer as SigLIP's: it ends a text by </s>, which is its padding, too."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(sentences * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(8)  # which a file may ask for
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    tokens = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
    (directory / "tokenizer_config.json").write_text(json.dumps(content))


def model_config(name: str, **changes: object) -> dict:
    """Return open_clip's config of a member of its."""
    changes = {**(MEMBERS[name] or {}), **changes}
    vision = changes.pop("vision_cfg", SIZES["vision_cfg"])
    text = {**SIZES["text_cfg"], **changes.pop("text_cfg", {})}
    return {**SIZES, **changes, "vision_cfg": vision, "text_cfg": text}


def write_config(path: Path, config: dict) -> list[object]:
    """Write a config of open_clip; return the overrides that choose it."""
    path.write_text(json.dumps(config))
    return [VISION_LANGUAGE, "OpenClipVisionLanguageModel", f"{CLIP}NAME", str(path)]


def write_members(directory: Path) -> dict[str, list[object]]:
    """Write the members' configs and tokenizer; return the overrides that choose each."""
    write_tokenizer(directory / "tokenizer")
    overrides = {name: write_config(directory / f"{name}.json", model_config(name)) for name in OPEN_CLIP}
    return {"clip": [], **overrides}
