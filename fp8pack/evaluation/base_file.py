"""The file of `--save-base`: a source's hidden states after its last layer, from which its logits follow.

One safetensors file: `hidden` [T, H], the windows one after another, and in its metadata what it belongs to.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from fp8pack.checkpoint.header import build_header, read_header
from fp8pack.checkpoint.shard_writer import sync_directory, sync_file, writing
from fp8pack.errors import InputError, OutputError, VerificationError
from fp8pack.evaluation.text import Window
from fp8pack.modelfacts.spec import TORCH_NAMES, Stored
from fp8pack.regular_files import open_regular

_KEY = "fp8pack-base"
_PIECE = 8 << 20


def text_digest(windows: Sequence[Window]) -> str:
    """Return the digest of the tokens of all windows: of text and tokenizer."""
    digest = blake3()
    for window in windows:
        digest.update(f"{window.document},{window.begin}:".encode())
        digest.update(window.ids.cpu().numpy().tobytes())
    return digest.hexdigest()


def base_facts(fingerprint: str, windows: Sequence[Window], dtype: str) -> dict[str, str]:
    """Return what a base belongs to: a source, a text with its tokenizer, and a dtype."""
    return {_KEY: "1", "source": fingerprint, "text": text_digest(windows), "dtype": dtype}


def check_new(path: Path) -> None:
    """Raise OutputError if there is something already, SpaceError if the place cannot be written."""
    if path.exists():
        raise OutputError(f"{path} exists", f"--base {path} uses it, or choose another name")
    with writing(path):
        path.touch()
        path.unlink()


def save_base(path: Path, hidden: Path, facts: dict[str, str], shape: tuple[int, int]) -> None:
    """Write a base from a file of hidden states [T, H], all or nothing."""
    stored = Stored("hidden", TORCH_NAMES[facts["dtype"]], shape)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            header = build_header([stored], [0], facts | {"digest": _copy(hidden)})
            with temporary.open("wb") as file:
                file.write(header)
                _copy(hidden, file)
            sync_file(temporary)
            temporary.replace(path)
        sync_directory(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def load_base(path: Path, facts: dict[str, str], hidden: Path, shape: tuple[int, int]) -> None:
    """Write the hidden states [T, H] of a base into a file.

    Raises:
        InputError: it is no base, or of another source, text, tokenizer or dtype. VerificationError: it is damaged.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist", "--save-base writes it")
    fd = open_regular(path)
    with os.fdopen(fd, "rb") as file:
        header = read_header(fd, str(path))
        if header.metadata.get(_KEY) != facts[_KEY]:
            raise InputError(f"{path} is no base of `fp8pack eval`", "--save-base writes one")
        for key, what in (("source", "source"), ("text", "text or tokenizer"), ("dtype", "dtype")):
            if header.metadata.get(key) != facts[key]:
                raise InputError(f"{path} is of another {what}", "write one for it with --save-base")
        if [spec.shape for spec in header.tensors] != [shape]:
            raise InputError(f"{path} does not hold hidden states {list(shape)}", "write it again with --save-base")
        file.seek(header.data_begin)
        with hidden.open("wb") as states:
            if _copy(file, states) != header.metadata.get("digest"):
                raise VerificationError(f"{path} is damaged", "write it again with --save-base")


def _copy(source: Path | BinaryIO, target: BinaryIO | None = None) -> str:
    """Copy a file from where it stands to its end, if there is a target; return its digest."""
    if isinstance(source, Path):
        with source.open("rb") as opened:
            return _copy(opened, target)
    digest = blake3()
    while piece := source.read(_PIECE):
        digest.update(piece)
        if target is not None:
            target.write(piece)
    return digest.hexdigest()
