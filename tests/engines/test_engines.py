"""What engines load, rule by rule: each case fails when its rule is taken away."""

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fp8pack.engines.rules import (
    EXPERTS,
    KV_CACHE,
    LISTS,
    ON_GPU,
    PARTIAL_BLOCKS,
    READERS,
    RENAMING,
    ROUNDS_ON_SM100,
    VERSIONS,
    WEIGHTS,
    WRAPPERS,
)

from fp8pack.engines.engine import Evidence
from fp8pack.engines.gpus import GPUS, parse_gpu
from fp8pack.engines.ignore_list import Match, find_listed, is_understood
from fp8pack.engines.judge import LLM_ENGINES, TP_SIZES, WHOLE, EngineVerdict, check_targets, judge_engines
from fp8pack.engines.known import NAMES, parse_targets
from fp8pack.engines.module_names import spellings
from fp8pack.engines.scale_layouts import SCALES, scale_problem
from fp8pack.errors import RecipeError
from fp8pack.modelfacts.model import ModelFacts
from fp8pack.modelfacts.spec import Stored, TensorSpec
from fp8pack.modelfacts.storage import Storage
from fp8pack.modelfacts.tensor_parallel import tp_problem
from fp8pack.numerics.formats import E4M3, E5M2
from fp8pack.numerics.granularity import BLOCK_128, CHANNEL, MX, TENSOR, parse_granularity
from fp8pack.numerics.scaling import ScaleRounding
from fp8pack.planning.choose_scheme import choose_scheme
from fp8pack.planning.recipe import FP8, FP8_BLOCK, FP8_DYNAMIC, Request

ROOT = Path(__file__).parents[2]
QWEN = ModelFacts("Qwen3ForCausalLM", "qwen3", num_layers=1, head_dim=128, num_heads=32, num_kv_heads=8)
LLAMA = replace(QWEN, architecture="LlamaForCausalLM", model_type="llama")
LAYER = "model.layers.0"
ROLES = {"q_proj": "attn.q", "k_proj": "attn.k", "v_proj": "attn.v", "o_proj": "attn.o"}
ROLES |= {"q_a_proj": "attn.q", "kv_a_proj_with_mqa": "attn.kv"}
ROLES |= {"gate_proj": "mlp.gate", "up_proj": "mlp.up", "down_proj": "mlp.down"}
Packed = list[tuple[TensorSpec, str]]


def weight(name: str, n: int, k: int, role: str = "") -> tuple[TensorSpec, str]:
    """An FP8 weight [N, K] and its role, by its leaf unless it is given."""
    found = role or ROLES[name.rsplit(".", 1)[-1]]
    if ".experts." in name:
        found = found.replace("mlp", "expert")
    return TensorSpec(f"{name}.weight", "BF16", (n, k), "model.safetensors", 0, 2 * n * k), found


def dense(hidden: int = 4096, kv: int = 1024, intermediate: int = 14336) -> Packed:
    attention, mlp = f"{LAYER}.self_attn", f"{LAYER}.mlp"
    return [
        *(weight(f"{attention}.{leaf}_proj", n, hidden) for leaf, n in (("q", hidden), ("k", kv), ("v", kv))),
        weight(f"{attention}.o_proj", hidden, hidden),
        *(weight(f"{mlp}.{leaf}_proj", intermediate, hidden) for leaf in ("gate", "up")),
        weight(f"{mlp}.down_proj", hidden, intermediate),
    ]


def experts(intermediate: int = 768, hidden: int = 2048) -> Packed:
    parent = f"{LAYER}.mlp.experts"
    return [
        pair
        for i in range(2)
        for pair in (
            *(weight(f"{parent}.{i}.{leaf}_proj", intermediate, hidden) for leaf in ("gate", "up")),
            weight(f"{parent}.{i}.down_proj", hidden, intermediate),
        )
    ]


def storage(kind: str, **changes: Any) -> Storage:
    """The storage of `method[/spelling] granularity activations`."""
    spelled, granularity, activations = kind.split()
    method, _, spelling = spelled.partition("/")
    return replace(Storage(method, E4M3, parse_granularity(granularity), activations, spelling=spelling), **changes)


BLOCK, DYNAMIC = storage("fp8 block:128x128 dynamic"), storage("compressed-tensors channel dynamic")


def judge(
    kind: str | Storage, engine: str, packed: Packed | None = None, facts: ModelFacts = QWEN, **where: Any
) -> EngineVerdict:
    stored = storage(kind) if isinstance(kind, str) else kind
    verdicts = judge_engines(stored, dense() if packed is None else packed, facts, **where)
    assert [verdict.engine for verdict in verdicts] == list(NAMES)
    return next(verdict for verdict in verdicts if verdict.engine == engine)


# Who reads what.

