"""`load_packed`: an FP8 checkpoint of any quant method as a mapping from names to tensors on a device.

On a CPU the tensors are views of the mapped files: nothing is copied, and a page is read when it is first used. On
any other device each range of a file is one buffer, filled by threads, and the tensors are views of it. Weights that
engines fuse are adjacent in the file, so a fused weight is a view, too.
"""

import gc
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from fp8pack.checkpoint.digests import Expected, expected_digests
from fp8pack.checkpoint.manifest_schema import PackedEntry, check_headers
from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import Source, open_checkpoint
from fp8pack.errors import InputError, RecipeError
from fp8pack.gemm.device import describe, find_device
from fp8pack.machine import usable_cores
from fp8pack.modelfacts.contents import Contents
from fp8pack.modelfacts.patterns import Matcher, Pattern
from fp8pack.modelfacts.spec import TensorSpec
from fp8pack.modelfacts.tensor_parallel import Part, Rank, part_of
from fp8pack.numerics.formats import Float8Format
from fp8pack.runtime.fnuz import turn_into_fnuz
from fp8pack.runtime.memory import Buffers, MappedFiles, Memory, Shapes
from fp8pack.runtime.packed_checkpoint import PackedCheckpoint
from fp8pack.runtime.placement import READ_NBYTES, digest_reads, place
from fp8pack.runtime.reader import Digests, read_all

_MAX_WORKERS = 8


def load_packed(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    tensors: str | Collection[str] | None = None,
    verify: bool = False,
    workers: int | None = None,
    tp: tuple[int, int] | None = None,
) -> PackedCheckpoint:
    """Load an FP8 checkpoint of any quant method: a directory, a single `.safetensors` file, or a cached repository.

    device: torch's name; on `meta` tensors have dtypes and shapes only.
    tensors: patterns of the tensors to load: names of tensors or modules, globs, or `re:` and a regular expression;
        only their bytes are read. All by default.
    verify: digest every byte that is read, and compare with fp8pack.json.
    workers: threads that read; by default one per core, at most 8.
    tp: (rank, world): load only this rank's part of every weight, cut between scale regions.
    Raises:
        InputError: a file is malformed or differs from the manifest, an FP8 weight has no matching scale, or a weight
            cannot be sharded over the ranks.
        VerificationError: a digest differs.
        DeviceError: torch finds no such device.
        RecipeError: a pattern matches no tensor, workers is below 1, or the meta device is to be verified.
    """
    with _collector_at_rest():
        source = open_checkpoint(Path(path))
    return load_source(source, device, tensors=tensors, verify=verify, workers=workers, tp=tp)


def load_source(
    source: Source,
    device: str | torch.device,
    *,
    tensors: str | Collection[str] | None = None,
    verify: bool = False,
    workers: int | None = None,
    tp: tuple[int, int] | None = None,
) -> PackedCheckpoint:
    """Load an open checkpoint; otherwise as `load_packed`."""
    with _collector_at_rest():
        contents = read_contents(source)
        if not contents.quantized:
            raise InputError(f"{source.path} has no FP8 weight", "`fp8pack pack` makes an FP8 checkpoint of it")
        _refuse_low_bits(contents)
        if source.manifest is not None:
            check_headers(source.specs, source.manifest)
        weights = tuple(contents.quantized)
        contents = _select(contents, [tensors] if isinstance(tensors, str) else tensors)
        parts = _parts(contents, Rank(*tp)) if tp else {}
        expected = _expected(source, contents) if verify else {}
    target = _checked(find_device(device), verify, workers)
    count = workers or min(_MAX_WORKERS, usable_cores())
    memory: Memory
    match target.type:
        case "meta":
            memory = Shapes(parts)
        case "cpu":
            reads = [read for name, tensor in expected.items() for read in digest_reads(name, tensor)]
            _check(expected, read_all(source.directory, reads, (), target, count))
            memory = MappedFiles(source.directory, parts)
        case _:
            memory = fill_buffers(source.directory, contents, parts, expected, device=target, workers=count)
    return PackedCheckpoint(source, contents, memory, parts, weights)


