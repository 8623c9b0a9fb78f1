"""inspect asks the engines with all that a checkpoint says of itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import llama_config, llama_tensors, write_model
from typer.testing import CliRunner

import fp8pack
from fp8pack import inspect_tensor
from fp8pack.cli.app import app
from fp8pack.reading.inspect import look
from fp8pack.reading.select import select


def with_list(folder: Path, entries: list[str]) -> Path:
    """A packed checkpoint by another tool, with these ignored modules."""
    source = write_model(folder / "source", llama_tensors(), llama_config())
    fp8pack.pack(source, folder / "out", scheme="FP8_DYNAMIC")
    (folder / "out" / "fp8pack.json").unlink()
    path = folder / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"] = entries
    path.write_text(json.dumps(config))
    return folder / "out"


def verdict_of(folder: Path, engine: str) -> fp8pack.EngineVerdict:
    (found,) = fp8pack.inspect(folder, targets=(engine,)).engines
    return found


def test_a_list_that_is_right_is_taken(tmp_path: Path) -> None:
    assert verdict_of(with_list(tmp_path, ["lm_head"]), "vllm").tp


@pytest.mark.parametrize("entry", ["re:.*q_proj", "model.layers.0.self_attn.k_proj"])
def test_a_list_that_means_an_fp8_module_is_refused(entry: str, tmp_path: Path) -> None:
    verdict = verdict_of(with_list(tmp_path, ["lm_head", entry]), "vllm")
    assert not verdict.tp
    assert "self_attn" in verdict.reason


@pytest.mark.parametrize("entry", ["re:(a+)+$", "re:" + ".*" * 20 + "x", "*" * 50, "x" * 10_000, "re:(", 3])
def test_an_entry_that_would_cost_too_much_or_is_none_is_passed_over(entry: Any, tmp_path: Path) -> None:
    assert verdict_of(with_list(tmp_path, ["lm_head", entry]), "vllm").tp


NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A source and its checkpoint."""
    source = write_model(tmp_path / "source", llama_tensors(), llama_config())
    fp8pack.pack(source, tmp_path / "out", scheme="FP8_DYNAMIC")
    return source, tmp_path / "out"


def poke(folder: Path, name: str, data: bytes) -> None:
    """Write bytes at the beginning of a tensor."""
    (shard,) = folder.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    length = int.from_bytes(content[:8], "little")
    begin = 8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
    content[begin : begin + len(data)] = data
    shard.write_bytes(content)


def test_a_nan_byte_in_the_payload_is_counted_and_fails(pair: tuple[Path, Path]) -> None:
    source, out = pair
    poke(out, NAME, b"\x7f")
    found = look(out, source)
    error = found[NAME].error
    assert error is not None
    assert (found[NAME].sqnr, error.num_nonfinite, error.cosine) == (None, 1, None)
    assert (found.totals.num_spoiled, found.totals.sqnr_min, found.totals.sqnr_mean) == (1, None, None)
    json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(fp8pack.VerificationError, match=f"'{NAME}' has 1 element that is NaN or infinite"):
        fp8pack.inspect(out, source, fail_if="sqnr_min<28")
    ran = CliRunner().invoke(app, ["inspect", str(out), "--against", str(source), "-q"])
    assert f"damaged  {NAME}: 1 element that is NaN or infinite" in ran.stdout
    assert getattr(ran.exception, "exit_code", None) == 6


def test_scales_that_are_no_scales_are_counted_and_fail(pair: tuple[Path, Path]) -> None:
    source, out = pair
    poke(out, f"{NAME}_scale", np.array([np.nan, -1.0, np.inf, 1.0], np.float32).tobytes())
    for found in (look(out), look(out, source)):
        scale = found[NAME].scale
        assert scale is not None
        assert (scale.num_bad, scale.max) == (3, 1.0)
        assert (found[NAME].sqnr, found.totals.num_spoiled, found.totals.sqnr_mean) == (None, 1, None)
        json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(fp8pack.VerificationError, match="has 3 scales that are negative, NaN or infinite"):
        fp8pack.inspect(out)
    with pytest.raises(fp8pack.VerificationError, match="3 scales"):
        inspect_tensor(out, NAME)


@pytest.mark.parametrize(
    ("bound", "broken"),
    [
        ("sqnr_min<28", ""),
        ("sqnr_min<40", "sqnr_min is 31"),
        ("cosine_min<0.999", ""),
        ("cosine_min<=0.9999", "cosine_min is 0.9996"),
        ("scale_ratio>=1", r"scale_ratio is \d"),
        ("scale_ratio>100", ""),
        ("nan>0", ""),
        ("nan>=0", "nan is 0"),
    ],
)
def test_bounds_name_the_worst_tensor(bound: str, broken: str, pair: tuple[Path, Path]) -> None:
    source, out = pair
    if not broken:
        fp8pack.inspect(out, source, fail_if=bound)
        return
    where = "" if bound.startswith("nan") else "in model.layers"
    with pytest.raises(fp8pack.BoundError, match=f"{broken}.*{where}"):
        fp8pack.inspect(out, source, fail_if=bound)


