"""A source checkpoint: its files, their headers, and reading its bytes."""

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from fp8pack.checkpoint.header import LENGTH_NBYTES, Header, read_header
from fp8pack.checkpoint.manifest_schema import Manifest, find_manifest, read_manifest
from fp8pack.errors import InputError
from fp8pack.machine import check_system
from fp8pack.modelfacts.model import ModelFacts, read_facts
from fp8pack.modelfacts.spec import ELEMENT_BITS, NIBBLE, TensorSpec
from fp8pack.numerics.table_codec import split_nibbles
from fp8pack.regular_files import FileVersion, check_link, fill, open_regular, read_range, version_of
from fp8pack.units import ceil_div

_PACK_ORIGINAL = "pack the BF16, FP16 or FP32 original"
_SAVE = "save the model with `save_pretrained(safe_serialization=True)`"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_SINGLE_NAMES = (SINGLE_NAME, "diffusion_pytorch_model.safetensors")
_SAMPLE_NBYTES = 4096
_MAX_JSON_NBYTES = 100_000_000
_MAX_NAME_NBYTES = 255
_NUMBERED = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})\.safetensors")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A safetensors file of the source: its size and its free-text metadata."""

    name: str
    size: int
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: headers are read and checked, tensors are not."""

    path: Path
    name: str
    directory: Path
    files: tuple[SourceFile, ...]
    specs: tuple[TensorSpec, ...]
    config: dict[str, Any] | None  # None: there is no config.json
    is_single_file: bool
    index_name: str | None
    headers: Mapping[str, Header] = field(repr=False)
    versions: Mapping[str, FileVersion] = field(repr=False)
    notes: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """BLAKE3 over each header and each tensor's first, middle and last 4 KiB: two fine-tunes of one base differ.

        It is computed when it is first asked for.
        """
        hasher = blake3()
        for file, header in sorted(self.headers.items()):
            with closing(self.open_file(file)) as reader:
                raw = memoryview(bytearray(header.data_begin - LENGTH_NBYTES))
                reader.readinto(raw, LENGTH_NBYTES)
                hasher.update(raw)
                for spec in header.tensors:
                    sample = memoryview(bytearray(min(_SAMPLE_NBYTES, spec.nbytes)))
                    middle = spec.begin + (spec.nbytes - len(sample)) // 2
                    for offset in (spec.begin, middle, spec.end - len(sample)):
                        reader.readinto(sample, offset)
                        hasher.update(sample)
        return f"blake3:{hasher.hexdigest()}"

    def open_file(self, file: str) -> "ShardReader":
        """Open a file whose header was read; InputError if it was changed or replaced since."""
        return ShardReader(self.directory / file, self.versions[file])

    def check_unchanged(self) -> None:
        """Raise InputError if a header, config.json or the index was changed or replaced since it was read."""
        for file, version in self.versions.items():
            with closing(ShardReader(self.directory / file, version)) as reader:
                if file in self.headers and reader.header().digest != self.headers[file].digest:
                    raise changed(file)

    @cached_property
    def manifest(self) -> Manifest | None:
        """What `fp8pack.json` says, None of a checkpoint that fp8pack did not write; read when it is first asked for.

        Raises:
            InputError: it is malformed, or of a schema that this version does not know.
        """
        path = find_manifest(self.path)
        return read_manifest(path) if path else None

    @property
    def facts(self) -> ModelFacts:
        """What config.json says of the model."""
        return read_facts(self.config or {})


class ShardReader:
    """One open shard: the only way that tensor bytes are read."""

    def __init__(self, path: Path, expected: FileVersion | None = None) -> None:
        """Open a file; InputError if it is another version than the expected one."""
        self._fd = open_regular(path)
        self.path = path
        self.version = version_of(os.fstat(self._fd))
        self.size = self.version.size
        if expected is not None and self.version != expected:
            self.close()
            raise changed(path.name)

    def header(self) -> Header:
        """Read and check the header; raises as `read_header` does."""
        return read_header(self._fd, self.path.name)

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer with the bytes at this offset of the file; InputError when the file ends before."""
        fill(self._fd, buffer, offset, self.path.name)

    def close(self) -> None:
        """Close the file; a second time does nothing, since the number may be another file's by then."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def changed(file: str) -> InputError:
    """Return the error of a file that is not the one that was looked at."""
    return InputError(f"{file} was changed or replaced during the run", "run again without changing the source")


def read_rows(reader: ShardReader, spec: TensorSpec, lo: int, hi: int) -> NDArray[Any]:
    """Return rows of a tensor as they are stored: unsigned integers of its width [hi - lo, K], a byte for 4 bits."""
    cols, bits = spec.matrix[1], ELEMENT_BITS[spec.dtype]
    is_gathered = spec.strides is not None or bits == NIBBLE
    width = cols if is_gathered else cols * bits // max(8, bits)
    rows = np.empty((hi - lo, width), np.dtype(f"u{max(8, bits) // 8}"))
    if is_gathered:
        gather(reader, spec, rows, (lo, 0))
    elif rows.size:
        reader.readinto(rows.data.cast("B"), spec.begin + lo * rows.nbytes // (hi - lo))
    return rows


def gather(reader: ShardReader, spec: TensorSpec, rows: NDArray[Any], start: tuple[int, int]) -> None:
    """Fill rows of a matrix with gaps or of 4 bits an element, from a row and column on; 4 bits become a byte.

    One range of bytes is read for each line of the source, or for all if there are no gaps. A line runs along the
    dimension whose elements lie closer together; what lies between them is read and left.
    """
    (num_rows, num_cols), strides = spec.matrix, spec.strides or (spec.matrix[1], 1)
    height = max(1, spec.shape[1] if spec.strides and len(spec.shape) == 3 else num_rows)
    first, last = start[0], start[0] + rows.shape[0]
    for index in range(first // height, ceil_div(last, height)):
        top, bottom = max(first, index * height), min(last, (index + 1) * height)
        origin = index * height * num_cols + (top - index * height) * strides[0] + start[1] * strides[1]
        part = rows[top - first : bottom - first]
        if strides == (part.shape[1], 1):
            _gather_lines(reader, spec, part.reshape(1, -1), origin, (part.size, 1))
        else:
            _gather_lines(reader, spec, part, origin, strides)


def _gather_lines(
    reader: ShardReader, spec: TensorSpec, rows: NDArray[Any], origin: int, strides: tuple[int, int]
) -> None:
    """Fill rows of a matrix, whose first element is the one at `origin` of the tensor, line by line."""
    lines, (near, far) = (rows.T, strides) if strides[0] < strides[1] else (rows, strides[::-1])
    count, length = lines.shape
    extent = (length - 1) * near + 1
    if not rows.size:
        return
    if ELEMENT_BITS[spec.dtype] == NIBBLE:
        together = 1 if far % 2 else count  # lines that begin with the same half of a byte
        for i in range(0, count, together):
            at = origin + i * far
            packed = np.empty((together, (at % 2 + extent + 1) // 2), np.uint8)
            for j, line in enumerate(packed):
                reader.readinto(line.data, spec.begin + (at + j * far) // 2)
            lines[i : i + together] = split_nibbles(packed)[:, at % 2 :][:, :extent:near]
        return
    segment = np.empty(extent, rows.dtype)
    for i in range(count):
        reader.readinto(segment.data.cast("B"), spec.begin + (origin + i * far) * rows.itemsize)
        lines[i] = segment[::near]


def check_floats(source: Source) -> Source:
    """Return a source whose weights are floats, with a note if it declares otherwise.

    Raises:
        InputError: a weight is quantized already; the hint is the remedy.
    """
    if float8 := next((spec for spec in source.specs if spec.dtype.startswith("F8")), None):
        raise InputError(
            f"{float8.file}: tensor {float8.name!r} is {float8.dtype} already",
            "`fp8pack convert` makes another FP8 checkpoint of it, `fp8pack unpack` BF16; or pack the BF16, FP16 or "
            "FP32 original",
        )
    declared = _declared(source.config or {}, source.directory)
    if declared and not all(map(_is_plain, source.specs)):
        raise InputError(f"{source.path} is quantized already ({declared})", _PACK_ORIGINAL)
    if narrow := next((spec for spec in source.specs if spec.dtype.startswith(("F6_", "F4"))), None):
        raise InputError(f"{narrow.file}: tensor {narrow.name!r} is {narrow.dtype} already", _PACK_ORIGINAL)
    if declared:
        note = f"config.json declares {declared!r}, but no tensor is quantized: the declaration is dropped"
        return replace(source, notes=(*source.notes, note))
    return source


def open_checkpoint(path: Path) -> Source:
    """Look at a checkpoint: a directory, a `.safetensors` file, or a repository in the hub cache.

    Raises:
        InputError: the path is no checkpoint that fp8pack reads; the hint is the remedy.
    """
    check_system()
    path = find_checkpoint(path)
    config: dict[str, Any] | None = None
    versions: dict[str, FileVersion] = {}
    index_name, weight_map = None, {}
    if path.is_dir():
        directory = path
        _refuse_other_kinds(path)
        index_name = _find_index(path)
        documents = [name for name in ("config.json", index_name) if name and os.path.lexists(path / name)]
        versions = {name: _look_at(path, name) for name in documents}
        config = read_json(path / "config.json") if "config.json" in versions else None
        weight_map = _read_index(path, index_name) if index_name else {}
        files = sorted(set(weight_map.values())) if weight_map else _files_without_index(path)
    elif path.suffix == ".safetensors":
        directory, files = path.parent, [path.name]
    else:
        raise InputError(f"{path} is not a .safetensors file", _SAVE)
    headers = {}
    for file in files:
        with closing(ShardReader(directory / file, _look_at(path, file) if path.is_dir() else None)) as reader:
            headers[file] = (reader.header(), reader.size)
            versions[file] = reader.version
    specs = tuple(spec for header, _ in headers.values() for spec in header.tensors)
    _check_tensors(specs, directory)
    notes: tuple[str, ...] = ()
    if index_name:
        specs, notes = _of_index(specs, weight_map, index_name)
    sources = tuple(SourceFile(file, size, header.metadata) for file, (header, size) in headers.items())
    parsed = {file: header for file, (header, _) in headers.items()}
    name, is_file = _display_name(path), not path.is_dir()
    return Source(path, name, directory, sources, specs, config, is_file, index_name, parsed, versions, notes)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most 100 MB; duplicate keys and other shapes are an InputError."""
    with _opened(path) as fd:
        size = os.fstat(fd).st_size
        if size > _MAX_JSON_NBYTES:
            raise InputError(f"{path.name} has {size} bytes, and a JSON file may have 100 MB at most")
        raw = read_range(fd, size, 0, path.name)
    try:
        document = json.loads(raw.decode(), object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name} is malformed: {error}") from None
    if not isinstance(document, dict):
        raise InputError(f"{path.name} is malformed: not a JSON object")
    return document


