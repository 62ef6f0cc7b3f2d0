"""The text side of open_clip's models: tokenizers from ``tokenizer.json``, and encoding of trimmed prompts."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regionspot.checkpoint.fetch import fetch_hub_file, hub_file
from regionspot.utils.files import read_json, sha256_of_file


def find_absent_files(source: str) -> list[Path]:
    """Return the files that a ``FileTokenizer`` of ``source`` would fetch."""
    if Path(source).is_dir():
        return []
    paths = [hub_file(source, name).path for name in ("tokenizer.json", "tokenizer_config.json")]
    return [path for path in paths if not path.is_file()]


class FileTokenizer:
    """A model's own tokenizer, from ``tokenizer.json`` and ``tokenizer_config.json``; no code in them is run.

    The tokens are those of open_clip's ``HFTokenizer``: a text is cleaned, tokenized, and padded to the context.
    """

    def __init__(self, source: str, context_length: int, clean: str = "whitespace") -> None:
        """
        Args:
            source: a directory, or a repository of the Hugging Face hub whose files are fetched when first needed.
            context_length: tokens of a prompt.
            clean: open_clip's name of what is done to a text before; "canonicalize" makes it lower case and removes
                punctuation.
        """
        self.source, self.context_length, self.clean = source, context_length, clean

    @cached_property
    def fingerprint(self) -> str:
        """Of all that tokens depend on."""
        return f"{self.clean} {sha256_of_file(self._file('tokenizer.json'))} {self._pad_id}"

    def __call__(self, names: Sequence[str], templates: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the (K * T, context) int32 tokens of all prompts, name by name, and their (K * T,) lengths.

        Raises:
            FileNotFoundError: the tokenizer's files are neither there nor can be fetched.
            ValueError: a name's prompts do not fit the context.
        """
        from open_clip.tokenizer import get_clean_fn

        clean = get_clean_fn(self.clean)
        prompts = [clean(template.format(name)) for name in names for template in templates]
        tokens = torch.full((len(prompts), self.context_length), self._pad_id, dtype=torch.int32)
        lengths = torch.zeros(len(prompts), dtype=torch.int64)
        for i, encoding in enumerate(self._tokenizer.encode_batch(prompts)):
            if (length := len(encoding.ids)) > self.context_length:
                raise ValueError(
                    f"class name {names[i // len(templates)]!r} is too long: its prompts do not fit the model's "
                    f"{self.context_length} tokens. Give a shorter name"
                )
            tokens[i, :length], lengths[i] = torch.tensor(encoding.ids, dtype=torch.int32), length
        return tokens, lengths

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            message = f"the tokenizer of {self.source} needs tokenizers: pip install 'regionspot[models]'"
            raise ImportError(message) from error
        path = self._file("tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no other type
            raise ValueError(f"{path} cannot be read as a tokenizer ({error})") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def _pad_id(self) -> int:
        path = self._file("tokenizer_config.json")
        token = read_json(path, "tokenizer").get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        pad_id = None if token is None else self._tokenizer.token_to_id(token)
        if pad_id is None:
            raise ValueError(f"{path}: expected a pad_token that tokenizer.json knows, got {token!r}")
        return pad_id

    def _file(self, name: str) -> Path:
        directory = Path(self.source)
        return directory / name if directory.is_dir() else fetch_hub_file(self.source, name)


def text_tower(clip_model: Any) -> Any:
    """Return what holds the text encoder: the model itself, as in CLIP, or its ``text``."""
    return getattr(clip_model, "text", clip_model)


def pool_type(clip_model: Any) -> str:
    """Return which token becomes a text's embedding: "argmax", "eos", "first" or "last"."""
    return text_tower(clip_model).pool_type if hasattr(clip_model, "text") else clip_model.text_pool_type


def can_trim(clip_model: Any) -> bool:
    """Return whether the padding behind a text changes nothing: attention is causal, and its own end is taken."""
    return text_tower(clip_model).attn_mask is not None and pool_type(clip_model) in ("argmax", "eos")


def encode_trimmed(clip_model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Encode texts of a model that ``can_trim``; open_clip's own forward pass takes the whole context only.

    Args:
        clip_model: of open_clip.
        tokens: (N, L) int with L from 1 to the context length.

    Returns:
        (N, text_dim) float, not normalized.
    """
    text, length = text_tower(clip_model), tokens.shape[1]
    dtype = text.transformer.get_cast_dtype()
    x = text.token_embedding(tokens).to(dtype) + text.positional_embedding[:length].to(dtype)  # (N, L, width)
    x = text.transformer(x, attn_mask=text.attn_mask[:length, :length])
    if pool_type(clip_model) == "argmax":  # end-of-text has the highest id of all tokens
        ends = tokens.argmax(dim=1)
    else:
        eos = text.eos_id if hasattr(clip_model, "text") else text.text_eos_id
        ends = (tokens == eos).int().argmax(dim=1)
    pooled = text.ln_final(x[torch.arange(len(tokens), device=tokens.device), ends])
    projection = text.text_projection
    if projection is None:
        return pooled
    return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
