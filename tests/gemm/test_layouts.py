"""Scales as cuBLASLt and DeepGEMM read them, each element where their documentation says it lies."""

import pytest
import torch

from fp8pack.gemm.layouts import exponents_of, for_cublaslt, for_deepgemm, tile, untile
from fp8pack.numerics.granularity import BLOCK_128, CHANNEL, MX, TENSOR, parse_granularity
from fp8pack.numerics.swizzle import swizzle


def powers(*shape: int) -> torch.Tensor:
    return torch.exp2(torch.randint(-126, 127, shape).float())


def test_tiles_are_those_of_the_files() -> None:
    exponents = torch.randint(0, 255, (131, 7), dtype=torch.uint8)
    assert (tile(exponents).numpy() == swizzle(exponents.numpy())).all()
    assert torch.equal(untile(tile(exponents), (131, 7)), exponents)


def test_mx_scales_lie_in_tiles() -> None:
    multiplier = powers(130, 5)
    found = for_cublaslt(multiplier, MX, (130, 160))
    assert (found.dtype, found.shape) == (torch.float8_e8m0fnu, (256 * 8,))
    for r, c in ((0, 0), (31, 3), (32, 0), (127, 4), (129, 4)):
        offset = ((r // 128) * 2 + c // 4) * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
        assert found[offset].float() == multiplier[r, c]


def test_blocks_lie_column_by_column_in_fours() -> None:
    multiplier = torch.rand(3, 5)
    found = for_cublaslt(multiplier, BLOCK_128, (384, 640))
    assert (found.shape, found.stride()) == ((8, 3), (1, 8))
    assert torch.equal(found[:5].t(), multiplier)


def test_channels_and_tensors_are_vectors() -> None:
    multiplier = torch.rand(19, 1)
    assert torch.equal(for_cublaslt(multiplier, CHANNEL, (32, 64))[0, :19], multiplier[:, 0])
    assert for_cublaslt(torch.rand(1, 1), TENSOR, (32, 64)).shape == (1,)
    with pytest.raises(ValueError, match="does not support group:64 scales"):
        for_cublaslt(multiplier, parse_granularity("group:64"), (32, 64))


@pytest.mark.parametrize(("n", "groups"), [(256, 4), (131, 5), (1, 1)])
def test_deepgemm_reads_four_exponents_in_a_word(n: int, groups: int) -> None:
    multiplier = powers(-(-n // 128), groups)
    found = for_deepgemm(multiplier, n, 128)
    assert found.shape == (n, -(-groups // 4))
    assert found.stride(0) == 1
    assert n == 1 or groups <= 4 or found.stride(1) == -(-n // 4) * 4
    for row in {0, n // 2, n - 1}:
        for group in range(groups):
            exponent = (int(found[row, group // 4]) >> 8 * (group % 4)) & 0xFF
            assert 2.0 ** (exponent - 127) == multiplier[row // 128, group]


def test_what_is_no_power_of_two_has_no_exponent() -> None:
    with pytest.raises(ValueError, match="scale_rounding='up'"):
        for_deepgemm(torch.full((1, 1), 0.3), 128, 128)
    assert exponents_of(torch.tensor([2.0**-127, 1.0, 2.0**127])).tolist() == [0, 127, 254]
