"""CLIP's tokens of many names in many templates, in a fraction of its tokenizer's time."""

import re
from collections.abc import Sequence

import clip
import torch

# A name whose tokens do not depend on the prompt around it, which CLIP's tokenizer splits at spaces and symbols.
_IS_SIMPLE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ,_'()/-]*[A-Za-z0-9])?")


class ClipTokenizer:
    """Tokenizes names in templates: what is around the names is tokenized once."""

    def __init__(self, templates: Sequence[str], context_length: int) -> None:
        self.templates, self.context_length = templates, context_length
        self._around = [[self._words(part) for part in template.split("{}")] for template in templates]
        self._start, self._end = clip.tokenize("")[0, :2].tolist()

    def __call__(self, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the (K * T, context) int32 tokens of all prompts, name by name, and their (K * T,) lengths.

        Raises:
            ValueError: a name's prompts do not fit the context.
        """
        prompts = torch.zeros(len(names), len(self.templates), self.context_length, dtype=torch.int32)
        for row, name in zip(prompts, names):
            try:
                if _IS_SIMPLE.fullmatch(name):
                    row.copy_(self._join(self._words(name)))
                else:
                    row.copy_(clip.tokenize([x.format(name) for x in self.templates], self.context_length))
            except RuntimeError as error:
                raise ValueError(
                    f"class name {name!r} is too long: its prompts do not fit CLIP's {self.context_length} tokens. "
                    "Give a shorter name"
                ) from error
        flat = prompts.flatten(0, 1)
        return flat, flat.argmax(dim=1) + 1  # end-of-text has the highest id

    def _join(self, words: list[int]) -> torch.Tensor:
        """Return the (T, context) tokens of a name in all templates."""
        tokens = [[self._start, *before, *words, *after, self._end] for before, after in self._around]
        if max(map(len, tokens)) > self.context_length:
            raise RuntimeError("too many tokens")
        return torch.tensor([prompt + [0] * (self.context_length - len(prompt)) for prompt in tokens])

    def _words(self, text: str) -> list[int]:
        """Return the tokens of a part of a prompt, without those of its start and end."""
        tokens = clip.tokenize(text, self.context_length)[0]
        return tokens[1 : int(tokens.argmax())].tolist()
