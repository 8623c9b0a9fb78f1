"""Which backend multiplies what, where; and that a wrong one is never used."""

import logging
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fp8pack.gemm import choose as choosing
from fp8pack.gemm.choose import Candidate, candidates, choose, verify
from fp8pack.gemm.device import DeviceFacts, describe
from fp8pack.gemm.operand import Operand
from fp8pack.gemm.reference_backend import ReferenceBackend
from fp8pack.gemm.scheme import GemmScheme, scheme_of
from fp8pack.numerics.formats import E4M3, E5M2
from fp8pack.numerics.granularity import BLOCK_128, CHANNEL, MX, TENSOR, parse_granularity

CPU = torch.device("cpu")
GROUP_64 = parse_granularity("group:64")
H200 = DeviceFacts("cuda", "H200", (9, 0), toolkit=(12, 9))
MI300 = DeviceFacts("hip", "MI300X", arch="gfx942", toolkit=(7, 0))


def first(scheme: GemmScheme, facts: DeviceFacts) -> str:
    return next(found.backend.name for found in candidates(scheme, facts) if found.problem is None)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (H200, ["torch", "torch", "torch", "triton", "triton"]),
        (replace(H200, toolkit=(12, 8)), ["torch", "torch", "triton", "triton", "triton"]),
        (replace(H200, capability=(8, 9)), ["torch", "torch", "triton", "triton", "triton"]),
        (replace(H200, capability=(10, 0)), ["torch", "torch", "triton", "torch", "triton"]),
        (replace(H200, capability=(8, 0)), ["triton"] * 5),
        (replace(H200, capability=(7, 5)), ["reference"] * 5),
        (MI300, ["torch", "torch", "reference", "reference", "reference"]),
        (replace(MI300, arch="gfx90a"), ["reference"] * 5),
        (DeviceFacts("cpu"), ["reference"] * 5),
        (DeviceFacts("mps"), ["reference"] * 5),
    ],
    ids=lambda value: f"{value.kind}-{value.capability}-{value.arch}" if isinstance(value, DeviceFacts) else "",
)
def test_rules_know_who_serves_what(facts: DeviceFacts, expected: list[str]) -> None:
    pytest.importorskip("triton")
    found = [first(scheme_of(E4M3, granularity), facts) for granularity in (TENSOR, CHANNEL, BLOCK_128, MX, GROUP_64)]
    assert found == expected


def test_weight_only_goes_to_triton_and_without_it_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    scheme = scheme_of(E4M3, CHANNEL, weight_only=True)
    assert first(scheme, H200) == "triton"
    monkeypatch.setattr(choosing, "find_spec", lambda name: None)
    assert first(scheme, H200) == "reference"


def test_activations_match_the_weight() -> None:
    found = {
        name: scheme_of(E4M3, parse_granularity(name)).activation for name in ("tensor", "channel", "mx", "group:64")
    }
    assert {name: str(activation) for name, activation in found.items()} == {
        "tensor": "tensor",
        "channel": "channel",
        "mx": "mx",
        "group:64": "channel",
    }
    assert str(scheme_of(E4M3, BLOCK_128).activation) == "group:128"
    assert str(scheme_of(E5M2, BLOCK_128)) == "e5m2 block:128x128, activations 1x128"


@dataclass(frozen=True)
class Broken:
    """A backend that raises, or is off by a tenth."""

    raises: bool
    name: str = "broken"

    def prepare(self, payload: Tensor, scale: Tensor, scheme: GemmScheme) -> Operand:
        return ReferenceBackend().prepare(payload, scale, scheme)

    def matmul(self, x: Tensor, weight: Operand, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        if self.raises:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand a long trace")
        return ReferenceBackend().matmul(x, weight, bias, out_dtype) * 1.1


@pytest.mark.parametrize(
    ("raises", "said"), [(True, "CUBLAS_STATUS_NOT_SUPPORTED"), (False, "relative error of 1.0e-01")]
)
def test_a_backend_that_fails_or_is_wrong_is_left_with_a_reason_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, raises: bool, said: str
) -> None:
    scheme = scheme_of(E4M3, parse_granularity("group:32" if raises else "group:96"))
    found = [Candidate(Broken(raises), None), Candidate(ReferenceBackend(), None)]
    monkeypatch.setattr(choosing, "candidates", lambda *_: iter(found))
    choose.cache_clear()
    with caplog.at_level(logging.WARNING, "fp8pack"):
        assert [choose(CPU, scheme).name for _ in range(3)] == ["reference"] * 3
    choose.cache_clear()
    assert len(caplog.records) == 1
    assert said in caplog.text
    assert "long trace" not in caplog.text


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda format: format.name)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block:128x128", "mx", "group:64", "block:64x96"])
def test_what_a_cpu_has_is_verified(granularity: str, format: object) -> None:
    scheme = scheme_of(E4M3 if format == E4M3 else E5M2, parse_granularity(granularity))
    served = [found.backend for found in candidates(scheme, describe(CPU)) if found.problem is None]
    assert served[0].name == "reference"
    assert [verify(backend, scheme, CPU) for backend in served] == [None] * len(served)


def test_amd_has_its_own_e4m3() -> None:
    assert [DeviceFacts("hip", arch=arch).is_fnuz for arch in ("gfx942", "gfx950", "")] == [True, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("weight_only", [False, True], ids=["", "weight-only"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block:128x128", "mx", "group:64", "group:128"])
def test_our_kernels_are_verified(granularity: str, weight_only: bool) -> None:
    """In Triton's interpreter where there is no GPU; it cuts BF16 results off, which doubles their error."""
    pytest.importorskip("triton")
    from fp8pack.gemm.triton_backend import TritonBackend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scheme = scheme_of(E4M3, parse_granularity(granularity), weight_only=weight_only)
    assert verify(TritonBackend(), scheme, device) is None