def fill_buffers(  # noqa: PLR0913
    directory: Path,
    contents: Contents,
    parts: Mapping[str, Part],
    expected: Mapping[str, Expected],
    *,
    device: torch.device,
    workers: int,
    read_nbytes: int = READ_NBYTES,
) -> Buffers:
    """Read tensors, or parts of them, into buffers of a device; check the expected digests."""
    wanted = ((spec, parts.get(spec.name)) for spec in _stored(contents))
    placement = place(wanted, expected, read_nbytes)
    buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for nbytes in placement.buffers]
    _check(expected, read_all(directory, placement.reads, buffers, device, workers))
    memory = Buffers(buffers, placement.places, parts)
    if describe(device).is_fnuz:
        turn_into_fnuz(memory, contents)
    return memory


def _refuse_low_bits(contents: Contents) -> None:
    """Refuse FP4 and integers, which are read to be written anew, and never multiplied with."""
    for spec in contents.tensors:
        if (quantized := contents.quantized.get(spec.name)) and not isinstance(quantized.format, Float8Format):
            raise InputError(
                f"{spec.file}: {spec.name!r} is {quantized.kind}, and only FP8 weights are loaded",
                "`fp8pack convert` makes an FP8 checkpoint of it, `fp8pack unpack` BF16",
            )


def _select(contents: Contents, patterns: Collection[str] | None) -> Contents:
    """The contents with only the tensors that a pattern matches."""
    if patterns is None:
        return contents
    matcher = Matcher(tuple(Pattern(text) for text in patterns), "tensors")
    chosen = tuple(spec for spec in contents.tensors if matcher.find(spec.name))
    matcher.check()
    names = {spec.name for spec in chosen}
    quantized = {name: entry for name, entry in contents.quantized.items() if name in names}
    return replace(contents, tensors=chosen, quantized=quantized)


def _parts(contents: Contents, rank: Rank) -> dict[str, Part]:
    found = {}
    for spec in contents.tensors:
        quantized = contents.quantized.get(spec.name)
        granularity = quantized.granularity if quantized else None
        part = part_of(spec, granularity, contents.facts, rank)
        if part is not None:
            found[spec.name] = part
    return found


def _stored(contents: Contents) -> list[TensorSpec]:
    """Every tensor to read, each once: weights, their scales, and scales of the KV cache."""
    small = [scale for entry in contents.quantized.values() for scale in (entry.scale, entry.input_scale) if scale]
    found = {(spec.file, spec.begin, spec.name): spec for spec in (*contents.tensors, *small)}
    found |= {(spec.file, spec.begin, spec.name): spec for spec in contents.kv_scales.values()}
    return list(found.values())


def _expected(source: Source, contents: Contents) -> dict[str, Expected]:
    """The manifest's digests of tensors, by their names in `contents`; markers, too."""
    if source.manifest is None:
        raise InputError(f"{source.path} has no fp8pack.json to verify it with", "verify=False loads it unverified")
    for file, header in source.headers.items():
        source.manifest.check_header(file, header.digest)
    own = expected_digests(source.manifest.tensors, {spec.name: spec for spec in source.specs})
    names = {(spec.file, spec.begin): spec.name for spec in source.specs if spec.nbytes}
    found = {spec.name: own[names.get((spec.file, spec.begin), spec.name)] for spec in _stored(contents)}
    entries = [source.manifest.tensors[name] for name in contents.quantized]
    markers = [marker.tensor for entry in entries if isinstance(entry, PackedEntry) for marker in entry.markers]
    return found | {name: own[name] for name in markers}


def _check(expected: Mapping[str, Expected], digests: Digests) -> None:
    for name, tensor in expected.items():
        tensor.check([digest for piece in tensor.pieces for digest in digests[name, piece.begin]])


def _checked(device: torch.device, verify: bool, workers: int | None) -> torch.device:
    """The device, after a check of `verify` and `workers`."""
    if workers is not None and workers < 1:
        raise RecipeError(f"workers is {workers}, and must be at least 1")
    if device.type == "meta" and verify:
        raise RecipeError("no bytes are read for the meta device, so none can be verified", "use verify=False")
    return device


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Disable the garbage collector: walking a hundred thousand new objects repeatedly doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
