"""Text embeddings of a vocabulary by the frozen CLIP, encoded in batches and cached on disk (paper, section 3.3)."""

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import clip
import torch
from clip.model import CLIP
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm

from regionspot.checkpoint.formats import fingerprint
from regionspot.modeling.vision_language.clip import encode_tokens, text_weights
from regionspot.utils.files import atomic_path, cache_dir
from regionspot.vocabulary import clean_name, get_phrases, get_templates

logger = logging.getLogger(__name__)

NUM_IN_MEMORY = 4  # vocabularies whose embeddings stay in memory
LOCK_TIMEOUTS = (30, 1770)  # seconds to wait for another process before the first warning, and before giving up
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
        self._in_memory: OrderedDict[str, torch.Tensor] = OrderedDict()

    @torch.inference_mode(False)  # cached embeddings may be trained with later, which inference tensors may not
    @torch.no_grad()
    def __call__(self, names: Sequence[str]) -> torch.Tensor:
        """Return the text embeddings of class names, cached in memory and on disk; any thread may call.

        Args:
            names: K names; those of a ``Vocabulary`` are the average of their synonyms.

        Returns:
            (K, text_dim) float32, L2-normalized.

        Raises:
            ValueError: a name is too long for CLIP's context, or CLIP's weights give no finite numbers.
        """
        cleaned = [tuple(clean_name(phrase, self.name_style) for phrase in phrases) for phrases in get_phrases(names)]
        key = self._key(cleaned)
        embeddings = self._in_memory.get(key)
        if embeddings is None:
            path = cache_dir() / "text" / f"{key}.safetensors"
            embeddings = self._read(path, len(cleaned))
            if embeddings is None:
                embeddings = self._encode_once(cleaned, path)
            with _LOCK:
                self._in_memory[key] = embeddings
                while len(self._in_memory) > NUM_IN_MEMORY:
                    self._in_memory.popitem(last=False)
        return embeddings.to(self.clip_model.text_projection.device)

    def _encode_once(self, cleaned: list[tuple[str, ...]], path: Path) -> torch.Tensor:
        """Encode into the cache: one of several processes does, the others wait and read."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _acquire(FileLock(f"{path}.lock")):
                embeddings = self._read(path, len(cleaned))
                if embeddings is None:
                    embeddings = self._average(cleaned).cpu()
                    with atomic_path(path) as temporary:
                        save_file({"embeddings": embeddings}, temporary, {"sha256": _digest(embeddings)})
        except OSError as error:
            logger.warning("text embeddings are not cached, %s cannot be used (%s)", path, error)
            embeddings = self._average(cleaned)
        return embeddings

    def _average(self, cleaned: list[tuple[str, ...]]) -> torch.Tensor:
        """Encode each class's phrases and average them."""
        flat = self.encode([phrase for phrases in cleaned for phrase in phrases])
        if not flat.isfinite().all():
            raise ValueError("text embeddings are not finite: CLIP's weights are damaged, or too large for their dtype")
        lengths = [len(phrases) for phrases in cleaned]
        if max(lengths) == 1:
            return flat
        means = [phrases.mean(dim=0) if len(phrases) > 1 else phrases[0] for phrases in flat.split(lengths)]
        return F.normalize(torch.stack(means), dim=1)

    def _key(self, cleaned: list[tuple[str, ...]]) -> str:
        with _LOCK:
            weights = text_weights(self.clip_model)
            # hashing all bytes takes a second; sums tell at once whether a weight or its dtype has changed since
            sums = torch.stack([value.sum(dtype=torch.float64) for value in weights.values()])
            if (checksum := sums.tolist()) != self._checksum:
                self._checksum, self._fingerprint = checksum, fingerprint(weights)
            content = [self._fingerprint, self.templates, cleaned, str(self.clip_model.dtype)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _read(self, path: Path, num_classes: int) -> torch.Tensor | None:
        """Return the cached embeddings, None where there are none or they are damaged."""
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                embeddings, metadata = file.get_tensor("embeddings"), file.metadata() or {}
        except (SafetensorError, OSError) as error:
            problem = str(error)
        else:
            shape = (num_classes, self.clip_model.text_projection.shape[1])
            problem = _find_damage(embeddings, shape, metadata.get("sha256", ""))
            if not problem:
                return embeddings
        logger.warning("cached text embeddings %s are damaged (%s); encoding again", path, problem)
        return None

    @torch.inference_mode(False)
    @torch.no_grad()
    def encode(self, cleaned: list[str]) -> torch.Tensor:
        """Encode K cleaned names without the cache, (K, text_dim): their K * T prompts in batches of similar length.

        The features of a name's prompts are not normalized before they are averaged, only their mean is: the released
        models were trained that way.
        """
        tokens, lengths = self._tokenize(cleaned)
        device = self.clip_model.text_projection.device
        order = torch.argsort(lengths, stable=True)
        sums = torch.zeros(len(cleaned), self.clip_model.text_projection.shape[1], device=device)
        bar = tqdm(total=len(tokens), desc="text embeddings", unit="prompt", disable=len(tokens) < 20000)
        with bar, torch.autocast(device.type, enabled=False):
            for batch in order.split(self.batch_size):
                features = encode_tokens(self.clip_model, tokens[batch, : int(lengths[batch].max())].to(device))
                sums.index_add_(0, (batch // len(self.templates)).to(device), features.float())
                bar.update(len(batch))
        return F.normalize(sums / len(self.templates), dim=1)

    def _tokenize(self, cleaned: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the (K * T, context) tokens of all prompts, name by name, and their (K * T,) lengths."""
        context = self.clip_model.context_length
        tokens = []
        for name in cleaned:
            try:
                tokens.append(clip.tokenize([template.format(name) for template in self.templates], context).int())
            except RuntimeError as error:
                raise ValueError(
                    f"class name {name!r} is too long: its prompts do not fit CLIP's {context} tokens. "
                    "Give a shorter name"
                ) from error
        stacked = torch.cat(tokens)
        return stacked, stacked.argmax(dim=1) + 1  # end-of-text has the highest id


def _digest(embeddings: torch.Tensor) -> str:
    return hashlib.sha256(embeddings.contiguous().numpy().data).hexdigest()


def _find_damage(embeddings: torch.Tensor, shape: tuple[int, int], sha256: str) -> str:
    """Return what is wrong with embeddings from a file, "" for nothing."""
    if embeddings.shape != shape or embeddings.dtype != torch.float32:
        return f"expected {shape} float32, got {tuple(embeddings.shape)} {embeddings.dtype}"
    if not ((embeddings.norm(dim=1) - 1).abs() < 1e-3).all():  # NaN fails this, too
        return "not of length 1"
    return "" if _digest(embeddings) == sha256 else "not the SHA-256 that was written with it"


@contextmanager
def _acquire(lock: FileLock) -> Iterator[None]:
    """Hold ``lock``; warn when another process keeps it, and proceed without it when that takes too long."""
    for seconds in LOCK_TIMEOUTS:
        try:
            lock.acquire(timeout=seconds)
            break
        except Timeout:
            logger.warning(
                "another process has held %s for %d s: it encodes the same vocabulary, or it was stopped (then end it)",
                lock.lock_file,
                seconds,
            )
    try:
        yield
    finally:
        lock.release()