LLM = "vllm sglang tensorrt-llm transformers tgi"
READ_BY = {
    "fp8 block:128x128 dynamic": f"{LLM} lmdeploy cublaslt",
    "fp8 block:128x128 static": "cublaslt",
    "fp8 tensor dynamic": "vllm sglang tgi cublaslt",
    "fp8 tensor static": "vllm sglang tgi cublaslt",
    "fp8/transformers tensor dynamic": "transformers cublaslt",
    "fp8/transformers tensor static": "transformers cublaslt",
    "compressed-tensors tensor dynamic": "vllm sglang transformers tgi cublaslt",
    "compressed-tensors tensor static": "vllm sglang transformers tgi cublaslt",
    "compressed-tensors tensor none": "vllm sglang transformers",
    "compressed-tensors channel dynamic": f"{LLM} cublaslt",
    "compressed-tensors channel static": "vllm sglang transformers cublaslt",
    "compressed-tensors channel none": "vllm sglang transformers",
    "compressed-tensors block:128x128 dynamic": "vllm sglang tensorrt-llm transformers cublaslt",
    "compressed-tensors block:128x128 static": "transformers cublaslt",
    "compressed-tensors block:128x128 none": "vllm sglang transformers",
    "compressed-tensors group:64 dynamic": "transformers",
    "compressed-tensors mx dynamic": "vllm transformers cublaslt",
    "compressed-tensors mx none": "vllm transformers",
    "modelopt tensor static": "vllm sglang tensorrt-llm cublaslt",
    "modelopt channel dynamic": "vllm tensorrt-llm cublaslt",
    "modelopt block:128x128 dynamic": "vllm tensorrt-llm cublaslt",
    "modelopt mx dynamic": "vllm sglang tensorrt-llm cublaslt",
    "mxfp8 mx dynamic": "sglang tensorrt-llm transformers cublaslt",
    "torchao tensor dynamic": "vllm transformers cublaslt",
    "torchao channel none": "vllm transformers",
    "quark tensor static": "vllm sglang transformers cublaslt",
    "quark channel dynamic": "vllm sglang transformers cublaslt",
    "quark block:128x128 dynamic": "vllm transformers cublaslt",
    "quark mx dynamic": "vllm transformers cublaslt",
    "comfyui tensor dynamic": "comfyui cublaslt",
    "comfyui-scaled tensor none": "comfyui",
    "comfyui mx dynamic": "comfyui cublaslt",
    "fbgemm_fp8 channel dynamic": "vllm transformers tgi cublaslt",
    "auto-round block:128x128 dynamic": "vllm cublaslt",
    "auto-round mx dynamic": "vllm cublaslt",
    "w8a8_fp8 channel dynamic": "sglang cublaslt",
    "fp8pack tensor dynamic": "cublaslt",
    "fp8pack group:64 dynamic": "",
}


@pytest.mark.parametrize("kind", READ_BY)
def test_who_reads_what(kind: str) -> None:
    verdicts = judge_engines(storage(kind), dense(), QWEN)
    assert {verdict.engine for verdict in verdicts if verdict.tp} == set(READ_BY[kind].split())
    for verdict in verdicts:
        assert bool(verdict.reason) == (not verdict.tp)
        assert "\n" not in verdict.reason + verdict.note


@pytest.mark.parametrize(
    ("kind", "engine", "note"),
    [
        ("fp8 block:128x128 dynamic", "transformers", "with accelerate"),
        ("compressed-tensors channel dynamic", "transformers", "with compressed-tensors"),
        ("torchao channel dynamic", "vllm", "with safetensors_load_strategy=torchao"),
        ("torchao channel dynamic", "transformers", "with torchao"),
        ("quark tensor static", "transformers", "with amd-quark"),
        ("fbgemm_fp8 channel dynamic", "vllm", "with its flag for deprecated methods"),
        ("compressed-tensors channel dynamic", "cublaslt", "on SM90"),
        ("compressed-tensors mx dynamic", "cublaslt", "on SM100 and later"),
        ("fp8 tensor dynamic", "cublaslt", "on SM89 and later"),
        ("fp8 block:128x128 dynamic", "vllm", ""),
    ],
)
def test_what_an_engine_needs_besides(kind: str, engine: str, note: str) -> None:
    assert judge(kind, engine).note == note


