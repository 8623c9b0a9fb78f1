"""The page of `inspect --html`."""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fp8pack.engines.known import NAMES
from fp8pack.reading.groups import groups_of, worst_of
from fp8pack.reading.inspection import Inspection
from fp8pack.reading.select import METRICS, select
from fp8pack.reading.tensor_detail import Histogram
from fp8pack.report.page.document import document
from fp8pack.report.page.parts import Column, bars, facts, heat_map, histogram, long_table, paragraph, section, table
from fp8pack.report.quality import decibels, share
from fp8pack.report.sentences import verdict_of_inspection
from fp8pack.units import format_size

_PLACE = re.compile(r"\.(\d+)\.(.+)$")  # layer, and what is in it
_BINS = 24
_ERRORS = (
    Column("sqnr", "SQNR dB", number=True, digits=2, fixed=True),
    Column("output_sqnr", "output dB", number=True, digits=2, fixed=True),
    Column("relative_mean", "error mean", number=True, percent=True, down=True),
    Column("flushed", "to zero", number=True, percent=True, down=True),
    Column("subnormal", "subnormal", number=True, percent=True, down=True),
    Column("saturated", "clipped", number=True, percent=True, down=True),
    Column("outlier_ratio", "amax / rms", number=True, digits=3, down=True),
    Column("cosine", "cosine", number=True, digits=7, fixed=True),
)


def inspection_page(found: Inspection, command: str = "") -> str:
    """Return an inspection as a page."""
    totals = found.totals
    packed, kept = groups_of(found)
    measured = totals.sqnr_min is not None
    recipe = found.recipe or {}
    sizes = [
        ("before", float(totals.source_nbytes), format_size(totals.source_nbytes)),
        ("now", float(totals.nbytes), f"{format_size(totals.nbytes)}, {format_size(totals.packed_nbytes)} quantized"),
    ]
    sections = [
        *(paragraph(said, "bad" if said.startswith("Do not") else "lead") for said in verdict_of_inspection(found)),
        facts(
            [
                ("architecture", found.architecture),
                ("scheme", f"{recipe.get('scheme', '')} {found.quant_method}".strip()),
                (
                    "compared with",
                    f"{found.against} (all elements)" if found.against else "nothing; --against measures",
                ),
                ("root", f"{found.root} (as the manifest says; the bytes were not read)" if found.root else ""),
            ]
        ),
        *(paragraph(f"Warning: {warning}", "bad") for warning in found.warnings),
        section("Size", bars("Bytes of all tensors", sizes)),
        section("What each layer lost" if measured else "Scales by layer", _heat(found, measured=measured)),
        section("What each output loses, predicted", _outputs(found)),
        section("Worst weights", _worst(found)),
        section("Distributions", *_distributions(found)),
        section(
            "What was quantized and kept",
            table(
                "Quantized",
                ("role", "tensors", "size", "format", "SQNR dB mean", "worst"),
                [
                    (
                        *(group.role, str(group.count), format_size(group.nbytes), group.stored),
                        *("" if value is None else decibels(value, 2) for value in (group.sqnr_mean, group.sqnr_min)),
                    )
                    for group in packed
                ],
                numbers=(1, 2, 4, 5),
            ),
            table(
                "Kept",
                ("role", "tensors", "size", "dtype", "because"),
                [(g.role, str(g.count), format_size(g.nbytes), g.stored, g.reason) for g in kept],
                numbers=(1, 2),
            ),
        ),
        section("Engines", _engines(found)),
        section("Tensors", _tensors(found, measured=measured)),
    ]
    return document(f"{found.checkpoint.name or found.checkpoint}: inspection", sections, command)


def by_layer(
    values: Mapping[str, float], worst: Callable[..., float]
) -> tuple[list[str], dict[str, list[float | None]]]:
    """Return the modules of layers, and for each layer the value of each module: of experts, the worst.

    values: by the name of a tensor or module.
    """
    cells: dict[int, dict[str, float]] = {}
    for name, value in values.items():
        if place := _PLACE.search(name):
            row = cells.setdefault(int(place[1]), {})
            module = re.sub(r"\.\d+\.", ".*.", place[2].removesuffix(".weight"))
            row[module] = worst(row.get(module, value), value)
    modules = list(dict.fromkeys(module for row in cells.values() for module in row))
    return modules, {f"layer {i}": [cells[i].get(module) for module in modules] for i in sorted(cells)}


