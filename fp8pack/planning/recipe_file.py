"""A recipe as YAML text."""

from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fp8pack.errors import RecipeError
from fp8pack.modelfacts.patterns import Pattern
from fp8pack.numerics.formats import parse_format
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.numerics.scaling import ScaleRounding
from fp8pack.planning.recipe import MAX_MARGIN, Request, Rule, RuleAction


class RuleEntry(BaseModel):
    """One rule: what its tensors become."""

    model_config = ConfigDict(extra="forbid")

    match: str
    action: RuleAction = RuleAction.PACK
    format: str | None = None
    granularity: str | None = None


class RecipeFile(BaseModel):
    """A recipe file; every key is optional and means what the flag of the same name means."""

    model_config = ConfigDict(extra="forbid")

    scheme: str = "auto"
    format: str | None = None
    granularity: str | None = None
    quant_method: str | None = None
    scale_rounding: ScaleRounding | None = None
    activations: str | None = None
    kv_cache: bool = False
    percentile: Annotated[float, Field(gt=0, le=100)] | None = None
    margin: Annotated[int, Field(ge=-MAX_MARGIN, le=MAX_MARGIN)] = 0
    warmup: Annotated[int, Field(ge=0)] = 0
    ignore: list[str] = []
    only: list[str] = []
    pack: list[str] = []
    rules: list[RuleEntry] = []
    keep_first_layers: Annotated[int, Field(ge=0)] = 0
    keep_last_layers: Annotated[int, Field(ge=0)] = 0


def parse_recipe(text: str, name: str) -> Request:
    """Return the request of a recipe file; RecipeError names the file and the key that is wrong."""
    try:
        document: Any = yaml.safe_load(text)
        entries = RecipeFile.model_validate(document if document is not None else {})
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is no YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the document"
        raise RecipeError(f"{name}: {place}: {first['msg']}") from None
    return Request(
        scheme=entries.scheme,
        format=parse_format(entries.format) if entries.format else None,
        granularity=parse_granularity(entries.granularity) if entries.granularity else None,
        quant_method=entries.quant_method,
        scale_rounding=entries.scale_rounding,
        activations=entries.activations,
        kv_cache=entries.kv_cache,
        percentile=entries.percentile,
        margin=entries.margin,
        warmup=entries.warmup,
        ignore=tuple(map(Pattern, entries.ignore)),
        only=tuple(map(Pattern, entries.only)),
        pack=tuple(map(Pattern, entries.pack)),
        rules=tuple(map(_rule, entries.rules)),
        keep_first_layers=entries.keep_first_layers,
        keep_last_layers=entries.keep_last_layers,
    )


def _rule(entry: RuleEntry) -> Rule:
    return Rule(
        Pattern(entry.match),
        entry.action,
        parse_format(entry.format) if entry.format else None,
        parse_granularity(entry.granularity) if entry.granularity else None,
    )
