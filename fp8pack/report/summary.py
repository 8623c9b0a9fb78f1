"""What `pack`, `convert` and `unpack` print on stderr."""

import shlex
from collections import Counter
from collections.abc import Sequence

from fp8pack.engines.known import BY_ID, id_of
from fp8pack.engines.serve import serve_command
from fp8pack.packing.result import PackResult, PlannedTensor, SchemeChoice, SkippedFile
from fp8pack.planning.keep import Choice
from fp8pack.report.engines import engine_lines
from fp8pack.report.text import listed
from fp8pack.units import format_seconds, format_size, natural

_PLURALS = {"norm": "norms", "bias": "biases", "embedding": "embeddings", "router": "routers", "logits": "logits"}
_MAX_LINES = 4
_FRONTIER = 7  # points of a frontier that are printed


def plan_lines(result: PackResult) -> list[str]:
    """Return the lines before the work: the model, the scheme and why, what is packed, kept and skipped."""
    head = [
        result.model,
        result.architecture,
        " ".join(result.source_dtypes),
        f"{result.num_tensors} tensors",
        format_size(result.source_nbytes),
    ]
    lines = [_unpack_line(result)]
    if result.scheme is not None:
        lines = ["  ".join(part for part in head if part), *_pack_lines(result, result.scheme)]
    lines += [f"skipped  {line}" for line in _skipped(result.skipped)]
    lines += [f"warning  {warning}" for warning in result.warnings]
    lines += [
        f"  {tensor.action:8} {tensor.name}  {tensor.role}  {tensor.reason}"
        for tensor in sorted(result.tensors, key=lambda tensor: natural(tensor.name))
    ]
    return lines


def _unpack_line(result: PackResult) -> str:
    before, after, free = map(format_size, (result.source_nbytes, result.output_nbytes, result.free_nbytes))
    head = [result.model, result.architecture, f"{result.num_unpacked} of {result.num_tensors} tensors are FP8"]
    return "  ".join(part for part in (*head, f"{before} become {after}, {free} are free") if part)


def _pack_lines(result: PackResult, scheme: SchemeChoice) -> list[str]:
    parts = f"{scheme.format} {scheme.granularity} {scheme.quant_method}"
    parts += ", static activations" if scheme.activations == "static" else ""
    parts += ", KV cache scales" if scheme.kv_cache else ""
    parts += ", scales of least error" if scheme.scales == "mse" else ""
    parts += ", compensated rounding" if scheme.rounding == "compensated" else ""
    packed = f"packed   {result.num_packed} linears"
    if carried := result.num_carried:
        packed += f", {'all' if carried == result.num_packed else carried} passed through (payload unchanged)"
    if result.num_unpacked:
        packed += f"    dequantized {result.num_unpacked}"
    kept = [entry for entry in result.kept if entry.role != "activation_scale"]
    cast = sum(entry.action == "cast" for entry in kept)
    into = f" ({cast} in {scheme.kept_dtype})" if cast else ""
    return [
        f"scheme   {scheme.name} ({scheme.reason}): {parts}",
        f"{packed}    kept {_kept([entry for entry in kept if entry.action != 'unpacked'], into)}",
        *_reason_lines([entry for entry in kept if not (result.choice and entry.name in result.choice.kept)]),
        *(_frontier_lines(result.choice) if result.choice else []),
    ]