@pytest.mark.parametrize(
    ("kind", "engine", "reason", "remedy"),
    [
        ("fp8 tensor dynamic", "transformers", "looks for weight_scale_inv", "--scheme FP8_DYNAMIC"),
        ("fp8 tensor dynamic", "tensorrt-llm", "means block scales there", "--scheme FP8_BLOCK"),
        ("fp8 tensor dynamic", "lmdeploy", "without its scale", "--scheme FP8_BLOCK"),
        ("fp8 block:128x128 static", "vllm", "dynamic activations only", "--scheme FP8_BLOCK"),
        ("fp8/transformers tensor dynamic", "vllm", "looks for weight_scale,", "--scheme FP8_DYNAMIC"),
        ("fp8/transformers tensor dynamic", "sglang", "only its Llama classes", "--scheme FP8_DYNAMIC"),
        ("fp8/transformers tensor dynamic", "tgi", "looks for weight_scale", "--scheme FP8_DYNAMIC"),
        ("modelopt tensor static", "tgi", "no reader for modelopt", "--quant-method compressed-tensors"),
        ("compressed-tensors tensor static", "tensorrt-llm", "refuses tensor scales", "--quant-method modelopt"),
        ("compressed-tensors channel none", "tensorrt-llm", "asks for input_activations", "--scheme FP8_DYNAMIC"),
        ("compressed-tensors block:128x128 dynamic", "tgi", "tensor and channel scales only", "--quant-method fp8"),
        ("compressed-tensors block:128x128 dynamic", "lmdeploy", "quant_method fp8 only", "--quant-method fp8"),
        ("compressed-tensors block:128x128 static", "vllm", "dynamic activations only", "--scheme FP8_BLOCK"),
        ("compressed-tensors group:64 dynamic", "vllm", "tensor, channel and block", "--scheme FP8_DYNAMIC"),
        ("compressed-tensors mx dynamic", "sglang", "no MXFP8 in compressed-tensors", "--quant-method modelopt"),
        ("modelopt tensor static", "transformers", "no reader for modelopt", "--quant-method compressed-tensors"),
        ("modelopt channel dynamic", "sglang", "static tensor scales and MXFP8 only", "--scheme FP8_DYNAMIC"),
        ("mxfp8 mx dynamic", "vllm", "only its MiniMax-M3 class", "--quant-method modelopt"),
        ("quark block:128x128 dynamic", "sglang", "Quark's files say weight_scale", "--quant-method fp8"),
        (
            "fbgemm_fp8 channel dynamic",
            "sglang",
            "no reader for channel scales in fbgemm_fp8",
            "--scheme FP8_DYNAMIC --quant-method compressed-tensors",
        ),
        ("fp8 block:128x128 dynamic", "comfyui", "single files", "--quant-method comfyui --granularity tensor"),
        ("compressed-tensors channel none", "cublaslt", "multiplies FP8 by FP8", "--activations dynamic"),
        ("fp8pack group:64 dynamic", "cublaslt", "no such mode", "--granularity tensor"),
        ("fp8pack tensor dynamic", "vllm", "only load_packed() reads", "--scheme FP8_BLOCK or FP8_DYNAMIC"),
    ],
)
def test_why_an_engine_does_not_read_it(kind: str, engine: str, reason: str, remedy: str) -> None:
    verdict = judge(kind, engine)
    assert verdict.tp == ()
    assert reason in verdict.reason
    assert verdict.remedy == remedy


def test_no_llm_engine_reads_e5m2() -> None:
    for engine in LLM_ENGINES:
        verdict = judge(replace(BLOCK, format=E5M2), engine)
        assert (verdict.tp, verdict.reason) == ((), "no LLM engine reads E5M2 weights")
        assert verdict.remedy == "--format e4m3"
    assert judge(storage("comfyui tensor dynamic", format=E5M2), "comfyui").tp
    assert judge(storage("fp8pack tensor dynamic", format=E5M2), "cublaslt").tp
    assert not judge(storage("fp8pack mx dynamic", format=E5M2), "cublaslt").tp


def test_llm_engines_ask_for_an_architecture_and_load_packed_does_not() -> None:
    assert judge(BLOCK, "vllm", facts=ModelFacts()).reason == "no config.json names an architecture"
    assert judge(BLOCK, "cublaslt", facts=ModelFacts()).tp
    assert judge("comfyui tensor dynamic", "comfyui", facts=ModelFacts()).tp


# Classes with peculiarities.


@pytest.mark.parametrize("architecture", RENAMING["sglang"])
@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        ("fp8 block:128x128 dynamic", "block scales"),
        ("modelopt mx dynamic", "MX scales"),
        ("mxfp8 mx dynamic", "MX scales"),
    ],
)
def test_sglangs_llama_family_loses_what_is_named_weight_scale_inv(architecture: str, kind: str, lost: str) -> None:
    verdict = judge(kind, "sglang", facts=replace(QWEN, architecture=architecture))
    assert verdict.tp == ()
    assert verdict.reason == f"its {RENAMING['sglang'][architecture]} loader loses {lost}"
    assert verdict.remedy == "--scheme FP8_DYNAMIC"
    assert judge(kind, "sglang").tp


@pytest.mark.parametrize("kind", ["compressed-tensors block:128x128 dynamic", "fp8 tensor dynamic"])
def test_sglangs_llama_family_reads_what_is_named_weight_scale(kind: str) -> None:
    assert judge(kind, "sglang", facts=LLAMA).tp


def test_renaming_classes_read_the_spelling_of_transformers() -> None:
    for architecture in RENAMING["sglang"]:
        assert judge("fp8/transformers tensor static", "sglang", facts=replace(QWEN, architecture=architecture)).tp
    assert not judge("fp8/transformers tensor static", "sglang").tp
    mistral = replace(QWEN, architecture="Mistral3ForConditionalGeneration")
    assert judge("fp8/transformers tensor static", "vllm", facts=mistral).tp
    assert judge(BLOCK, "vllm", facts=mistral).reason == "its Mistral3 loader loses block scales"
    assert judge("modelopt mx dynamic", "vllm", facts=mistral).tp


def test_vllm_reads_quant_method_mxfp8_for_minimax_only() -> None:
    assert judge("mxfp8 mx dynamic", "vllm", facts=replace(QWEN, architecture="MiniMaxM3SparseForCausalLM")).tp