def test_tensors_are_chosen_and_sorted(pair: tuple[Path, Path]) -> None:
    source, out = pair
    found = fp8pack.inspect(out, source)
    names = [tensor.name for tensor in select(found)]
    assert names.index("model.layers.0.input_layernorm.weight") < names.index("model.layers.1.input_layernorm.weight")
    worst = [tensor.sqnr for tensor in select(found, sort="sqnr") if tensor.sqnr is not None]
    assert worst == sorted(worst)
    assert worst[0] == found.totals.sqnr_min
    sizes = [tensor.nbytes for tensor in select(found, sort="size")]
    assert sizes == sorted(sizes, reverse=True)
    downs = select(found, only="*.down_proj", where=["sqnr<99", "subnormal<0.5"])
    assert [tensor.name for tensor in downs] == [NAME, NAME.replace("0", "1")]
    assert select(found, where="sqnr<1") == ()
    for wrong in ({"sort": "colour"}, {"where": "colour<3"}, {"only": "nothing"}):
        with pytest.raises(fp8pack.RecipeError):
            select(found, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [NAME, NAME.removesuffix(".weight")])
def test_one_tensor_is_shown_with_its_histograms(name: str, pair: tuple[Path, Path]) -> None:
    source, out = pair
    found = inspect_tensor(out, name, source, explain=True)
    size = int(np.prod(found.tensor.shape))
    assert found.scales is not None
    assert (sum(found.values.counts), sum(found.scales.counts)) == (size, found.tensor.shape[0])
    assert sum(found.exponents.counts) <= size
    assert found.tensor.sqnr == fp8pack.inspect(out, source)[NAME].sqnr
    by_name = {(other.format, other.granularity): other for other in found.alternatives}
    assert len(by_name) == 10
    stored = by_name["e4m3", "channel"]
    assert stored.sqnr == pytest.approx(found.tensor.sqnr, rel=1e-12)
    assert stored.nbytes == size + 4 * found.tensor.shape[0]
    for granularity in ("tensor", "block:128x128", "mx"):
        fp8pack.pack(source, out.with_name("other"), granularity=granularity, quant_method="fp8pack", overwrite=True)
        packed = fp8pack.inspect(out.with_name("other"), source)[NAME]
        assert by_name["e4m3", granularity].sqnr == pytest.approx(packed.sqnr, rel=1e-12), granularity


def test_one_tensor_that_is_a_float_is_explained_from_itself(pair: tuple[Path, Path]) -> None:
    source, out = pair
    assert len(inspect_tensor(source, NAME, explain=True).alternatives) == 10
    assert inspect_tensor(source, "model.norm").scales is None
    with pytest.raises(fp8pack.RecipeError, match="none is given"):
        inspect_tensor(out, NAME, explain=True)
    with pytest.raises(fp8pack.InputError, match="did you mean 'model"):
        inspect_tensor(out, "layers.0.mlp.down_proj")


@pytest.mark.parametrize(
    "words",
    [
        [NAME, "--fail-if", "sqnr_min<99"],
        ["--calibration", "c.safetensors", "--fail-if", "output_sqnr_min<99"],
        ["--calibration", "c.safetensors", "--html", "page.html"],
        ["--sort", "colour"],
        ["--where", "colour<3"],
    ],
    ids=" ".join,
)
def test_what_would_be_ignored_is_refused_before_anything_is_read(words: list[str], tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["inspect", str(tmp_path / "missing"), *words])
    assert isinstance(ran.exception, fp8pack.RecipeError)


def test_the_overview_fits_a_screen(pair: tuple[Path, Path]) -> None:
    source, out = pair
    ran = CliRunner().invoke(app, ["inspect", str(out), "--against", str(source)])
    lines = ran.stdout.splitlines()
    assert len(lines) < 45
    assert any("FP8_DYNAMIC (asked for), compressed-tensors; by fp8pack" in line for line in lines)
    assert sum("proj.weight" in line for line in lines) == 10
    assert [line for line in lines if line.startswith("next")]


def test_a_conversion_that_was_asked_for_says_so(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", llama_tensors(), llama_config())
    fp8pack.pack(source, tmp_path / "block", scheme="FP8_BLOCK")
    named = fp8pack.convert(tmp_path / "block", tmp_path / "named", scheme="FP8_DYNAMIC", dry_run=True)
    kept = fp8pack.convert(tmp_path / "block", tmp_path / "kept", ignore="*.o_proj", dry_run=True)
    reasons = [result.scheme.reason for result in (named, kept) if result.scheme]
    assert reasons == ["asked for", "as in the source"]