def _frontier_lines(choice: Choice) -> list[str]:
    """What a budget keeps, and some points of the frontier around it."""
    last, chosen = len(choice.frontier) - 1, choice.chosen
    shown = sorted({0, last, *(last * i // (_FRONTIER - 1) for i in range(_FRONTIER)), min(chosen.parts, last)})
    lines = [
        f"keep     {chosen.parts} of {last} parts stay: KL {chosen.kl:.3g}, tensors {format_size(chosen.nbytes)}",
        f"         {listed(list(choice.kept), _MAX_LINES)}" if choice.kept else "         none",
    ]
    for step in (choice.frontier[i] for i in shown):
        mark = "  <-" if step == chosen else ""
        lines.append(f"         {step.parts:4} kept  KL {step.kl:<9.3g} {format_size(step.nbytes)}{mark}")
    return lines


def result_lines(result: PackResult) -> list[str]:
    """Return the lines after the work: sizes, speed, quality, who loads the output, and what to do next."""
    ratio = result.output_nbytes / max(1, result.source_nbytes) - 1
    size = f"{format_size(result.output_nbytes)} ({ratio:+.0%})".replace("-", "\N{MINUS SIGN}")
    engines = engine_lines(result.engines, asked=result.targets)
    if result.dry_run:
        return [f"result   {size}  would be written to {result.output}", *engines]
    if result.already_complete:
        return [f"result   {result.output} is already complete; its weights were not read"]
    lines = [f"note     {note}" for note in result.notes]
    if result.resumed_nbytes:
        lines.append(f"resumed  {format_size(result.resumed_nbytes)} were finished by an earlier run")
    seconds = result.seconds or 1e-9
    rate = (result.source_nbytes - result.resumed_nbytes) / seconds
    peak = f"peak {format_size(result.peak_memory or 0)}"
    lines.append(f"result   {'  '.join([size, format_seconds(seconds), f'{format_size(rate)}/s', peak])}")
    source = "the FP8 source" if result.verb == "convert" else "the source"
    for what, sqnr in (("outputs on calibrated inputs", result.output_sqnr), ("weights", result.sqnr)):
        if sqnr:
            values = f"mean {sqnr.mean:.1f}, worst {sqnr.worst:.1f} dB"
            lines.append(f"SQNR     of {what} against {source} (8 rows per band): {values}")
    return [*lines, *engines, f"next     {_next(result)}"]


def _next(result: PackResult) -> str:
    """The command that serves the output in the first engine that was asked for, or else in the first that loads it."""
    path = str(result.output)
    loading = {verdict.engine: verdict for verdict in result.engines if verdict.tp}
    for engine in tuple(map(id_of, result.targets)) or tuple(loading):
        if engine in loading and BY_ID[engine].is_for_language_models:
            kv_cache = result.scheme is not None and result.scheme.kv_cache
            tp = result.tp or min(loading[engine].tp)
            if command := serve_command(engine, path, tp=tp, ep=result.ep or 1, kv_cache=kv_cache):
                return command
    return f"fp8pack inspect {shlex.quote(path)}"


def _kept(kept: Sequence[PlannedTensor], into: str) -> str:
    policy = [entry for entry in kept if entry.reason.startswith("policy")]
    counts = Counter(entry.role for entry in policy)
    singles = {entry.role: entry.name.removesuffix(".weight").rsplit(".", 1)[-1] for entry in policy}
    words = [singles[role] if count == 1 else f"{count} {_PLURALS.get(role, role)}" for role, count in counts.items()]
    words += [f"{len(kept) - len(policy)} for other reasons"] if len(kept) > len(policy) else []
    return f"{len(kept)}{into}: {', '.join(words)}" if words else f"{len(kept)}{into}"


def _reason_lines(kept: Sequence[PlannedTensor]) -> list[str]:
    others = [entry for entry in kept if not entry.reason.startswith("policy")]
    lines = [f"         {entry.name}: {entry.reason}" for entry in others[:_MAX_LINES]]
    more = len(others) - _MAX_LINES
    return lines + ([f"         and {more} more; --dry-run -v lists them"] if more > 0 else [])


def _skipped(skipped: Sequence[SkippedFile]) -> list[str]:
    groups: dict[tuple[str, str], int] = {}
    for entry in skipped:
        top = entry.file.split("/", 1)[0] + ("/" if "/" in entry.file else "")
        groups[top, entry.rule] = groups.get((top, entry.rule), 0) + entry.size
    lines = [f"{name} {format_size(size)} ({rule})" for (name, rule), size in groups.items()]
    return lines[:_MAX_LINES] + ([f"and {len(lines) - _MAX_LINES} more"] if len(lines) > _MAX_LINES else [])