def check_file_name(name: Any, where: str) -> str:
    """Return the name if it is that of a `.safetensors` file in the same directory; InputError otherwise."""
    windows = PureWindowsPath(name) if isinstance(name, str) else None
    if (
        windows is None
        or windows.name != name
        or windows.drive
        or not name.endswith(".safetensors")
        or re.search(r"[\x00-\x1f/\\\ud800-\udfff]", name)
        or len(name.encode()) > _MAX_NAME_NBYTES
    ):
        raise InputError(f"{where}: {str(name)[:200]!r} is not the name of a .safetensors file in this directory")
    return str(name)


def _look_at(directory: Path, name: str) -> FileVersion:
    """The version of a file of a model, which may be a link to another one of it."""
    try:
        return version_of(os.stat(check_link(directory, name)))
    except FileNotFoundError:
        raise InputError(f"{name} is missing in {directory}") from None
    except OSError as error:
        raise InputError(f"{name} of {directory} cannot be read: {str(error.strerror).lower()}") from None


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = open_regular(path)
    try:
        yield fd
    finally:
        os.close(fd)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def find_checkpoint(path: Path) -> Path:
    """Return the path, or of the id of a cached repository its snapshot; InputError if there is neither."""
    try:
        return path if path.exists() else _find_in_hub_cache(path)
    except OSError as error:  # a name that is too long, say
        raise InputError(f"{str(path)[:200]} cannot be read: {str(error.strerror).lower()}") from None


