"""How the committed weights are packed: in half precision, and with only the used rows of the token embedding."""

import clip
import torch

from miniworld.categories import NAMES
from regionspot.vocabulary import get_templates


def used_tokens() -> torch.Tensor:
    """Return the sorted ids of the tokens in the prompts and captions of this world."""
    texts = [template.format("and") for template in get_templates("all")] + NAMES
    return torch.unique(clip.tokenize(texts))


def pack_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the contents of a weights file for a frozen model's state dict; ``regionspot.checkpoint`` reads it."""
    packed = {key: value.detach().cpu().half().contiguous() for key, value in state.items()}
    for key in [key for key in packed if key.endswith("token_embedding.weight")]:
        tokens, name = used_tokens(), key.removesuffix(".weight")
        packed[f"{name}.rows"] = packed.pop(key)[tokens].contiguous()
        packed[f"{name}.tokens"] = tokens
    return packed
