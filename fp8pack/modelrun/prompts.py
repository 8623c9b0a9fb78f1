"""Prompts of files and data sets, and their token ids."""

import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from fp8pack.errors import InputError
from fp8pack.modelrun.chat import Prompt, render

BUILT_IN = "built-in"
HELD_OUT = "held-out"
_REPOSITORY = Path(__file__).parents[2] / "calib_prompts"
_INSTALLED = Path(__file__).parents[1] / "_data"
_OURS = {BUILT_IN: "prompts.jsonl", HELD_OUT: "heldout.jsonl"}
_LOADERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".txt": "text", ".arrow": "arrow"}
_JSON = (".jsonl", ".ndjson", ".json")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_MORE_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content")  # of a message, beside role and content
_MAX_CHARS_PER_TOKEN = 256  # a tokenizer of a text takes many times its size, and no token is as long
_SHAPES = "text, article, prompt (and completion), messages, conversations, or instruction (and output)"


def load_prompts(places: Sequence[str], count: int, *, text_column: str | None = None) -> list[Prompt]:
    """Return the first `count` prompts of several places, one from each in turn; fewer if there are no more.

    places: `built-in`, a JSONL, Parquet, CSV, Arrow or text file, a directory of such files or of `save_to_disk`, or
    the id of a data set in the hub cache. text_column: the column that has the text or the conversation; by default
    the first known one.

    Raises:
        InputError: a place is not found, or a row has no known shape.
    """
    sources = [((name, row) for name, row in _rows(place) if not _is_blank(row)) for place in places]
    rows = (found for turn in zip_longest(*sources) for found in turn if found is not None)
    return [parse_row(row, name, text_column) for name, row in islice(rows, count)]


def parse_row(row: Any, name: str, text_column: str | None = None) -> Prompt:
    """Return the prompt of a row in one of the known shapes; InputError names the row and the shapes."""
    found = ", ".join(map(repr, row))[:200] if isinstance(row, Mapping) and row else "nothing"
    if text_column is not None:
        content = row.get(text_column) if isinstance(row, Mapping) else None
        if isinstance(content, list) and content:
            return _conversation(content, row, name)
        if isinstance(content, str) and content.strip():
            return Prompt(name, content)
        raise InputError(f"{name} has no text in column {text_column!r}: it has {found}", "--text-column NAME")
    if isinstance(row, Mapping):
        for key in ("messages", "conversations"):
            if isinstance(row.get(key), list) and row[key]:
                return _conversation(row[key], row, name)
        for keys in (("text",), ("article",), ("prompt", "completion"), ("instruction", "input", "output")):
            if isinstance(row.get(keys[0]), str) and row[keys[0]].strip():
                parts = (row.get(key) for key in keys)
                return Prompt(name, "\n\n".join(part for part in parts if isinstance(part, str) and part))
            if keys[0] == "prompt" and isinstance(row.get("prompt"), list) and row["prompt"]:
                return _conversation(row["prompt"], row, name)
    else:
        found = type(row).__name__
    raise InputError(
        f"{name} is not a prompt: it has {found}, not {_SHAPES}", "--text-column NAME names the column of the text"
    )


def tokenize(prompts: Iterable[Prompt], tokenizer: Any, max_length: int) -> list[tuple[list[int], bool]]:
    """Return the token ids of each prompt, cut to `max_length`, and whether it was cut.

    A conversation goes through the tokenizer's chat template, which transformers renders in its sandbox: as strings, or
    as lists of parts if the template reads no strings. Without a template, its contents are joined by blank lines.

    Raises:
        InputError: the template refuses a conversation, or nothing is left of a prompt.
    """
    prompts, has_template = list(prompts), bool(tokenizer.chat_template)
    asked = [prompt for prompt in prompts if has_template and isinstance(prompt.content, list)]
    texts = iter(render(asked, tokenizer, max_length * _MAX_CHARS_PER_TOKEN))
    found = []
    for prompt in prompts:
        rendered = next(texts) if has_template and isinstance(prompt.content, list) else None
        found.append(_tokenize(prompt, rendered, tokenizer, max_length))
    return found


