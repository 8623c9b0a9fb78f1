"""All that is no shard: config.json, the index, side files, and last the manifest."""

import json
from collections.abc import Callable, Collection, Iterator
from heapq import merge
from io import BytesIO
from itertools import repeat
from pathlib import Path
from typing import Any

from blake3 import blake3

from fp8pack.checkpoint.journal import BandResult
from fp8pack.checkpoint.manifest import MANIFEST_NAME, NUMERICS_VERSION, SCHEMA_VERSION, digest_of_bands, write_manifest
from fp8pack.checkpoint.shard_writer import write_file
from fp8pack.checkpoint.side_files import SideFile
from fp8pack.checkpoint.source import INDEX_NAME, SINGLE_NAME
from fp8pack.modelfacts.contents import Quantized
from fp8pack.modelfacts.spec import Stored
from fp8pack.packing.execute import ShardWork
from fp8pack.packing.model_card import CARD_NAME, MAX_CARD_NBYTES, missing_from_card, model_card, strip_card
from fp8pack.packing.prepare import Prepared
from fp8pack.packing.side_work import SideWork, digest_of, read_side_file
from fp8pack.packing.sqnr import Measured, sqnr_of
from fp8pack.planning.activation_scales import ActivationScale
from fp8pack.planning.plan import Action, Packing, PackPlan, Plan, TensorPlan

CardSection = Callable[[Path], str]  # a section of the model card, as Markdown, from what is packed


def side_files_to_copy(prepared: Prepared) -> tuple[SideFile, ...]:
    """Return the side files that are copied byte for byte: all that are not written anew, as the model card may be."""
    anew = {*prepared.documents, _index_name(prepared), *({CARD_NAME} if _small_card(prepared) else ())}
    return tuple(side for side in prepared.side_files if side.rule is None and side.name not in anew)


def write_metadata(
    prepared: Prepared,
    works: tuple[ShardWork, ...],
    sides: tuple[SideWork, ...],
    folder: Path,
    card_section: CardSection | None = None,
) -> str:
    """Write everything beside shards and copied side files into the staged directory; return the manifest's root."""
    source, files = prepared.source, shard_entries(works)
    for name, content in _contents(prepared).items():
        write_file(folder / name, content)
        files[name] = _small_entry(content)
    for work in sides:
        files[work.side.name] = {"size": work.side.size, "digest": work.digest}
    name = (
        prepared.output.name.removesuffix(".safetensors") + ".fp8pack.json" if source.is_single_file else MANIFEST_NAME
    )
    section = ""
    if card_section is not None:  # which loads the checkpoint, and may need the manifest for it
        write_manifest(folder / name, head_of(prepared, files), tensor_entries(works))
        section = card_section(folder)
    card = _card(prepared, sqnr_of(works), section)
    if card is not None:
        write_file(folder / CARD_NAME, card)
        files[CARD_NAME] = _small_entry(card)
    return write_manifest(folder / name, head_of(prepared, files), tensor_entries(works))


def shard_entries(works: tuple[ShardWork, ...]) -> dict[str, dict[str, Any]]:
    """Return the entry of each shard in the manifest's list of files."""
    return {
        work.plan.file: {"size": work.size, "header": f"blake3:{blake3(work.header()).hexdigest()}"} for work in works
    }


def _small_entry(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "digest": f"blake3:{blake3(content).hexdigest()}"}


def _card(prepared: Prepared, sqnr: Measured, section: str = "") -> bytes | None:
    """The model card of a directory: with FP8 weights, above the text of the base model's; else without what was ours.

    None where there is none: nothing is left of it, or that of the source is too long and is copied.
    """
    source, plan, found = prepared.source, prepared.plan, _small_card(prepared)
    if source.is_single_file or (
        found is None and any(side.name == CARD_NAME for side in side_files_to_copy(prepared))
    ):
        return None
    base = read_side_file(found, source.directory) if found else b""
    text = base.decode(errors="replace")
    if isinstance(plan, PackPlan):
        return model_card(prepared.verb, plan, source, sqnr, text, section)
    stripped = strip_card(text)
    if stripped == text:
        return base if found else None
    return stripped.encode() or None


