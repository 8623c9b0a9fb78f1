"""The backend of each device and scheme: chosen once, and verified with a small GEMM before use."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from fp8pack.gemm.activations import float_scale_of, quantize_in_torch
from fp8pack.gemm.device import DeviceFacts, describe
from fp8pack.gemm.operand import Backend
from fp8pack.gemm.reference_backend import ReferenceBackend
from fp8pack.gemm.scheme import GemmScheme
from fp8pack.gemm.torch_backend import TorchBackend, torch_problem
from fp8pack.numerics import torch_codec
from fp8pack.numerics.formats import E4M3
from fp8pack.numerics.granularity import MX, Granularity
from fp8pack.numerics.rounding import ScaleRounding

logger = logging.getLogger("fp8pack")

_M, _N, _K = 40, 384, 288  # of the GEMM that verifies a backend: several blocks of 128, and partial ones
_MAX_ERROR = 5e-3  # relative, Frobenius; rounding the result to BF16 alone gives 1.7e-3


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend, and why it does not support a scheme; None if it should."""

    backend: Backend
    problem: str | None


def candidates(scheme: GemmScheme, facts: DeviceFacts) -> Iterator[Candidate]:
    """Yield the backends, the fastest first, each with the problem that rules find; the reference has none.

    On a CPU the reference comes first: with the weight cached in BF16 it takes 1/50 (M = 1) to 1/5 (M = 128) of the
    time of scaled_mm, which casts the weight to float32 for each GEMM (docs/log.md).
    """
    reference = Candidate(ReferenceBackend(), None)
    if facts.kind == "cpu":
        yield reference
    yield Candidate(TorchBackend(), torch_problem(scheme, facts))
    if facts.kind == "cuda" and find_spec("triton") is not None:
        from fp8pack.gemm.triton_backend import TritonBackend, triton_problem  # imports Triton

        yield Candidate(TritonBackend(), triton_problem(scheme, facts))
    if facts.kind != "cpu":
        yield reference


@cache
def choose(device: torch.device, scheme: GemmScheme) -> Backend:
    """Return the backend for a device and a scheme; log a warning, once, with the reason if it is not the fastest."""
    reasons: list[str] = []
    for candidate in candidates(scheme, describe(device)):
        problem = candidate.problem or verify(candidate.backend, scheme, device)
        if problem is None:
            if reasons:
                logger.warning("%s on %s runs on %s: %s", scheme, device, candidate.backend.name, "; ".join(reasons))
            return candidate.backend
        reasons.append(f"{candidate.backend.name}: {problem}")
    raise RuntimeError(f"no backend supports {scheme} on {device}: {'; '.join(reasons)}")


def verify(backend: Backend, scheme: GemmScheme, device: torch.device) -> str | None:
    """Multiply small random matrices; return why the result is wrong, None if it is correct.

    Correct: a relative error (Frobenius) of at most 5e-3 against a float64 GEMM of the quantized operands.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_M, _K, generator=generator, dtype=torch.bfloat16)
    payload, scale = _quantized(torch.randn(_N, _K, generator=generator), scheme.granularity, scheme)
    values = torch_codec.dequantize(payload, scale, scheme.granularity.region((_N, _K)))
    expected = _as_quantized(x, scheme.activation) @ values.double().t()
    if describe(device).is_fnuz and scheme.format == E4M3:
        payload, scale = torch_codec.as_fnuz(payload), scale * 2
    try:
        with torch.autocast(device.type, enabled=False):
            weight = backend.prepare(payload.to(device), scale.to(device), scheme)
            found = backend.matmul(x.to(device), weight, None, torch.bfloat16).cpu().double()
    except Exception as error:  # libraries raise any type for a GEMM that they do not have
        return f"it failed with {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    off = float((found - expected).norm() / expected.norm())
    return None if off <= _MAX_ERROR else f"its result has a relative error of {off:.1e}"


def _quantized(weight: Tensor, granularity: Granularity, scheme: GemmScheme) -> tuple[Tensor, Tensor]:
    rounding = ScaleRounding.UP if granularity == MX else ScaleRounding.NONE
    return torch_codec.quantize(weight, granularity.region((_N, _K)), format=scheme.format, rounding=rounding)


def _as_quantized(x: Tensor, activation: Granularity | None) -> Tensor:
    if activation is None:
        return x.double()
    payload, scale = quantize_in_torch(x, activation, padded=(_M, _K))
    return torch_codec.dequantize(
        payload, float_scale_of(scale).reshape(-1, scale.shape[-1]), activation.region((_M, _K))
    ).double()