def _find_in_hub_cache(path: Path) -> Path:
    """The id of a cached repository becomes its snapshot; nothing is ever downloaded."""
    text = path.as_posix()
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*(\.\w[\w-]*)*/[A-Za-z0-9][\w-]*(\.\w[\w-]*)*", text):
        raise InputError(f"{path} does not exist")
    from huggingface_hub import try_to_load_from_cache  # heavy, and only for repository ids
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(text, "config.json")
    except HFValidationError:
        raise InputError(f"{path} does not exist") from None
    if not isinstance(found, str):
        raise InputError(
            f"{text} is neither a directory nor a repository in the hub cache", f"run `hf download {text}`"
        )
    return Path(found).parent


def _display_name(path: Path) -> str:
    place = Path(os.path.abspath(path))
    if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
        return place.parent.parent.name.rsplit("--", 1)[-1]
    return place.name if path.is_dir() else path.stem


def beside(source: Source, name: str) -> Path:
    """Return where an output of this name goes unless told: beside the source, never into the hub cache."""
    path = Path(os.path.abspath(source.path))
    return (Path.cwd() if path.parent.name == "snapshots" else path.parent) / name


def _refuse_other_kinds(directory: Path) -> None:
    names = {entry.name for entry in directory.iterdir()}
    if "adapter_config.json" in names:
        raise InputError(f"{directory} is a LoRA adapter", "merge it into its base model first")
    if "model_index.json" in names:
        part = next((name for name in ("transformer", "unet") if name in names), "transformer")
        command = f"fp8pack pack {shlex.quote(str(directory / part))}"
        raise InputError(f"{directory} is a diffusers pipeline", f"pack its model, `{command}`")
    if any(name.endswith(".safetensors") for name in names):
        return
    if any(name.endswith(".gguf") for name in names):
        raise InputError(f"{directory} has GGUF files only", "pack the BF16 safetensors they were made from")
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
        raise InputError(f"{directory} has pickled weights only", _SAVE)
    raise InputError(f"{directory} has no .safetensors file")