def card_notes(prepared: Prepared) -> tuple[str, ...]:
    """Return what to add to the model card before it is published."""
    if prepared.source.is_single_file or not isinstance(prepared.plan, PackPlan):
        return ()
    found = _small_card(prepared)
    base = read_side_file(found, prepared.source.directory).decode(errors="replace") if found else ""
    missing = missing_from_card(prepared.source, base)
    it = "them" if len(missing) > 1 else "it"
    return (f"README.md names no {' and no '.join(missing)}: add {it} before you publish",) if missing else ()


def _small_card(prepared: Prepared) -> SideFile | None:
    """The model card of the source, unless it is too long to be written anew."""
    cards = (side for side in prepared.side_files if side.name == CARD_NAME and side.rule is None)
    return next((side for side in cards if side.size <= MAX_CARD_NBYTES), None)


def describes(prepared: Prepared, files: dict[str, Any]) -> bool:
    """Say whether the files of a finished output are those that this pack would write, as far as they are no weights.

    Shards are compared by name and size, everything else by digest, but for the model card, which holds what only the
    work shows.
    """
    sizes = {name: entry["size"] for name, entry in files.items() if "header" in entry}
    shards = {shard.file: shard.nbytes for shard in prepared.plan.shards}
    if sizes.keys() != shards.keys() or any(sizes[file] <= shards[file] for file in shards):
        return False
    return small_entries(prepared) == {
        name: entry for name, entry in files.items() if "header" not in entry and name != CARD_NAME
    }


def small_entries(prepared: Prepared) -> dict[str, dict[str, Any]]:
    """Return the entry of each file that is no shard, but for the model card: it says where the source lies."""
    found = {name: _small_entry(content) for name, content in _contents(prepared).items()}
    for side in prepared.side_files:
        if side.rule is None and side.name != CARD_NAME:
            found[side.name] = {"size": side.size, "digest": digest_of(side, prepared.source.directory)}
    return found


def small_files(
    prepared: Prepared, names: Collection[str], sqnr: Callable[[], Measured]
) -> Iterator[tuple[str, bytes]]:
    """Yield the content of files that are no shards, by name; the SQNR is asked for if the model card is one."""
    contents = _contents(prepared)
    if CARD_NAME in names and (card := _card(prepared, sqnr())) is not None:
        contents[CARD_NAME] = card
    for side in prepared.side_files:
        if side.name in names and side.name not in contents and side.rule is None:
            yield side.name, read_side_file(side, prepared.source.directory)
    yield from ((name, contents[name]) for name in names if name in contents)


def manifest_path(prepared: Prepared) -> Path:
    """Return where the manifest of the finished output lies."""
    if prepared.source.is_single_file:
        return prepared.output.with_suffix(".fp8pack.json")
    return prepared.output / MANIFEST_NAME


def _contents(prepared: Prepared) -> dict[str, bytes]:
    """The small files that are written anew: config.json, what stands beside it, and the index."""
    contents = dict(prepared.documents)
    if name := _index_name(prepared):
        contents[name] = _index(prepared.plan)
    return contents


def _index_name(prepared: Prepared) -> str | None:
    """The name of the index, None where there is none."""
    name, shards = prepared.source.index_name, prepared.plan.shards
    return (name or INDEX_NAME) if len(shards) > 1 or (name and shards[0].file != SINGLE_NAME) else None


