"""Expert parallelism: experts that are not cut, the engines that can, and the commands that serve them."""

import pytest
from engines.engine_cases import BLOCK, LAYER, QWEN, experts, judge, weight

from fp8pack.engines.serve import serve_command

EIGHT = [
    pair
    for i in range(8)
    for pair in (
        weight(f"{LAYER}.mlp.experts.{i}.gate_proj", 256, 2048),
        weight(f"{LAYER}.mlp.experts.{i}.down_proj", 2048, 256),
    )
]


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tensorrt-llm"])
def test_experts_that_tensor_parallelism_cuts_are_whole_with_expert_parallelism(engine: str) -> None:
    assert judge(BLOCK, engine, EIGHT, QWEN, tp=4).tp == ()
    verdict = judge(BLOCK, engine, EIGHT, QWEN, tp=4, ep=4)
    assert (verdict.tp, verdict.reason) == ((4,), "")


def test_groups_of_two_gpus_cut_each_expert_in_two() -> None:
    """768 / 2 is a multiple of 128, 768 / 4 is none."""
    packed = experts(768)
    assert judge(BLOCK, "sglang", packed, QWEN, tp=4, ep=2).tp == (4,)
    assert judge(BLOCK, "sglang", packed, QWEN, tp=4).tp == ()
    assert "768 / 4" in judge(BLOCK, "sglang", packed, QWEN, tp=8, ep=2).reason


def test_what_each_engine_asks_for() -> None:
    assert (
        judge(BLOCK, "vllm", EIGHT, QWEN, tp=8, ep=4).reason == "it divides experts among all 8 GPUs, not into 4 groups"
    )
    assert judge(BLOCK, "vllm", EIGHT, QWEN, ep=4).tp == (4,)
    assert judge(BLOCK, "vllm", EIGHT[:6], QWEN, tp=4, ep=4).tp == (4,)  # three experts: with a rest
    uneven = judge(BLOCK, "sglang", EIGHT[:6], QWEN, tp=4, ep=4)
    assert (uneven.loads, uneven.reason) == (False, "3 experts do not divide evenly among 4 groups of GPUs")
    assert judge(BLOCK, "sglang", EIGHT, QWEN, tp=4, ep=3).reason == "4 GPUs do not divide into 3 groups of experts"


def test_attention_is_cut_all_the_same() -> None:
    attention = weight(f"{LAYER}.self_attn.o_proj", 2048, 1536)
    assert "o_proj" in judge(BLOCK, "vllm", [*EIGHT, attention], QWEN, tp=8, ep=8).reason


@pytest.mark.parametrize(
    ("engine", "command"),
    [
        ("vllm", "vllm serve m --tensor-parallel-size 4 --enable-expert-parallel --kv-cache-dtype fp8"),
        ("sglang", "python -m sglang.launch_server --model-path m --tp 4 --ep-size 4 --kv-cache-dtype fp8_e4m3"),
        ("tensorrt-llm", "trtllm-serve m --tp_size 4 --ep_size 4"),
        ("lmdeploy", "lmdeploy serve api_server m --tp 4 --ep 4"),
    ],
)
def test_the_commands_divide_experts(engine: str, command: str) -> None:
    assert serve_command(engine, "m", tp=4, ep=4, kv_cache=True) == command
