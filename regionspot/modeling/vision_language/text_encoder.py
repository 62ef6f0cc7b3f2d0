"""Text embeddings of a vocabulary by the frozen CLIP, encoded in batches and cached on disk (paper, section 3.3)."""

import hashlib
import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import clip
import torch
from clip.model import CLIP
from torch.nn import functional as F
from tqdm import tqdm

from regionspot.checkpoint.formats import fingerprint
from regionspot.modeling.vision_language.clip import encode_tokens, text_weights
from regionspot.modeling.vision_language.text_cache import TextCache
from regionspot.utils.files import cache_dir
from regionspot.vocabulary import clean_name, get_phrases, get_templates
from regionspot.vocabulary_entries import EmbeddedVocabulary

MANY_PROMPTS = 20000  # they take minutes on a CPU: a warning and a progress bar
NUM_IN_MEMORY = 4  # vocabularies whose embeddings stay in memory
# A name whose tokens do not depend on the prompt around it, which CLIP's tokenizer splits at spaces and symbols.
_IS_SIMPLE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ,_'()/-]*[A-Za-z0-9])?")
logger = logging.getLogger(__name__)
_LOCK = threading.RLock()  # of all encoders: one of their own would keep models from being copied


class TextEncoder:
    """Turns class names into text embeddings: the mean over the prompts of a name, normalized and cached.

    It uses the CLIP of the vision-language model and owns no weights.
    """

    def __init__(
        self, clip_model: CLIP, templates: str = "all", name_style: str = "dataset", batch_size: int = 256
    ) -> None:
        """
        Args:
            clip_model: CLIP.
            templates: "all", "one" or "none", see ``regionspot.vocabulary``.
            name_style: "dataset" or "readable", see ``regionspot.vocabulary.clean_name``.
            batch_size: prompts encoded at once.
        """
        self.clip_model = clip_model
        self.templates = get_templates(templates)
        self.name_style = name_style
        if batch_size < 1:
            raise ValueError(f"MODEL.REGIONSPOT.CLIP.TEXT_BATCH_SIZE: expected at least 1, got {batch_size}")
        clean_name("", name_style)  # refuses an unknown style now, not with the first names
        self.batch_size = batch_size
        self._checksum: list[float] = []  # of CLIP's weights when they were hashed last
        self._fingerprint = ""
        self._in_memory: OrderedDict[tuple, torch.Tensor] = OrderedDict()

    @torch.inference_mode(False)  # cached embeddings may be trained with later, which inference tensors may not
    @torch.no_grad()
    def __call__(self, names: Sequence[str]) -> torch.Tensor:
        """Return the text embeddings of class names, cached in memory and on disk; any thread may call.

        Args:
            names: K names; those of a ``Vocabulary`` are the average of their synonyms, those of an
                ``EmbeddedVocabulary`` have theirs.

        Returns:
            (K, text_dim) float32, L2-normalized.

        Raises:
            ValueError: a name is too long for CLIP's context, or CLIP's weights give no finite numbers.
        """
        if isinstance(names, EmbeddedVocabulary):
            return names.embeddings.to(self.clip_model.text_projection.device)
        cleaned = [tuple(clean_name(phrase, self.name_style) for phrase in phrases) for phrases in get_phrases(names)]
        directory = self._cache_directory()
        key = (directory, tuple(cleaned))
        embeddings = self._in_memory.get(key)
        if embeddings is None:
            cache = TextCache(directory, self.clip_model.text_projection.shape[1])
            flat = cache.get([phrase for phrases in cleaned for phrase in phrases], self._encode_finite)
            embeddings = _average(flat, [len(phrases) for phrases in cleaned])
            with _LOCK:
                self._in_memory[key] = embeddings
                while len(self._in_memory) > NUM_IN_MEMORY:
                    self._in_memory.popitem(last=False)
        return embeddings.to(self.clip_model.text_projection.device)

    def _encode_finite(self, cleaned: list[str]) -> torch.Tensor:
        embeddings = self.encode(cleaned)
        if not embeddings.isfinite().all():
            raise ValueError("text embeddings are not finite: CLIP's weights are damaged, or too large for their dtype")
        return embeddings

    def _cache_directory(self) -> Path:
        """Return the directory of this CLIP with these templates in this precision."""
        with _LOCK:
            weights = text_weights(self.clip_model)
            # hashing all bytes takes a second; sums of every 256th weight tell at once whether they have changed
            sums = [value.flatten()[::256].sum(dtype=torch.float64) for value in weights.values()]
            if (checksum := torch.stack(sums).tolist()) != self._checksum:
                self._checksum, self._fingerprint = checksum, fingerprint(weights)
            content = [self._fingerprint, self.templates, str(self.clip_model.dtype)]
        return cache_dir() / "text" / hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    @torch.inference_mode(False)
    @torch.no_grad()
    def encode(self, cleaned: list[str]) -> torch.Tensor:
        """Encode K cleaned names without the cache, (K, text_dim): their K * T prompts in batches of similar length.

        The features of a name's prompts are not normalized before they are averaged, only their mean is: the released
        models were trained that way.
        """
        tokens, lengths = self._tokenize(cleaned)
        if len(tokens) >= MANY_PROMPTS and len(self.templates) > 1:
            logger.warning(
                "encoding %d names in %d templates, %d prompts; MODEL.REGIONSPOT.CLIP.TEMPLATES one or none needs %d "
                "times fewer, but published numbers use all",
                len(cleaned),
                len(self.templates),
                len(tokens),
                len(self.templates),
            )
        device = self.clip_model.text_projection.device
        order = torch.argsort(lengths, stable=True)
        sums = torch.zeros(len(cleaned), self.clip_model.text_projection.shape[1], device=device)
        bar = tqdm(total=len(tokens), desc="text embeddings", unit="prompt", disable=len(tokens) < MANY_PROMPTS)
        with bar, torch.autocast(device.type, enabled=False):
            for batch in order.split(self.batch_size):
                features = encode_tokens(self.clip_model, tokens[batch, : int(lengths[batch].max())].to(device))
                sums.index_add_(0, (batch // len(self.templates)).to(device), features.float())
                bar.update(len(batch))
        return F.normalize(sums / len(self.templates), dim=1)

    def _tokenize(self, cleaned: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the (K * T, context) tokens of all prompts, name by name, and their (K * T,) lengths."""
        context = self.clip_model.context_length
        around = [[self._words(part) for part in template.split("{}")] for template in self.templates]
        start, end = clip.tokenize("")[0, :2].tolist()
        prompts = torch.zeros(len(cleaned), len(self.templates), context, dtype=torch.int32)
        for row, name in zip(prompts, cleaned):
            try:
                if _IS_SIMPLE.fullmatch(name):
                    words = self._words(name)
                    tokens = [[start, *before, *words, *after, end] for before, after in around]
                    if max(map(len, tokens)) > context:
                        raise RuntimeError("too many tokens")
                    row.copy_(torch.tensor([prompt + [0] * (context - len(prompt)) for prompt in tokens]))
                else:
                    row.copy_(clip.tokenize([template.format(name) for template in self.templates], context))
            except RuntimeError as error:
                raise ValueError(
                    f"class name {name!r} is too long: its prompts do not fit CLIP's {context} tokens. "
                    "Give a shorter name"
                ) from error
        flat = prompts.flatten(0, 1)
        return flat, flat.argmax(dim=1) + 1  # end-of-text has the highest id

    def _words(self, text: str) -> list[int]:
        """Return the tokens of a part of a prompt, without those of its start and end."""
        tokens = clip.tokenize(text, self.clip_model.context_length)[0]
        return tokens[1 : int(tokens.argmax())].tolist()


def _average(embeddings: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Return a (K, D) embedding of each class from those of its phrases, ``lengths`` of them."""
    if max(lengths) == 1:
        return embeddings
    means = [phrases.mean(dim=0) if len(phrases) > 1 else phrases[0] for phrases in embeddings.split(lengths)]
    return F.normalize(torch.stack(means), dim=1)
