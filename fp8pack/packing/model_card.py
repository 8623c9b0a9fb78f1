"""The model card of an FP8 checkpoint: what was done to it, how good it is, and how each engine serves it.

The card comes before the text of the base model's own, whose licence and language it inherits. Nothing in it depends on
where or when it was written, since its digest is part of the root.
"""

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import yaml

from fp8pack.checkpoint.source import Source
from fp8pack.engines.known import NAMES
from fp8pack.engines.serve import load_code, serve_command
from fp8pack.limits import MAX_DEPTH, depth_of
from fp8pack.numerics.rounding import DAMPING
from fp8pack.numerics.scaling import CANDIDATES
from fp8pack.packing.sqnr import Measured
from fp8pack.planning.plan import Action, PackPlan
from fp8pack.planning.recipe import WRITABLE
from fp8pack.units import format_size

CARD_NAME = "README.md"
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name", "datasets")
MAX_CARD_NBYTES = 4 << 20
_MAX_HEAD = 100_000  # characters of YAML
_BEGIN, _END = "<!-- fp8pack -->", "<!-- /fp8pack -->"  # around what is ours, so that it does not outlive its FP8 bytes
_OUR_TAGS = frozenset(("fp8", "fp8pack", *WRITABLE))
_OUR_KEYS = ("base_model", "base_model_relation")
_ACTIVATIONS = {
    "dynamic": "dynamic: scales are computed while serving",
    "static": "static: calibrated scales",
    "none": "not quantized: weight-only",
}


def model_card(verb: str, plan: PackPlan, source: Source, measured: Measured, base: str, section: str = "") -> bytes:
    """Return the text of README.md.

    verb: `pack` or `convert`. measured: what quantizing cost, on a sample of the rows. base: the text of the base
        model's card, empty if it has none. section: more of what quantization cost.
    """
    head, body = _split(strip_card(base))
    model = _base_model(source, base)
    parts = [
        f"---\n{_head(head, model, plan)}---",
        _BEGIN,
        f"# {_escape(model.rpartition('/')[2]) or plan.facts.architecture or 'A model'} in FP8",
        _what(verb, plan, model),
        _ignored(plan),
        _quality(plan, measured),
        section.strip(),
        _serving(plan),
        _END,
        f"---\n\n{body.strip()}" if body.strip() else "",
    ]
    return ("\n\n".join(part for part in parts if part) + "\n").encode()


def missing_from_card(source: Source, base: str) -> list[str]:
    """Return what a card that is published should say, and neither the source nor its card does."""
    head = _split(strip_card(base))[0]
    found = [] if _base_model(source, base) or "base_model" in head else ["base model"]
    return found + ([] if "license" in head else ["licence"])


def strip_card(text: str) -> str:
    """Return a card without what fp8pack wrote in it; any other is returned as it is."""
    begin, end = text.find(_BEGIN), text.rfind(_END)
    if begin < 0 or end < begin:
        return text
    head, _ = _split(text[:begin])
    body = text[end + len(_END) :].strip().removeprefix("---").strip()
    kept = {key: value for key, value in head.items() if key not in _OUR_KEYS}
    kept["tags"] = [tag for tag in _tags(head) if tag not in _OUR_TAGS]
    kept = {key: value for key, value in kept.items() if value}
    return (f"---\n{_dump(kept)}---\n\n" if kept else "") + (f"{body}\n" if body else "")


def _split(text: str) -> tuple[dict[str, Any], str]:
    """The front matter of a card, as far as it is one, all scalars as text, and the text below it."""
    match = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text[: 2 * _MAX_HEAD], re.DOTALL)
    if match is None or len(match[1]) > _MAX_HEAD or depth_of(match[1]) > MAX_DEPTH:
        return {}, text
    try:
        if any(map(_is_more_than_text, yaml.parse(match[1], Loader=yaml.BaseLoader))):
            return {}, text
        head = yaml.load(match[1], Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        return {}, text
    return (head if isinstance(head, dict) else {}), text[match.end() :]


def _is_more_than_text(event: yaml.Event) -> bool:
    """Tags build objects, and aliases can cost far more than reading them; no card has either."""
    if isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)):
        return event.tag is not None
    return isinstance(event, yaml.AliasEvent)