def _find_index(directory: Path) -> str | None:
    """The index that says which files hold the model; a whole model.safetensors beside it wins, as in transformers."""
    if any((directory / name).exists() for name in _SINGLE_NAMES):
        return None
    indexes = sorted(path.name for path in directory.glob("*.safetensors.index.json"))
    return INDEX_NAME if INDEX_NAME in indexes else indexes[0] if len(indexes) == 1 else None


def _files_without_index(directory: Path) -> list[str]:
    """The one file, or all of a numbered set: model-00001-of-00002.safetensors and so on."""
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    files = [name for name in _SINGLE_NAMES if name in files][:1] or files
    if len(files) == 1 and not _NUMBERED.fullmatch(files[0]):
        return files
    sets = {(match[1], match[3]) for match in map(_NUMBERED.fullmatch, files) if match}
    if len(sets) == 1 and all(map(_NUMBERED.fullmatch, files)):
        [(stem, count)] = sets
        wanted = [f"{stem}-{i:0{len(count)}}-of-{count}.safetensors" for i in range(1, min(int(count), 10**5) + 1)]
        if missing := next((name for name in wanted if name not in files), None):
            raise InputError(f"{missing} is missing in {directory}, which has no index", "download it again")
        return wanted
    raise InputError(f"{directory} has {len(files)} .safetensors files and no index", "name the one file to pack")


def _read_index(directory: Path, name: str) -> dict[str, str]:
    weight_map = read_json(directory / name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{name} has no weight_map")
    checked: set[str] = set()
    for file in weight_map.values():
        if not isinstance(file, str) or file not in checked:
            checked.add(check_file_name(file, name))
    if len({file.casefold() for file in checked}) != len(checked):
        raise InputError(f"{name} names two files that differ only in case")
    return weight_map


def _check_tensors(specs: tuple[TensorSpec, ...], directory: Path) -> None:
    if not specs:
        raise InputError(f"{directory} has no tensors")
    seen: dict[str, str] = {}
    for spec in specs:
        if spec.name in seen:
            raise InputError(
                f"tensor {spec.name!r} appears in both {seen[spec.name]} and {spec.file}", "remove one of the files"
            )
        seen[spec.name] = spec.file


def _of_index(
    specs: tuple[TensorSpec, ...], weight_map: dict[str, str], name: str
) -> tuple[tuple[TensorSpec, ...], tuple[str, ...]]:
    """The tensors that an index names, checked against the files, and a note on others that the files have."""
    found = {spec.name: spec.file for spec in specs}
    if missing := weight_map.keys() - found.keys():
        raise InputError(f"tensor {min(missing)!r} appears in {name} but in no file", "download the checkpoint again")
    for tensor, file in found.items():
        if weight_map.get(tensor, file) != file:
            raise InputError(
                f"tensor {tensor!r} is in {file}, but {name} has it in {weight_map[tensor]}",
                "download the checkpoint again",
            )
    others = [tensor for tensor in found if tensor not in weight_map]
    if not others:
        return specs, ()
    note = f"{len(others)} tensors that {name} does not name are skipped, such as {min(others)}"
    return tuple(spec for spec in specs if spec.name in weight_map), (note,)


def _declared(config: dict[str, Any], directory: Path) -> str:
    """The quant method that a configuration declares, empty if none."""
    for section in [config, *(value for value in config.values() if isinstance(value, dict))]:
        if quantized := section.get("quantization_config") or section.get("compression_config"):
            return str(quantized.get("quant_method") if isinstance(quantized, dict) else quantized)[:40]
    return "modelopt" if (directory / "hf_quant_config.json").exists() else ""


def _is_plain(spec: TensorSpec) -> bool:
    """Whether a tensor is no payload and no scale of a quantized weight: floats, and integers of buffers."""
    leaf = spec.name.rpartition(".")[2]
    quantized = re.fullmatch(r"qweight|qzeros|g_idx|absmax|quant_map|weight_packed|\w*_?scales?(_inv)?|SCB", leaf)
    return not quantized and (spec.dtype in ("BF16", "F16", "F32", "F64") or leaf not in ("weight", "data"))
