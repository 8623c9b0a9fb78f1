"""What `pack`, `convert` and `unpack` say on stderr, drawn from their facts."""

import shlex
from collections import Counter
from typing import Any

from fp8pack.report.engines import engine_lines
from fp8pack.units import format_seconds, format_size

_PLURALS = {"norm": "norms", "bias": "biases", "embedding": "embeddings", "router": "routers", "logits": "logits"}
_MAX_LINES = 4


def plan_lines(facts: dict[str, Any]) -> list[str]:
    """Return the lines that stand before the work: the model, the scheme and why, what is packed, kept and left out."""
    head = [
        facts["model"],
        facts["architecture"],
        " ".join(facts["source_dtypes"]),
        f"{facts['num_tensors']} tensors",
        format_size(facts["source_nbytes"]),
    ]
    is_unpacking = "unpack" in facts["recipe"]
    lines = [_unpack_line(facts)] if is_unpacking else ["  ".join(part for part in head if part), *_pack_lines(facts)]
    lines += [f"left out {line}" for line in _left_out(facts["left_out"])]
    lines += [f"warning  {warning}" for warning in facts["warnings"]]
    lines += [
        f"  {tensor['action']:8} {tensor['name']}  {tensor['role']}  {tensor['reason']}"
        for tensor in facts.get("tensors", ())
    ]
    return lines


def _unpack_line(facts: dict[str, Any]) -> str:
    before, after, free = (format_size(facts[key]) for key in ("source_nbytes", "output_nbytes", "free_nbytes"))
    head = [facts["model"], facts["architecture"], f"{facts['num_unpacked']} FP8 tensors of {facts['num_tensors']}"]
    return "  ".join(part for part in (*head, f"{before} become {after}, {free} are free") if part)


def _pack_lines(facts: dict[str, Any]) -> list[str]:
    recipe = facts["recipe"]
    parts = f"{recipe['format']} {recipe['granularity']} {recipe['quant_method']}"
    parts += ", static activations" if recipe["activations"] == "static" else ""
    parts += ", KV cache" if recipe.get("kv_cache") else ""
    packed = f"packed   {facts['num_packed']} linears"
    if carried := facts["num_carried"]:
        packed += f", {'all' if carried == facts['num_packed'] else carried} with their FP8 bytes untouched"
    if facts["num_unpacked"]:
        packed += f"    unpacked {facts['num_unpacked']}"
    kept = [entry for entry in facts["kept"] if entry["action"] == "copied" and entry["role"] != "activation_scale"]
    return [
        f"scheme   {recipe['scheme']} ({recipe['reason']}): {parts}",
        f"{packed}    kept {len(kept)}{_kept(kept)}",
        *_shape_lines([entry for entry in facts["kept"] if entry["role"] != "activation_scale"]),
    ]


def result_lines(facts: dict[str, Any]) -> list[str]:
    """Return the lines that stand after the work: sizes, speed, quality, who loads the output, and what to do next."""
    ratio = facts["output_nbytes"] / max(1, facts["source_nbytes"]) - 1
    size = f"{format_size(facts['output_nbytes'])} ({ratio:+.0%})".replace("-", "\N{MINUS SIGN}")
    if facts["dry_run"]:
        return [f"result   {size}  would be written to {facts['output']}", *engine_lines(facts["engines"])]
    if facts["already_complete"]:
        return [f"result   {facts['output']} is already complete"]
    lines = [f"note     {note}" for note in facts["notes"]]
    if facts["resumed_nbytes"]:
        lines.append(f"resumed  {format_size(facts['resumed_nbytes'])} were finished by an earlier run")
    rate = (facts["source_nbytes"] - facts["resumed_nbytes"]) / facts["seconds"]
    parts = [
        size,
        format_seconds(facts["seconds"]),
        f"{format_size(rate)}/s",
        f"peak {format_size(facts['peak_memory'])}",
    ]
    sqnr = facts["sqnr"]
    if sqnr["mean"] is not None:
        parts.append(f"SQNR mean {sqnr['mean']:.1f}, worst {sqnr['worst']:.1f} dB")
    lines += [f"result   {'  '.join(parts)}", *engine_lines(facts["engines"])]
    if facts["recipe"].get("quant_method") != "fp8pack" and any(
        engine["engine"] == "vllm" and engine["tp"] for engine in facts["engines"]
    ):
        lines.append(f"next     vllm serve {shlex.quote(facts['output'])}")
    else:
        lines.append(f"next     fp8pack inspect {shlex.quote(facts['output'])}")
    return lines


def _kept(kept: list[dict[str, Any]]) -> str:
    policy = [entry for entry in kept if entry["reason"].startswith("policy")]
    counts = Counter(entry["role"] for entry in policy)
    singles = {entry["role"]: entry["name"].removesuffix(".weight").rsplit(".", 1)[-1] for entry in policy}
    words = [singles[role] if count == 1 else f"{count} {_PLURALS.get(role, role)}" for role, count in counts.items()]
    words += [f"{len(kept) - len(policy)} for other reasons"] if len(kept) > len(policy) else []
    return ": " + ", ".join(words) if words else ""


def _shape_lines(kept: list[dict[str, Any]]) -> list[str]:
    others = [entry for entry in kept if not entry["reason"].startswith("policy")]
    lines = [f"         {entry['name']}: {entry['reason']}" for entry in others[:_MAX_LINES]]
    return lines + (
        [f"         and {len(others) - _MAX_LINES} more; --dry-run -v lists them"] if len(others) > _MAX_LINES else []
    )


def _left_out(left_out: list[dict[str, Any]]) -> list[str]:
    groups: dict[tuple[str, str], int] = {}
    for entry in left_out:
        top = entry["file"].split("/", 1)[0] + ("/" if "/" in entry["file"] else "")
        groups[top, entry["rule"]] = groups.get((top, entry["rule"]), 0) + entry["size"]
    lines = [f"{name} {format_size(size)} ({rule})" for (name, rule), size in groups.items()]
    return lines[:_MAX_LINES] + ([f"and {len(lines) - _MAX_LINES} more"] if len(lines) > _MAX_LINES else [])
