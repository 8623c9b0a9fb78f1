"""A recipe as a file: YAML with the keywords of `fp8pack.pack`, or the manifest of an earlier output."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any

from fp8pack.errors import InputError, RecipeError
from fp8pack.inputs import parse_path
from fp8pack.limits import MAX_DEPTH, depth_of
from fp8pack.modelfacts.patterns import Pattern
from fp8pack.numerics.formats import parse_format
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.planning.recipe import SCHEMES, Request, Rule, RuleAction
from fp8pack.regular_files import read_regular

DEFAULTS: dict[str, object] = {name: given.default for name, given in signature(Request).parameters.items()}
_RULE_KEYS = ("match", "action", "format", "granularity")
_MAX_NBYTES = 1 << 30  # of a manifest
_MAX_YAML = 1 << 20
_OF_A_RESULT = ("reason", "spelling", "calibration", "damping", "unpack")  # in the recipe of a manifest, but no keyword


def make_request(recipe: str | Path | Mapping[str, object] | None = None, **given: object) -> Request:
    """Return the request of a recipe, a file or a mapping; the values given with it override it.

    A value that equals the keyword's default does not override.

    Raises:
        RecipeError: the recipe cannot be read, has a key that is not known, or a value is wrong.
    """
    named = (
        recipe if isinstance(recipe, Mapping) else {} if recipe is None else read_recipe(parse_path("recipe", recipe))
    )
    where = "recipe" if isinstance(recipe, Mapping) or recipe is None else Path(recipe).name
    values = _checked(named, where)
    values |= {name: value for name, value in given.items() if not _is_default(name, value)}
    return Request(**values)


def read_recipe(path: Path) -> Mapping[str, object]:
    """Return the keys of a recipe file: of YAML, or of the recipe in a manifest (`fp8pack.json`)."""
    try:
        if path.stat().st_size > _MAX_NBYTES:
            raise RecipeError(f"{path} is too large for a recipe")
        text = read_regular(path).decode()
    except InputError as error:
        raise RecipeError(str(error)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    document = _parse(text, path.name)
    if document is None:
        return {}
    if not isinstance(document, Mapping):
        raise RecipeError(f"{path.name} is not a recipe: it has no keys", "write one `key: value` on each line")
    if isinstance(document.get("fp8pack"), Mapping) and isinstance(document.get("recipe"), Mapping):
        return keywords_of(document["recipe"])
    calibration = document.get("calibration")
    if isinstance(calibration, str) and calibration:  # relative to the recipe, so that both can move
        return {**document, "calibration": path.parent / calibration}
    return document


def _parse(text: str, name: str) -> Any:
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{name} is not valid JSON: {error}") from None
    if len(text) > _MAX_YAML or depth_of(text) > MAX_DEPTH:
        raise RecipeError(f"{name} is too large, or nested too deeply, for a recipe in YAML")
    import yaml  # for this option alone

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None


def keywords_of(recipe: Mapping[str, object]) -> Mapping[str, object]:
    """Return the keywords that pack the same again as the recipe in a manifest; a calibration must be given again."""
    found = {key: value for key, value in recipe.items() if key not in _OF_A_RESULT and value is not None}
    if found.get("scheme") not in {scheme.name for scheme in SCHEMES}:
        found.pop("scheme", None)  # its parts define it
    if recipe.get("spelling") == "transformers":
        found["targets"] = ["transformers"]
    return found


def _checked(document: Mapping[str, object], where: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in document.items():
        name = {"target": "targets", "exclude": "ignore"}.get(str(key), str(key)).replace("-", "_")
        if name not in DEFAULTS:
            near = get_close_matches(name, DEFAULTS, 1)
            guess = f": did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"{where}: unknown key {key!r}{guess}", f"keys: {', '.join(DEFAULTS)}")
        values[name] = _rules(value, where) if name == "rules" else DEFAULTS[name] if value is None else value
    try:
        Request(**values)
    except RecipeError as error:
        raise error.within(where) from None
    return values


def _rules(value: object, where: str) -> tuple[Rule, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(entry, Mapping | Rule) for entry in value):
        raise RecipeError(f"{where}: rules is not a list", "write `- match: PATTERN` and `  action: keep` below it")
    return tuple(entry if isinstance(entry, Rule) else _rule(entry, where) for entry in value)


def _rule(entry: Mapping[str, object], where: str) -> Rule:
    if unknown := next((key for key in entry if key not in _RULE_KEYS), None):
        raise RecipeError(f"{where}: a rule has the unknown key {unknown!r}", f"keys: {', '.join(_RULE_KEYS)}")
    if not isinstance(entry.get("match"), str):
        raise RecipeError(f"{where}: a rule has no pattern", "write `match: PATTERN`")
    action = entry.get("action", RuleAction.PACK)
    if action not in set(RuleAction):
        raise RecipeError(f"{where}: the action {action!r} of a rule is not known", "choose pack or keep")
    format, granularity = entry.get("format"), entry.get("granularity")
    return Rule(
        Pattern(str(entry["match"])),
        RuleAction(str(action)),
        parse_format(str(format)) if format else None,
        parse_granularity(str(granularity)) if granularity else None,
    )


def _is_default(name: str, value: object) -> bool:
    default = DEFAULTS[name]
    return value is None or value == default or (isinstance(default, tuple) and isinstance(value, list) and not value)
