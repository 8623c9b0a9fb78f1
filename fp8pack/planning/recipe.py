"""The recipe: how a checkpoint is quantized, as data."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fp8pack.engines.gpus import parse_gpu
from fp8pack.engines.known import id_of, parse_targets
from fp8pack.errors import RecipeError
from fp8pack.inputs import (
    Texts,
    parse_choice,
    parse_count,
    parse_dtype,
    parse_number,
    parse_path,
    parse_switch,
    parse_texts,
    unknown,
)
from fp8pack.modelfacts.patterns import Pattern, Patterns, parse_patterns
from fp8pack.modelfacts.storage import Storage
from fp8pack.numerics.formats import E4M3, Float8Format, parse_format
from fp8pack.numerics.granularity import BLOCK_128, CHANNEL, MX, TENSOR, Granularity, parse_granularity
from fp8pack.numerics.rounding import DAMPING, SCALE_CHOICES, WEIGHT_ROUNDINGS, ScaleRounding

if TYPE_CHECKING:
    from fp8pack.planning.calibration import Calibration  # NumPy, which --help must not wait for

T = TypeVar("T")

MAX_TP = 1024
ACTIVATIONS = ("dynamic", "static", "none")
ROUNDINGS = tuple(rounding.value for rounding in ScaleRounding)
MAX_MARGIN = 8
KEPT_DTYPES = ("bfloat16", "float16")
USUAL_GRANULARITY = {
    "mxfp8": MX,
    "torchao": CHANNEL,
    "comfyui": TENSOR,
    "comfyui-scaled": TENSOR,
}  # without block scales
WRITABLE = (
    "fp8",
    "compressed-tensors",
    "modelopt",
    "mxfp8",
    "torchao",
    "quark",
    "comfyui",
    "comfyui-scaled",
    "fp8pack",
)


class RuleAction(StrEnum):
    """What a rule does with the tensors that its pattern matches."""

    KEEP = "keep"
    PACK = "pack"


@dataclass(frozen=True, slots=True)
class Rule:
    """Overrules the policy for the tensors of a pattern; format and granularity, if given, overrule the recipe's."""

    pattern: Pattern
    action: RuleAction
    format: Float8Format | None = None
    granularity: Granularity | None = None


@dataclass(frozen=True, slots=True, init=False)
class Request:
    """The options of a pack, before the checkpoint is read; None leaves the choice to the scheme.

    Every value may be given as text, as a person types it: `granularity="block:128x128"`, `ignore="*.o_proj"`,
    `targets="vllm,sglang"`. It is checked and stored as its own type.

    Raises:
        RecipeError: a value is not of its kind, out of range, or not known.
    """

    scheme: str
    format: Float8Format | None
    granularity: Granularity | None
    quant_method: str | None
    scale_rounding: ScaleRounding | None
    scales: str
    rounding: str
    activations: str | None
    calibration: Path | None
    kv_cache: bool
    percentile: float | None
    margin: int
    warmup: int
    ignore: tuple[Pattern, ...]
    only: tuple[Pattern, ...]
    pack: tuple[Pattern, ...]
    rules: tuple[Rule, ...]
    keep_first_layers: int
    keep_last_layers: int
    kept_dtype: str | None
    targets: tuple[str, ...]
    tp: int | None
    ep: int | None
    gpu: str | None
    strict_target: bool
    strip_prefix: tuple[str, ...]

    def __init__(
        self,
        scheme: str = "auto",
        *,
        format: Float8Format | str | None = None,
        granularity: Granularity | str | None = None,
        quant_method: str | None = None,
        scale_rounding: ScaleRounding | str | None = None,
        scales: str = "amax",
        rounding: str = "nearest",
        activations: str | None = None,
        calibration: str | Path | None = None,
        kv_cache: bool = False,
        percentile: float | str | None = None,
        margin: int | str = 0,
        warmup: int | str = 0,
        ignore: Patterns = (),
        only: Patterns = (),
        pack: Patterns = (),
        rules: Iterable[Rule] = (),
        keep_first_layers: int | str = 0,
        keep_last_layers: int | str = 0,
        kept_dtype: str | None = None,
        targets: Texts = (),
        tp: int | str | None = None,
        ep: int | str | None = None,
        gpu: str | None = None,
        strict_target: bool = False,
        strip_prefix: Texts = (),
    ) -> None:
        put = partial(object.__setattr__, self)
        put("scheme", "auto" if scheme is None else parse_scheme_name(scheme))
        put("format", _parsed(format, Float8Format, parse_format))
        put("granularity", _parsed(granularity, Granularity, parse_granularity))
        put("quant_method", None if quant_method is None else parse_choice("quant_method", quant_method, WRITABLE))
        of_scales = None if scale_rounding is None else parse_choice("scale_rounding", scale_rounding, ROUNDINGS)
        put("scale_rounding", None if of_scales is None else ScaleRounding(of_scales))
        put("scales", parse_choice("scales", scales, SCALE_CHOICES))
        put("rounding", parse_weight_rounding(rounding))
        put("activations", None if activations is None else parse_choice("activations", activations, ACTIVATIONS))
        put("calibration", None if calibration is None else parse_path("calibration", calibration))
        put("kv_cache", parse_switch("kv_cache", kv_cache))
        put("percentile", None if percentile is None else parse_number("percentile", percentile, above=0, most=100))
        put("margin", parse_count("margin", margin, least=-MAX_MARGIN, most=MAX_MARGIN))
        put("warmup", parse_count("warmup", warmup))
        put("ignore", parse_patterns("ignore", ignore))
        put("only", parse_patterns("only", only))
        put("pack", parse_patterns("pack", pack))
        put("rules", tuple(rules))
        put("keep_first_layers", parse_count("keep_first_layers", keep_first_layers))
        put("keep_last_layers", parse_count("keep_last_layers", keep_last_layers))
        put("kept_dtype", None if kept_dtype is None else parse_dtype("kept_dtype", kept_dtype, KEPT_DTYPES))
        put("targets", parse_targets(parse_texts("targets", targets, commas=True)))
        put("tp", None if tp is None else parse_count("tp", tp, least=1, most=MAX_TP))
        put("ep", None if ep is None else parse_count("ep", ep, least=1, most=MAX_TP))
        put("strict_target", parse_switch("strict_target", strict_target))
        put("strip_prefix", parse_texts("strip_prefix", strip_prefix))
        put("gpu", None if (known := parse_gpu(gpu)) is None else known.name)


