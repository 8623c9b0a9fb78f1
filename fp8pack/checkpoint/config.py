"""config.json: the quantization is announced in it, and nothing else of it changes."""

import json
import re
from typing import Any


def add_quantization_config(text: bytes, quantization: dict[str, Any]) -> bytes:
    """Return the text of a config.json with `quantization_config` as its last key; every other byte stays.

    The text must be a JSON object, as `read_json` has checked. A `quantization_config` of null is replaced.
    """
    body = re.sub(
        rb'"quantization_config"\s*:\s*null\s*,\s*|,\s*"quantization_config"\s*:\s*null(?=\s*[,}])', b"", text
    )
    end = body.rstrip()
    inner, tail = end[:-1].rstrip(), body[len(end) :]
    indent = re.match(rb"\{\s*?\n([ \t]+)", body.lstrip())
    if indent is None:
        added = json.dumps(quantization, ensure_ascii=False)
        return inner + (b", " if inner != b"{" else b"") + f'"quantization_config": {added}}}'.encode() + tail
    step = indent[1].decode()
    added = json.dumps(quantization, indent=step, ensure_ascii=False).replace("\n", f"\n{step}")
    return inner + (b"," if inner != b"{" else b"") + f'\n{step}"quantization_config": {added}\n}}'.encode() + tail
