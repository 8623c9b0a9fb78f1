"""Targets: which scheme serves them all, and what is said where none does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engines.engine_cases import DYNAMIC, LAYER, LLAMA, LLM_ENGINES, QWEN, Packed, dense, experts, weight

from fp8pack.engines.case import make_case
from fp8pack.engines.judge import check_targets, judge_engines
from fp8pack.engines.known import parse_targets
from fp8pack.errors import RecipeError
from fp8pack.modelfacts.model import ModelFacts
from fp8pack.numerics.formats import E5M2
from fp8pack.numerics.granularity import BLOCK_128, MX, TENSOR, parse_granularity
from fp8pack.numerics.rounding import ScaleRounding
from fp8pack.planning.choose_scheme import choose_scheme
from fp8pack.planning.recipe import FP8, FP8_BLOCK, FP8_DYNAMIC, Request


def test_targets_are_named_in_any_case() -> None:
    assert parse_targets(["vLLM", "TensorRT_LLM", "trtllm", "ComfyUI", "cublasLt", "vllm"]) == (
        "vllm",
        "tensorrt-llm",
        "comfyui",
        "cublaslt",
    )
    for unknown in ("mlx", "xtrtllm"):
        with pytest.raises(RecipeError, match=f"target {unknown!r} is not known"):
            parse_targets([unknown])


def test_a_target_that_cannot_load_it_is_an_error_with_the_remedy() -> None:
    verdicts = judge_engines(make_case(DYNAMIC, dense(), QWEN))
    check_targets(verdicts, DYNAMIC, ("vllm", "sglang"))
    with pytest.raises(RecipeError) as caught:
        check_targets(verdicts, DYNAMIC, ("vllm", "lmdeploy"))
    assert str(caught.value) == "LMDeploy 02f556b3 cannot load channel scales in compressed-tensors: block scales only"
    assert caught.value.command_hint == "--scheme FP8_BLOCK"


def choose(*targets: str, packed: Packed | None = None, facts: ModelFacts = QWEN, **asked: Any) -> tuple[str, str, str]:
    """Method, granularity and activations of what `auto` takes; every target loads it."""
    request = Request(targets=targets, **asked)
    weights = dense() if packed is None else packed
    scheme, reason = choose_scheme(request, weights, facts)
    assert reason.startswith("auto: ")
    return scheme.quant_method, scheme.granularity.name, scheme.activations


FP8_BLOCKS = ("fp8", "block:128x128", "dynamic")
CHANNELS = ("compressed-tensors", "channel", "dynamic")


@pytest.mark.parametrize(
    ("targets", "facts", "asked", "expected"),
    [
        (("vllm",), QWEN, {}, FP8_BLOCKS),
        (LLM_ENGINES, QWEN, {}, FP8_BLOCKS),
        (("vllm", "lmdeploy"), LLAMA, {}, FP8_BLOCKS),
        (("vllm", "sglang", "transformers", "tensorrt-llm"), LLAMA, {}, CHANNELS),
        (("sglang",), LLAMA, {"granularity": BLOCK_128}, ("compressed-tensors", "block:128x128", "dynamic")),
        (("vllm", "tgi"), QWEN, {"granularity": TENSOR}, ("fp8", "tensor", "dynamic")),
        (("vllm", "transformers"), QWEN, {"granularity": TENSOR}, ("compressed-tensors", "tensor", "dynamic")),
        (("transformers",), QWEN, {"granularity": TENSOR}, ("fp8", "tensor", "dynamic")),
        (("sglang",), QWEN, {"granularity": MX}, ("modelopt", "mx", "dynamic")),
        (("sglang", "transformers"), QWEN, {"granularity": MX}, ("mxfp8", "mx", "dynamic")),
        (("vllm", "transformers"), QWEN, {"granularity": MX}, ("compressed-tensors", "mx", "dynamic")),
        (("comfyui",), ModelFacts(), {}, ("comfyui", "tensor", "dynamic")),
        (("comfyui",), ModelFacts(), {"format": E5M2}, ("comfyui", "tensor", "dynamic")),
        (("vllm",), QWEN, {"activations": "static"}, ("modelopt", "tensor", "static")),
        (("vllm", "transformers"), QWEN, {"activations": "static"}, ("compressed-tensors", "tensor", "static")),
        (("transformers",), QWEN, {"calibration": Path("c")}, ("compressed-tensors", "tensor", "static")),
        (("tgi",), QWEN, {"activations": "static", "quant_method": "fp8"}, ("fp8", "tensor", "static")),
        (("vllm",), QWEN, {"calibration": Path("c"), "kv_cache": True}, FP8_BLOCKS),
        (("vllm",), QWEN, {"activations": "none"}, ("compressed-tensors", "channel", "none")),
        (("vllm",), QWEN, {"quant_method": "Compressed_Tensors"}, CHANNELS),
        (("cublaslt",), QWEN, {"gpu": "h100"}, FP8_BLOCKS),
        (("cublaslt",), QWEN, {"gpu": "l4"}, ("fp8", "tensor", "dynamic")),
        (("cublaslt",), QWEN, {"gpu": "b200"}, ("fp8", "tensor", "dynamic")),
        (("tgi",), QWEN, {"gpu": "l40s"}, CHANNELS),
    ],
)
def test_auto_takes_the_first_scheme_that_all_targets_load(
    targets: tuple[str, ...], facts: ModelFacts, asked: dict[str, Any], expected: tuple[str, str, str]
) -> None:
    assert choose(*targets, facts=facts, **asked) == expected


def test_auto_keeps_the_format_and_the_rounding_that_are_asked_for() -> None:
    scheme, _ = choose_scheme(Request(targets=("comfyui",), format=E5M2), dense(), ModelFacts())
    assert scheme.format == E5M2
    scheme, _ = choose_scheme(Request(targets=("vllm",), scale_rounding=ScaleRounding.FLOOR), dense(), QWEN)
    assert scheme.scale_rounding == ScaleRounding.FLOOR


def test_auto_looks_at_the_size_that_targets_are_asked_for_at() -> None:
    assert choose("vllm", packed=experts()) == FP8_BLOCKS
    scheme, reason = choose_scheme(Request(targets=("vllm",), tp=4), experts(), QWEN)
    assert scheme == FP8_DYNAMIC
    assert (
        reason
        == f"auto: vLLM: {LAYER}.mlp.experts.0.gate_proj.weight has N = 768, and 768 / 4 is not a multiple of 128"
    )


def test_auto_looks_at_the_usual_sizes_for_a_large_model() -> None:
    spec, role = experts()[0]
    large = [(replace(spec, end=17 * 10**9), role)]
    assert choose("vllm", packed=large) == CHANNELS
    facts = replace(QWEN, num_heads=6, num_kv_heads=6)  # at sizes that its heads allow: 2
    assert choose("vllm", packed=large, facts=facts) == FP8_BLOCKS


def test_auto_packs_all_weights_if_it_can_and_else_says_how_many_stay() -> None:
    ragged = [
        *dense(),
        weight("model.layers.1.self_attn.q_proj", 192, 256),
        weight("model.layers.1.mlp.o_proj", 192, 96),
    ]
    ragged += [weight("model.layers.1.self_attn.v_proj", 256, 256)]
    scheme, reason = choose_scheme(Request(targets=("vllm",)), ragged, QWEN)
    assert scheme == FP8_DYNAMIC
    assert reason == "auto: model.layers.1.self_attn.q_proj.weight is 192 x 256, not a multiple of 128"
    scheme, reason = choose_scheme(Request(targets=("lmdeploy",)), ragged, QWEN)
    assert scheme == FP8_BLOCK
    assert reason == "auto: 3 weights are ignored: they do not fit the block:128x128 of LMDeploy"


@pytest.mark.parametrize(
    ("targets", "facts", "asked", "message"),
    [
        (
            ("lmdeploy", "sglang"),
            LLAMA,
            {},
            "no scheme works for both LMDeploy (block scales only) and SGLang (its Llama loader loses block scales)",
        ),
        (
            ("vllm", "tensorrt-llm", "transformers"),
            QWEN,
            {"activations": "static"},
            "no scheme works for both TensorRT-LLM (it refuses tensor scales there) and transformers (it has no reader "
            "for modelopt and takes the bytes for weights without scales)",
        ),
        (("vllm",), ModelFacts(), {}, "vLLM loads no scheme of this model: no config.json names an architecture"),
        (("vllm",), QWEN, {"format": E5M2}, "vLLM loads no scheme of this model: no LLM engine reads E5M2 weights"),
        (
            ("vllm",),
            replace(QWEN, num_heads=12),
            {"tp": 8},
            "vLLM loads no scheme of this model: 12 attention heads with 8 key heads do not spread over 8 GPUs",
        ),
        (
            ("sglang", "vllm", "transformers"),
            QWEN,
            {"granularity": MX, "gpu": "h100"},
            "no scheme works for SGLang, vLLM, transformers at once",
        ),
    ],
)
def test_targets_that_exclude_each_other_are_named(
    targets: tuple[str, ...], facts: ModelFacts, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        choose_scheme(Request(targets=targets, **asked), dense(), facts)
    assert str(caught.value) == message
    assert caught.value.command_hint == ("pack once for each target" if message.startswith("no scheme") else "")


def test_a_scheme_that_is_named_is_taken() -> None:
    request = Request(scheme="FP8_BLOCK", targets=("lmdeploy", "sglang"), gpu="b200")
    assert choose_scheme(request, dense(), LLAMA) == (FP8_BLOCK, "asked for")


def test_a_granularity_that_no_target_reads_is_left_to_the_check_of_targets() -> None:
    assert choose_scheme(Request(targets=("vllm",), granularity=parse_granularity("group:64")), dense(), QWEN)


@pytest.mark.parametrize(
    ("facts", "request_", "expected"),
    [
        (QWEN, Request(), (FP8_BLOCK, "auto: every packed dimension is a multiple of 128")),
        (LLAMA, Request(), (FP8_DYNAMIC, "auto: SGLang's Llama loader loses block scales")),
        (QWEN, Request(activations="static"), (FP8, "auto: the calibration gives static activation scales")),
        (QWEN, Request(gpu="h100"), (FP8_BLOCK, "auto: every packed dimension is a multiple of 128")),
        (LLAMA, Request(gpu="b200"), (FP8_DYNAMIC, "auto: SGLang's Llama loader loses block scales")),
    ],
)
def test_auto_without_targets(facts: ModelFacts, request_: Request, expected: tuple[Any, str]) -> None:
    assert choose_scheme(request_, dense(), facts) == expected


@pytest.mark.parametrize("targets", [(), ("vllm",)])
def test_block_scales_for_sm100_are_powers_of_two(targets: tuple[str, ...]) -> None:
    scheme, reason = choose_scheme(Request(targets=targets, gpu="b200"), dense(), QWEN)
    assert scheme == replace(FP8_BLOCK, scale_rounding=ScaleRounding.UP)
    assert reason == "auto: every packed dimension is a multiple of 128, in powers of two for B200"
    asked = Request(targets=targets, gpu="b200", scale_rounding=ScaleRounding.NONE)
    assert choose_scheme(asked, dense(), QWEN)[0] == FP8_BLOCK
    assert choose_scheme(Request(targets=targets, gpu="rtx5090"), dense(), QWEN)[0] == FP8_BLOCK