def head_of(prepared: Prepared, files: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return all sections of the manifest but the tensors."""
    source = prepared.source
    return {
        "fp8pack": {"schema": SCHEMA_VERSION, "numerics": NUMERICS_VERSION},
        "source": {
            "fingerprint": source.fingerprint,
            "files": {file.name: {"size": file.size} for file in source.files},
        },
        "recipe": {**prepared.plan.selection, **prepared.plan.recipe_data},
        "files": files,
    }


def tensor_entries(works: tuple[ShardWork, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the entry of each tensor in the manifest, by name."""
    by_work = (zip(sorted(work.tensors, key=_name), repeat(work)) for work in works)
    for tensor, work in merge(*by_work, key=lambda pair: pair[0].spec.name):
        name = tensor.spec.name
        results = [work.results[name, index] for index in range(tensor.num_bands)]
        yield name, _entry(tensor, work.plan.file, results)


def _name(tensor: TensorPlan) -> str:
    return tensor.spec.name


def _entry(tensor: TensorPlan, file: str, results: list[BandResult]) -> dict[str, Any]:
    entry: dict[str, Any] = {"action": tensor.action.value, "role": tensor.role, "reason": tensor.reason, "file": file}
    if tensor.packing is None:
        entry |= {"dtype": tensor.data.dtype, "shape": list(tensor.data.shape)}
    else:
        entry |= _packed_entry(tensor, tensor.packing, results)
    if tensor.action == Action.UNPACKED:
        entry |= _bands(tensor)
    if tensor.action == Action.CAST:
        entry["source_dtype"] = tensor.spec.dtype
    if tensor.quantized:
        entry["from"] = _origin(tensor.quantized)
    if tensor.activations:
        entry["activation_scales"] = [_activation_entry(activation) for activation in tensor.activations]
    if tensor.markers:
        entry["markers"] = [_stored(marker.stored, marker.data) for marker in tensor.markers]
    return entry | {"digest": digest_of_bands(result.digest for result in results)}


def _activation_entry(activation: ActivationScale) -> dict[str, Any]:
    return {
        "kind": activation.kind,
        "point": activation.point,
        "source": activation.source,
        **_stored(activation.stored, activation.data),
        "value": activation.scale,
        "amax": activation.amax,
        "amax_history_seed": list(activation.history),
    }


def _stored(stored: Stored, data: bytes) -> dict[str, Any]:
    digest = f"blake3:{blake3(data).hexdigest()}"
    return {"tensor": stored.name, "dtype": stored.dtype, "shape": list(stored.shape), "digest": digest}


def _origin(quantized: Quantized) -> dict[str, Any]:
    scale = quantized.scale.name if quantized.scale else None
    return {"format": quantized.format.name, "granularity": quantized.granularity.name, "scale": scale}


def _packed_entry(tensor: TensorPlan, packing: Packing, results: list[BandResult]) -> dict[str, Any]:
    scale = packing.scale
    spec = tensor.spec
    return {
        "format": packing.format.name,
        "granularity": packing.granularity.name,
        "block": list(packing.granularity.region(spec.shape)),
        "layout": "row-major [N, K]",
        **({"tensor": tensor.data.name} if tensor.data.name != spec.name else {}),
        "shape": list(spec.shape),
        "source_dtype": tensor.quantized.source_dtype if tensor.quantized else spec.dtype,
        "scale_inv": {
            "tensor": scale.name,
            "dtype": scale.dtype,
            "shape": list(scale.shape),
            **({"layout": "tiles of 128 x 4"} if packing.tiled else {}),
            "dequantize": "value = fp8 * 2^(scale_inv - 127)" if scale.dtype == "U8" else "value = fp8 * scale_inv",
            "digest": digest_of_bands(result.scale_digest for result in results if result.scale_digest),
        },
        **({"carried": True} if packing.carried else {}),
        "amax": max(result.amax for result in results),
        **_bands(tensor),
    }


def _bands(tensor: TensorPlan) -> dict[str, int]:
    cut = {"band_cols": tensor.band_cols} if tensor.band_cols < tensor.matrix[1] else {}
    return {"band_rows": tensor.band_rows, **cut}


def _index(plan: Plan) -> bytes:
    """The index as `json.dumps(indent=2)` writes it, whose pieces would take ten times its size."""
    total = sum(stored.nbytes for shard in plan.shards for stored in shard.tensors)
    located = merge(*(zip(sorted(s.name for s in shard.tensors), repeat(shard.file)) for shard in plan.shards))
    text = BytesIO()
    text.write(f'{{\n  "metadata": {{\n    "total_size": {total}\n  }},\n  "weight_map": {{'.encode())
    for i, (name, file) in enumerate(located):
        line = f"{json.dumps(name, ensure_ascii=False)}: {json.dumps(file, ensure_ascii=False)}"
        text.write(f"{',' if i else ''}\n    {line}".encode())
    text.write(b"\n  }\n}\n")
    return text.getvalue()