@pytest.mark.parametrize(
    ("kind", "role", "reason"),
    [
        ("fp8 tensor dynamic", "logits", "never takes the logits"),
        ("compressed-tensors channel dynamic", "embedding", "no FP8 embedding"),
        ("compressed-tensors channel static", "expert.up", "dynamic activations only"),
        ("compressed-tensors channel none", "expert.up", "no weight-only FP8 experts"),
    ],
)
def test_vllm_keeps_weights_of_some_roles_otherwise(kind: str, role: str, reason: str) -> None:
    verdict = judge(kind, "vllm", [*dense(), weight("odd", 256, 256, role)])
    assert verdict.tp == ()
    assert verdict.reason.startswith("odd.weight is FP8")
    assert reason in verdict.reason
    assert judge(kind, "vllm").tp
    assert verdict.remedy


def test_vllm_takes_fp8_logits_in_compressed_tensors() -> None:
    assert judge(DYNAMIC, "vllm", [*dense(), weight("lm_head", 256, 256, "logits")]).tp


# Shapes and tensor parallelism.


def test_a_block_that_tensor_parallelism_cuts_is_named_with_both_ways_out() -> None:
    verdict = judge(BLOCK, "vllm", experts(), QWEN)
    assert verdict.tp == (1, 2)
    assert verdict.reason == f"{LAYER}.mlp.experts.0.gate_proj.weight has N = 768, and 768 / 4 is no multiple of 128"
    assert verdict.remedy == "--scheme FP8_DYNAMIC, or serve with expert parallelism"


def test_a_cut_along_k_is_named() -> None:
    verdict = judge(BLOCK, "vllm", [weight(f"{LAYER}.mlp.experts.0.down_proj", 2048, 768)], tp=4)
    assert verdict.reason == f"{LAYER}.mlp.experts.0.down_proj.weight has K = 768, and 768 / 4 is no multiple of 128"
    assert verdict.tp == ()


@pytest.mark.parametrize(
    ("engine", "remedy"), [("tgi", "--scheme FP8_DYNAMIC"), ("lmdeploy", "expert parallelism"), ("sglang", None)]
)
def test_a_remedy_is_one_that_the_engine_has(engine: str, remedy: str | None) -> None:
    expected = "--scheme FP8_DYNAMIC, or serve with expert parallelism" if remedy is None else remedy
    assert judge(BLOCK, engine, experts()).remedy == expected


def test_expert_parallelism_is_no_remedy_where_attention_is_cut_too() -> None:
    attention = weight(f"{LAYER}.self_attn.o_proj", 2048, 768)
    assert judge(BLOCK, "vllm", [*experts(), attention]).remedy == "--scheme FP8_DYNAMIC"


def test_channel_scales_are_cut_at_multiples_of_16_and_have_no_remedy_beyond() -> None:
    assert judge(DYNAMIC, "vllm", experts()).tp == TP_SIZES
    verdict = judge(DYNAMIC, "vllm", dense(intermediate=1040), tp=2)
    assert verdict.reason == f"{LAYER}.mlp.gate_proj.weight has N = 1040, and 1040 / 2 is no multiple of 16"
    assert verdict.remedy == ""


def test_heads_that_do_not_spread_have_no_remedy() -> None:
    verdict = judge(BLOCK, "vllm", facts=replace(QWEN, num_heads=12, num_kv_heads=4))
    assert verdict.tp == (1, 2, 4)
    assert verdict.reason == "12 attention heads with 4 key heads do not spread over 8 GPUs"
    assert verdict.remedy == ""


def test_replicated_key_heads_are_not_cut() -> None:
    facts = replace(QWEN, num_kv_heads=2)
    assert tp_problem(dense(kv=256), BLOCK_128, 8, facts) is None
    assert tp_problem(dense(kv=256), BLOCK_128, 4, replace(facts, num_kv_heads=4)) is not None


def test_first_projections_of_latent_attention_are_not_cut() -> None:
    """DeepSeek-V3 as it is published: N of kv_a_proj_with_mqa is 576."""
    attention = [
        weight(f"{LAYER}.self_attn.{leaf}", n, 7168) for leaf, n in (("q_a_proj", 1536), ("kv_a_proj_with_mqa", 576))
    ]
    facts = replace(QWEN, architecture="DeepseekV3ForCausalLM", num_heads=128, num_kv_heads=128)
    for engine in ("vllm", "sglang", "lmdeploy"):
        assert judge(BLOCK, engine, attention, facts).tp == TP_SIZES


def test_mx_scales_are_cut_at_multiples_of_32() -> None:
    verdict = judge("modelopt mx dynamic", "vllm", [weight(f"{LAYER}.mlp.down_proj", 256, 96)])
    assert verdict.tp == (1,)
    assert "K = 96, and 96 / 2 is no multiple of 32" in verdict.reason


@pytest.mark.parametrize("engine", WHOLE)
def test_some_load_whole_weights(engine: str) -> None:
    kind = "comfyui tensor dynamic" if engine == "comfyui" else BLOCK
    assert judge(kind, engine, experts(), tp=None).tp == (1,)


def test_mx_needs_k_in_groups_of_32() -> None:
    for engine in ("vllm", "sglang", "tensorrt-llm"):
        verdict = judge("modelopt mx dynamic", engine, [weight(f"{LAYER}.mlp.up_proj", 64, 48)])
        assert verdict.reason == f"{LAYER}.mlp.up_proj.weight has K = 48, no multiple of 32"
        assert verdict.remedy == "--scheme FP8_DYNAMIC"


