"""Putting damaged tensors and small files of a packed checkpoint right, from its source, in place.

Only what differs is written: a tensor where it lies, a shard whose header or size is wrong as a whole, a small file by
one rename. Every byte is one that the manifest has the digest of, so a repair that is cut off is done again.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from blake3 import blake3

from fp8pack.checkpoint.manifest_schema import Manifest
from fp8pack.checkpoint.shard_writer import ShardWriter, sync_directory, write_file, writing
from fp8pack.checkpoint.whole import Difference
from fp8pack.errors import RecipeError
from fp8pack.packing.execute import ShardWork
from fp8pack.packing.metadata import small_files
from fp8pack.packing.prepare import Prepared
from fp8pack.packing.recompute import Packed, execution_of, prepare_again, run_execution, sqnr_again
from fp8pack.packing.target import Folder
from fp8pack.planning.layout import ShardPlan


def repair(
    packed: Packed,
    manifest: Manifest,
    differences: Sequence[Difference],
    source: Path,
    calibration: Path | None,
    tell: Callable[[int, int], None],
) -> None:
    """Write what differs again; whether all is right then, `verify` says.

    Raises:
        InputError: the source is not the one that was packed.
        RecipeError: packing the source gives other shards.
        SpaceError: a file cannot be written.
    """
    prepared = prepare_again(packed, source, calibration)
    folder, damaged = packed.manifest.parent, {(entry.file, entry.tensor) for entry in differences}
    execution = execution_of(prepared, _InPlace(folder))
    for work in execution.works:
        entry = manifest.files.get(work.plan.file)
        if entry is None or (entry.size, entry.header) != (work.size, _digest(work.header())):
            raise RecipeError(f"{packed.checkpoint} is not what packing {source} gives", "pack the source again")
    for work in execution.works:
        _narrow(work, damaged, folder / work.plan.file)
    run_execution(execution, prepared, tell)
    _write_small(prepared, manifest, {file for file, tensor in damaged if tensor is None}, folder)


def _narrow(work: ShardWork, damaged: Iterable[tuple[str, str | None]], path: Path) -> None:
    """Leave only the damaged tensors of a shard as work; write its header and its small tensors where they differ."""
    names = {tensor for file, tensor in damaged if file == work.plan.file}
    if None in names:  # the header or the size: where tensors begin was not known, so that all are written
        writer = ShardWriter(path, create=True)
        try:
            writer.start(work.header(), work.size)
        finally:
            writer.close()
    else:
        keep = []
        for tensor in work.tensors:
            own = {tensor.data.name, *(constant.stored.name for constant in tensor.constants)}
            own |= {tensor.packing.scale.name} if tensor.packing else set()
            keep += [tensor] if own & names else []
        work.tensors = tuple(keep)
        work.num_bands = sum(tensor.num_bands for tensor in keep)
    if names and work.constants:
        writer = ShardWriter(path)
        try:
            for offset, data in work.constants:
                writer.write(memoryview(data), offset)
            writer.sync()
        finally:
            writer.close()


def _write_small(prepared: Prepared, manifest: Manifest, names: Iterable[str], folder: Path) -> None:
    """Write small files whose bytes are those of the manifest; another model card, say, is left as it is."""
    wanted = {name for name in names if name in manifest.files and manifest.files[name].header is None}
    for name, content in small_files(prepared, wanted, lambda: sqnr_again(prepared)):
        if _digest(content) == manifest.files[name].digest:
            place = folder / name
            with writing(place):
                place.parent.mkdir(parents=True, exist_ok=True)
            temporary = place.with_name(f".{place.name}.fp8pack-partial")  # of a repair that was cut off: written again
            try:
                write_file(temporary, content)
                with writing(place):
                    temporary.replace(place)
            finally:
                temporary.unlink(missing_ok=True)
            sync_directory(place.parent)


def _digest(data: bytes) -> str:
    return f"blake3:{blake3(data).hexdigest()}"


class _InPlace(Folder):
    """The files of the checkpoint themselves, which are there."""

    def start(self, file: str, header: bytes, size: int, constants: Iterable[tuple[int, bytes]]) -> None:
        """Do nothing: headers are written where they differ."""

    def check(self, plan: ShardPlan) -> None:
        """Do nothing: the checkpoint is verified afterwards."""