def _parsed(value: T | str | None, kind: type[T], parse: Callable[[str], T]) -> T | None:
    return value if value is None or isinstance(value, kind) else parse(str(value))


@dataclass(frozen=True, slots=True)
class Scheme:
    """A preset: format, granularity, activations and quant method under one name."""

    name: str
    format: Float8Format
    granularity: Granularity
    scale_rounding: ScaleRounding
    activations: str
    quant_method: str
    suffix: str


FP8 = Scheme("FP8", E4M3, TENSOR, ScaleRounding.NONE, "static", "modelopt", "FP8")
FP8_BLOCK = Scheme("FP8_BLOCK", E4M3, BLOCK_128, ScaleRounding.NONE, "dynamic", "fp8", "FP8-block")
FP8_DYNAMIC = Scheme("FP8_DYNAMIC", E4M3, CHANNEL, ScaleRounding.NONE, "dynamic", "compressed-tensors", "FP8-dynamic")
MXFP8 = Scheme("MXFP8", E4M3, MX, ScaleRounding.UP, "dynamic", "compressed-tensors", "MXFP8")
W8A16 = Scheme("W8A16", E4M3, CHANNEL, ScaleRounding.NONE, "none", "compressed-tensors", "FP8-W8A16")
FP8_SCALED = Scheme("FP8_SCALED", E4M3, TENSOR, ScaleRounding.NONE, "dynamic", "comfyui", "fp8_scaled")
SCHEMES = (FP8_BLOCK, FP8_DYNAMIC, FP8, MXFP8, W8A16, FP8_SCALED)