@pytest.mark.parametrize("shape", [(24, 64), (64, 24)])
def test_fp8_gemms_need_multiples_of_16(shape: tuple[int, int]) -> None:
    packed = [weight(f"{LAYER}.mlp.up_proj", *shape)]
    verdict = judge(DYNAMIC, "vllm", packed)
    assert verdict.tp == ()
    assert f"{shape[0]} x {shape[1]}, no multiple of 16" in verdict.reason
    assert verdict.remedy == f"--ignore {LAYER}.mlp.up_proj"
    assert judge(DYNAMIC, "transformers", packed).tp
    assert judge(DYNAMIC, "cublaslt", packed).tp


@pytest.mark.parametrize(
    ("name", "shape", "engines"),
    [
        ("self_attn.o_proj", (192, 256), "vllm sglang tensorrt-llm tgi lmdeploy"),
        ("self_attn.o_proj", (256, 192), "vllm sglang tensorrt-llm tgi lmdeploy"),
        ("self_attn.v_proj", (192, 256), "vllm"),
        ("mlp.up_proj", (192, 256), "vllm"),
        ("self_attn.q_proj", (192, 256), ""),
        ("self_attn.q_proj", (256, 192), "vllm sglang tensorrt-llm tgi lmdeploy"),
        ("self_attn.kv_a_proj_with_mqa", (576, 256), "vllm sglang tensorrt-llm tgi lmdeploy"),
        ("self_attn.q_a_proj", (192, 256), ""),
        ("mlp.experts.0.up_proj", (192, 256), ""),
    ],
)
def test_partial_blocks_by_engine(name: str, shape: tuple[int, int], engines: str) -> None:
    verdicts = judge_engines(BLOCK, [weight(f"{LAYER}.{name}", *shape)], QWEN, tp=1)
    assert {verdict.engine for verdict in verdicts if verdict.tp} == {*engines.split(), "cublaslt"}
    refused = {verdict.engine: verdict for verdict in verdicts if "no multiple of 128" in verdict.reason}
    assert set(refused) == {*LLM_ENGINES} - set(engines.split())
    assert {engine: verdict.remedy for engine, verdict in refused.items()} == {
        engine: "" if engine == "lmdeploy" else "--scheme FP8_DYNAMIC" for engine in refused
    }


def test_compressed_tensors_cuts_partial_blocks_itself() -> None:
    packed = [weight(f"{LAYER}.self_attn.q_proj", 192, 256)]
    assert judge("compressed-tensors block:128x128 dynamic", "transformers", packed).tp


# What stays.

UP = f"{LAYER}.mlp.up_proj"


@pytest.mark.parametrize(
    ("kind", "engine", "entry", "meant"),
    [
        (BLOCK, "vllm", f"{LAYER}.mlp", False),
        (BLOCK, "vllm", "mlp.up_proj", False),
        (BLOCK, "vllm", UP, True),
        (BLOCK, "sglang", f"{LAYER}.mlp", True),
        (BLOCK, "sglang", "mlp", True),
        (BLOCK, "sglang", f"{LAYER}.mlp.up", False),
        (BLOCK, "transformers", f"{LAYER}.mlp", True),
        (BLOCK, "transformers", "up_proj", True),
        (BLOCK, "transformers", "0.mlp", False),
        (BLOCK, "tensorrt-llm", "*up_proj", True),
        (BLOCK, "tensorrt-llm", "up_proj", False),
        (DYNAMIC, "vllm", r"re:.*up_", True),
        (DYNAMIC, "vllm", r"re:up_", False),
        (DYNAMIC, "sglang", r"re:.*mlp\.up", True),
        (DYNAMIC, "vllm", "*up_proj", False),
        ("modelopt tensor static", "vllm", "mlp.up", True),
        ("modelopt tensor static", "vllm", "*.up_*", True),
        ("modelopt tensor static", "sglang", "up_*", True),
        ("modelopt tensor static", "sglang", "mlp.up_proj", False),
        ("modelopt mx dynamic", "sglang", "up_*", False),
        ("modelopt mx dynamic", "sglang", "mlp", True),
        ("quark tensor static", "vllm", r"re:.*up_", True),
        ("torchao channel dynamic", "vllm", "mlp.up_proj", True),
        (DYNAMIC, "transformers", r"re:.*up_", True),
        (DYNAMIC, "transformers", "up_proj", False),
    ],
)
def test_each_engine_compares_the_list_in_its_own_way(
    kind: str | Storage, engine: str, entry: str, meant: bool
) -> None:
    packed = [weight(UP, 256, 256)]
    verdict = judge(kind, engine, packed, kept=["lm_head", entry])
    assert bool(verdict.tp) != meant
    if meant:
        assert entry in verdict.reason or entry == UP
        assert UP in verdict.reason
        assert verdict.remedy == f"--ignore {UP}"


def test_the_fused_name_counts_and_the_remedy_is_a_name_of_the_checkpoint() -> None:
    verdict = judge(BLOCK, "vllm", [weight(UP, 256, 256)], kept=[f"{LAYER}.mlp.gate_up_proj"])
    assert f"{LAYER}.mlp.gate_up_proj is FP8" in verdict.reason
    assert verdict.remedy == f"--ignore {UP}"
    verdict = judge("modelopt tensor static", "vllm", kept=[f"{LAYER}.mlp.gate"])  # a router that hits gate_up_proj
    assert "`model.layers.0.mlp.gate` in the list" in verdict.reason


