"""`--kept-dtype`: floats that are not packed, rounded once to a dtype of 16 bits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import verbs
from checkpoints import Tensors, llama_config, llama_tensors, random_weight, read_tensors, write_model
from numpy.typing import NDArray

import fp8pack
from fp8pack.errors import InputError, OutputError, RecipeError
from fp8pack.numerics.narrow import OVERFLOW, cast
from fp8pack.packing.options import WriteOptions
from fp8pack.planning.recipe import Request
from fp8pack.planning.sizes import Sizes

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
NORM, HEAD, LINEAR = "model.norm.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"


def bits_of(dtype: str) -> NDArray[Any]:
    """Every bit pattern of 16 bits; of F32 every pattern of the upper half before each kind of lower half, and ties."""
    upper = np.arange(1 << 16, dtype=np.uint16)
    if dtype != "F32":
        return upper
    lower = (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0x3000)
    return np.concatenate([upper.astype(np.uint32) << 16 | np.uint32(half) for half in lower])


def as_torch(bits: NDArray[Any], dtype: str) -> torch.Tensor:
    return torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(TORCH[dtype])


@pytest.mark.parametrize(("dtype", "to"), [("F32", "BF16"), ("F32", "F16"), ("BF16", "F16"), ("F16", "BF16")])
def test_every_value_is_torchs_bit_for_bit_and_a_nan_keeps_its_sign(dtype: str, to: str) -> None:
    bits = bits_of(dtype)
    values = as_torch(bits, dtype)
    fits = ~(values.isfinite() & values.to(TORCH[to]).isinf()).numpy()
    found = cast(bits[fits], dtype, to)
    assert found is not None
    expected = values[torch.from_numpy(fits)].to(TORCH[to])
    is_nan = expected.isnan().numpy()
    np.testing.assert_array_equal(found[~is_nan], expected.view(torch.uint16).numpy()[~is_nan])
    signs = as_torch(bits[fits][is_nan], dtype).signbit().numpy()
    quiet = {"BF16": 0x7FC0, "F16": 0x7E00}[to]
    np.testing.assert_array_equal(found[is_nan], np.where(signs, quiet | 0x8000, quiet))


@pytest.mark.parametrize("to", ["BF16", "F16"])
def test_what_rounds_to_infinity_is_refused_from_the_very_value_on(to: str) -> None:
    limit = np.float32(OVERFLOW[to])
    assert cast(np.array([-limit]).view(np.uint32), "F32", to) is None
    below = np.nextafter(np.array([limit]), np.float32(0))
    assert np.isfinite(as_torch(cast(below.view(np.uint32), "F32", to), to).item())  # type: ignore[arg-type]


def pack(model: Path, output: Path, **options: Any) -> fp8pack.PackResult:
    return fp8pack.pack(model, output, scheme="FP8_BLOCK", **options)


def to_torch(tensor: NDArray[Any], dtype: torch.dtype) -> NDArray[Any]:
    return torch.from_numpy(tensor.astype(np.float32)).to(dtype).view(torch.uint16).numpy()


@pytest.fixture
def float32_model(tmp_path: Path) -> Path:
    tensors = llama_tensors(dtype=np.float32) | {
        "model.layers.0.self_attn.q_proj.bias": random_weight((256,), 7, np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": random_weight((32,), 8, np.float32),
        "model.layers.1.mlp.gate.e_score_correction_bias": random_weight((8,), 9, np.float32),
        "model.empty": np.zeros((0, 4), np.float32),
        "model.scalar": np.array(0.1, np.float32),
        "model.position_ids": np.arange(9),
    }
    return write_model(tmp_path / "model", tensors, llama_config() | {"dtype": "float32"}, shards=2)


STAYING = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.mlp.gate.e_score_correction_bias")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kept_floats_are_rounded_and_packed_weights_are_the_same(
    float32_model: Path, tmp_path: Path, dtype: str
) -> None:
    pack(float32_model, tmp_path / "plain")
    result = pack(float32_model, tmp_path / "out", kept_dtype=dtype)
    source, plain, found = map(read_tensors, (float32_model, tmp_path / "plain", tmp_path / "out"))
    actions = {entry["name"]: entry for entry in result.to_dict()["kept"]}
    assert found.keys() == plain.keys()
    for name, tensor in found.items():
        if actions.get(name, {}).get("action") == "cast":
            assert str(tensor.dtype) == dtype
            np.testing.assert_array_equal(tensor.view(np.uint16), to_torch(source[name], getattr(torch, dtype)))
        else:
            assert tensor.dtype == plain[name].dtype
            np.testing.assert_array_equal(tensor.view(np.uint8), plain[name].view(np.uint8))
    copied = {name for name, entry in actions.items() if entry["action"] == "copied"}
    assert copied == {*STAYING, "model.position_ids"}
    assert all(actions[name]["reason"].endswith("not cast: engines keep it in float32") for name in STAYING)
    saved = sum(entry["nbytes"] // 2 for entry in actions.values() if entry["action"] == "cast")
    assert result.output_nbytes == sum(tensor.nbytes for tensor in plain.values()) - saved
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_the_manifest_says_so_and_every_byte_is_verified(float32_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = pack(float32_model, out, kept_dtype="bf16")
    document = json.loads((out / "fp8pack.json").read_text())
    entry = document["tensors"][NORM]
    assert (entry["action"], entry["dtype"], entry["source_dtype"]) == ("cast", "BF16", "F32")
    assert document["recipe"]["kept_dtype"] == "bfloat16"
    assert result.scheme is not None and result.scheme.kept_dtype == "bfloat16"
    assert isinstance(kept := fp8pack.load_packed(out, verify=True)[NORM], torch.Tensor)
    assert kept.dtype == torch.bfloat16
    shown = fp8pack.inspect(out)
    assert (shown[NORM].action, shown[NORM].dtype) == ("cast", "BF16")
    comparison = {tensor.name: tensor for tensor in fp8pack.diff(float32_model, out).tensors}
    assert comparison[NORM].formats == ("F32", "BF16")
    assert (comparison[NORM].sqnr or 0) > 50
    card = (out / "README.md").read_text()
    assert "| kept in | bfloat16: 10 tensors, rounded once |" in card
    assert "--kept-dtype bfloat16" in card

    shard = next(file for file in out.glob("*.safetensors") if NORM in read_tensors(file))
    data = bytearray(shard.read_bytes())
    position = data.index(read_tensors(shard)[NORM].tobytes())
    data[position] ^= 1
    shard.write_bytes(data)
    with pytest.raises(fp8pack.VerificationError, match=NORM):
        fp8pack.load_packed(out, verify=True)


def test_tensors_of_several_bands_are_digested_as_copies_are(tmp_path: Path) -> None:
    large = random_weight((9 << 10, 512), 1, np.float32)
    tensors = {LINEAR: random_weight((128, 128), 2, np.float32), "model.embed_tokens.weight": large}
    model = write_model(tmp_path / "model", tensors, llama_config())
    pack(model, tmp_path / "out", kept_dtype="bfloat16")
    assert fp8pack.load_packed(tmp_path / "out", verify=True)
    found = read_tensors(tmp_path / "out")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(found.view(np.uint16), to_torch(large, torch.bfloat16))


@pytest.mark.parametrize("strip", [64, 4096])
def test_the_bytes_do_not_depend_on_how_work_is_cut(float32_model: Path, tmp_path: Path, strip: int) -> None:
    request = Request("FP8_BLOCK", kept_dtype="bfloat16")
    verbs.pack(float32_model, request, WriteOptions(tmp_path / "whole"))
    verbs.pack(float32_model, request, WriteOptions(tmp_path / "cut", sizes=Sizes(band=1000, strip=strip), workers=3))
    whole, cut = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "cut")
    assert all(cut[name].tobytes() == tensor.tobytes() for name, tensor in whole.items())


def test_without_the_option_the_recipe_does_not_mention_it(float32_model: Path, tmp_path: Path) -> None:
    pack(float32_model, tmp_path / "out")
    document = json.loads((tmp_path / "out" / "fp8pack.json").read_text())
    assert "kept_dtype" not in document["recipe"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_the_same_dtype_is_a_plain_copy(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", llama_tensors(), llama_config())
    result = pack(model, tmp_path / "out", kept_dtype="bfloat16")
    assert {tensor.action for tensor in result.kept} == {"copied"}
    plain = pack(model, tmp_path / "plain")
    assert (result.output_nbytes, result.num_packed) == (plain.output_nbytes, plain.num_packed)


def test_values_out_of_range_are_refused_by_name(tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors[NORM] = np.full(256, 1e5).astype(ml_dtypes.bfloat16)
    tensors[HEAD][0, 0] = np.inf
    model = write_model(tmp_path / "model", tensors, llama_config())
    with pytest.raises(InputError, match=rf"^model.safetensors: values out of range of F16 in {NORM}$") as caught:
        pack(model, tmp_path / "out", kept_dtype="float16")
    assert caught.value.command_line.endswith("choose --kept-dtype bfloat16")
    assert not (tmp_path / "out").exists()


def test_unfinished_work_of_another_dtype_is_not_taken_over(float32_model: Path, tmp_path: Path) -> None:
    tensors = read_tensors(float32_model) | {NORM: np.full(256, 1e5, np.float32)}
    model = write_model(tmp_path / "large", tensors, llama_config())
    with pytest.raises(InputError):
        pack(model, tmp_path / "out", kept_dtype="float16")
    with pytest.raises(OutputError, match="unfinished work of another recipe"):
        pack(model, tmp_path / "out", kept_dtype="bfloat16")
    pack(model, tmp_path / "out", kept_dtype="bfloat16", resume=False)
    with pytest.raises(OutputError, match="exists"):
        pack(model, tmp_path / "out")


def test_a_recipe_and_a_manifest_name_it(float32_model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("scheme: FP8_BLOCK\nkept-dtype: bfloat16\n")
    first = fp8pack.pack(float32_model, tmp_path / "first", recipe=recipe)
    again = fp8pack.pack(float32_model, tmp_path / "again", recipe=tmp_path / "first" / "fp8pack.json")
    assert first.root == again.root == pack(float32_model, tmp_path / "typed", kept_dtype="bfloat16").root
    with pytest.raises(RecipeError, match="kept dtype 'float32' is not known"):
        pack(float32_model, tmp_path / "other", kept_dtype="float32")


def test_the_command_line_says_how_many_are_cast(float32_model: Path, tmp_path: Path) -> None:
    command = ["-m", "fp8pack", "pack", str(float32_model), "-o", str(tmp_path / "out"), "--kept-dtype", "bfloat16"]
    done = subprocess.run([sys.executable, *command, "--dry-run"], capture_output=True, text=True, check=True)
    assert "kept 13 (10 in bfloat16): " in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_transformers_keeps_in_float32_stays(tmp_path: Path) -> None:
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    tensors = {
        name: random_weight((128, 256), 0, np.float32),
        name.replace(".wo.", ".wi."): random_weight((256, 128), 1, np.float32),
        "shared.weight": random_weight((64, 128), 2, np.float32),
    }
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "dtype": "float32"}
    model = write_model(tmp_path / "model", tensors, config)
    kept = {tensor.name: tensor for tensor in pack(model, tmp_path / "out", ignore="*.wo.*", kept_dtype="bf16").kept}
    assert (kept[name].action, kept["shared.weight"].action) == ("copied", "cast")
    assert kept[name].reason.endswith("not cast: transformers keeps it in float32")
    assert read_tensors(tmp_path / "out")[name].dtype == np.float32


def test_parts_of_fused_experts_that_are_kept_are_cast(tmp_path: Path) -> None:
    fused = random_weight((4, 512, 128), 0, np.float32)
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": fused,
        "model.layers.0.mlp.experts.down_proj": random_weight((4, 128, 256), 1, np.float32),
        "model.norm.weight": random_weight((128,), 2, np.float32),
    }
    config = {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", "hidden_size": 128}
    model = write_model(tmp_path / "model", tensors, config)
    pack(model, tmp_path / "out", ignore="*.experts.1.up_proj*", kept_dtype="bfloat16", quant_method="fp8pack")
    found = read_tensors(tmp_path / "out")["model.layers.0.mlp.experts.1.up_proj.weight"]
    np.testing.assert_array_equal(found.view(np.uint16), to_torch(fused[1, 256:], torch.bfloat16))
    assert fp8pack.load_packed(tmp_path / "out", verify=True)


def test_unpacking_gives_floats_of_that_dtype(float32_model: Path, tmp_path: Path) -> None:
    pack(float32_model, tmp_path / "out", kept_dtype="float16")
    fp8pack.unpack(tmp_path / "out", tmp_path / "floats")
    found = read_tensors(tmp_path / "floats")
    assert {str(tensor.dtype) for name, tensor in found.items() if name not in STAYING} == {"float16", "int64"}
    assert json.loads((tmp_path / "floats" / "config.json").read_text())["dtype"] == "float16"


def test_a_conversion_casts_what_is_kept_and_what_it_dequantizes(float32_model: Path, tmp_path: Path) -> None:
    pack(float32_model, tmp_path / "packed")
    result = fp8pack.convert(tmp_path / "packed", tmp_path / "out", kept_dtype="float16", ignore="*.0.mlp.*")
    found = read_tensors(tmp_path / "out")
    assert (str(found[NORM].dtype), str(found[LINEAR].dtype)) == ("float16", "float16")
    assert (result.num_unpacked, found[STAYING[1]].dtype) == (3, np.float32)
    only_cast = fp8pack.convert(tmp_path / "packed", tmp_path / "cast", kept_dtype="bfloat16")
    assert only_cast.num_carried == only_cast.num_packed > 0
    assert isinstance(kept := fp8pack.load_packed(tmp_path / "cast", verify=True)[NORM], torch.Tensor)
    assert kept.dtype == torch.bfloat16


@pytest.mark.parametrize("declared", [True, False])
def test_transformers_loads_an_embedding_model_in_that_dtype(tmp_path: Path, declared: bool) -> None:
    from transformers import AutoModel, BertConfig, BertModel

    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    model: Any = BertModel(BertConfig(vocab_size=256, **sizes)).eval()
    model.save_pretrained(tmp_path / "model")
    if not declared:
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        del config["dtype"]
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    fp8pack.pack(tmp_path / "model", tmp_path / "out", scheme="FP8_DYNAMIC", kept_dtype="bfloat16")
    loaded: Any = AutoModel.from_pretrained(tmp_path / "out").eval()
    weight = loaded.get_parameter("embeddings.word_embeddings.weight")
    expected = model.get_parameter("embeddings.word_embeddings.weight").to(torch.bfloat16)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, expected)
    tokens = torch.arange(32)[None]
    with torch.inference_mode():
        ours, exact = loaded(tokens).last_hidden_state.float(), model(tokens).last_hidden_state
    assert torch.nn.functional.cosine_similarity(ours.flatten(), exact.flatten(), dim=0) > 0.99


PEAK = """
import json, resource, sys
import fp8pack
peaks = []
for model in sys.argv[2:]:
    fp8pack.pack(model, model + "-out", scheme="FP8_BLOCK", kept_dtype="bfloat16", workers=1)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_size_of_a_tensor(tmp_path: Path) -> None:
    models = []
    for rows in (4 << 10, 64 << 10):
        tensors: Tensors = {LINEAR: random_weight((128, 128), 0, np.float32)}
        tensors["model.embed_tokens.weight"] = np.zeros((rows, 1024), np.float32)
        models.append(write_model(tmp_path / f"{rows}", tensors, llama_config()))
    done = subprocess.run([sys.executable, "-c", PEAK, "", *map(str, models)], capture_output=True, check=True)
    small, large = json.loads(done.stdout)
    assert large - small < 16 << 20
