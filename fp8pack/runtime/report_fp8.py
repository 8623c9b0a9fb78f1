"""`report_fp8`: which layers of a model run in FP8."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from fp8pack.runtime.linear import FP8Linear


@dataclass(frozen=True, slots=True)
class FP8Report:
    """Which layers of a model run in FP8; `print` shows it as text.

    on: FP8 layers by scheme and backend; `reference` means dequantized and multiplied in BF16. others: linears and
    experts that are not FP8, such as lm_head. fp8_nbytes: bytes of FP8 payloads. other_nbytes: bytes of the others'
    weights. padding: the share of zeros that kernels need in the payloads.
    """

    on: dict[tuple[str, str], int]
    others: tuple[str, ...]
    fp8_nbytes: int
    other_nbytes: int
    padding: float

    def __str__(self) -> str:
        lines = [f"{count} layers on {backend}: {scheme}" for (scheme, backend), count in sorted(self.on.items())]
        names = ", ".join(self.others[:3]) + (", …" if len(self.others) > 3 else "")
        lines.append(f"{len(self.others)} linears and experts not in FP8{': ' + names if names else ''}")
        total = self.fp8_nbytes + self.other_nbytes
        share = self.fp8_nbytes / total if total else 0
        lines.append(f"{share:.1%} of their bytes are FP8, {self.padding:.1%} of which is padding")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        on = [{"scheme": s, "backend": b, "layers": count} for (s, b), count in sorted(self.on.items())]
        return {**asdict(self), "on": on, "others": list(self.others)}


def report_fp8(model: nn.Module) -> FP8Report:
    """Count the layers of a model that run in FP8, and those that do not; prepares all weights for their device."""
    on: Counter[tuple[str, str]] = Counter()
    others: list[str] = []
    fp8 = padded = other = 0
    for path, module in model.named_modules():
        if isinstance(module, FP8Linear):
            operand = module.packed.operand
            on[str(operand), operand.backend.name] += 1
            fp8 += module.weight.nbytes
            padded += operand.payload.nbytes
        elif isinstance(module, nn.Linear):
            others.append(path)
            other += module.weight.nbytes
        else:
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:  # of experts
                    others.append(f"{path}.{leaf}")
                    other += parameter.nbytes
    return FP8Report(dict(on), tuple(others), fp8, other, 1 - fp8 / padded if padded else 0.0)
