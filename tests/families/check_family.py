"""What becomes of one class: packed, loaded by transformers in two ways, and compared weight for weight."""

import gc
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.quantizers import quantizer_finegrained_fp8

import fp8pack
from fp8pack.packing.result import PlannedTensor

SCHEMES = ("FP8_DYNAMIC", "FP8_BLOCK", "static", "MXFP8")
# transformers reads the scales of compressed-tensors as BF16.
BF16_STEP = 2.0**-7
FP8_NOISE = 0.06
# Roles that the policy keeps, whatever the class.
MEANT = frozenset(
    (
        *("tower", "projector", "mtp", "logits", "embedding", "router", "indexer", "rotary", "conditioning", "final"),
        *("modulation", "state", "lora"),
    )
)
_SCALES = ("_scale_inv", "_scale")


class NotSaved(Exception):
    """transformers does not load what it saved of this class, quantized or not."""


class NotRun(Exception):
    """The class does not run on text alone."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened to a class under a scheme.

    packed: the share of its multiplying weights that are FP8. wide: those that are not, by name. warned: whether pack
    says so. verdict: what fp8pack says of transformers, and why. kept, dequantized: why it did not load right as FP8,
    and as BF16; empty if it did. unpacked: why the output of unpack did not load right; empty if it did.
    """

    model_type: str
    cls: str
    scheme: str
    packed: float
    wide: tuple[str, ...]
    warned: bool
    verdict: bool | None
    reason: str
    kept: str
    dequantized: str
    unpacked: str

    @property
    def loads(self) -> bool:
        """Whether transformers loads the right weights, both ways."""
        return not self.kept and not self.dequantized

    @property
    def honest(self) -> bool:
        """Whether the verdict is what happened."""
        return self.verdict is None or self.verdict == self.loads


class Family:
    """A tiny model in BF16 files, which transformers loads again."""

    def __init__(self, model: Any, model_type: str, place: Path) -> None:
        """Save the model below a directory.

        Raises:
            NotSaved: transformers does not load its own BF16 files of this class.
        """
        self._model, self._type, self._place = model, model_type, place
        model.save_pretrained(place / "source")
        self._truth = values_of(model)
        problem, _ = _load(type(model), place / "source", self._truth, self._truth, 0.0)
        if problem:
            raise NotSaved(problem)

    def check(self, scheme: str) -> Outcome:
        """Pack the model, load it, and say what happened.

        Raises:
            NotRun: static scales need a run over text, which the class does not take.
        """
        cls, source, out = type(self._model), self._place / "source", self._place / scheme
        asked: dict[str, Any] = {"scheme": scheme}
        if scheme == "static":
            observe_text(self._model, self._place / "calibration.safetensors")
            asked = {"scheme": "FP8", "quant_method": "compressed-tensors"}
            asked["calibration"] = self._place / "calibration.safetensors"
        plan = fp8pack.pack(source, out, dry_run=True, **asked)
        report = fp8pack.pack(source, out, **asked)
        share, wide = _share(multiplying(self._model), plan.tensors)
        verdict = next(each for each in report.engines if each.engine == "transformers")
        fp8pack.unpack(out, self._place / f"{scheme}-unpacked")
        unpacked, reference = _load(cls, self._place / f"{scheme}-unpacked", self._truth, self._truth, FP8_NOISE)
        reference, near = (self._truth, FP8_NOISE) if unpacked else (reference, BF16_STEP)
        with kept_in_fp8():
            kept, _ = _load(cls, out, self._truth, reference, near)
        method = json.loads((out / "config.json").read_bytes())["quantization_config"]["quant_method"]
        is_compressed = method == "compressed-tensors"
        config = transformers.CompressedTensorsConfig if is_compressed else transformers.FineGrainedFP8Config
        wide_config = config(dequantize=True)
        dequantized, _ = _load(cls, out, self._truth, reference, near, quantization_config=wide_config)
        warned = any("stay as they are" in warning for warning in plan.warnings)
        return Outcome(
            *(self._type, cls.__name__, scheme, share, wide, warned, verdict.loads, verdict.reason),
            *(kept, dequantized, unpacked),
        )


def observe_text(model: Any, path: Path) -> None:
    """Calibrate a model on some tokens."""
    tokens = torch.arange(5, 37)[None]
    try:
        with torch.no_grad(), fp8pack.observe(model) as observation:
            model(input_ids=tokens)
    except Exception as error:  # whatever a class raises that wants images or sound
        raise NotRun(str(error)) from error
    observation.save(path)