def _tokenize(prompt: Prompt, rendered: str | None, tokenizer: Any, max_length: int) -> tuple[list[int], bool]:
    templated = rendered is not None
    if rendered is not None:
        text = rendered
    elif isinstance(prompt.content, str):
        text = prompt.content
    else:
        text = "\n\n".join(filter(None, map(_plain_text, prompt.content)))
    longest = max_length * _MAX_CHARS_PER_TOKEN
    is_long, text = len(text) > longest, text[:longest]
    try:
        ids = tokenizer(text, add_special_tokens=not templated, truncation=True, max_length=max_length)["input_ids"]
        full = tokenizer(text, add_special_tokens=not templated)["input_ids"] if len(ids) >= max_length else ids
        cut = is_long or len(full) > len(ids)
    except (TypeError, UnicodeError):  # of half a surrogate pair
        raise InputError(f"{prompt.name} cannot be tokenized") from None
    if not ids:
        raise InputError(f"{prompt.name} has no tokens")
    return [int(token) for token in ids], cut


def _plain_text(message: Mapping[str, Any]) -> str:
    """A message where there is no template: its content, and the calls in it as JSON."""
    calls = message.get("tool_calls")
    return "\n".join(filter(None, [message.get("content"), json.dumps(calls, ensure_ascii=False) if calls else ""]))


def _conversation(messages: Sequence[Any], row: Mapping[str, Any], name: str) -> Prompt:
    return Prompt(name, [_parse_message(message, name) for message in messages], _parse_tools(row.get("tools"), name))


def _parse_tools(tools: Any, name: str) -> list[Any] | None:
    """The functions of a row: a list, or the same as JSON, as tables have it."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise InputError(f"{name}: 'tools' is not JSON") from None
    return tools if isinstance(tools, list) and tools else None


def _parse_message(message: Any, name: str) -> dict[str, Any]:
    """A message with its role and content first; what a template may read beside them stays, without nulls."""
    if isinstance(message, Mapping):
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        more = {key: message[key] for key in _MORE_KEYS if message.get(key)}
        if calls := more.get("tool_calls"):
            more["tool_calls"] = [_parse_call(call) for call in calls] if isinstance(calls, list) else calls
        if isinstance(content, list):  # parts, as multimodal data sets have them: their text is what can be run
            texts = [part.get("text") for part in content if isinstance(part, Mapping)]
            content = "\n".join(text for text in texts if isinstance(text, str))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": _ROLES.get(role, role), "content": content, **more}
        if isinstance(role, str) and content is None and more:  # no key: a template may write null as "None"
            return {"role": _ROLES.get(role, role), **more}
    raise InputError(f"{name}: a message needs role and content (or from and value)")


def _parse_call(call: Any) -> Any:
    """A call of a function with its arguments as a mapping: templates write those as JSON, and text twice."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _is_blank(row: Any) -> bool:
    """Whether a row is empty, as lines between paragraphs are in some data sets."""
    return isinstance(row, Mapping) and all(
        value is None or (isinstance(value, str) and not value.strip()) for value in row.values()
    )


def _rows(place: str) -> Iterator[tuple[str, Any]]:
    if place in _OURS:
        path = (_INSTALLED if (_INSTALLED / _OURS[place]).exists() else _REPOSITORY) / _OURS[place]
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
                            f"{name} is not a JSON object", "write one prompt a line, as `jq -c '.[]'` does"
                        ) from None
                    yield name, row
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _data_set(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows through `datasets`: of a file, a directory, or a snapshot in the hub cache; nothing is ever downloaded."""
    import datasets  # slow to import, and not needed for JSONL

    name = path.name
    saved = any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json"))  # by save_to_disk()
    if path.is_file():
        if path.suffix not in _LOADERS:
            raise InputError(f"{path} is not a prompt file: .jsonl, {', '.join(_LOADERS)}")
        options: dict[str, Any] = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
        options["data_files"] = glob.escape(os.path.abspath(path))
        kind = _LOADERS[path.suffix]
    else:
        kind, options = os.path.abspath(path) if path.is_dir() else _cached_data_set(path.as_posix()), {}
    try:
        if saved:
            found = datasets.load_from_disk(kind)
            splits = found if isinstance(found, dict) else {"train": found}
        else:
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
            f"{name} is neither a file nor a data set in the hub cache",
            f"run `hf download --repo-type dataset {name}`",
        ) from None