@dataclass(frozen=True, slots=True)
class ActivationOptions:
    """How statistics become an amax.

    percentile: of all magnitudes, instead of the largest. margin: the scale is multiplied by 2^margin, as in
    Transformer Engine. warmup: prompts at the start that are skipped for amax and history.
    """

    percentile: float | None = None
    margin: int = 0
    warmup: int = 0


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the bytes of the output, resolved; `reason` says why the scheme was chosen.

    kept_dtype: of the floats that are not packed, as torch spells it; None is that of the source.
    """

    scheme: str
    reason: str
    format: Float8Format
    granularity: Granularity
    scale_rounding: ScaleRounding
    activations: str
    quant_method: str
    suffix: str
    kv_cache: bool = False
    calibration: "Calibration | None" = None  # if anything depends on it
    activation_options: ActivationOptions = field(default_factory=ActivationOptions)
    spelling: str = ""  # see Storage
    kept_dtype: str | None = None
    scales: str = "amax"
    rounding: str = "nearest"

    @property
    def storage(self) -> Storage:
        """The part of it that an engine sees."""
        parts = (self.quant_method, self.format, self.granularity, self.activations)
        return Storage(*parts, self.scale_rounding != ScaleRounding.NONE, self.kv_cache, self.spelling)

    def as_data(self) -> dict[str, Any]:
        """Return the recipe as the manifest stores it."""
        return {
            "scheme": self.scheme,
            "reason": self.reason,
            "format": self.format.name,
            "granularity": self.granularity.name,
            "scale_rounding": self.scale_rounding.value,
            "activations": self.activations,
            "quant_method": self.quant_method,
            **({"spelling": self.spelling} if self.spelling else {}),
            **({"kept_dtype": self.kept_dtype} if self.kept_dtype else {}),
            **({"scales": self.scales} if self.scales != "amax" else {}),
            **({"rounding": self.rounding, "damping": DAMPING} if self.rounding != "nearest" else {}),
            **({"calibration": self.calibration.digest} if self.calibration else {}),
            **self._scaled_activations(),
        }

    def _scaled_activations(self) -> dict[str, Any]:
        if self.calibration is None or not (self.activations == "static" or self.kv_cache):
            return {}
        options = self.activation_options
        return {
            "kv_cache": self.kv_cache,
            "percentile": options.percentile,
            "margin": options.margin,
            "warmup": options.warmup,
        }


def selection_of(request: Request) -> dict[str, Any]:
    """Return which tensors a request selects, as the manifest stores it."""
    named = {"ignore": request.ignore, "only": request.only, "pack": request.pack}
    selection: dict[str, Any] = {
        flag: [pattern.text for pattern in patterns] for flag, patterns in named.items() if patterns
    }
    if request.rules:
        selection["rules"] = [
            {
                "match": rule.pattern.text,
                "action": rule.action.value,
                "format": rule.format.name if rule.format else None,
                "granularity": rule.granularity.name if rule.granularity else None,
            }
            for rule in request.rules
        ]
    if request.strip_prefix:
        selection["strip_prefix"] = list(request.strip_prefix)
    layers = {"keep_first_layers": request.keep_first_layers, "keep_last_layers": request.keep_last_layers}
    return selection | {key: count for key, count in layers.items() if count}


def parse_scheme_name(text: object) -> str:
    """Return the name of a scheme as it is written, `auto` included."""
    known = {_scheme_key(scheme.name): scheme.name for scheme in SCHEMES} | {"AUTO": "auto"}
    found = known.get(_scheme_key(text)) if isinstance(text, str) else None
    if found is None:
        raise unknown("scheme", text, ("auto", *(scheme.name for scheme in SCHEMES)))
    return found


def parse_scheme(text: str) -> Scheme | None:
    """Return the scheme of a name in any case, `-` as `_`; None for `auto`."""
    name = parse_scheme_name(text)
    return next((scheme for scheme in SCHEMES if scheme.name == name), None)


def parse_weight_rounding(text: object) -> str:
    """Return how weights are rounded; `gptq` is another name of compensated rounding."""
    return parse_choice("rounding", "compensated" if text == "gptq" else text, WEIGHT_ROUNDINGS)


def _scheme_key(text: str) -> str:
    return text.strip().upper().replace("-", "_")


def resolve(request: Request, scheme: Scheme, reason: str, calibration: "Calibration | None" = None) -> Recipe:
    """Return the scheme with the parts that the request overrides; a changed part makes it `custom`.

    Raises:
        RecipeError: calibrated scales are asked for without a calibration, or the other way round.
    """
    check_calibration(request, request.activations or scheme.activations, calibration)
    return _override(scheme, request, reason, calibration)


def resolve_conversion(request: Request, storage: Storage, calibration: "Calibration | None" = None) -> Recipe:
    """Return the recipe of a conversion: what is not asked for is the same as in the source.

    Raises:
        RecipeError: nothing is asked for, or calibrated scales without a calibration.
    """
    scheme = parse_scheme(request.scheme)
    parts = (request.format, request.granularity, request.scale_rounding, request.activations, request.quant_method)
    others = (request.kv_cache, request.targets, request.ignore, request.only, request.rules, request.kept_dtype)
    if scheme is None and not any((*parts, *others)):
        raise RecipeError("nothing to convert to", "choose a --scheme, --quant-method, --granularity, or --kv-cache")
    if scheme is None:
        same_regions = request.granularity in (None, storage.granularity)
        rounding = ScaleRounding.UP if storage.powers_of_two and same_regions else ScaleRounding.NONE
        parts_of_source = (storage.format, storage.granularity, rounding, storage.activations)
        method = storage.quant_method if storage.quant_method in WRITABLE else _method_of(*parts_of_source)
        suffix = _suffix(storage.format, storage.granularity, storage.activations, storage.quant_method)
        scheme = Scheme("", *parts_of_source, method, suffix)
    activations = request.activations or scheme.activations
    has_scales = activations == "static" and storage.activations == "static"
    if request.kv_cache or request.rounding != "nearest" or calibration is not None or not has_scales:
        check_calibration(request, activations, calibration)
    named = parse_scheme(request.scheme) is not None
    recipe = _override(scheme, request, "asked for" if named else "as in the source", calibration)
    return replace(recipe, kv_cache=recipe.kv_cache or storage.kv_cache)


def check_calibration(request: Request, activations: str, calibration: "Calibration | None") -> None:
    """Raise RecipeError if calibrated scales are asked for without a calibration, or the other way round."""
    what = "static activations need" if activations == "static" else "KV-cache scales need" if request.kv_cache else ""
    if what and calibration is None:
        raise RecipeError(f"{what} a calibration", "run `fp8pack calibrate MODEL`, then use --calibration FILE")
    if request.rounding == "compensated" and calibration is None:
        raise RecipeError(
            "compensated rounding needs a calibration with second moments",
            "run `fp8pack calibrate MODEL --second-moments blocks`, then use --calibration FILE",
        )
    options = request.percentile is not None or request.margin or request.warmup
    if not what and request.rounding == "nearest" and calibration is not None:
        has_moments = any(site.moments for site in calibration.sites)
        compensated = "--rounding compensated, " if has_moments else ""
        raise RecipeError(
            "a calibration is for static activations, KV-cache scales or compensated rounding, and none is asked for",
            f"add {compensated}--scheme FP8 or --kv-cache, or leave out --calibration",
        )
    if not what and options:
        raise RecipeError(
            "percentile, margin and warmup change calibrated scales, and none are asked for",
            "add --calibration FILE --scheme FP8, or --calibration FILE --kv-cache",
        )
    if request.percentile is not None and request.warmup:
        raise RecipeError(
            "percentile and warmup exclude each other: the histogram covers all prompts",
            "leave out --percentile, or leave out --warmup",
        )


def _override(scheme: Scheme, request: Request, reason: str, calibration: "Calibration | None") -> Recipe:
    activations = request.activations or scheme.activations
    granularity = request.granularity or scheme.granularity
    format = request.format or scheme.format
    rounding = request.scale_rounding or (ScaleRounding.UP if granularity == MX else scheme.scale_rounding)
    unchanged = (scheme.format, scheme.granularity, scheme.scale_rounding, scheme.activations)
    method = request.quant_method or (
        scheme.quant_method
        if unchanged == (format, granularity, rounding, activations)
        else _method_of(format, granularity, rounding, activations)
    )
    parts = (format, granularity, rounding, activations, method)
    asked = (request.format, request.granularity, request.scale_rounding, request.activations, request.quant_method)
    if request.scales == "mse" and rounding != ScaleRounding.NONE:
        raise RecipeError("scales that are powers of two leave nothing to search", "leave out --scales mse")
    kv = "-KV" if request.kv_cache else ""
    known = next((known for known in SCHEMES if parts == _parts(known)), None)
    return Recipe(
        known.name if known else "custom",
        "asked for" if any(asked) else reason,
        *parts,
        (known.suffix if known else _suffix(format, granularity, activations, method)) + kv,
        request.kv_cache,
        calibration,
        ActivationOptions(request.percentile, request.margin, request.warmup),
        spelling_of(request, method, granularity),
        request.kept_dtype,
        request.scales,
        request.rounding,
    )


def _parts(scheme: Scheme) -> tuple[Float8Format, Granularity, ScaleRounding, str, str]:
    return scheme.format, scheme.granularity, scheme.scale_rounding, scheme.activations, scheme.quant_method


def _suffix(format: Float8Format, granularity: Granularity, activations: str, method: str) -> str:
    if method == FP8_SCALED.quant_method and granularity == TENSOR:
        return f"fp8_{format.name}_scaled"
    detail = granularity.name.replace(":", "-") + ("-static" if activations == "static" else "")
    return f"FP8-{detail}" if format == E4M3 else f"FP8-{format.name}-{detail}"


def spelling_of(request: Request, method: str, granularity: Granularity) -> str:
    """Return which tensor names a storage uses: transformers has its own for tensor scales under `fp8`."""
    is_for_transformers = method == "fp8" and granularity == TENSOR and "transformers" in map(id_of, request.targets)
    return "transformers" if is_for_transformers else ""


def _method_of(format: Float8Format, granularity: Granularity, rounding: ScaleRounding, activations: str) -> str:
    if format != E4M3:
        return "fp8pack"
    if granularity in (BLOCK_128, TENSOR) and activations == "dynamic":
        return "fp8"
    if activations == "static":
        return "modelopt" if granularity == TENSOR else "fp8pack"
    if granularity in (CHANNEL, TENSOR, BLOCK_128) or (granularity == MX and rounding == ScaleRounding.UP):
        return "compressed-tensors"
    return "fp8pack"
