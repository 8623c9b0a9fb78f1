"""FP8 activations in float32: the rounding against ml_dtypes, the product against float64."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fp8pack.numerics.formats import E4M3, E5M2, Float8Format
from fp8pack.numerics.simulate import Activation, Dynamic, Static, round_activations, simulated

ELEMENT = {"e4m3": (ml_dtypes.float8_e4m3fn, 448.0), "e5m2": (ml_dtypes.float8_e5m2, 57344.0)}
FORMATS = pytest.mark.parametrize("format", [E4M3, E5M2], ids=["e4m3", "e5m2"])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "f32"])


def rounded_by_hand(x: NDArray[np.float32], scale: NDArray[np.float32], format: str) -> NDArray[np.float32]:
    """FP8 values times their scale, in float32; scale is broadcast."""
    element, largest = ELEMENT[format]
    with np.errstate(over="ignore"):
        quotient = np.clip(x / scale, np.float32(-largest), np.float32(largest))
    return quotient.astype(element).astype(np.float32) * scale


def dynamic_by_hand(x: NDArray[np.float32], group: int | None, format: str) -> NDArray[np.float32]:
    """A scale for each group of each row [M, K], of the whole row without one."""
    width = group or x.shape[1]
    result = np.empty_like(x)
    for i in range(x.shape[0]):
        for lo in range(0, x.shape[1], width):
            part = x[i, lo : lo + width]
            amax = np.abs(part).max()
            smallest = np.float32(2.0**-126)
            scale = max(amax / np.float32(ELEMENT[format][1]), smallest) if amax else np.float32(1)
            result[i, lo : lo + width] = rounded_by_hand(part, np.float32(scale), format)
    return result


def same_bits(found: Tensor, expected: NDArray[np.float32]) -> None:
    """Equal in every bit, the sign of zero too."""
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.contiguous().numpy().view(np.uint32), expected.view(np.uint32))


def activations(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Values over many binades, with a row of zeros, zeros of both signs and an outlier."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-12, 3, shape, generator=generator).float())
    rows = x.view(-1, shape[-1])
    rows[-1] = 0.0
    rows[0, 0], rows[0, -1], rows[rows.shape[0] // 2, 0] = 90.0, -0.0, -200.0
    return x.to(dtype)


def values(x: Tensor) -> NDArray[np.float32]:
    return x.float().reshape(-1, x.shape[-1]).numpy()


@DTYPES
@FORMATS
@pytest.mark.parametrize("k", [1, 16, 127, 256, 300])
def test_dynamic_scales_are_those_of_each_token(k: int, format: Float8Format, dtype: torch.dtype) -> None:
    x = activations(9, k, dtype=dtype)
    same_bits(round_activations(x, Dynamic(format=format)), dynamic_by_hand(values(x), None, format.name))


@FORMATS
@pytest.mark.parametrize(("group", "k"), [(128, 256), (128, 300), (128, 129), (128, 100), (64, 200), (1, 5), (7, 20)])
def test_dynamic_scales_of_groups_end_with_a_shorter_one(group: int, k: int, format: Float8Format) -> None:
    x = activations(6, k)
    expected = dynamic_by_hand(values(x), group, format.name)
    same_bits(round_activations(x, Dynamic(group, format)), expected)


@pytest.mark.parametrize("activation", [Dynamic(), Dynamic(128), Static(0.125), Static(0.01, E5M2)], ids=repr)
@pytest.mark.parametrize("shape", [(200,), (1, 200), (2, 3, 200), (2, 1, 3, 200)])
def test_leading_dimensions_are_tokens(shape: tuple[int, ...], activation: Activation) -> None:
    x = activations(*shape)
    found = round_activations(x, activation)
    assert found.shape == shape
    flat = round_activations(x.reshape(-1, 200), activation)
    assert torch.equal(found.reshape(-1, 200), flat)


def test_a_layout_in_memory_is_no_matter() -> None:
    x = activations(8, 4, 256).transpose(0, 1)
    assert not x.is_contiguous()
    expected = dynamic_by_hand(values(x), None, "e4m3").reshape(4, 8, 256)
    same_bits(round_activations(x, Dynamic()), expected)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (0, 1)])
@pytest.mark.parametrize("activation", [Dynamic(), Dynamic(128), Static(1.0)], ids=repr)
def test_nothing_gives_nothing(shape: tuple[int, ...], activation: Activation) -> None:
    found = round_activations(torch.empty(shape, dtype=torch.bfloat16), activation)
    assert (found.shape, found.dtype) == (shape, torch.float32)


@DTYPES
@FORMATS
@pytest.mark.parametrize("scale", [2.0**-9, 0.0123456789, 0.4, 3.0, 2.0**-126])
def test_static_values_are_rounded_under_one_scale(scale: float, format: Float8Format, dtype: torch.dtype) -> None:
    x = activations(5, 300, dtype=dtype)
    expected = rounded_by_hand(values(x), np.float32(scale), format.name)
    same_bits(round_activations(x, Static(scale, format)), expected)


@FORMATS
def test_what_lies_beyond_a_static_scale_saturates_and_never_becomes_nan(format: Float8Format) -> None:
    scale = 0.125
    largest = format.max * scale
    x = torch.tensor([[largest, 1.01 * largest, 1e30, -largest, -1e30, -2 * largest, 1.0, 0.0]])
    expected = [[largest, largest, largest, -largest, -largest, -largest, 1.0, 0.0]]
    assert round_activations(x, Static(scale, format)).tolist() == expected


@pytest.mark.parametrize("activation", [Static(0.5), Static(2.0**-126), Dynamic(), Dynamic(2)], ids=repr)
def test_zeros_keep_their_sign(activation: Activation) -> None:
    x = torch.tensor([[0.0, -0.0, 0.0, -0.0], [1.0, -0.0, 0.0, -1.0]])
    found = round_activations(x, activation)
    assert torch.equal(torch.signbit(found), torch.signbit(x))
    assert found[0].abs().max() == 0


def test_subnormal_elements_are_rounded_to_even() -> None:
    """The smallest E4M3 is 2^-9: half of it is a tie that goes to zero, one and a half of it goes to two."""
    step = 2.0**-9
    x = torch.tensor([[0.5, 0.75, 1.0, 1.5, 2.5, 3.5, 7.0, -0.5, -1.5]]) * step
    assert (round_activations(x, Static(1.0)) / step).tolist() == [[0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 7.0, -0.0, -2.0]]


def test_activations_that_are_subnormal_floats_have_the_smallest_scale() -> None:
    x = torch.tensor([[2.0**-133, -(2.0**-130), 0.0]])
    same_bits(round_activations(x, Dynamic()), dynamic_by_hand(values(x), None, "e4m3"))


def test_the_input_is_left_as_it_is() -> None:
    x = activations(4, 64, dtype=torch.float32)
    before = x.clone()
    for activation in (Dynamic(), Dynamic(16), Static(0.01)):
        round_activations(x, activation)
        assert torch.equal(x, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("activation", [Dynamic(), Dynamic(2), Static(1.0)], ids=repr)
def test_what_is_not_finite_raises(activation: Activation, bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        round_activations(torch.tensor([[1.0, 2.0, bad]]), activation)


# Linears of a model.


class Model(nn.Module):
    """Two linears, with and without a bias."""

    def __init__(self, dtype: torch.dtype = torch.float32, k: int = 256) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Module()
        self.inner.up = nn.Linear(k, 48, dtype=dtype)
        self.down = nn.Linear(48, 16, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Two products."""
        return self.down(self.inner.up(x))


