"""FP4 and integers as sources of FP8: what is packed of them is what is packed of their values."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import oracle
import pytest
import verbs
from checkpoint.low_bits_cases import CASES, EXPERTS, LAYER, MODULE, gpt_oss
from checkpoints import read_tensors
from packing.fp8_sources import as_bytes, asked

import fp8pack
from fp8pack.checkpoint.manifest_schema import read_manifest
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request
from fp8pack.planning.sizes import Sizes

ATTENTION = f"{LAYER}.self_attn.o_proj.weight"


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block:128x128", "mx", "group:64"])
def test_gpt_oss_is_packed_as_its_bf16_form_is(granularity: str, tmp_path: Path) -> None:
    """Split, interleaved gate and up, biases and all: payloads, scales and configuration."""
    source = gpt_oss(hidden=128, inner=256).write(tmp_path / "model", shards=2)
    fp8pack.unpack(source, tmp_path / "bf16")
    request = asked(granularity, "fp8pack")
    verbs.pack(source, request, WriteOptions(tmp_path / "out"))
    verbs.pack(tmp_path / "bf16", request, WriteOptions(tmp_path / "expected", workers=1))
    found, expected = as_bytes(tmp_path / "out"), as_bytes(tmp_path / "expected")
    assert f"{EXPERTS}.2.gate_proj.weight" in found
    assert found == expected
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "expected")]
    assert configs[0] == configs[1]


def test_bands_strips_workers_and_columns_change_no_byte_of_it(tmp_path: Path) -> None:
    source, request = gpt_oss(hidden=128, inner=256).write(tmp_path / "model"), asked("block:32x32", "fp8pack")
    verbs.pack(source, request, WriteOptions(tmp_path / "whole", workers=1))
    verbs.pack(source, request, WriteOptions(tmp_path / "cut", workers=3, sizes=Sizes(band=3000, strip=1000)))
    verbs.pack(source, request, WriteOptions(tmp_path / "columns", sizes=Sizes(band=2100, granule=2000, strip=99)))
    verbs.pack(source, request, WriteOptions(tmp_path / "torch", device="torch:cpu"))
    for name in ("cut", "columns", "torch"):
        assert as_bytes(tmp_path / name) == as_bytes(tmp_path / "whole"), name


def test_experts_that_are_ignored_stay_whole_in_bf16(tmp_path: Path) -> None:
    source = gpt_oss().write(tmp_path / "model")
    fp8pack.unpack(source, tmp_path / "bf16")
    fp8pack.pack(source, tmp_path / "out", scheme="FP8_DYNAMIC", ignore="*experts*")
    found, values = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "bf16")
    for leaf in ("gate_up_proj", "down_proj"):
        assert found[f"{EXPERTS}.{leaf}"].tobytes() == values[f"{EXPERTS}.{leaf}"].tobytes()


@pytest.mark.parametrize("name", [name for name in CASES if name != "gpt-oss"])
def test_convert_quantizes_their_float32_values_and_leaves_the_rest(name: str, tmp_path: Path) -> None:
    source = CASES[name]().write(tmp_path / "model")
    fp8pack.unpack(source, tmp_path / "values", dtype="float32")
    facts = verbs.convert(source, asked("channel", "fp8pack"), WriteOptions(tmp_path / "out"))
    assert facts.num_carried == 0
    found, values = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "values")
    (weight,) = CASES[name]().values
    codes, scales = oracle.quantize(values[weight], "e4m3", "channel")
    assert found[weight].tobytes() == codes.tobytes()
    assert found[f"{weight}_scale_inv"].tobytes() == scales.tobytes()
    assert found[ATTENTION].dtype == ml_dtypes.bfloat16
    assert found.keys() == {*values, f"{weight}_scale_inv"}
    entry = read_manifest(tmp_path / "out" / "fp8pack.json").tensors[weight]
    assert entry.origin
    assert (entry.origin.format, entry.origin.granularity) == (CASES[name]().format, CASES[name]().granularity)


@pytest.mark.parametrize("name", CASES)
def test_pack_also_quantizes_what_was_left_in_floats(name: str, tmp_path: Path) -> None:
    source = CASES[name]().write(tmp_path / "model")
    fp8pack.pack(source, tmp_path / "out", scheme="FP8_DYNAMIC")
    found = read_tensors(tmp_path / "out")
    assert found[ATTENTION].dtype == ml_dtypes.float8_e4m3fn
    leftover = ("_packed", "_blocks", "_shape", "zero_point", "input_scale", "global_scale", "scale_2", "_scales")
    assert not [tensor for tensor in found if tensor.endswith(leftover)]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["quantization_config"]["format"] == "float-quantized"
    loaded = fp8pack.load_packed(tmp_path / "out")
    assert isinstance(loaded[ATTENTION], fp8pack.PackedTensor)


@pytest.mark.parametrize("name", ["NVFP4 of ModelOpt", "INT4, group"])
def test_without_a_scheme_one_is_chosen(name: str, tmp_path: Path) -> None:
    source = CASES[name]().write(tmp_path / "model")
    chosen = {verb(source, dry_run=True).recipe["scheme"] for verb in (fp8pack.pack, fp8pack.convert)}
    assert len(chosen) == 1


def test_one_weight_alone_can_be_named(tmp_path: Path) -> None:
    source = CASES["INT4, group"]().write(tmp_path / "model")
    request = Request(scheme="FP8_DYNAMIC", only=(f"{MODULE}.weight",))
    assert verbs.pack(source, request, WriteOptions(tmp_path / "out")).num_packed == 1


MEASURED = """
import json, resource, sys
from pathlib import Path
import fp8pack
out, source, small = sys.argv[1:]
peaks = []
for name, path in (("small", small), ("large", source)):
    fp8pack.pack(path, Path(out) / name, scheme="FP8_DYNAMIC", workers=2)
    fp8pack.unpack(path, Path(out) / f"{name}-bf16", workers=2)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_experts(tmp_path: Path) -> None:
    """42 MiB of FP4 that become 84 MiB of FP8 and 168 MiB of BF16; what small ones need, and a few bands."""
    small = gpt_oss().write(tmp_path / "small-model")
    large = gpt_oss(hidden=1024, inner=1792, count=16).write(tmp_path / "model")
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path), str(large), str(small)],
        capture_output=True, text=True, check=False, env=os.environ | {"MALLOC_ARENA_MAX": "2"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    before, after = json.loads(ran.stdout)
    assert after - before < 96 << 20
    assert np.prod(read_tensors(tmp_path / "large-bf16")[f"{EXPERTS}.gate_up_proj"].shape) == 16 * 1024 * 3584
