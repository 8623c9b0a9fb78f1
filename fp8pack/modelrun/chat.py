"""Conversations as text: a chat template is a program that came with the model, and runs in a process of its own.

transformers renders it in Jinja's sandbox, which bounds neither time nor memory.
"""

import json
import resource
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fp8pack.errors import InputError

_PROBE = "fp8pack-probe"
_MAX_SECONDS = 60.0
_MAX_NBYTES = 2 << 30
_PAGE_NBYTES = resource.getpagesize()

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as text, or as a conversation of {role, content, …}; `name` is its file and line, or data set and row.

    tools: the functions that a conversation may call, as a chat template takes them.
    """

    name: str
    content: str | Messages
    tools: list[Any] | None = None


def render(prompts: Sequence[Prompt], tokenizer: Any, longest: int) -> list[str]:
    """Return each conversation as text of at most `longest` characters.

    Raises:
        InputError: the template refuses one, or takes more than a minute or 2 GiB for all of them.
    """
    if not prompts:
        return []
    context = get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_render, args=(send, prompts, tokenizer, longest), daemon=True)
    child.start()
    send.close()
    try:
        if not receive.poll(_MAX_SECONDS):
            raise InputError(f"the tokenizer's chat template takes more than {_MAX_SECONDS:.0f} s")
        document = json.loads(receive.recv_bytes())
    except EOFError:
        raise InputError("the tokenizer's chat template needs too much memory") from None
    finally:
        child.kill()
        child.join()
        receive.close()
    if "error" in document:
        raise InputError(document["error"])
    return list(document["texts"])


def _render(send: Connection, prompts: Sequence[Prompt], tokenizer: Any, longest: int) -> None:
    """Render in the child, and send the texts or the sentence of an error as JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the parent gets, too
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * _PAGE_NBYTES
    resource.setrlimit(resource.RLIMIT_AS, (used + _MAX_NBYTES, used + _MAX_NBYTES))
    try:
        reads_strings = _reads_strings(tokenizer)
        texts = [_text_of(prompt, tokenizer, reads_strings)[: longest + 1] for prompt in prompts]
        answer: dict[str, Any] = {"texts": texts}
    except InputError as error:
        answer = {"error": str(error)}
    send.send_bytes(json.dumps(answer).encode())


def _reads_strings(tokenizer: Any) -> bool:
    """Whether a chat template takes content as a string; those of some multimodal models take lists of parts only."""

    def shows(content: Any) -> bool:
        try:
            asked = [{"role": "user", "content": content}]
            return _PROBE in str(tokenizer.apply_chat_template(asked, tokenize=False))
        except Exception:  # whatever a template raises
            return False

    return shows(_PROBE) or not shows([{"type": "text", "text": _PROBE}])


def _text_of(prompt: Prompt, tokenizer: Any, reads_strings: bool) -> str:
    messages = list(prompt.content) if isinstance(prompt.content, list) else []
    with_content = [{"content": "", **message} for message in messages]  # some templates fail on a call without
    failure: Exception | None = None
    for form in (messages, with_content, _fold_system(with_content)):
        shaped = form if reads_strings else [_in_parts(message) for message in form]
        asking = form[-1]["role"] == "user"
        try:
            template = tokenizer.apply_chat_template
            return str(template(shaped, prompt.tools, tokenize=False, add_generation_prompt=asking))
        except Exception as error:  # whatever a template raises; it is a program that came with the model
            failure = failure or error
    reason = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
    raise InputError(f"{prompt.name}: the tokenizer's chat template fails on it: {reason}")


def _fold_system(messages: Messages) -> Messages:
    """For templates without a system role: its content goes before the first question."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message.get("content", "")}]}
