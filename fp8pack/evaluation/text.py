"""The text that models predict: documents, cut into windows of tokens."""

from dataclasses import dataclass
from typing import Any

import torch

from fp8pack.errors import InputError
from fp8pack.evaluation.options import EvalOptions
from fp8pack.modelrun.prompts import load_prompts, tokenize

_MOST_DOCUMENTS = 100_000
_FEWEST = 2  # tokens, of which one is predicted
_FEW_DOCUMENTS = 8  # with fewer, a bootstrap over documents says little


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [T] that are run at once, the document that they are of, and where in it they begin."""

    document: int
    begin: int
    ids: torch.Tensor


@dataclass(frozen=True, slots=True)
class Text:
    """The documents by name, their windows, the tokenizer of both, and what is to be said of them."""

    names: tuple[str, ...]
    windows: tuple[Window, ...]
    tokenizer: Any
    notes: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all windows."""
        return sum(len(window.ids) for window in self.windows)

    @property
    def lengths(self) -> list[int]:
        """Predicted tokens of each document: the first of a window is not predicted."""
        lengths = [0] * len(self.names)
        for window in self.windows:
            lengths[window.document] += len(window.ids) - 1
        return lengths


def read_text(options: EvalOptions, tokenizer: Any, length: int, device: torch.device) -> Text:
    """Return the documents, cut into windows of a length, up to the number of tokens that is asked for.

    Raises:
        InputError: a text is refused, or there is none of two tokens.
    """
    prompts = load_prompts(options.text, _MOST_DOCUMENTS, text_column=options.text_column)
    names: list[str] = []
    windows: list[Window] = []
    left = options.num_tokens
    for prompt in prompts:
        if left < _FEWEST:
            break
        ((ids, _),) = tokenize([prompt], tokenizer, left)
        cuts = [(begin, ids[begin : begin + length]) for begin in range(0, len(ids), length)]
        found = [Window(len(names), begin, torch.tensor(cut, device=device)) for begin, cut in cuts if len(cut) > 1]
        if found:
            names.append(prompt.name)
            windows += found
            left -= len(ids)
    if not windows:
        raise InputError(f"{', '.join(options.text)} has no text of two tokens or more")
    notes = [f"the first {options.num_tokens} tokens are evaluated: --num-tokens takes more"] if left < _FEWEST else []
    if len(names) < _FEW_DOCUMENTS:
        notes.append(f"{len(names)} document{'s' if len(names) > 1 else ''}: intervals need about {_FEW_DOCUMENTS}")
    return Text(tuple(names), tuple(windows), tokenizer, tuple(notes))
