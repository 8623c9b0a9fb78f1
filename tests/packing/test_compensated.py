"""Packing with compensated rounding and searched scales: the bytes of GPTQ, the same however the work is cut."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from checkpoints import MakeCheckpoint, Tensors, llama_config, llama_tensors, random_weight
from gptq import gptq, spread_scales
from numpy.typing import NDArray
from packing.static_sources import files_of, stored

import fp8pack
from fp8pack.calibration.recorder import Recorder, Rows, Threads
from fp8pack.checkpoint.calibration_file import read_calibration, write_calibration
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.errors import DeadlineError, InputError, RecipeError
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.numerics.scaling import CANDIDATES
from fp8pack.numerics.second_moments import block_of
from fp8pack.packing.options import WriteOptions
from fp8pack.packing.prepare import prepare_pack
from fp8pack.packing.write import run
from fp8pack.planning.calibration import Calibration, Site
from fp8pack.planning.recipe import Request
from fp8pack.planning.sizes import Sizes

Array = NDArray[Any]
INPUTS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
DTYPES = {"e4m3": "F8_E4M3", "e5m2": "F8_E5M2"}


def activations(tokens: int, channels: int, seed: int) -> Array:
    """Return BF16 inputs [T, K] with correlated channels."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, channels)) * (1 + np.arange(channels)) ** -0.5
    return (mixed @ rng.standard_normal((channels, channels))).astype(ml_dtypes.bfloat16)


def site_of(points: Sequence[str], inputs: Array, kind: str) -> Site:
    """Return the statistics of inputs [T, K] at these points."""
    recorder, threads, bits = Recorder(points, inputs.shape[1]), Threads(1), inputs.view(np.uint16)
    rows = Rows.of(np.zeros(len(inputs), np.int32))
    recorder.add(bits.ctypes.data, inputs.shape, rows, threads)
    if kind != "none" and len(inputs):
        recorder.add_moments(bits, block_of(kind, inputs.shape[1]), rows, threads)
    return recorder.site(1)


def calibrate(source: Path, sites: Sequence[Site], name: str = "calibration") -> Path:
    """Write a calibration of a checkpoint."""
    path = source.parent / f"{name}.safetensors"
    fingerprint = open_checkpoint(source).fingerprint
    write_calibration(path, Calibration(fingerprint, ("blake3:a",), {}, tuple(sites)))
    return path


def llama_inputs(tensors: Tensors, tokens: int = 600) -> dict[str, Array]:
    """Return the input of each packed weight; modules that share one share it here."""
    found = {}
    for layer in range(2):
        for i, (first, modules) in enumerate(INPUTS.items()):
            channels = tensors[f"model.layers.{layer}.{first}.weight"].shape[1]
            values = activations(tokens, channels, 10 * layer + i)
            found |= {f"model.layers.{layer}.{module}.weight": values for module in modules}
    return found


def llama_sites(inputs: dict[str, Array], kind: str) -> list[Site]:
    sites: dict[int, list[str]] = {}
    for name, values in inputs.items():
        sites.setdefault(id(values), []).append(f"{name.removesuffix('.weight')}.input")
    return [site_of(points, inputs[f"{points[0].removesuffix('.input')}.weight"], kind) for points in sites.values()]


def expected_bytes(weight: Array, inputs: Array, spread: Array, format: str, size: int) -> bytes:
    exact = inputs.astype(np.float64)
    return gptq(weight.astype(np.float32), exact.T @ exact, spread, format, size).tobytes()


@pytest.fixture
def model(make_checkpoint: MakeCheckpoint) -> tuple[Path, Tensors, dict[str, Array]]:
    tensors = llama_tensors()
    return make_checkpoint(tensors), tensors, llama_inputs(tensors)


Model = tuple[Path, Tensors, dict[str, Array]]


