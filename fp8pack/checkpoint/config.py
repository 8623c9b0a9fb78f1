"""config.json: the quantization is announced in it, and nothing else of it changes."""

import json
import re
from typing import Any

KEY = "quantization_config"


def add_quantization_config(text: bytes, quantization: dict[str, Any]) -> bytes:
    """Return the text of a config.json with `quantization_config` as its last key; every other byte stays.

    The text must be a JSON object, as `read_json` has checked. Where the key stands there already, null or empty,
    the document is written anew, with its order and indent.
    """
    document = json.loads(text)
    indent = re.match(rb"\{[^\S\n]*\n([ \t]+)", text.lstrip())
    step = indent[1].decode() if indent else None
    if KEY in document:
        return json.dumps(document | {KEY: quantization}, indent=step, ensure_ascii=False).encode() + b"\n"
    body = text.rstrip()
    inner, tail = body[:-1].rstrip(), text[len(body) :]
    comma = b"," if document else b""
    added = json.dumps(quantization, indent=step, ensure_ascii=False)
    if step is None:
        return inner + (comma and b", ") + f'"{KEY}": {added}}}'.encode() + tail
    added = added.replace("\n", f"\n{step}")
    return inner + comma + f'\n{step}"{KEY}": {added}\n}}'.encode() + tail