def _base_model(source: Source, card: str) -> str:
    """The id of the model, by its place in the hub cache, or as a card of ours says.

    A config.json often names what the model was fine-tuned from.
    """
    place = source.path.absolute()
    if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
        return place.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    named = _split(card)[0].get("base_model") if _BEGIN in card else None
    return named if isinstance(named, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", named) else ""


def _head(base: Mapping[str, Any], model: str, plan: PackPlan) -> str:
    head: dict[str, Any] = {key: base[key] for key in _INHERITED if key in base and _is_plain(base[key])}
    if not any(verdict.tp for verdict in plan.engines if verdict.engine == head.get("library_name")):
        head.pop("library_name", None)
    if model:
        head |= {"base_model": model, "base_model_relation": "quantized"}
    head["tags"] = list(dict.fromkeys([*_tags(base), "fp8", plan.recipe.quant_method, "fp8pack"]))
    return _dump(head)


def _dump(head: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True))


def _tags(head: Mapping[str, Any]) -> list[str]:
    tags = head.get("tags", [])
    return tags if isinstance(tags, list) and _is_plain(tags) else []


def _is_plain(value: Any) -> bool:
    """Whether it is a text or a list of texts, as every key that is inherited has."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(entry, str) for entry in value))


def _what(verb: str, plan: PackPlan, model: str) -> str:
    recipe, before, after = plan.recipe, plan.source_nbytes, plan.output_nbytes
    carried = sum(tensor.packing is not None and tensor.packing.carried for tensor in plan.packed)
    unpacked = sum(tensor.action == Action.UNPACKED for tensor in plan.tensors)
    cast = sum(tensor.action == Action.CAST for tensor in plan.tensors)
    rows = [
        ("weights", f"{recipe.format.name.upper()}, scales: {recipe.granularity}"),
        ("activations", _ACTIVATIONS[recipe.activations]),
        ("KV cache", "calibrated scales" if recipe.kv_cache else "no scales: the engine decides"),
        ("quant method", f"`{recipe.quant_method}`"),
        ("size", f"{format_size(before)} before, {format_size(after)} after ({after / before - 1:+.0%})"),
    ]
    if recipe.scales == "mse":
        rows.insert(1, ("scales", f"of {CANDIDATES.size} candidates, the one with the least error"))
    if recipe.rounding == "compensated":
        rows.insert(1, ("rounding", f"compensated for the inputs of a calibration (GPTQ), damping {DAMPING}"))
    if carried:
        rows.insert(1, ("passed through", f"{carried} weights: their FP8 bytes are those of the source"))
    if unpacked:
        into = recipe.kept_dtype or "BF16"
        rows.insert(1, ("dequantized", f"{unpacked} weights, quantized in the source, are {into}"))
    if cast:
        rows.insert(1, ("kept in", f"{recipe.kept_dtype}: {cast} tensors, rounded once"))
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return (
        f"{_escape(model) or 'The base model'}, quantized with fp8pack.\n\n| | |\n|---|---|\n{table}\n\n"
        f"```\n{_command(verb, plan, model)}\n```{_calibrated(plan)}"
    )


def _calibrated(plan: PackPlan) -> str:
    """Which statistics the scales are from, if any."""
    if plan.recipe.calibration is None:
        return ""
    digest = plan.recipe_data["calibration"]
    return (
        f"\n\n`FILE` is a calibration with the statistics `{digest}`; `fp8pack.json` is the whole recipe (`--recipe`)."
    )


def _command(verb: str, plan: PackPlan, model: str) -> str:
    """The command that makes this checkpoint, with every part of its recipe that no other part implies."""
    recipe, selection = plan.recipe, plan.selection
    words = ["fp8pack", verb, model or "MODEL"]
    if recipe.scheme != "custom":
        words += ["--scheme", recipe.scheme]
    else:
        words += ["--format", recipe.format.name, "--granularity", recipe.granularity.name]
        words += ["--scale-rounding", recipe.scale_rounding.value, "--activations", recipe.activations]
        words += ["--quant-method", recipe.quant_method]
    if recipe.spelling:
        words += ["--target", recipe.spelling]
    if recipe.kept_dtype:
        words += ["--kept-dtype", recipe.kept_dtype]
    if recipe.scales != "amax":
        words += ["--scales", recipe.scales]
    if recipe.rounding != "nearest":
        words += ["--rounding", recipe.rounding]
    if recipe.calibration is not None:
        options = recipe.activation_options
        words += ["--calibration", "FILE", *(["--kv-cache"] if recipe.kv_cache else [])]
        words += ["--percentile", f"{options.percentile:g}"] if options.percentile is not None else []
        words += ["--margin", str(options.margin)] if options.margin else []
        words += ["--warmup", str(options.warmup)] if options.warmup else []
    for flag in ("ignore", "only", "pack"):
        words += [word for pattern in selection.get(flag, ()) for word in (f"--{flag}", pattern)]
    words += [word for prefix in selection.get("strip_prefix", ()) for word in ("--strip-prefix", prefix)]
    if selection.keys() & {"rules", "keep_first_layers", "keep_last_layers"}:
        words += ["--recipe", "fp8pack.json"]
    return shlex.join(words)


def _ignored(plan: PackPlan) -> str:
    kept = [tensor for tensor in plan.tensors if tensor.action in (Action.COPIED, Action.CAST)]
    counts = Counter((tensor.role, tensor.reason) for tensor in kept if tensor.role != "activation_scale")
    lines = [
        f"| {role} | {count} | {_escape(reason.removeprefix('policy: '))} |" for (role, reason), count in counts.items()
    ]
    if not lines:
        return ""
    dtype = plan.recipe.kept_dtype
    how = f"not quantized; floats are rounded to {dtype} unless it says why not" if dtype else "copied as they are"
    return f"## What was ignored\n\nThese tensors are {how}.\n\n| role | tensors | why |\n|---|---|---|\n" + "\n".join(
        lines
    )


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))


def _quality(plan: PackPlan, measured: Measured) -> str:
    """The SQNR by role, of outputs if there are any, and of weights."""
    found = {
        "the outputs of the quantized weights, on the inputs of the calibration,": measured.outputs,
        "the quantized weights": measured.weights,
    }
    tables = [
        f"Signal-to-quantization-noise ratio (SQNR) of {what} against the source in dB, over a sample of their rows."
        f"\n\n{_by_role(plan, sqnr)}"
        for what, sqnr in found.items()
        if sqnr
    ]
    return "\n\n".join(["## What quantization cost", *tables]) if tables else ""


def _by_role(plan: PackPlan, sqnr: Mapping[str, float]) -> str:
    roles: dict[str, list[float]] = defaultdict(list)
    for tensor in plan.packed:
        if tensor.spec.name in sqnr:
            roles[tensor.role].append(sqnr[tensor.spec.name])
    rows = [
        f"| {role} | {len(found)} | {sum(found) / len(found):.1f} | {min(found):.1f} |"
        for role, found in sorted(roles.items())
    ]
    return "| role | weights | mean | worst |\n|---|---|---|---|\n" + "\n".join(rows)


def _serving(plan: PackPlan) -> str:
    """For each engine that loads it, the command or code, at the smallest tensor-parallel size that works."""
    lines = []
    for verdict in plan.engines:
        if not verdict.tp:
            continue
        command = serve_command(verdict.engine, ".", tp=min(verdict.tp), ep=plan.ep or 1, kv_cache=plan.recipe.kv_cache)
        code = load_code(verdict.engine, ".", plan.facts.architecture)
        if command or code:
            about = [verdict.note] if verdict.note else []
            about += [f"tensor-parallel size {', '.join(map(str, verdict.tp))}"] if len(verdict.tp) > 1 else []
            note = f" ({'; '.join(about)})" if about else ""
            lines.append(f"{NAMES[verdict.engine]}{note}:\n\n```{'python' if code else ''}\n{command or code}\n```")
    if not lines:
        return ""
    return "## How to serve it\n\nIn this directory; read in the engines' code, not run.\n\n" + "\n\n".join(lines)