@pytest.mark.parametrize("kind", ["blocks", "full"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:64", "block:128x128", "mx"])
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_the_bytes_are_those_of_gptq(format: str, granularity: str, kind: str, model: Model, tmp_path: Path) -> None:
    source, tensors, inputs = model
    calibration = calibrate(source, llama_sites(inputs, kind))
    asked = {"format": format, "granularity": granularity, "quant_method": "fp8pack", "activations": "none"}
    fp8pack.pack(source, tmp_path / "out", rounding="gptq", calibration=calibration, **asked)
    fp8pack.pack(source, tmp_path / "nearest", **asked)
    found, nearest = stored(tmp_path / "out"), stored(tmp_path / "nearest")
    assert found.keys() == nearest.keys()
    changed = 0
    for name in found:
        if name not in inputs:
            assert found[name] == nearest[name]  # scales, and what is kept
            continue
        weight = tensors[name]
        described = parse_granularity(granularity)
        raw = next(found[other] for other in found if other.startswith(f"{name}_scale") or other == f"{name}_scale_inv")
        bits = np.frombuffer(raw[2], np.uint8 if raw[0] in ("U8", "F8_E8M0") else "<f4")
        scales = np.exp2(bits.astype(np.float32) - 127) if bits.dtype == np.uint8 else bits
        spread = spread_scales(
            scales.reshape(described.scale_shape(weight.shape)), described.region(weight.shape), weight.shape
        )
        size = block_of(kind, weight.shape[1])
        assert found[name][:2] == (DTYPES[format], weight.shape)
        assert found[name][2] == expected_bytes(weight, inputs[name], spread, format, size), name
        changed += found[name] != nearest[name]
    assert changed == len(inputs)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block:128x128"])
def test_searched_scales_are_the_best_candidates_and_rounding_follows_them(
    granularity: str, model: Model, tmp_path: Path
) -> None:
    source, tensors, _ = model
    asked = {"granularity": granularity, "quant_method": "fp8pack", "activations": "none"}
    fp8pack.pack(source, tmp_path / "out", scales="mse", **asked)
    found, described = stored(tmp_path / "out"), parse_granularity(granularity)
    groups: dict[str, list[str]] = {}
    for name in (name for name in tensors if name.endswith("_proj.weight")):
        leaf = name.split(".")[-2]
        fused = (
            "qkv" if leaf in ("q_proj", "k_proj", "v_proj") else "gate_up" if leaf in ("gate_proj", "up_proj") else leaf
        )
        groups.setdefault(f"{name.split('.')[2]} {fused if granularity == 'tensor' else leaf}", []).append(name)
    for names in groups.values():
        weights = [tensors[name].astype(np.float32) for name in names]
        amax = max(float(np.abs(weight).max()) for weight in weights) if granularity == "tensor" else None
        scales = [oracle.quantize(weight, "e4m3", granularity, amax=amax)[1] for weight in weights]
        errors = []
        for factor in CANDIDATES:
            total: Any = 0
            for weight, scale in zip(weights, scales, strict=True):
                region, grid = described.region(weight.shape), described.scale_shape(weight.shape)
                spread = spread_scales((scale.reshape(grid) * factor).astype(np.float32), region, weight.shape)
                rounded = np.clip(weight / spread, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
                square = np.square((weight - rounded * spread).astype(np.float64))
                rows = np.add.reduceat(square, np.arange(0, weight.shape[0], region[0]), 0)
                total = total + np.add.reduceat(rows, np.arange(0, weight.shape[1], region[1]), 1)
            errors.append(total)
        best = CANDIDATES[np.argmin(np.stack(errors, -1), -1)]
        for name, weight, scale in zip(names, weights, scales, strict=True):
            region, grid = described.region(weight.shape), described.scale_shape(weight.shape)
            better = (scale.reshape(grid) * best).astype(np.float32)
            spread = spread_scales(better, region, weight.shape)
            codes = np.clip(weight / spread, -448, 448).astype(ml_dtypes.float8_e4m3fn)
            assert found[f"{name}_scale_inv"][2] == better.tobytes(), name
            assert found[name][2] == codes.tobytes()


@pytest.mark.parametrize("scales", ["amax", "mse"])
@pytest.mark.parametrize("granularity", ["tensor", "block:128x128"])
def test_however_the_work_is_cut_the_root_is_the_same(
    granularity: str, scales: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    tensors = llama_tensors()
    source = make_checkpoint(tensors, shards=3)
    calibration = calibrate(source, llama_sites(llama_inputs(tensors), "full"))
    request = Request(
        granularity=granularity, quant_method="fp8pack", rounding="compensated", scales=scales,
        activations="none", calibration=calibration,
    )  # fmt: skip
    found = []
    for i, (workers, memory, sizes) in enumerate(
        [
            (1, "256MiB", Sizes()),
            (2, "256MiB", Sizes()),
            (7, "1GiB", Sizes()),
            (2, "256MiB", Sizes(strip=1 << 14, checkpoint=1 << 12)),
        ]
    ):
        options = WriteOptions(tmp_path / str(i), workers=workers, max_memory=memory, sizes=sizes)
        found.append(run(prepare_pack(source, request, options)).root)
    assert len(set(found)) == 1


def test_feedbacks_that_do_not_fit_together_are_made_one_after_the_other(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _, inputs = model
    calibration = calibrate(source, llama_sites(inputs, "full"))
    request = Request("FP8_BLOCK", rounding="compensated", calibration=calibration)
    at_once = run(prepare_pack(source, request, WriteOptions(tmp_path / "a", workers=4)))
    from fp8pack.packing import feedbacks

    most, make = 0, feedbacks.Feedbacks._make

    def counted(self: feedbacks.Feedbacks, compensation: Any) -> Any:
        nonlocal most
        most = max(most, len(self._entries))
        return make(self, compensation)

    monkeypatch.setattr(feedbacks, "_ROOM", 0)
    monkeypatch.setattr(feedbacks.Feedbacks, "_make", counted)
    alone = run(prepare_pack(source, request, WriteOptions(tmp_path / "b", workers=4, sizes=Sizes(strip=1 << 13))))
    assert most == 1
    assert alone.root == at_once.root


def test_a_pack_that_was_cut_off_continues_to_the_same_bytes(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _, inputs = model
    calibration = calibrate(source, llama_sites(inputs, "blocks"))
    request = Request("FP8_BLOCK", rounding="compensated", scales="mse", calibration=calibration)
    whole = run(prepare_pack(source, request, WriteOptions(tmp_path / "whole")))
    from fp8pack.packing import bands

    count, compensate = 0, bands.compensate

    def failing(*args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count == 6:
            raise OSError("cut off")
        compensate(*args, **kwargs)

    options = WriteOptions(tmp_path / "cut", workers=1, sizes=Sizes(checkpoint=1))
    monkeypatch.setattr(bands, "compensate", failing)
    with pytest.raises(OSError, match="cut off"):
        run(prepare_pack(source, request, options))
    again = run(prepare_pack(source, request, options))
    assert again.root == whole.root
    assert again.resumed_nbytes > 0
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_another_calibration_does_not_continue_the_work(model: Model, tmp_path: Path) -> None:
    source, _, inputs = model
    one = calibrate(source, llama_sites(inputs, "blocks"), "one")
    other = calibrate(source, llama_sites(llama_inputs(model[1], 700), "blocks"), "other")
    asked: dict[str, Any] = {"scheme": "FP8_BLOCK", "rounding": "compensated"}
    with pytest.raises(DeadlineError):
        fp8pack.pack(source, tmp_path / "out", calibration=one, deadline=0, **asked)
    fp8pack.pack(source, tmp_path / "out", calibration=other, resume=False, **asked)
    fp8pack.pack(source, tmp_path / "fresh", calibration=other, **asked)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_the_manifest_says_it_all_and_verify_packs_it_again(model: Model, tmp_path: Path) -> None:
    source, _, inputs = model
    calibration = calibrate(source, llama_sites(inputs, "blocks"))
    other = calibrate(source, llama_sites(inputs, "full"), "other")
    found = fp8pack.pack(
        source, tmp_path / "out", scheme="FP8_DYNAMIC", rounding="gptq", scales="mse", calibration=calibration
    )
    recipe = json.loads((tmp_path / "out" / "fp8pack.json").read_bytes())["recipe"]
    said = {"rounding": "compensated", "damping": 0.01, "scales": "mse"}
    assert said | {"calibration": read_calibration(calibration).digest} == {
        key: recipe[key] for key in (*said, "calibration")
    }
    assert "percentile" not in recipe
    assert found.output_sqnr is not None
    assert found.sqnr is not None
    assert found.output_sqnr.mean > found.sqnr.mean
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--scales mse --rounding compensated --calibration FILE" in card
    assert card.index("the outputs of the quantized weights") < card.index("the quantized weights against")
    assert not fp8pack.verify(tmp_path / "out", against=source, calibration=calibration).differences
    with pytest.raises(RecipeError, match="second moments of a calibration"):
        fp8pack.verify(tmp_path / "out", against=source)
    with pytest.raises(InputError, match="not the calibration"):
        fp8pack.verify(tmp_path / "out", against=source, calibration=other)
    again = fp8pack.pack(source, tmp_path / "again", recipe=tmp_path / "out" / "fp8pack.json", calibration=calibration)
    assert again.root == found.root


def test_repair_writes_the_compensated_bytes_again(model: Model, tmp_path: Path) -> None:
    source, _, inputs = model
    calibration = calibrate(source, llama_sites(inputs, "blocks"))
    fp8pack.pack(source, tmp_path / "out", scheme="FP8_BLOCK", rounding="gptq", calibration=calibration)
    [shard] = (tmp_path / "out").glob("*.safetensors")
    before = shard.read_bytes()
    shard.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    found = fp8pack.verify(tmp_path / "out", against=source, calibration=calibration, repair=True)
    assert found.repaired
    assert shard.read_bytes() == before


# Experts.


def moe_tensors(experts: int = 3) -> Tensors:
    tensors: Tensors = {"model.embed_tokens.weight": random_weight((64, 128), 1)}
    tensors["model.layers.0.mlp.gate.weight"] = random_weight((experts, 128), 2)
    for expert in range(experts):
        for i, (leaf, shape) in enumerate(
            {"gate_proj": (256, 128), "up_proj": (256, 128), "down_proj": (128, 256)}.items()
        ):
            tensors[f"model.layers.0.mlp.experts.{expert}.{leaf}.weight"] = random_weight(shape, 10 * expert + i)
    return tensors


@pytest.mark.parametrize("tokens", [(700, 60, 0), (60, 60, 0)])
def test_experts_with_few_tokens_take_the_moments_of_all_or_round_to_nearest(
    tokens: tuple[int, ...], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    tensors = moe_tensors()
    config = llama_config("Qwen3MoeForCausalLM") | {"num_experts": 3, "model_type": "qwen3_moe"}
    source = make_checkpoint(tensors, config=config)
    prefix = "model.layers.0.mlp.experts"
    inputs, sites = {}, []
    for expert, count in enumerate(tokens):
        for leaves, channels in ((("gate_proj", "up_proj"), 128), (("down_proj",), 256)):
            values = activations(count, channels, 7 * expert + channels)
            sites.append(site_of([f"{prefix}.{expert}.{leaf}.input" for leaf in leaves], values, "blocks"))
            inputs |= {f"{prefix}.{expert}.{leaf}.weight": values for leaf in leaves}
    asked: dict[str, Any] = {"granularity": "channel", "quant_method": "fp8pack", "activations": "none"}
    found = fp8pack.pack(
        source, tmp_path / "out", rounding="compensated", calibration=calibrate(source, sites), **asked
    )
    fp8pack.pack(source, tmp_path / "nearest", **asked)
    out, nearest = stored(tmp_path / "out"), stored(tmp_path / "nearest")
    enough = sum(tokens) >= 512
    for name, own in inputs.items():
        scales = np.frombuffer(out[f"{name}_scale_inv"][2], "<f4").reshape(-1, 1)
        spread = spread_scales(scales, (1, tensors[name].shape[1]), tensors[name].shape)
        pool = [values for other, values in inputs.items() if other.split(".")[-2] == name.split(".")[-2]]
        used = own if len(own) >= 512 else np.concatenate(pool)
        expected = expected_bytes(tensors[name], used, spread, "e4m3", 128) if enough else nearest[name][2]
        assert out[name][2] == expected, name
    notes = " ".join(found.warnings)
    if enough:
        assert "6 expert weights got too few tokens" in notes
    else:
        assert "9 weights are rounded to nearest" in notes


# What is refused.


def test_what_cannot_be_done_is_refused(model: Model, tmp_path: Path) -> None:
    source, _, inputs = model
    with_moments = calibrate(source, llama_sites(inputs, "blocks"), "with")
    without = calibrate(source, llama_sites(inputs, "none"), "without")
    out = tmp_path / "out"
    for asked, message, hint in (
        ({"rounding": "compensated"}, "needs a calibration file", "--second-moments blocks"),
        ({"rounding": "compensated", "calibration": without}, "does not have", "--second-moments blocks"),
        ({"rounding": "compensated", "calibration": with_moments, "device": "cuda"}, "runs on the CPU", "--device cpu"),
        ({"scales": "mse", "device": "cuda"}, "runs on the CPU", "--device cpu"),
        ({"scales": "mse", "scheme": "MXFP8"}, "powers of two", "--scales mse"),
        ({"scales": "mse", "scale_rounding": "up"}, "powers of two", "--scales mse"),
        ({"rounding": "stochastic"}, "is not known", "nearest, compensated"),
        ({"scheme": "FP8_BLOCK", "calibration": with_moments}, "none is asked for", "--rounding compensated"),
        ({"scheme": "FP8_BLOCK", "calibration": without}, "none is asked for", "--scheme FP8"),
    ):
        with pytest.raises(RecipeError, match=message) as caught:
            fp8pack.pack(source, out, **asked)
        assert hint in (caught.value.command_hint or ""), (asked, caught.value.command_hint)
    assert not out.exists()


def test_auto_does_not_take_a_calibration_for_rounding_as_one_for_static_scales(model: Model, tmp_path: Path) -> None:
    source, _, inputs = model
    calibration = calibrate(source, llama_sites(inputs, "blocks"))
    found = fp8pack.pack(source, tmp_path / "out", rounding="compensated", calibration=calibration, dry_run=True)
    assert (found.recipe["scheme"], found.recipe["activations"]) == ("FP8_BLOCK", "dynamic")
    found = fp8pack.pack(source, tmp_path / "out", calibration=calibration, dry_run=True)
    assert (found.recipe["scheme"], found.recipe["activations"]) == ("FP8", "static")


def test_few_tokens_are_said(model: Model, tmp_path: Path) -> None:
    source, tensors, _ = model
    calibration = calibrate(source, llama_sites(llama_inputs(tensors, 100), "blocks"))
    found = fp8pack.pack(source, tmp_path / "out", scheme="FP8_BLOCK", rounding="gptq", calibration=calibration)
    assert any("fewer than 4 tokens for each channel" in warning for warning in found.warnings)


def test_conversion_compensates_what_it_requantizes(model: Model, tmp_path: Path) -> None:
    source, _, inputs = model
    calibration = calibrate(source, llama_sites(inputs, "blocks"))
    fp8pack.pack(source, tmp_path / "e5m2", format="e5m2", granularity="channel", quant_method="fp8pack")
    found = fp8pack.convert(
        tmp_path / "e5m2", tmp_path / "out", scheme="FP8_BLOCK", rounding="gptq", calibration=calibration
    )
    nearest = fp8pack.convert(tmp_path / "e5m2", tmp_path / "nearest", scheme="FP8_BLOCK")
    assert found.output_sqnr is not None
    assert nearest.output_sqnr is None
    assert found.root != nearest.root
