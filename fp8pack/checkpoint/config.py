"""config.json: the quantization is announced in it, and nothing else of it changes."""

import json
import re
from collections.abc import Mapping
from typing import Any

KEY = "quantization_config"
_OLD_KEYS = (KEY, "compression_config")
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "half": "F16", "float32": "F32", "float": "F32"}


def set_quantization_config(text: bytes, quantization: dict[str, Any] | None) -> bytes:
    """Return the text of a config.json with `quantization_config` as its last key, or without any; the rest stays.

    The text must be a JSON object, as `read_json` has checked. Where it announces a quantization already, even null
    or empty, the document is written anew, with its order and indent; a text that is right as it is stays as it is.
    """
    document = json.loads(text)
    indent = re.match(rb"\{[^\S\n]*\n([ \t]+)", text.lstrip())
    step = indent[1].decode() if indent else None
    stripped = _strip(document)
    if stripped != document:
        if quantization is not None:
            stripped = _replace(document, stripped, quantization)
        return json.dumps(stripped, indent=step, ensure_ascii=False).encode() + b"\n"
    if quantization is None:
        return text
    body = text.rstrip()
    inner, tail = body[:-1].rstrip(), text[len(body) :]
    comma = b"," if document else b""
    added = json.dumps(quantization, indent=step, ensure_ascii=False)
    if step is None:
        return inner + (comma and b", ") + f'"{KEY}": {added}}}'.encode() + tail
    added = added.replace("\n", f"\n{step}")
    return inner + comma + f'\n{step}"{KEY}": {added}\n}}'.encode() + tail


def declared_dtype(config: Mapping[str, Any]) -> str:
    """Return the dtype of floats (BF16, F16, F32) that a parsed config.json declares, BF16 where it does not."""
    sections = [config, *(config.get(key) for key in ("text_config", "llm_config", "language_config"))]
    for section in sections:
        declared = (section.get("dtype") or section.get("torch_dtype")) if isinstance(section, Mapping) else None
        if isinstance(declared, str) and declared.removeprefix("torch.") in _DTYPES:
            return _DTYPES[declared.removeprefix("torch.")]
    return "BF16"


def set_dtype(text: bytes, dtype: str) -> bytes:
    """Return the text of a config.json with another dtype, also in sections that have the same; the rest stays."""
    document = json.loads(text)
    old = document.get("dtype") or document.get("torch_dtype")
    if not isinstance(old, str) or not old.isidentifier():
        return text
    return re.sub(rb'("(?:torch_)?dtype"\s*:\s*)"' + old.encode() + b'"', rb'\1"' + dtype.encode() + b'"', text)


def _strip(document: dict[str, Any]) -> dict[str, Any]:
    """The document without the quantization that it announces, at its top or in a section such as text_config."""
    stripped = {key: value for key, value in document.items() if key not in _OLD_KEYS}
    for key, section in stripped.items():
        if isinstance(section, dict) and any(section.get(old) for old in _OLD_KEYS):
            stripped[key] = {inner: value for inner, value in section.items() if inner not in _OLD_KEYS}
    return stripped


def _replace(document: dict[str, Any], stripped: dict[str, Any], quantization: dict[str, Any]) -> dict[str, Any]:
    """The stripped document with a quantization where the old one stood at the top, else at the end."""
    replaced = {key: quantization if key == KEY else stripped.get(key) for key in document if key in (KEY, *stripped)}
    return replaced if KEY in replaced else {**stripped, KEY: quantization}
