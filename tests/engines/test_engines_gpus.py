"""What engines load on which GPU, rule by rule."""

from dataclasses import replace

import pytest
from engines.engine_cases import BLOCK, DYNAMIC, QWEN, dense, judge, storage

from fp8pack.engines.case import make_case
from fp8pack.engines.gpus import parse_gpu
from fp8pack.engines.judge import judge_engines
from fp8pack.errors import RecipeError
from fp8pack.modelfacts.storage import Storage


@pytest.mark.parametrize(
    ("text", "name", "capability"),
    [
        ("h100", "H100", "9.0"),
        ("H200", "H200", "9.0"),
        ("h20", "H20", "9.0"),
        ("a100", "A100", "8.0"),
        ("l4", "L4", "8.9"),
        ("L40S", "L40S", "8.9"),
        ("rtx4090", "RTX4090", "8.9"),
        ("RTX 5090", "RTX5090", "12.0"),
        ("b200", "B200", "10.0"),
        ("gb200", "GB200", "10.0"),
        ("b300", "B300", "10.3"),
        ("mi300x", "MI300X", "gfx942"),
        ("mi325x", "MI325X", "gfx942"),
        ("mi350x", "MI350X", "gfx950"),
        ("mi355x", "MI355X", "gfx950"),
        ("NVIDIA H100 80GB HBM3", "H100", "9.0"),
        ("NVIDIA GeForce RTX 4090", "RTX4090", "8.9"),
        ("Tesla V100-SXM2-16GB", "V100", "7.0"),
        ("AMD Instinct MI300X", "MI300X", "gfx942"),
    ],
)
def test_gpus_by_name(text: str, name: str, capability: str) -> None:
    gpu = parse_gpu(text)
    assert gpu is not None
    assert (gpu.name, gpu.capability) == (name, capability)


def test_an_unknown_gpu_is_an_error_that_lists_the_known() -> None:
    assert parse_gpu(None) is None
    for text in ("h1000", "", "nvidia", "gfx942"):
        with pytest.raises(RecipeError, match="is not known") as caught:
            parse_gpu(text)
        assert caught.value.hint.startswith("choose v100, t4, a100")
    with pytest.raises(RecipeError, match="gpu 'rtx9999' is not known"):
        judge_engines(make_case(BLOCK, dense(), QWEN, gpu="rtx9999"))


@pytest.mark.parametrize(
    ("kind", "engine", "gpu", "words"),
    [
        (BLOCK, "vllm", "a100", "Marlin"),
        (BLOCK, "vllm", "t4", "Marlin"),
        (BLOCK, "vllm", "l40s", "block scales run weight-only"),
        (DYNAMIC, "vllm", "l40s", ""),
        (BLOCK, "vllm", "h100", ""),
        (BLOCK, "vllm", "mi300x", "e4m3fnuz"),
        (BLOCK, "vllm", "mi355x", ""),
        (BLOCK, "sglang", "a100", "Marlin"),
        (BLOCK, "sglang", "mi325x", "e4m3fnuz"),
        (DYNAMIC, "tgi", "l4", "Marlin"),
        (DYNAMIC, "tgi", "mi300x", "e4m3fnuz"),
        (BLOCK, "transformers", "a100", "with accelerate; dequantized to BF16"),
        (BLOCK, "lmdeploy", "a100", "F16"),
        ("modelopt mx dynamic", "vllm", "h100", "emulated or weight-only"),
        ("modelopt mx dynamic", "vllm", "b200", ""),
        ("modelopt mx dynamic", "sglang", "h100", "converted at load"),
        ("modelopt mx dynamic", "sglang", "mi300x", "MXFP8 becomes 128 x 128 block scales at load; turned into"),
        (BLOCK, "vllm", "b200", "--scale-rounding up"),
        (BLOCK, "sglang", "gb300", "--scale-rounding up"),
        (BLOCK, "tensorrt-llm", "b200", "--scale-rounding up"),
        (BLOCK, "vllm", "rtx5090", ""),
        (DYNAMIC, "vllm", "b200", ""),
        (replace(BLOCK, powers_of_two=True), "vllm", "b200", ""),
        (DYNAMIC, "cublaslt", "h100", ""),
        (storage("fp8 tensor dynamic"), "cublaslt", "b200", ""),
    ],
)
def test_what_a_gpu_changes(kind: str | Storage, engine: str, gpu: str, words: str) -> None:
    verdict = judge(kind, engine, gpu=gpu)
    assert verdict.tp
    assert words in verdict.note
    assert bool(words) == bool(verdict.note)


@pytest.mark.parametrize(
    ("kind", "engine", "gpu", "reason"),
    [
        (BLOCK, "vllm", "v100", "SM75"),
        ("modelopt tensor static", "vllm", "a100", "needs SM89"),
        ("modelopt tensor static", "sglang", "a100", "needs SM89"),
        (BLOCK, "sglang", "t4", "SM80"),
        (BLOCK, "tensorrt-llm", "a100", "SM89"),
        (BLOCK, "tensorrt-llm", "mi300x", "NVIDIA GPUs only"),
        ("modelopt mx dynamic", "tensorrt-llm", "h100", "SM100"),
        (BLOCK, "tgi", "l40s", "takes no block scales"),
        (BLOCK, "tgi", "mi355x", "gfx950"),
        (BLOCK, "lmdeploy", "mi300x", "NVIDIA GPUs only"),
        ("fbgemm_fp8 channel dynamic", "transformers", "l4", "SM90"),
        (DYNAMIC, "cublaslt", "b200", "SM90 only"),
        (BLOCK, "cublaslt", "l4", "SM90 only"),
        (BLOCK, "cublaslt", "a100", "from SM89"),
        ("modelopt mx dynamic", "cublaslt", "h100", "from SM100"),
        (BLOCK, "cublaslt", "mi300x", "NVIDIA GPUs only"),
    ],
)
def test_where_a_gpu_rules_an_engine_out(kind: str | Storage, engine: str, gpu: str, reason: str) -> None:
    verdict = judge(kind, engine, gpu=gpu)
    assert verdict.tp == ()
    assert reason in verdict.reason
    assert judge(kind, engine).tp