@pytest.mark.parametrize(
    ("kind", "engine", "entry"),
    [
        (BLOCK, "vllm", "re:.*lm_head"),
        (BLOCK, "sglang", "*lm_head"),
        (DYNAMIC, "vllm", "*lm_head"),
        ("modelopt mx dynamic", "sglang", "mtp*"),
    ],
)
def test_an_entry_that_means_nothing_is_noted(kind: str | Storage, engine: str, entry: str) -> None:
    verdict = judge(kind, engine, kept=[entry])
    assert verdict.tp
    assert f"`{entry}` in the list of modules that stay means nothing to it" in verdict.note


@pytest.mark.parametrize("kind", READ_BY)
@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_full_names_satisfy_every_engine(kind: str, prefix: str) -> None:
    """Routers, towers and logits as fp8pack lists them, in all of their spellings, mean no FP8 module."""
    names = [f"{prefix}layers.{n}.mlp.{leaf}" for n in (0, 1, 10) for leaf in ("gate", "shared_expert_gate")]
    names += [f"model.vision_tower.layers.0.{leaf}_proj" for leaf in "qkv"]
    kept = [spelling for name in (*names, "model.visual.merger", "lm_head") for spelling in spellings(name)]
    packed = [(replace(spec, name=spec.name.replace("model.", prefix, 1)), role) for spec, role in experts()]
    packed += [weight(f"{prefix}layers.{n}.mlp.shared_expert.gate_proj", 512, 2048) for n in (0, 1, 10)]
    tied = replace(QWEN, tied=True)
    assert judge_engines(storage(kind), packed, tied, kept=kept) == judge_engines(storage(kind), packed, tied)


def test_a_broken_expression_in_a_list_means_nothing() -> None:
    assert find_listed(["re:(", "re:["], ["a.b"], (Match.REGEX,)) is None


def test_no_list_means_that_it_is_not_known() -> None:
    assert judge(BLOCK, "vllm", facts=replace(QWEN, tied=True)).note == ""
    assert judge(DYNAMIC, "vllm", facts=replace(QWEN, tied=True)).tp


@pytest.mark.parametrize(
    ("kept", "packed"),
    [
        (f"{LAYER}.self_attn.q_proj", [weight(f"{LAYER}.self_attn.k_proj", 256, 256)]),
        (f"{LAYER}.mlp.gate_proj", [weight(f"{LAYER}.mlp.up_proj", 256, 256)]),
        (f"{LAYER}.mlp.experts.0.up_proj", [weight(f"{LAYER}.mlp.experts.1.down_proj", 256, 256)]),
    ],
)
def test_fused_modules_are_fp8_in_all_of_their_parts_or_in_none(kept: str, packed: Packed) -> None:
    for engine in ("vllm", "sglang", "tensorrt-llm", "tgi", "lmdeploy"):
        verdict = judge(BLOCK, engine, packed, kept=[kept])
        assert verdict.tp == ()
        assert f"{kept} is not, which it fuses into" in verdict.reason
        assert verdict.remedy == f"--ignore {packed[0][0].name.removesuffix('.weight')}"
    assert judge(BLOCK, "transformers", packed, kept=[kept]).tp


def test_vllm_wants_the_v_proj_in_the_list_that_a_shared_projection_does_not_have() -> None:
    attention, packed = f"{LAYER}.self_attn", [weight(UP, 256, 256)]
    kept = [f"{attention}.q_proj", f"{attention}.k_proj"]
    verdict = judge(DYNAMIC, "vllm", packed, kept=kept)
    assert verdict.tp == ()
    assert f"without {attention}.v_proj" in verdict.reason
    for added in (f"{attention}.v_proj", f"{attention}.qkv_proj", "re:.*self_attn.*"):
        assert judge(DYNAMIC, "vllm", packed, kept=[*kept, added]).tp
    assert judge(DYNAMIC, "sglang", packed, kept=kept).tp


@pytest.mark.parametrize(
    ("kind", "engine"),
    [(DYNAMIC, "vllm"), ("modelopt tensor static", "vllm"), (BLOCK, "transformers")],
)
def test_a_tied_head_must_be_listed(kind: str | Storage, engine: str) -> None:
    tied = replace(QWEN, tied=True)
    verdict = judge(kind, engine, facts=tied, kept=[f"{LAYER}.linear_attn.b"])
    assert verdict.tp == ()
    assert verdict.reason.startswith("lm_head is tied")
    assert judge(kind, engine, facts=tied, kept=["lm_head"]).tp
    assert judge(kind, engine, kept=[f"{LAYER}.linear_attn.b"]).tp


def test_a_tied_head_cannot_be_fp8() -> None:
    packed = [*dense(), weight("lm_head", 256, 256, "logits")]
    verdict = judge(DYNAMIC, "sglang", packed, replace(QWEN, tied=True))
    assert verdict.tp == ()
    assert verdict.reason == "lm_head.weight is FP8, and config.json ties it to the embedding"
    assert judge(DYNAMIC, "sglang", packed).tp


