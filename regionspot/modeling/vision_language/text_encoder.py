"""Text embeddings of a vocabulary by the frozen CLIP, encoded in batches and cached on disk (paper, section 3.3)."""

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

from regionspot.checkpoint.formats import fingerprint
from regionspot.modeling.vision_language.text_cache import TextCache
from regionspot.modeling.vision_language.vision_language_model import VisionLanguageModel
from regionspot.utils.files import cache_dir
from regionspot.vocabulary import clean_name, get_phrases, get_templates
from regionspot.vocabulary_entries import EmbeddedVocabulary

MANY_PROMPTS = 20000  # they take minutes on a CPU: a warning and a progress bar
NUM_IN_MEMORY = 4  # vocabularies whose embeddings stay in memory
logger = logging.getLogger(__name__)
_LOCK = threading.RLock()  # of all encoders: one of their own would keep models from being copied


class TextEncoder:
    """Turns class names into text embeddings: the mean over the prompts of a name, normalized and cached.

    It uses the text side of the vision-language model and owns no weights.
    """

    def __init__(
        self,
        vision_language: VisionLanguageModel,
        templates: str = "all",
        name_style: str = "dataset",
        batch_size: int = 256,
    ) -> None:
        """
        Args:
            vision_language: CLIP, or another model.
            templates: "all", "one" or "none", see ``regionspot.vocabulary``.
            name_style: "dataset" or "readable", see ``regionspot.vocabulary.clean_name``.
            batch_size: prompts encoded at once.
        """
        self.vision_language = vision_language
        self.templates = get_templates(templates)
        self.name_style = name_style
        if batch_size < 1:
            raise ValueError(f"MODEL.REGIONSPOT.CLIP.TEXT_BATCH_SIZE: expected at least 1, got {batch_size}")
        clean_name("", name_style)  # refuses an unknown style now, not with the first names
        self.batch_size = batch_size
        self._checksum: list[float] = []  # of CLIP's weights when they were hashed last
        self._fingerprint = ""
        self._in_memory: OrderedDict[tuple, torch.Tensor] = OrderedDict()

    @property
    def device(self) -> torch.device:
        return self.vision_language.pixel_mean.device

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
            return names.embeddings.to(self.device)
        cleaned = [tuple(clean_name(phrase, self.name_style) for phrase in phrases) for phrases in get_phrases(names)]
        directory = self._cache_directory()
        key = (directory, tuple(cleaned))
        embeddings = self._in_memory.get(key)
        if embeddings is None:
            cache = TextCache(directory, self.vision_language.text_dim)
            flat = cache.get([phrase for phrases in cleaned for phrase in phrases], self._encode_finite)
            embeddings = _average(flat, [len(phrases) for phrases in cleaned])
            with _LOCK:
                self._in_memory[key] = embeddings
                while len(self._in_memory) > NUM_IN_MEMORY:
                    self._in_memory.popitem(last=False)
        return embeddings.to(self.device)

    def _encode_finite(self, cleaned: list[str]) -> torch.Tensor:
        embeddings = self.encode(cleaned)
        if not embeddings.isfinite().all():
            raise ValueError("text embeddings are not finite: CLIP's weights are damaged, or too large for their dtype")
        return embeddings

    def _cache_directory(self) -> Path:
        """Return the directory of this CLIP with these templates in this precision."""
        with _LOCK:
            weights = self.vision_language.text_weights()
            # hashing all bytes takes a second; sums of every 256th weight tell at once whether they have changed
            sums = [value.flatten()[::256].sum(dtype=torch.float64) for value in weights.values()]
            if (checksum := torch.stack(sums).tolist()) != self._checksum:
                self._checksum, self._fingerprint = checksum, fingerprint(weights, self.vision_language.text_setup)
            content = [self._fingerprint, self.templates, str(self.vision_language.dtype)]
        return cache_dir() / "text" / hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    @torch.inference_mode(False)
    @torch.no_grad()
    def encode(self, cleaned: list[str]) -> torch.Tensor:
        """Encode K cleaned names without the cache, (K, text_dim): their K * T prompts in batches of similar length.

        The features of a name's prompts are not normalized before they are averaged, only their mean is: the released
        models were trained that way.
        """
        tokens, lengths = self.vision_language.tokenize(cleaned, self.templates)
        if len(tokens) >= MANY_PROMPTS and len(self.templates) > 1:
            logger.warning(
                "encoding %d names in %d templates, %d prompts; MODEL.REGIONSPOT.CLIP.TEMPLATES one or none needs %d "
                "times fewer, but published numbers use all",
                len(cleaned),
                len(self.templates),
                len(tokens),
                len(self.templates),
            )
        order = torch.argsort(lengths, stable=True)
        sums = torch.zeros(len(cleaned), self.vision_language.text_dim, device=self.device)
        bar = tqdm(total=len(tokens), desc="text embeddings", unit="prompt", disable=len(tokens) < MANY_PROMPTS)
        with bar, torch.autocast(self.device.type, enabled=False):
            for batch in order.split(self.batch_size):
                features = self.vision_language.encode_tokens(
                    tokens[batch, : int(lengths[batch].max())].to(self.device)
                )
                sums.index_add_(0, (batch // len(self.templates)).to(self.device), features.float())
                bar.update(len(batch))
        return F.normalize(sums / len(self.templates), dim=1)


def _average(embeddings: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Return a (K, D) embedding of each class from those of its phrases, ``lengths`` of them."""
    if max(lengths) == 1:
        return embeddings
    means = [phrases.mean(dim=0) if len(phrases) > 1 else phrases[0] for phrases in embeddings.split(lengths)]
    return F.normalize(torch.stack(means), dim=1)
