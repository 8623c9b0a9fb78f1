"""Converting and unpacking: files of every kind, outputs that were cut off, and the memory that it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import verbs
from checkpoints import Tensors, random_weight, read_tensors, write_model, write_shard
from packing.fp8_sources import E4M3, LAYER, as_bytes, asked, config_of, config_text, convert, source_of

import fp8pack
from fp8pack.checkpoint.quantized import read_contents
from fp8pack.checkpoint.source import open_checkpoint
from fp8pack.errors import Fp8PackError, OutputError
from fp8pack.modelfacts.patterns import Pattern
from fp8pack.packing import bands
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.sizes import Sizes

# Containers.


def test_pack_overrules_the_policy_for_fp8_weights_too(tmp_path: Path) -> None:
    """`--pack lm_head`, of a head that is FP8 in the source, changes nothing and is no error."""
    codes, scales = oracle.quantize(random_weight((128, 256)).astype(np.float32), "e4m3", "channel")
    extra: Tensors = {"model.head.weight": codes.view(E4M3), "model.head.weight_scale_inv": scales}
    source = source_of(tmp_path / "source", "channel", extra=extra)
    request = asked(method="compressed-tensors", pack=(Pattern("model.head"),))
    found = convert(source, tmp_path / "out", request)
    assert found["model.head.weight"].tobytes() == codes.tobytes()


def test_a_single_file_becomes_a_single_file_with_its_markers(tmp_path: Path) -> None:
    module = "model.diffusion_model.blocks.0.ffn.0"
    codes, scales = oracle.quantize(random_weight((128, 256)).astype(np.float32), "e4m3", "tensor")
    tensors: Tensors = {
        "model.diffusion_model.scaled_fp8": np.zeros(0, E4M3),
        f"{module}.weight": codes.view(E4M3),
        f"{module}.scale_weight": scales.reshape(()),
        f"{module}.bias": random_weight((128,), 1),
    }
    write_shard(tmp_path / "x.safetensors", tensors, {"note": "kept", "_quantization_metadata": "{}"})
    facts = fp8pack.convert(tmp_path / "x.safetensors", quant_method="comfyui")
    output = Path(facts.output)
    assert output.parent == tmp_path
    found = read_tensors(output)
    assert set(found) == {f"{module}.{leaf}" for leaf in ("weight", "weight_scale", "comfy_quant", "bias")}
    assert json.loads(found[f"{module}.comfy_quant"].tobytes())["format"] == "float8_e4m3fn"
    assert found[f"{module}.weight"].tobytes() == codes.tobytes()
    raw = output.read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert metadata["note"] == "kept"
    assert "_quantization_metadata" not in metadata
    back = fp8pack.convert(output, tmp_path / "y.safetensors", quant_method="comfyui-scaled")
    assert as_bytes(Path(back.output)) == as_bytes(tmp_path / "x.safetensors")


def test_mistrals_own_files_keep_params_json_without_what_no_longer_holds(tmp_path: Path) -> None:
    module = "layers.0.feed_forward.w2"
    codes, scales = oracle.quantize(random_weight((128, 256)).astype(np.float32), "e4m3", "tensor")
    tensors: Tensors = {
        f"{module}.weight": codes.view(E4M3),
        f"{module}.qscale_weight": scales.reshape(()),
        f"{module}.qscale_act": np.ones((), np.float32),
    }
    source = write_model(tmp_path / "source", tensors)
    (source / "model.safetensors").rename(source / "consolidated.safetensors")
    params = {"dim": 128, "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}}
    (source / "params.json").write_text(json.dumps(params))
    fp8pack.unpack(source, tmp_path / "floats")
    assert json.loads((tmp_path / "floats" / "params.json").read_text()) == {"dim": 128}
    assert set(read_tensors(tmp_path / "floats")) == {f"{module}.weight"}
    try:
        fp8pack.convert(source, tmp_path / "out", quant_method="compressed-tensors")
    except Fp8PackError as error:
        assert len(str(error).splitlines()) == 1
    else:  # something must say how the output is quantized
        assert read_contents(open_checkpoint(tmp_path / "out")).method == "compressed-tensors"


def test_files_of_other_tools_do_not_contradict_the_output(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "tensor", "static")
    text = config_text(source)
    del text["quantization_config"]
    text["text_config"] = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
    (source / "config.json").write_text(json.dumps(text))
    (source / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    convert(source, tmp_path / "out", asked(method="compressed-tensors"))
    found = config_text(tmp_path / "out")
    assert found["quantization_config"]["quant_method"] == "compressed-tensors"
    assert found["text_config"] == {}
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    convert(source, tmp_path / "modelopt", asked(method="modelopt"))
    document = json.loads((tmp_path / "modelopt" / "hf_quant_config.json").read_text())
    config = config_text(tmp_path / "modelopt")["quantization_config"]
    assert document["quantization"]["quant_algo"] == config["quant_algo"] == "FP8"
    assert document["quantization"]["exclude_modules"] == config["ignore"]


def test_the_same_again_is_complete_and_a_limit_on_shards_changes_no_tensor(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "channel", shards=2)
    request = asked(method="compressed-tensors")
    first = verbs.convert(source, request, WriteOptions(tmp_path / "out"))
    again = verbs.convert(source, request, WriteOptions(tmp_path / "out"))
    assert again.already_complete
    assert again.root == first.root
    convert(source, tmp_path / "small", request, max_shard_size=60_000)
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 3
    assert as_bytes(tmp_path / "small") == as_bytes(tmp_path / "out")


# Interrupted.


@pytest.mark.parametrize(("granularity", "method"), [("channel", "compressed-tensors"), ("block:128x128", "fp8")])
def test_a_conversion_that_was_cut_off_continues_to_the_same_bytes(
    granularity: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that are carried, and bytes that are made anew."""
    source, request = source_of(tmp_path / "source", "channel", shards=2), asked(granularity, method)
    convert(source, tmp_path / "whole", request)
    left = iter(range(5))
    with monkeypatch.context() as patched:
        for name in ("carry", "pack"):
            genuine = getattr(bands.BandWorker, name)

            def cut_off(*arguments: Any, genuine: Any = genuine) -> Any:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return genuine(*arguments)

            patched.setattr(bands.BandWorker, name, cut_off)
        with pytest.raises(KeyboardInterrupt):
            verbs.convert(source, request, WriteOptions(tmp_path / "out", workers=1, sizes=Sizes(checkpoint=1)))
    assert not (tmp_path / "out").exists()
    other = asked("group:64", "fp8pack")
    with pytest.raises(OutputError, match="another recipe"):
        verbs.convert(source, other, WriteOptions(tmp_path / "out"))
    facts = verbs.convert(source, request, WriteOptions(tmp_path / "out"))
    assert facts.resumed_nbytes > 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }


MEASURED = """
import json, resource, sys
from pathlib import Path
import fp8pack
out, small, large = map(Path, sys.argv[1:])
asked = {"scheme": "FP8_DYNAMIC"}, {"quant_method": "compressed-tensors"}
peaks = []
for source in (small, large):
    for i, request in enumerate(asked):
        fp8pack.convert(source, out / f"{source.name}-{i}", workers=2, **request)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """96 MiB of FP8, carried and quantized anew."""
    small = source_of(tmp_path / "small", "block:128x128")
    name = f"{LAYER}.mlp.down_proj.weight"
    tensors: Tensors = {
        name: np.full((12288, 8192), 0x38, np.uint8).view(E4M3),
        f"{name}_scale_inv": np.full((96, 64), 0.5, np.float32),
    }
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    large = write_model(tmp_path / "large", tensors, config_of(quantization_config=quantization))
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path), str(small), str(large)],
        capture_output=True, text=True, check=False, env=os.environ | {"MALLOC_ARENA_MAX": "2"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    before, after = json.loads(ran.stdout)
    assert after - before < 96 << 20
