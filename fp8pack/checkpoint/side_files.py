"""All other files of a model directory: which are copied, which are excluded, and why."""

import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path

from fp8pack.checkpoint.source import ShardReader
from fp8pack.errors import InputError
from fp8pack.regular_files import FileVersion, check_link, read_regular, version_of

_LEFT_OUT = tuple(
    (re.compile(pattern), rule)
    for pattern, rule in (
        (r"(^|/)(\.git[^/]*|\.cache|\.ipynb_checkpoints)(/|$)|(^|/)\.DS_Store$", "tool state"),
        (r"\.index\.json$", "an index of the source"),
        (r"(^|/)original/|(^|/)consolidated[^/]*\.safetensors$", "another weight format"),
        (r"\.(bin|pt|pth|ckpt|gguf|h5|msgpack|ot|npz|tflite|mlmodel)$|\.onnx[^/]*$", "another weight format"),
        (r"\.safetensors$", "weights outside the index"),
        (
            r"(^|/)(optimizer|scheduler|rng_state)[^/]*$|(^|/)training_args\.bin$|(^|/)trainer_state\.json$",
            "training state",
        ),
        (r"(^|/)(checkpoint-\d+|global_step\d+)(/|$)", "training state"),
        (
            r"(^|/)(hf_quant_config|quantize_config|quant_config|quantization_config)\.json$|(^|/)recipe\.ya?ml$",
            "another tool's quantization",
        ),
        (r"(^|/)fp8pack\.json$|\.fp8pack\.json$", "a manifest of fp8pack"),
    )
)


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file beside the weights; `rule` says why it is excluded, None that it is copied.

    stored: which file was looked at, None if there is none.
    """

    name: str
    size: int
    rule: str | None
    stored: FileVersion | None = None

    @property
    def version(self) -> tuple[int, int, int]:
        """What tells this version of the file from another one: size, time of the last change, inode."""
        return (self.size, self.stored.modified, self.stored.inode) if self.stored else (self.size, 0, 0)

    def open_in(self, directory: Path) -> ShardReader:
        """Open the file that was looked at; InputError if another one lies there now, or it was changed."""
        return ShardReader(directory / self.name, self.stored)


def list_side_files(directory: Path, weights: Sequence[str], copy: Sequence[str] = ()) -> tuple[SideFile, ...]:
    """Return every file of a model directory but its weights and config.json, sorted by name.

    `copy` holds globs of files that are brought along although a rule would leave them out.

    Raises:
        InputError: a link leads out of the model, a file is no regular file, or a glob matches nothing.
    """
    own = {"config.json", *weights}
    copied = (*copy, *(f"{escape(path)}/*" for path in _module_paths(directory)))
    found = [_classify(directory, name, copied) for name in _walk(directory) if name not in own]
    for pattern in copy:
        if not any(fnmatchcase(side.name, pattern) for side in found):
            raise InputError(f"copy pattern {pattern!r} matches no file in {directory}", "check the name")
    return tuple(sorted(found, key=lambda side: side.name))


def _module_paths(directory: Path) -> Iterator[str]:
    """Directories of the modules of a sentence-transformers model, which have weights of their own."""
    if not os.path.lexists(directory / "modules.json"):
        return
    with suppress(InputError, ValueError, RecursionError):
        modules = json.loads(read_regular(directory / "modules.json"))
        for module in modules if isinstance(modules, list) else ():
            path = module.get("path") if isinstance(module, dict) else None
            if isinstance(path, str) and re.fullmatch(r"\w[\w.-]*", path):
                yield path


def _walk(directory: Path) -> list[str]:
    def refuse(error: OSError) -> None:
        place = Path(str(error.filename)).relative_to(directory).as_posix()
        reason = str(error.strerror).lower()
        raise InputError(f"{place}/ of {directory} cannot be read: {reason}", "make it readable, or remove it")

    names = []
    for root, folders, files in os.walk(directory, onerror=refuse):
        base = Path(root)
        folders[:] = [folder for folder in folders if not _is_tool_folder(folder)]
        names += [(base / file).relative_to(directory).as_posix() for file in files]
        names += [
            (base / folder).relative_to(directory).as_posix() for folder in folders if (base / folder).is_symlink()
        ]
    return names


def _is_tool_folder(name: str) -> bool:
    return name in (".git", ".cache", ".ipynb_checkpoints") or name.endswith((".fp8pack-partial", ".fp8pack-old"))


def _classify(directory: Path, name: str, copy: Sequence[str]) -> SideFile:
    path = directory / name
    if re.search(r"[\ud800-\udfff]", name):  # what no manifest can hold
        raise InputError(f"{name!r} in {directory} is not a name in UTF-8", "rename the file, or remove it")
    wanted = any(fnmatchcase(name, pattern) for pattern in copy)
    rule = None if wanted else next((rule for pattern, rule in _LEFT_OUT if pattern.search(name)), None)
    place = check_link(directory, name) if rule is None else path
    try:
        status = path.stat() if rule else place.lstat()  # of what is checked, not of a link that took its place
    except OSError:
        return SideFile(name, 0, rule or "a broken link")
    if not stat.S_ISREG(status.st_mode):
        return SideFile(name, 0, "no regular file")
    return SideFile(name, status.st_size, rule, version_of(status))