@contextmanager
def kept_in_fp8() -> Iterator[None]:
    """Build FP8 linears as on a GPU: on a CPU transformers would dequantize."""
    cls = quantizer_finegrained_fp8.FineGrainedFP8HfQuantizer
    original = cls.validate_environment
    cls.validate_environment = lambda self, *args, **kwargs: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        cls.validate_environment = original  # type: ignore[method-assign]


def _load(
    cls: Any,
    directory: Path,
    truth: dict[str, torch.Tensor],
    reference: dict[str, torch.Tensor],
    near: float,
    **options: Any,
) -> tuple[str, dict[str, torch.Tensor]]:
    try:
        loaded, report = cls.from_pretrained(directory, dtype=torch.bfloat16, output_loading_info=True, **options)
    except Exception as error:  # whatever transformers raises is the answer
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", {}
    found = take_apart(values_of(loaded), reference)
    del loaded
    gc.collect()
    missing = sorted(name for name in report["missing_keys"] if not name.endswith(_SCALES) or name in truth)
    if missing:
        return f"missing {missing[0]}", found
    lost = sorted(set(reference) - set(found))
    if lost:
        return f"no {lost[0]}", found
    for name, expected in reference.items():
        distance = _distance(found[name], expected)
        if not distance <= near:
            return f"{name} is off by {distance:.3g}", found
    return "", found


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.float(), expected.float()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-6)) if expected.numel() else 0.0


def values_of(model: Any) -> dict[str, torch.Tensor]:
    """Return the values of each parameter; FP8 with a scale beside it is multiplied, without one it is taken raw."""
    state = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    values = {}
    for name, tensor in state.items():
        if name not in parameters or (name.endswith(_SCALES) and _base(name) in state):
            continue
        scale = next((state[name + end] for end in _SCALES if name + end in state), None)
        is_fp8 = tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
        values[name] = _multiply(tensor, scale) if is_fp8 and scale is not None else tensor
    return values


def take_apart(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put experts together that transformers takes apart at load, as it does for Llama 4 in compressed-tensors."""
    together = dict(found)
    for name, whole in reference.items():
        experts, _, leaf = name.rpartition(".")
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(leaf, ())
        names = [[f"{experts}.{i}.{part}.weight" for part in parts] for i in range(len(whole))] if parts else []
        if name not in found and names and all(each in found for row in names for each in row):
            rows = [torch.cat([found[each] for each in row]) for row in names]
            together[name] = torch.stack([row.T if row.shape != whole.shape[1:] else row for row in rows])
    return together


def _base(name: str) -> str:
    return name.removesuffix("_inv").removesuffix("_scale")


def _multiply(payload: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    wide = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    if wide.numel() > 1:
        for dim in (-2, -1):
            times = -(-payload.shape[dim] // wide.shape[dim])
            if times > 1:
                wide = wide.repeat_interleave(_step(payload.shape[dim], wide.shape[dim]), dim)
            wide = wide.narrow(dim, 0, payload.shape[dim])
    return (payload.float() * wide).to(torch.bfloat16)


def _step(size: int, count: int) -> int:
    """How many elements share a scale: 128 of blocks, 32 of MX, all of a row."""
    return next(step for step in (32, 128, size) if -(-size // step) == count)


def multiplying(model: Any) -> dict[str, int]:
    """Return the weights that multiply in the layers of a model, and their sizes: linears, and fused experts."""
    found = {}
    for path, module in model.named_modules():
        if not re.search(r"(^|\.)\d+\.[A-Za-z_]", path):
            continue
        if isinstance(module, torch.nn.Linear):
            found[f"{path}.weight"] = module.weight.numel()
        elif "expert" in type(module).__name__.lower():
            found |= {
                f"{path}.{name}": weight.numel()
                for name, weight in module.named_parameters(recurse=False)
                if weight.dim() == 3
            }
    return found


def _share(weights: dict[str, int], tensors: Sequence[PlannedTensor]) -> tuple[float, tuple[str, ...]]:
    """The share of the class's linears and experts that are FP8, of those that neither policy nor shape keeps."""
    packed = sum(prod(tensor.shape) for tensor in tensors if tensor.action == "packed")
    staying = [
        tensor
        for tensor in tensors
        if tensor.action != "packed"
        and len(tensor.shape) in (2, 3)
        and tensor.role not in MEANT
        and "multiple of" not in tensor.reason
        and (tensor.name in weights or tensor.role in ("experts", "conv1d"))
    ]
    total = packed + sum(prod(tensor.shape) for tensor in staying)
    named = tuple(f"{tensor.name} {list(tensor.shape)}: {tensor.reason}" for tensor in staying)
    return (packed / total if total else 1.0), named
