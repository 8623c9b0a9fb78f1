"""Comparing checkpoints: the same values under other names are equal, and what differs is never called so."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from checkpoints import Tensors, llama_config, random_weight, write_model, write_shard
from numpy.typing import NDArray
from typer.testing import CliRunner

import fp8pack
from fp8pack.checkpoint.values import strips
from fp8pack.cli.app import app
from fp8pack.errors import Fp8PackError
from fp8pack.modelfacts.spec import TensorSpec
from fp8pack.numerics.metrics import LOST_DB
from fp8pack.reading.comparison import Comparison, TensorComparison
from fp8pack.reading.diff import compare

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
MODULE = "model.layers.0.mlp.up_proj"
WEIGHT = f"{MODULE}.weight"
SHAPE = (200, 300)


def floats(shape: tuple[int, int] = SHAPE) -> NDArray[np.float32]:
    return random_weight(shape).astype(np.float32)


def packed(
    granularity: str, shape: tuple[int, int] = SHAPE, **more: Any
) -> tuple[Tensors, NDArray[np.float32], NDArray[np.float32]]:
    """An FP8 weight in our own convention, its values, and its scale for each element."""
    weight = floats(shape)
    codes, scales = oracle.quantize(weight, "e4m3", granularity, **more)
    spread = oracle.spread(scales, oracle.region_of(granularity, shape), shape)
    grid = scales.reshape(()) if granularity == "tensor" else scales
    return {WEIGHT: codes.view(E4M3), f"{WEIGHT}_scale_inv": grid}, codes.view(E4M3).astype(np.float32) * spread, spread


def model(folder: Path, tensors: Tensors, granularity: str | None = None) -> Path:
    quantization = {"quantization_config": {"quant_method": "fp8pack", "granularity": granularity}}
    return write_model(folder, tensors, llama_config() | (quantization if granularity else {}))


def sqnr(exact: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    exact, other = exact.astype(np.float64), other.astype(np.float64)
    return float(10 * np.log10((exact**2).sum() / ((exact - other) ** 2).sum()))


def only(facts: Comparison) -> TensorComparison:
    (tensor,) = (tensor for tensor in facts.tensors if tensor.name == WEIGHT)
    return tensor


def others() -> Tensors:
    return {
        "mask": np.triu(np.full((8, 8), -np.inf, np.float32), 1),
        "mask_16": np.full((3,), -np.inf, BF16),
        "hole": np.array([1, np.nan, 2], np.float32),
        "ids": np.arange(5, dtype=np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.float32(3).reshape(()),
        "state": np.arange(7, dtype=np.uint8),
        "model.norm.weight": random_weight((64,)),
    }


@pytest.mark.parametrize("name", others())
def test_a_tensor_is_equal_to_itself_whatever_it_holds(name: str, tmp_path: Path) -> None:
    a = model(tmp_path / "a", {name: others()[name]})
    facts = fp8pack.diff(a, a)
    assert facts.totals.num_equal == facts.totals.num_tensors == 1
    assert facts.totals.sqnr_min is None
    assert facts.tensors[0].equal_bytes in (1.0, None)


def test_an_fp8_weight_with_a_nan_byte_is_equal_to_itself(tmp_path: Path) -> None:
    tensors, _, _ = packed("channel")
    codes = tensors[WEIGHT].view(np.uint8).copy()
    codes[3, 4] = 0x7F
    a = model(tmp_path / "a", tensors | {WEIGHT: codes.view(E4M3)}, "channel")
    assert only(fp8pack.diff(a, a)).equal


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:64", "block:128x128", "block:48x80"])
def test_fp8_against_its_source_has_the_sqnr_of_all_elements(granularity: str, tmp_path: Path) -> None:
    tensors, values, _ = packed(granularity)
    a = model(tmp_path / "a", {WEIGHT: random_weight(SHAPE)})
    b = model(tmp_path / "b", tensors, granularity)
    facts = fp8pack.diff(a, b)
    found = only(facts)
    assert found.formats == ("BF16", f"e4m3 {granularity}")
    assert found.sqnr == pytest.approx(sqnr(floats(), values), abs=1e-4)
    assert found.equal_bytes is None
    assert found.scale_ratio is None
    assert facts.totals.sqnr_worst_tensor == WEIGHT
    assert facts.only_in_a == facts.only_in_b == ()


@pytest.mark.parametrize("theirs", ["tensor", "channel", "group:96", "block:128x128", "block:48x80"])
@pytest.mark.parametrize("ours", ["tensor", "channel", "group:64", "block:128x128", "block:30x50"])
def test_scales_are_held_against_each_other_element_by_element(ours: str, theirs: str, tmp_path: Path) -> None:
    first, exact, spread = packed(ours)
    second, other, other_spread = packed(theirs, rounding="up")
    found = only(fp8pack.diff(model(tmp_path / "a", first, ours), model(tmp_path / "b", second, theirs)))
    ratio = other_spread / spread
    assert found.scale_ratio == (float(ratio.min()), float(ratio.max()))
    assert found.sqnr == pytest.approx(sqnr(exact, other), abs=1e-4)
    same = np.count_nonzero(first[WEIGHT].view(np.uint8) == second[WEIGHT].view(np.uint8))
    assert found.equal_bytes == pytest.approx(same / exact.size)


def test_one_convention_and_another_hold_the_same_values(tmp_path: Path) -> None:
    source = model(tmp_path / "source", {WEIGHT: random_weight((256, 256)), "model.norm.weight": random_weight((256,))})
    fp8pack.pack(source, tmp_path / "fp8", scheme="FP8_BLOCK")
    for method in ("compressed-tensors", "modelopt", "quark", "fp8pack"):
        fp8pack.convert(tmp_path / "fp8", tmp_path / method, quant_method=method)
        facts = fp8pack.diff(tmp_path / "fp8", tmp_path / method)
        assert facts.quant_methods == ("fp8", method)
        assert facts.totals.num_equal == 2
        assert only(facts).equal_bytes == 1.0
        assert only(facts).scale_ratio == (1.0, 1.0)
    fp8pack.unpack(tmp_path / "fp8", tmp_path / "floats", dtype="float32")
    assert only(fp8pack.diff(tmp_path / "fp8", tmp_path / "floats")).equal
    assert not only(fp8pack.diff(tmp_path / "fp8", source)).equal


def test_names_and_shapes_that_differ_are_told(tmp_path: Path) -> None:
    a = model(tmp_path / "a", {WEIGHT: random_weight(SHAPE), "x": random_weight((3,)), "z": random_weight((3,))})
    b = model(tmp_path / "b", {WEIGHT: random_weight((300, 200)), "y": random_weight((3,)), "z": random_weight((3,))})
    facts = fp8pack.diff(a, b)
    assert (facts.only_in_a, facts.only_in_b) == (("x",), ("y",))
    found = only(facts)
    assert (found.shape, found.other_shape, found.equal) == ((200, 300), (300, 200), False)
    assert (facts.totals.num_equal, facts.totals.num_tensors) == (1, 2)


def test_a_byte_that_differs_at_the_end_is_found(tmp_path: Path) -> None:
    tensors = {"ids": np.arange(100_000, dtype=np.int64).reshape(100, 1000), WEIGHT: random_weight((3000, 1500))}
    changed = {name: tensor.copy() for name, tensor in tensors.items()}
    changed["ids"][-1, -1] = 0
    changed[WEIGHT][-1, -1] = 7
    facts = fp8pack.diff(model(tmp_path / "a", tensors), model(tmp_path / "b", changed))
    assert [tensor.equal for tensor in facts.tensors] == [False, False]
    shares = {tensor.name: tensor.equal_bytes for tensor in facts.tensors}
    assert shares == {"ids": 1 - 1e-5, WEIGHT: pytest.approx(1 - 1 / 4_500_000, abs=1e-12)}


# What must not look better than it is.


def strict(facts: Comparison) -> None:
    """JSON knows no Infinity and no NaN."""
    json.dumps(facts.to_dict(), allow_nan=False)


@pytest.mark.parametrize("kind", ["zeros in A", "NaN in B", "infinity in B"])
def test_what_is_quite_wrong_has_no_good_sqnr_and_breaks_a_bound(kind: str, tmp_path: Path) -> None:
    exact, wrong = random_weight(SHAPE), random_weight(SHAPE)
    if kind == "zeros in A":
        exact = np.zeros(SHAPE, BF16)
    else:
        wrong[5, 5] = np.nan if "NaN" in kind else np.inf
    fine = random_weight(SHAPE, 1)
    a = model(tmp_path / "a", {WEIGHT: exact, "model.layers.1.mlp.up_proj.weight": fine})
    b = model(tmp_path / "b", {WEIGHT: wrong, "model.layers.1.mlp.up_proj.weight": fine * BF16(1.0078125)})
    facts = compare(a, b)
    strict(facts)
    found = only(facts)
    assert not found.equal
    assert (found.sqnr, found.num_nonfinite) == ((LOST_DB, 0) if kind == "zeros in A" else (None, 1))
    ran = CliRunner().invoke(app, ["diff", str(a), str(b), "--fail-if", "sqnr_min<28"])
    assert isinstance(ran.exception, Fp8PackError)
    assert ran.exception.exit_code == (8 if kind == "zeros in A" else 6)


def test_a_nan_byte_in_b_is_no_perfect_weight(tmp_path: Path) -> None:
    tensors, _, _ = packed("channel")
    codes = tensors[WEIGHT].view(np.uint8).copy()
    codes[3, 4] = 0xFF
    a = model(tmp_path / "a", tensors, "channel")
    b = model(tmp_path / "b", tensors | {WEIGHT: codes.view(E4M3)}, "channel")
    found = only(compare(a, b))
    assert (found.equal, found.sqnr, found.num_nonfinite) == (False, None, 1)
    with pytest.raises(fp8pack.VerificationError, match="1 element is NaN or infinite in A or B alone"):
        fp8pack.diff(a, b)


def test_scales_of_zero_are_no_error_of_the_comparison(tmp_path: Path) -> None:
    first, _, _ = packed("channel")
    zeros = first | {f"{WEIGHT}_scale_inv": np.zeros((200, 1), np.float32)}
    a, b = model(tmp_path / "a", zeros, "channel"), model(tmp_path / "b", first, "channel")
    for pair in ((a, b), (b, a), (a, a)):
        strict(fp8pack.diff(*pair))


def test_identical_checkpoints_keep_every_bound(tmp_path: Path) -> None:
    tensors, _, _ = packed("channel")
    a = model(tmp_path / "a", tensors, "channel")
    ran = CliRunner().invoke(app, ["diff", str(a), str(a), "--fail-if", "sqnr_min<28", "--json"])
    assert ran.exception is None, ran.exception
    assert json.loads(ran.stdout)["totals"]["num_equal"] == 1


def test_a_bound_that_holds_is_kept_and_one_that_is_broken_has_code_8(tmp_path: Path) -> None:
    tensors, values, _ = packed("channel")
    a, b = model(tmp_path / "a", {WEIGHT: random_weight(SHAPE)}), model(tmp_path / "b", tensors, "channel")
    measured = sqnr(floats(), values)
    for bound, code in ((measured - 1, 0), (measured + 1, 8)):
        ran = CliRunner().invoke(app, ["diff", str(a), str(b), "--fail-if", f"sqnr_min<{bound:.3f}"])
        assert (ran.exception.exit_code if isinstance(ran.exception, Fp8PackError) else ran.exit_code) == code


@pytest.mark.parametrize("leaf", ["input_scale", "k_scale"])
def test_scales_of_activations_that_differ_do_not_go_unseen(leaf: str, tmp_path: Path) -> None:
    tensors, _, _ = packed("tensor")
    name = f"{MODULE}.input_scale" if leaf == "input_scale" else "model.layers.0.self_attn.k_scale"
    found = []
    for i in (1, 2):
        folder = model(tmp_path / f"{i}", tensors | {name: np.float32(i).reshape(())}, "tensor")
        found.append(fp8pack.diff(tmp_path / "1", folder))
    same, different = ({key: value for key, value in facts.to_dict().items() if key != "b"} for facts in found)
    assert same != different


def test_formats_without_values_are_compared_by_their_bytes(tmp_path: Path) -> None:
    """Elements of four bits, of which two share a byte."""
    folders = []
    for i, data in enumerate((bytes(32), bytes(31) + b"\x10", bytes(32))):
        header = {"w": {"dtype": "F4", "shape": [4, 16], "data_offsets": [0, 32]}}
        raw = json.dumps(header).encode()
        folder = model(tmp_path / f"{i}", {"x": np.zeros(1, np.uint8)})
        (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
        folders.append(folder)
    assert not fp8pack.diff(folders[0], folders[1]).tensors[0].equal
    assert fp8pack.diff(folders[0], folders[2]).tensors[0].equal


def test_single_files_and_directories_are_compared(tmp_path: Path) -> None:
    tensors, _, _ = packed("tensor")
    folder = model(tmp_path / "a", tensors, "tensor")
    write_shard(tmp_path / "x.safetensors", tensors)
    facts = fp8pack.diff(folder, tmp_path / "x.safetensors")
    assert facts.totals.num_equal == facts.totals.num_tensors == 1
    assert facts.quant_methods == ("fp8pack", "")


def test_the_command_prints_what_differs_and_json_alone_on_stdout(tmp_path: Path) -> None:
    tensors, _, _ = packed("channel")
    a, b = model(tmp_path / "a", {WEIGHT: random_weight(SHAPE)}), model(tmp_path / "b", tensors, "channel")
    ran = CliRunner().invoke(app, ["diff", str(a), str(b)])
    assert ran.exit_code == 0
    assert WEIGHT in ran.stdout
    assert "0 of 1 common tensors have the same values" in ran.stdout
    ran = CliRunner().invoke(app, ["diff", str(a), str(b), "--json"])
    assert json.loads(ran.stdout)["totals"]["num_tensors"] == 1


def test_what_is_read_in_several_strips_is_compared_whole(tmp_path: Path) -> None:
    """Strips of a MiB of elements, which end within a block."""
    shape = (1100, 1000)
    tensors, values, _ = packed("block:48x80", shape)
    a, b = model(tmp_path / "a", {WEIGHT: random_weight(shape)}), model(tmp_path / "b", tensors, "block:48x80")
    assert len(list(strips(TensorSpec(WEIGHT, "BF16", shape, "", 0, 0)))) == 2
    assert only(fp8pack.diff(a, b)).sqnr == pytest.approx(sqnr(floats(shape), values), abs=1e-9)