def _heat(found: Inspection, *, measured: bool) -> str:
    metric = METRICS["sqnr" if measured else "scale_max"]
    values = {tensor.name: value for tensor in found.tensors if tensor.format and (value := metric(tensor)) is not None}
    if measured:
        caption = "SQNR of weights in dB; darker is worse"
        return heat_map(caption, *by_layer(values, min), lambda value: decibels(value, 2), low_is_dark=True)
    return heat_map("Largest scale; darker is larger", *by_layer(values, max), lambda value: f"{value:.2g}")


def _outputs(found: Inspection) -> str:
    values = {tensor.name: tensor.output_sqnr for tensor in found.tensors if tensor.output_sqnr is not None}
    caption = "SQNR of outputs in dB, as if input channels were independent; darker is worse"
    return heat_map(caption, *by_layer(values, min), lambda value: decibels(value, 2), low_is_dark=True)


def _worst(found: Inspection) -> str:
    rows = []
    for tensor in worst_of(found):
        error = tensor.error
        numbers = (error.relative_mean, error.flushed, error.saturated) if error else (None,) * 3
        sqnr = decibels(tensor.sqnr, 2) if tensor.sqnr is not None else tensor.problem
        rows.append((tensor.name, sqnr, *map(share, numbers)))
    headers = ("tensor", "SQNR dB", "error mean", "to zero", "clipped")
    return table("Lowest SQNR against the source", headers, rows, numbers=(1, 2, 3, 4))


def _distributions(found: Inspection) -> list[str]:
    def of(caption: str, key: str) -> str:
        values = [value for tensor in found.tensors if tensor.format and (value := METRICS[key](tensor)) is not None]
        return histogram(caption, by_ratio([value for value in values if value > 0]), lambda value: f"{value:.3g}")

    return [of("Largest scale of each weight", "scale_max"), of("amax of each weight", "amax")]


def by_ratio(values: Sequence[float]) -> Histogram | None:
    """Return a histogram of numbers above zero in bins of equal ratio; None of fewer than two different ones."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if not low < high:
        return None
    edges = np.geomspace(low, high, _BINS + 1)
    edges[0], edges[-1] = low, high
    return Histogram(tuple(map(float, edges)), tuple(map(int, np.histogram(values, edges)[0])))


def _engines(found: Inspection) -> str:
    words = {True: "yes", False: "no", None: "not known"}
    rows = [
        (
            NAMES[verdict.engine] + (f" ({verdict.version})" if verdict.version else ""),
            words[verdict.loads],
            " ".join(map(str, verdict.tp)),
            "; ".join(part for part in (verdict.note, verdict.reason, verdict.remedy) if part),
        )
        for verdict in found.engines
    ]
    return table(
        "Decided by rules that were read in the engines' code", ("engine", "loads", "TP", "why"), rows, numbers=(2,)
    )


def _tensors(found: Inspection, *, measured: bool) -> str:
    tensors = select(found)
    columns = [
        Column("name", "tensor"),
        Column("role", "role", words=True),
        Column("format", "format", words=True),
        Column("shape", "shape", words=True),
        Column("size", "bytes", number=True, down=True),
        Column("scale_min", "scale min", number=True, digits=3),
        Column("scale_max", "scale max", number=True, digits=3, down=True),
    ]
    values: list[Sequence[object]] = [
        [tensor.name for tensor in tensors],
        [tensor.role for tensor in tensors],
        [f"{tensor.format} {tensor.granularity}" if tensor.format else tensor.dtype for tensor in tensors],
        [" x ".join(map(str, tensor.shape)) or "scalar" for tensor in tensors],
        *([METRICS[column.key](tensor) for tensor in tensors] for column in columns[4:]),
    ]
    if measured:
        columns += _ERRORS
        values += [[METRICS[column.key](tensor) for tensor in tensors] for column in _ERRORS]
    columns.append(Column("because", "because", words=True))
    values.append([tensor.problem or ("" if tensor.format else tensor.reason) for tensor in tensors])
    return long_table("tensors", columns, values, "down_proj sqnr<31.6" if measured else "down_proj size>1000000")