def test_lists_are_compared_fast_enough_for_a_mixture_of_experts() -> None:
    """One expert stands for all of its layer: the comparisons do not grow with their number."""
    entries = [f"model.layers.{n}.mlp.gate" for n in range(60)]
    packed = [weight(f"model.layers.{n}.mlp.experts.{i}.up_proj", 256, 256) for n in range(60) for i in range(64)]
    assert judge("modelopt tensor static", "vllm", packed, kept=entries).tp


# GPUs.


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
        with pytest.raises(RecipeError, match="is not known: choose v100, t4, a100"):
            parse_gpu(text)
    with pytest.raises(RecipeError, match="mi355x"):
        judge_engines(BLOCK, dense(), QWEN, gpu="rtx9999")


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


# Scales of K and V.


@pytest.mark.parametrize(
    ("kind", "engine", "architecture", "words"),
    [
        ("fp8 block:128x128 dynamic", "vllm", "Qwen3MoeForCausalLM", "drops the scales of K and V"),
        (
            "compressed-tensors channel dynamic",
            "vllm",
            "Qwen3_5ForConditionalGeneration",
            "drops the scales of K and V",
        ),
        ("compressed-tensors channel dynamic", "vllm", "Qwen3ForCausalLM", ""),
        ("fp8 block:128x128 dynamic", "vllm", "Qwen3ForCausalLM", "--kv-cache-dtype fp8"),
        ("fp8 block:128x128 dynamic", "sglang", "Qwen3ForCausalLM", "--kv-cache-dtype fp8_e4m3"),
        ("modelopt tensor static", "tensorrt-llm", "Qwen3ForCausalLM", "TRTLLM_LOAD_KV_SCALES=1"),
        ("fp8 block:128x128 dynamic", "tensorrt-llm", "Qwen3ForCausalLM", "KV scales unused"),
        ("fp8 block:128x128 dynamic", "transformers", "Qwen3ForCausalLM", "KV scales unused"),
        ("fp8 block:128x128 dynamic", "lmdeploy", "Qwen3ForCausalLM", "KV scales unused"),
        ("fp8 block:128x128 dynamic", "tgi", "Qwen3ForCausalLM", ""),
    ],
)
def test_what_becomes_of_kv_scales(kind: str, engine: str, architecture: str, words: str) -> None:
    facts = replace(QWEN, architecture=architecture)
    verdict, without = (judge(storage(kind, kv_cache=cache), engine, facts=facts) for cache in (True, False))
    assert verdict.tp
    assert words in verdict.note
    assert (verdict.note == without.note) == (not words)


# Targets and schemes.


def test_targets_are_named_in_any_case() -> None:
    assert parse_targets(["vLLM", "TensorRT_LLM", "trtllm", "ComfyUI", "cublasLt"]) == (
        "vllm",
        "tensorrt-llm",
        "tensorrt-llm",
        "comfyui",
        "cublaslt",
    )
    for unknown in ("mlx", "xtrtllm"):
        with pytest.raises(RecipeError, match="is not known: choose vllm, sglang"):
            parse_targets([unknown])


def test_a_target_that_cannot_load_it_is_an_error_with_the_remedy() -> None:
    verdicts = judge_engines(DYNAMIC, dense(), QWEN)
    check_targets(verdicts, DYNAMIC, ("vllm", "sglang"))
    with pytest.raises(RecipeError) as caught:
        check_targets(verdicts, DYNAMIC, ("vllm", "lmdeploy"))
    expected = "LMDeploy cannot load channel scales in compressed-tensors: block scales only: use --scheme FP8_BLOCK"
    assert str(caught.value) == expected


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
        reason == f"auto: vLLM: {LAYER}.mlp.experts.0.gate_proj.weight has N = 768, and 768 / 4 is no multiple of 128"
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
    assert reason == "auto: model.layers.1.self_attn.q_proj.weight is 192 x 256, no multiple of 128"
    scheme, reason = choose_scheme(Request(targets=("lmdeploy",)), ragged, QWEN)
    assert scheme == FP8_BLOCK
    assert reason == "auto: 3 weights stay that do not fit the block:128x128 of LMDeploy"


