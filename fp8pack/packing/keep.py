"""`pack --keep`: a plan in which the weights that cost most stay as they are, within a budget."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fp8pack.documents import Document
from fp8pack.errors import InputError, RecipeError
from fp8pack.modelfacts.fused import EXPERT
from fp8pack.modelfacts.patterns import parse_patterns
from fp8pack.packing.options import WriteOptions
from fp8pack.packing.prepare import Prepared, prepare_pack
from fp8pack.planning.keep import Budget, Cost, choose_kept
from fp8pack.planning.recipe import Request, Rule, RuleAction
from fp8pack.regular_files import read_regular


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Interval(_Entry):
    value: Annotated[float, Field(allow_inf_nan=False)]


class _PartEntry(_Entry):
    name: str
    kl: _Interval
    tensors: tuple[str, ...]


class _LinearEntry(_Entry):
    name: str
    sqnr: float | None


class _Sensitivity(_Entry):
    fingerprint: str
    parts: tuple[_PartEntry, ...]
    linears: tuple[_LinearEntry, ...]


def read_sensitivity(sensitivity: str | Path | Document) -> Mapping[str, Any]:
    """Return what `evaluate_layers` measured, from its result or from the file of `eval --per-linear -o`.

    Raises:
        InputError: the file is missing, or is none of these.
    """
    if isinstance(sensitivity, Document):
        return sensitivity.to_dict()
    try:
        document = json.loads(read_regular(Path(sensitivity)))
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise InputError(f"{sensitivity} is no evaluation of layers", "`fp8pack eval --per-linear -o FILE` writes one")
    return document


def prepare_keeping(
    model: Path,
    request: Request,
    options: WriteOptions,
    budget: Budget,
    sensitivity: Mapping[str, Any],
    factor: float = 1.0,
) -> Prepared:
    """Return the plan of a pack that keeps weights within a budget; raises as `prepare_pack` and `choose_kept` do.

    sensitivity: what `evaluate_layers` measured, as plain data. factor: see `choose_kept`.
    """
    prepared = prepare_pack(model, request, options)
    try:
        found = _Sensitivity.model_validate(sensitivity)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise InputError(f"the sensitivity is malformed: {place[:200]!r}", "measure it with fp8pack eval") from None
    if found.fingerprint != prepared.source.fingerprint:
        raise InputError(f"the sensitivity is not of {prepared.source.path}", "measure it of this model")
    choice = choose_kept(prepared.plan.tensors, _costs(found), budget, factor)
    if not choice.kept:
        return replace(prepared, choice=choice)
    patterns = parse_patterns("keep", sorted(set(map(_pattern, choice.kept))))
    rules = tuple(Rule(pattern, RuleAction.KEEP) for pattern in patterns)
    if len(choice.kept) == len(prepared.plan.packed):
        raise RecipeError(f"{budget.text} keeps every weight", "allow more, or keep fewer")
    return replace(prepare_pack(model, replace(request, rules=(*rules, *request.rules)), options), choice=choice)


def _pattern(name: str) -> str:
    """The pattern of a weight: that of all experts for one of them."""
    match = EXPERT.match(name.removesuffix(".weight"))
    return f"{match['parent']}.*" if match else name


def _costs(found: _Sensitivity) -> list[Cost]:
    costs = []
    for part in found.parts:
        inside = [linear.sqnr for linear in found.linears if f"{linear.name}.".startswith(f"{part.name}.")]
        worst = min((-math.inf if sqnr is None else sqnr for sqnr in inside), default=math.inf)  # None is a NaN
        costs.append(Cost(part.tensors, max(0.0, part.kl.value), worst))
    return costs
