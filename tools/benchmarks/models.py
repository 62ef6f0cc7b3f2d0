"""What each localizer and each vision-language model costs: parameters, time and memory, with random weights."""

from argparse import Namespace
from typing import Any

import torch
from detectron2.config import CfgNode

from regionspot.config import load_config
from regionspot.modeling.frozen import get_dtype
from regionspot.modeling.localizers import build_localizer
from regionspot.modeling.vision_language import build_vision_language_model
from regionspot.structures import Prompts
from tools.benchmarks.measure import Meter
from tools.benchmarks.proposals import SIZE, draw_image
from tools.benchmarks.table import Table


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def measure_localizer(cfg: CfgNode, table: Table, num_boxes: int) -> None:
    """Add the rows of the config's localizer: its image encoder, and the tokens of boxes."""
    name, localizer = cfg.MODEL.REGIONSPOT.SAM.NAME, build_localizer(cfg).to(cfg.MODEL.DEVICE)
    image = draw_image().to(cfg.MODEL.DEVICE)
    table.add(f"{name}: image encoder", lambda: localizer.encode_images([image]))
    table.rows[-1]["parameters"] = _count(localizer)
    embeddings = localizer.encode_images([image])
    corners = torch.rand(num_boxes, 2, 2, generator=torch.Generator().manual_seed(0)).sort(dim=1).values
    height, width = localizer.input_size(SIZE)
    boxes = (corners * torch.tensor([width, height])).flatten(1).to(cfg.MODEL.DEVICE)
    table.add(
        f"{name}: tokens of {num_boxes} boxes",
        lambda: localizer(embeddings, [Prompts(boxes=boxes)]),
        unit="boxes",
        number=num_boxes,
    )
    table.rows[-1]["token_dim"] = localizer.token_dim


@torch.no_grad()
def measure_vision_language(cfg: CfgNode, table: Table) -> None:
    """Add the rows of the config's vision-language model: its image encoder, and a prompt."""
    name, model = cfg.MODEL.REGIONSPOT.CLIP.NAME, build_vision_language_model(cfg).to(cfg.MODEL.DEVICE)
    image = draw_image().to(cfg.MODEL.DEVICE)
    table.add(f"{name}: feature map", lambda: model.encode_images([image]))
    table.rows[-1] |= {"parameters": _count(model), "token_dim": model.width}
    tokens = torch.randint(1, 1000, (1, model.context_length)).to(
        cfg.MODEL.DEVICE
    )  # a tokenizer may have to be fetched
    table.add(f"{name}: a prompt of {model.context_length} tokens", lambda: model.encode_tokens(tokens), unit="prompts")
    table.rows[-1]["token_dim"] = model.text_dim


def main(args: Namespace) -> dict[str, Any]:
    cfgs = [load_config(file, args.opts) for file in (args.config_file, *args.others)]
    node = cfgs[0].MODEL.REGIONSPOT
    table = Table(Meter(torch.device(cfgs[0].MODEL.DEVICE), args.repeats), 1, get_dtype(node.PRECISION))
    localizers: dict[tuple[str, str], CfgNode] = {}
    vision_language: dict[tuple[str, str], CfgNode] = {}
    for cfg in cfgs:  # several configs share a model
        node = cfg.MODEL.REGIONSPOT
        localizers.setdefault((node.LOCALIZER.NAME, node.SAM.NAME), cfg)
        vision_language.setdefault((node.VISION_LANGUAGE.NAME, node.CLIP.NAME), cfg)
    for cfg in localizers.values():
        measure_localizer(cfg, table, args.boxes)
    for cfg in vision_language.values():
        measure_vision_language(cfg, table)
    return table.finish(args, precision=node.PRECISION)