@pytest.mark.parametrize(
    ("targets", "facts", "asked", "message"),
    [
        (
            ("lmdeploy", "sglang"),
            LLAMA,
            {},
            "no scheme serves both LMDeploy (block scales only) and SGLang (its Llama loader loses block scales): "
            "pack twice",
        ),
        (
            ("vllm", "tensorrt-llm", "transformers"),
            QWEN,
            {"activations": "static"},
            "no scheme serves both TensorRT-LLM (it refuses tensor scales there) and transformers (it has no reader "
            "for modelopt and takes the bytes for weights without scales): pack twice",
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
            "no scheme serves SGLang, vLLM, transformers at once: pack twice",
        ),
    ],
)
def test_targets_that_exclude_each_other_are_named(
    targets: tuple[str, ...], facts: ModelFacts, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        choose_scheme(Request(targets=targets, **asked), dense(), facts)
    assert str(caught.value) == message


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


# Scales on disk.

UP_WEIGHT = f"{UP}.weight"


@pytest.mark.parametrize(
    ("kind", "suffix", "dtype", "shape"),
    [
        ("fp8 block:128x128 dynamic", "_scale_inv", "F32", (2, 3)),
        ("fp8 block:128x128 dynamic", "_scale_inv", "BF16", (2, 3)),
        ("fp8 tensor static", "_scale", "F32", ()),
        ("fp8/transformers tensor static", "_scale_inv", "F32", ()),
        ("compressed-tensors channel dynamic", "_scale", "F32", (256, 1)),
        ("compressed-tensors tensor static", "_scale", "BF16", (1,)),
        ("compressed-tensors mx dynamic", "_scale", "U8", (256, 12)),
        ("modelopt tensor static", "_scale", "F32", ()),
        ("modelopt tensor static", "_scale", "F32", (1,)),
        ("modelopt mx dynamic", "_scale", "U8", (256, 12)),
        ("modelopt channel dynamic", "_scale", "F32", (256,)),
        ("modelopt block:128x128 dynamic", "_scale", "F32", (2, 1, 3, 1)),
        ("mxfp8 mx dynamic", "_scale_inv", "U8", (256, 12)),
        ("quark tensor static", "_scale", "F32", ()),
        ("quark mx dynamic", "_scale", "U8", (256, 12)),
        ("quark channel dynamic", "_scale", "F32", (256,)),
        ("quark block:128x128 dynamic", "_scale", "F8_E8M0", (2, 3)),
        ("fbgemm_fp8 channel dynamic", "_scale", "F32", (256, 1)),
        ("comfyui tensor dynamic", "_scale", "F32", ()),
    ],
)
def test_scales_have_the_name_dtype_and_shape_that_readers_want(
    kind: str, suffix: str, dtype: str, shape: tuple[int, ...]
) -> None:
    stored, weight_shape = storage(kind), (256, 384)
    good = Stored(UP_WEIGHT + suffix, dtype, shape)
    assert scale_problem(stored, UP_WEIGHT, weight_shape, good) is None
    wrong = [
        (replace(good, name=f"{UP}.scale"), "is not called"),
        (replace(good, dtype="F64"), "is F64, not"),
        (replace(good, shape=(1, 1)), r"is \[1, 1\], not"),
    ]
    for scale, words in wrong:
        problem = scale_problem(stored, UP_WEIGHT, weight_shape, scale)
        assert problem is not None
        assert words.replace("\\", "") in problem


def test_scales_of_other_conventions_are_not_judged() -> None:
    assert scale_problem(storage("fp8pack group:64 dynamic"), "w", (64, 64), Stored("s", "F32", (64, 1))) is None


# The tables, and the page that is made from them.


def test_every_rule_says_where_it_was_read_and_why() -> None:
    for rule in (*READERS, *WEIGHTS, *EXPERTS, *ON_GPU, *KV_CACHE):
        assert rule.engine in NAMES
        assert rule.source
        assert rule.loads or rule.text
        assert not rule.loads or not rule.remedy
    assert all(row.source and row.engine in NAMES for row in LISTS)
    assert all(row.source for row in SCALES)
    assert all(source for _, source, _ in PARTIAL_BLOCKS.values())
    assert all(ROUNDS_ON_SM100.values())
    assert VERSIONS.keys() == NAMES.keys()


def test_only_what_tests_of_libraries_ran_counts_as_run() -> None:
    run = {(rule.engine, kind) for rule in READERS if rule.evidence == Evidence.RUN for kind in rule.kinds.split(", ")}
    kinds = (
        "channel dynamic",
        "channel none",
        "mx dynamic",
        "block:128x128 dynamic",
        "tensor dynamic",
        "tensor static",
    )
    expected = {("transformers", f"compressed-tensors {kind}") for kind in kinds}
    others = ("fp8 block:128x128 dynamic", "fp8/transformers tensor dynamic", "mxfp8 mx dynamic", "torchao *")
    assert run == expected | {("transformers", kind) for kind in others}
    assert not any(rule.evidence == Evidence.RUN for rule in (*WEIGHTS, *ON_GPU, *KV_CACHE))
    refused = [rule.engine for rule in (*EXPERTS, *WRAPPERS) if rule.evidence == Evidence.RUN]
    assert refused == ["transformers"] * 3  # tests/interop/test_methods.py


def test_every_rule_of_a_gpu_names_one_that_is_known() -> None:
    known = {gpu.arch for gpu in GPUS.values()} | {"any"}
    for rule in ON_GPU:
        for arch in rule.only:
            assert arch in known or any(candidate.startswith(arch.rstrip("*")) for candidate in known), arch


def test_entries_are_names_globs_or_expressions() -> None:
    assert is_understood("a.b", ())
    assert not is_understood("a.*", (Match.WHOLE, Match.REGEX))
    assert is_understood("a.*", (Match.GLOB_OF_PART,))
    assert not is_understood("re:a", (Match.GLOB,))
    assert is_understood("re:a", (Match.REGEX,))


def test_the_page_of_engines_is_the_one_that_the_rules_make() -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert (ROOT / "docs" / "engines.md").read_text(encoding="utf-8") == generate["engines_text"]()


def test_the_page_of_engines_shows_every_kind_of_storage() -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    assert {f"| `{kind}` |" in page for kind in generate["KINDS"]} == {True}
    assert {kind.split()[0] for kind in READ_BY} <= {kind.split()[0] for kind in generate["KINDS"]}
    assert CHANNEL.name in page