def fp8_weight(n: int, k: int, seed: int = 0) -> tuple[Tensor, NDArray[np.float64]]:
    """A dequantized weight, float32, and the same numbers before the product with the scale was rounded."""
    random = np.random.default_rng(seed)
    payload = (random.standard_normal((n, k)) * 100).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    scale = np.float32(0.000123)
    return torch.from_numpy(payload.astype(np.float32) * scale), payload.astype(np.float64) * np.float64(scale)


def fp8_rows(x: NDArray[np.float32], scale: float | None) -> NDArray[np.float64]:
    """FP8 values times scale in float64; scale None: that of each row."""
    largest = np.float32(448)
    scales = np.abs(x).max(1, keepdims=True) / largest if scale is None else np.float32(scale)
    quotient = np.clip(x / scales, -largest, largest)
    return quotient.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scales.astype(np.float64)


@pytest.mark.parametrize("scale", [None, 0.02, 0.001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("k", [32, 256, 2048])
def test_a_linear_gives_the_product_of_the_fp8_values(k: int, dtype: torch.dtype, scale: float | None) -> None:
    """Both factors are rounded once (2^-24 each), then K products are added in float32 in any order."""
    model = Model(dtype, k)
    weight, exact_weight = fp8_weight(48, k)
    x = torch.randn(3, 20, k, generator=torch.Generator().manual_seed(2)).to(dtype)
    activation: Activation = Dynamic() if scale is None else Static(scale)
    with torch.no_grad(), simulated(model, {"inner.up": (weight, activation)}):
        found = model.inner.up(x)
    assert (found.dtype, found.shape) == (dtype, (3, 20, 48))
    rows, bias = fp8_rows(values(x), scale), model.inner.up.bias.detach().double().numpy()
    expected = rows @ exact_weight.T + bias
    magnitude = np.abs(rows) @ np.abs(exact_weight).T + np.abs(bias)
    unit = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    smallest = 2.0**-24 if dtype == torch.float16 else 0.0
    error = np.abs(found.double().numpy().reshape(-1, 48) - expected)
    in_float32 = (k + 5) * 2.0**-24 * magnitude
    assert (error <= in_float32 * (1 + unit) + unit * np.abs(expected) + smallest).all()
    if dtype == torch.float32:
        assert np.sqrt((error**2).mean() / (expected**2).mean()) < 2.0**-20


def test_a_bias_is_added_in_float32_and_a_missing_one_is_none() -> None:
    model = Model(torch.bfloat16)
    weight, _ = fp8_weight(48, 256)
    with torch.no_grad(), simulated(model, {"inner.up": (weight, Dynamic()), "down": (torch.ones(16, 48), Dynamic())}):
        assert torch.equal(model.inner.up(torch.zeros(2, 256, dtype=torch.bfloat16)), model.inner.up.bias.expand(2, 48))
        assert torch.equal(model.down(torch.zeros(2, 48, dtype=torch.bfloat16)), torch.zeros(2, 16).bfloat16())


def test_only_the_linears_that_are_named_change_and_all_are_restored() -> None:
    model, x = Model(), torch.randn(4, 256)
    before = model(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    weight = model.inner.up.weight.detach().clone()
    with simulated(model, {"inner.up": (weight, Dynamic())}):
        inside = model(x)
        assert torch.equal(
            model.down(torch.ones(1, 48)), torch.nn.functional.linear(torch.ones(1, 48), model.down.weight)
        )
    assert not torch.equal(inside, before)
    assert torch.equal(model(x), before)
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_linears_are_restored_after_an_exception() -> None:
    model, x = Model(), torch.randn(4, 256)
    before, weight = model(x), torch.zeros(48, 256)
    with pytest.raises(KeyError, match="mine"), simulated(model, {"inner.up": (weight, Dynamic())}):
        raise KeyError("mine")
    assert torch.equal(model(x), before)
    with (
        pytest.raises(ValueError, match="NaN or infinity"),
        simulated(model, {"inner.up": (weight, Static(1.0)), "down": (torch.zeros(16, 48), Dynamic())}),
    ):
        model(torch.full((1, 256), float("nan")))
    assert torch.equal(model(x), before)
    with pytest.raises(AttributeError), simulated(model, {"down": (weight, Dynamic()), "nowhere": (weight, Dynamic())}):
        pytest.fail("a path that leads nowhere")
    assert torch.equal(model(x), before)


def replaced_forward(model: Model) -> Callable[[Tensor], Tensor]:
    """Give a linear a forward of its own, as libraries that wrap modules do; return it."""

    def forward(x: Tensor) -> Tensor:
        return torch.ones(*x.shape[:-1], 16)

    model.down.forward = forward
    return forward


def test_a_forward_that_a_module_had_of_its_own_is_given_back() -> None:
    model = Model()
    forward = replaced_forward(model)
    with simulated(model, {"down": (torch.zeros(16, 48), Dynamic())}):
        assert model.down(torch.randn(2, 48)).abs().max() == 0
    assert model.down.forward is forward


def test_one_linear_under_two_paths_is_restored() -> None:
    model = Model()
    model.again = model.down
    weight: dict[str, Any] = {path: (torch.zeros(16, 48), Dynamic()) for path in ("down", "again")}
    with simulated(model, weight):
        assert model.again(torch.randn(2, 48)).abs().max() == 0
    assert "forward" not in vars(model.down)


def test_within_another_simulation_the_inner_one_holds_while_it_lasts() -> None:
    model, x = Model(), torch.randn(2, 48)
    with simulated(model, {"down": (torch.zeros(16, 48), Dynamic())}):
        with simulated(model, {"down": (torch.ones(16, 48), Dynamic())}):
            assert model.down(x).abs().max() > 0
        assert model.down(x).abs().max() == 0
    assert torch.equal(model.down(x), torch.nn.functional.linear(x, model.down.weight))
