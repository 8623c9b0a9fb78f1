"""Where prompts come from, and how a row of a data set becomes token ids."""

import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from fp8pack.errors import InputError

BUILT_IN = "built-in"
_REPOSITORY = Path(__file__).parents[2] / "calib_prompts" / "prompts.jsonl"
_INSTALLED = Path(__file__).parents[1] / "_data" / "prompts.jsonl"
_LOADERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".txt": "text", ".arrow": "arrow"}
_JSON = (".jsonl", ".ndjson", ".json")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_SHAPES = "text, article, prompt (and completion), messages, conversations, or instruction (and output)"

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as text, or as a conversation of {role, content}; `name` says where it came from."""

    name: str
    content: str | Messages


def load_prompts(places: Sequence[str], count: int) -> list[Prompt]:
    """Return the first `count` prompts of several places, taken from each in turn; fewer if they hold no more.

    places: `built-in`, a JSONL, Parquet, CSV, Arrow or text file, or the id of a data set in the hub cache.

    Raises:
        InputError: there is no such place, or a row has none of the shapes that are known.
    """
    sources = [((name, row) for name, row in _rows(place) if not _is_blank(row)) for place in places]
    rows = (found for turn in zip_longest(*sources) for found in turn if found is not None)
    return [parse_row(row, name) for name, row in islice(rows, count)]


def parse_row(row: Any, name: str) -> Prompt:
    """Return the prompt of a row in one of the shapes in use; InputError names the row and the shapes."""
    if isinstance(row, Mapping):
        for key in ("messages", "conversations"):
            if isinstance(row.get(key), list) and row[key]:
                return Prompt(name, [_parse_message(message, name) for message in row[key]])
        for keys in (("text",), ("article",), ("prompt", "completion"), ("instruction", "input", "output")):
            if isinstance(row.get(keys[0]), str) and row[keys[0]].strip():
                parts = (row.get(key) for key in keys)
                return Prompt(name, "\n\n".join(part for part in parts if isinstance(part, str) and part))
            if keys[0] == "prompt" and isinstance(row.get("prompt"), list) and row["prompt"]:
                return Prompt(name, [_parse_message(message, name) for message in row["prompt"]])
    found = ", ".join(map(repr, row)) if isinstance(row, Mapping) else type(row).__name__
    raise InputError(f"{name} is no prompt: it has {found[:200] or 'nothing'}, and needs text in one of {_SHAPES}")


def tokenize(prompts: Iterable[Prompt], tokenizer: Any, max_length: int) -> list[tuple[list[int], bool]]:
    """Return the token ids of each prompt, cut to `max_length`, and whether it was cut.

    A conversation goes through the tokenizer's chat template, which transformers renders in its sandbox; without one,
    its contents follow each other.

    Raises:
        InputError: the template refuses a conversation, or nothing is left of a prompt.
    """
    return [_tokenize(prompt, tokenizer, max_length) for prompt in prompts]


def _tokenize(prompt: Prompt, tokenizer: Any, max_length: int) -> tuple[list[int], bool]:
    templated = isinstance(prompt.content, list) and bool(tokenizer.chat_template)
    if isinstance(prompt.content, str):
        text = prompt.content
    elif templated:
        text = _render(prompt.content, tokenizer, prompt.name)
    else:
        text = "\n\n".join(message["content"] for message in prompt.content)
    try:
        ids = tokenizer(text, add_special_tokens=not templated, truncation=True, max_length=max_length)["input_ids"]
        cut = len(ids) >= max_length and len(tokenizer(text, add_special_tokens=not templated)["input_ids"]) > len(ids)
    except (TypeError, UnicodeError):  # of half a surrogate pair
        raise InputError(f"{prompt.name} is no text that can be tokenized") from None
    if not ids:
        raise InputError(f"{prompt.name} has no tokens")
    return [int(token) for token in ids], cut


def _render(messages: Messages, tokenizer: Any, name: str) -> str:
    asking = messages[-1]["role"] == "user"
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking))
    except Exception as error:  # whatever a template raises; it is a program that came with the model
        folded = _fold_system(messages)
        if folded == messages:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise InputError(f"{name}: the tokenizer's chat template fails on it: {reason}") from None
        return _render(folded, tokenizer, name)


def _fold_system(messages: Messages) -> Messages:
    """For templates that know no system role: its content goes before the first question."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def _parse_message(message: Any, name: str) -> dict[str, str]:
    if isinstance(message, Mapping):
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, list):  # parts, as multimodal data sets have them: their text is what can be run
            texts = [part.get("text") for part in content if isinstance(part, Mapping)]
            content = "\n".join(text for text in texts if isinstance(text, str))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": _ROLES.get(role, role), "content": content}
    raise InputError(f"{name}: a message needs role and content (or from and value)")


def _is_blank(row: Any) -> bool:
    """Whether a row holds nothing, as the lines between paragraphs in some data sets."""
    return isinstance(row, Mapping) and all(
        value is None or (isinstance(value, str) and not value.strip()) for value in row.values()
    )


def _rows(place: str) -> Iterator[tuple[str, Any]]:
    if place == BUILT_IN:
        path = _INSTALLED if _INSTALLED.exists() else _REPOSITORY
        return _json_lines(path)
    path = Path(place)
    if not path.exists() and (path.suffix in (*_LOADERS, *_JSON) or place.startswith(("/", ".", "~"))):
        raise InputError(f"{path} does not exist")
    if path.suffix in _JSON and path.is_file():
        return _json_lines(path)
    return _data_set(path)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    name = f"{path.name}, line {number}"
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError):
                        raise InputError(
                            f"{name} is no JSON object: one prompt a line, as `jq -c '.[]'` writes"
                        ) from None
                    yield name, row
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _data_set(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows through `datasets`: of a file, or of a snapshot in the hub cache; nothing is ever downloaded."""
    import datasets  # slow to import, and not needed for JSONL

    name = path.name
    if path.is_file():
        if path.suffix not in _LOADERS:
            raise InputError(f"{path} is no prompt file: .jsonl, {', '.join(_LOADERS)}")
        options: dict[str, Any] = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
        options["data_files"] = glob.escape(os.path.abspath(path))
        kind = _LOADERS[path.suffix]
    else:
        kind, options = os.path.abspath(path) if path.is_dir() else _cached_data_set(path.as_posix()), {}
    try:
        splits = datasets.load_dataset(kind, streaming=True, **options)
        split = splits.get("train") or next(iter(splits.values()))
        for number, row in enumerate(split, 1):
            yield f"{name}, row {number}", row
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{path} cannot be read as a data set: {' '.join(str(error).split())[:300]}") from None


def _cached_data_set(name: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, repo_type="dataset", local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError):
        raise InputError(
            f"{name} is neither a file nor a data set in the hub cache: run `hf download --repo-type dataset {name}`"
        ) from None
