"""What engines load, rule by rule: each case fails when its rule is taken away."""

from dataclasses import replace

import pytest
from engines.engine_cases import (
    BLOCK,
    DYNAMIC,
    LAYER,
    LLAMA,
    LLM_ENGINES,
    QWEN,
    READ_BY,
    UP,
    Packed,
    dense,
    experts,
    judge,
    storage,
    weight,
)

from fp8pack.engines.case import TP_SIZES, make_case
from fp8pack.engines.ignore_list import Match, find_listed
from fp8pack.engines.judge import judge_engines
from fp8pack.engines.known import BY_ID, ENGINES
from fp8pack.engines.module_names import spellings
from fp8pack.modelfacts.model import ModelFacts
from fp8pack.modelfacts.storage import Storage
from fp8pack.modelfacts.tensor_parallel import tp_problem
from fp8pack.numerics.formats import E5M2
from fp8pack.numerics.granularity import BLOCK_128

# Who reads what.


@pytest.mark.parametrize("kind", READ_BY)
def test_who_reads_what(kind: str) -> None:
    verdicts = judge_engines(make_case(storage(kind), dense(), QWEN))
    assert {verdict.engine for verdict in verdicts if verdict.tp} == set(READ_BY[kind].split())
    for verdict in verdicts:
        assert bool(verdict.reason) == (not verdict.tp)
        assert "\n" not in verdict.reason + verdict.note


@pytest.mark.parametrize(
    ("kind", "engine", "note"),
    [
        ("fp8 block:128x128 dynamic", "transformers", "with accelerate"),
        ("compressed-tensors channel dynamic", "transformers", "with compressed-tensors"),
        ("torchao channel dynamic", "vllm", "with torchao"),
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
        ("fp8 tensor dynamic", "transformers", "looks for weight_scale_inv", "--quant-method compressed-tensors"),
        ("fp8 tensor dynamic", "tensorrt-llm", "means block scales there", "--scheme FP8_DYNAMIC"),
        ("fp8 tensor dynamic", "lmdeploy", "without its scale", "--scheme FP8_BLOCK"),
        ("fp8 block:128x128 static", "vllm", "dynamic activations only", "--scheme FP8_BLOCK"),
        ("fp8/transformers tensor dynamic", "vllm", "looks for weight_scale,", "--quant-method compressed-tensors"),
        ("fp8/transformers tensor dynamic", "sglang", "only its Llama classes", "--quant-method compressed-tensors"),
        ("fp8/transformers tensor dynamic", "tgi", "looks for weight_scale", "--quant-method compressed-tensors"),
        ("modelopt tensor static", "tgi", "no reader for modelopt", "--quant-method compressed-tensors"),
        ("compressed-tensors tensor static", "tensorrt-llm", "refuses tensor scales", "--quant-method modelopt"),
        ("compressed-tensors channel none", "tensorrt-llm", "asks for input_activations", "--scheme FP8_DYNAMIC"),
        ("compressed-tensors block:128x128 dynamic", "tgi", "tensor and channel scales only", "--quant-method fp8"),
        ("compressed-tensors block:128x128 dynamic", "lmdeploy", "quant_method fp8 only", "--quant-method fp8"),
        ("compressed-tensors block:128x128 static", "vllm", "dynamic activations only", "--scheme FP8_BLOCK"),
        ("compressed-tensors group:64 dynamic", "vllm", "tensor, channel and block", "--scheme FP8_DYNAMIC"),
        ("compressed-tensors mx dynamic", "sglang", "no MXFP8 in compressed-tensors", "--quant-method modelopt"),
        ("modelopt tensor static", "transformers", "no reader for modelopt", "--quant-method compressed-tensors"),
        (
            "modelopt channel dynamic",
            "sglang",
            "static tensor scales and MXFP8 only",
            "--quant-method compressed-tensors",
        ),
        ("mxfp8 mx dynamic", "vllm", "only its MiniMax-M3 class", "--quant-method compressed-tensors"),
        (
            "quark block:128x128 dynamic",
            "sglang",
            "Quark's files say weight_scale",
            "--quant-method compressed-tensors",
        ),
        (
            "fbgemm_fp8 channel dynamic",
            "sglang",
            "no reader for channel scales in fbgemm_fp8",
            "--quant-method compressed-tensors",
        ),
        ("fp8 block:128x128 dynamic", "comfyui", "single files", "--scheme FP8_SCALED"),
        ("compressed-tensors channel none", "cublaslt", "multiplies FP8 by FP8", "--scheme FP8_DYNAMIC"),
        ("fp8pack group:64 dynamic", "cublaslt", "no such mode", "--scheme FP8_DYNAMIC"),
        ("fp8pack tensor dynamic", "vllm", "only load_packed() reads", "--quant-method compressed-tensors"),
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
        assert verdict.remedy.startswith("--scheme FP8_")
    assert judge(storage("comfyui tensor dynamic", format=E5M2), "comfyui").tp
    assert judge(storage("fp8pack tensor dynamic", format=E5M2), "cublaslt").tp
    assert not judge(storage("fp8pack mx dynamic", format=E5M2), "cublaslt").tp


def test_llm_engines_ask_for_an_architecture_and_load_packed_does_not() -> None:
    assert judge(BLOCK, "vllm", facts=ModelFacts()).reason == "no config.json names an architecture"
    assert judge(BLOCK, "cublaslt", facts=ModelFacts()).tp
    assert judge("comfyui tensor dynamic", "comfyui", facts=ModelFacts()).tp


# Classes with peculiarities.


@pytest.mark.parametrize("architecture", BY_ID["sglang"].renaming)
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
    assert verdict.reason == f"its {BY_ID['sglang'].renaming[architecture]} loader loses {lost}"
    assert verdict.remedy == "--quant-method compressed-tensors" or " mx " in kind
    assert judge(kind, "sglang").tp


@pytest.mark.parametrize("kind", ["compressed-tensors block:128x128 dynamic", "fp8 tensor dynamic"])
def test_sglangs_llama_family_reads_what_is_named_weight_scale(kind: str) -> None:
    assert judge(kind, "sglang", facts=LLAMA).tp


def test_renaming_classes_read_the_spelling_of_transformers() -> None:
    for architecture in BY_ID["sglang"].renaming:
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
    assert verdict.reason == f"{LAYER}.mlp.experts.0.gate_proj.weight has N = 768, and 768 / 4 is not a multiple of 128"
    assert verdict.remedy == "--scheme FP8_DYNAMIC, or serve with expert parallelism"


def test_a_cut_along_k_is_named() -> None:
    verdict = judge(BLOCK, "vllm", [weight(f"{LAYER}.mlp.experts.0.down_proj", 2048, 768)], tp=4)
    assert verdict.reason == f"{LAYER}.mlp.experts.0.down_proj.weight has K = 768, and 768 / 4 is not a multiple of 128"
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
    assert verdict.reason == f"{LAYER}.mlp.gate_proj.weight has N = 1040, and 1040 / 2 is not a multiple of 16"
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
    assert "K = 96, and 96 / 2 is not a multiple of 32" in verdict.reason


@pytest.mark.parametrize("engine", [engine.id for engine in ENGINES if engine.loads_whole])
def test_some_load_whole_weights(engine: str) -> None:
    kind = "comfyui tensor dynamic" if engine == "comfyui" else BLOCK
    assert judge(kind, engine, experts(), tp=None).tp == (1,)


def test_mx_needs_k_in_groups_of_32() -> None:
    for engine in ("vllm", "sglang", "tensorrt-llm"):
        verdict = judge("modelopt mx dynamic", engine, [weight(f"{LAYER}.mlp.up_proj", 64, 48)])
        assert verdict.reason == f"{LAYER}.mlp.up_proj.weight has K = 48, not a multiple of 32"
        assert verdict.remedy == "--scheme FP8_DYNAMIC"


@pytest.mark.parametrize("shape", [(24, 64), (64, 24)])
def test_fp8_gemms_need_multiples_of_16(shape: tuple[int, int]) -> None:
    packed = [weight(f"{LAYER}.mlp.up_proj", *shape)]
    verdict = judge(DYNAMIC, "vllm", packed)
    assert verdict.tp == ()
    assert f"{shape[0]} x {shape[1]}, not a multiple of 16" in verdict.reason
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
    verdicts = judge_engines(make_case(BLOCK, [weight(f"{LAYER}.{name}", *shape)], QWEN, tp=1))
    assert {verdict.engine for verdict in verdicts if verdict.tp} == {*engines.split(), "cublaslt"}
    refused = {verdict.engine: verdict for verdict in verdicts if "not a multiple of 128" in verdict.reason}
    assert set(refused) == {*LLM_ENGINES} - set(engines.split())
    same_scales = "--quant-method quark" if "experts" in name else "--quant-method compressed-tensors"
    others = {"lmdeploy": "", "transformers": same_scales}
    for engine, verdict in refused.items():
        assert verdict.remedy == others.get(engine, "--scheme FP8_DYNAMIC")


def test_compressed_tensors_cuts_partial_blocks_itself() -> None:
    packed = [weight(f"{LAYER}.self_attn.q_proj", 192, 256)]
    assert judge("compressed-tensors block:128x128 dynamic", "transformers", packed).tp


# What stays.


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
        (BLOCK, "transformers", "proj", True),
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
    verdict = judge(kind, engine, packed, ignored=["lm_head", entry])
    assert bool(verdict.tp) != meant
    if meant:
        assert entry in verdict.reason or entry == UP
        assert UP in verdict.reason
        assert verdict.remedy == f"--ignore {UP}"


def test_the_fused_name_counts_and_the_remedy_is_a_name_of_the_checkpoint() -> None:
    verdict = judge(BLOCK, "vllm", [weight(UP, 256, 256)], ignored=[f"{LAYER}.mlp.gate_up_proj"])
    assert f"also matches {LAYER}.mlp.gate_up_proj, which is FP8" in verdict.reason
    assert verdict.remedy == f"--ignore {UP}"
    verdict = judge("modelopt tensor static", "vllm", ignored=[f"{LAYER}.mlp.gate"])  # a router that hits gate_up_proj
    assert "ignore entry `model.layers.0.mlp.gate` also matches" in verdict.reason


def test_a_fused_module_whose_parts_are_ignored_is_not_known_to_a_list_of_torchao() -> None:
    parts = [f"vision_tower.layers.0.self_attn.{leaf}_proj" for leaf in "qkv"]
    verdict = judge("torchao channel none", "vllm", ignored=parts)
    assert verdict.loads is False
    assert "that vision_tower.layers.0.self_attn.qkv_proj is ignored where its parts are" in verdict.reason
    assert judge("torchao channel none", "vllm", ignored=["vision_tower.layers.0.self_attn.qkv_proj"]).loads
    assert judge(DYNAMIC, "vllm", ignored=parts).loads


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
    verdict = judge(kind, engine, ignored=[entry])
    assert verdict.tp
    assert f"ignore entry `{entry}` is no valid pattern for it" in verdict.note


@pytest.mark.parametrize("kind", READ_BY)
@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_full_names_satisfy_every_engine(kind: str, prefix: str) -> None:
    """Routers, towers and logits as fp8pack lists them, in all of their spellings, mean no FP8 module."""
    names = [f"{prefix}layers.{n}.mlp.{leaf}" for n in (0, 1, 10) for leaf in ("gate", "shared_expert_gate")]
    names += [f"model.vision_tower.layers.0.{leaf}_proj" for leaf in "qkv"]
    ignored = [spelling for name in (*names, "model.visual.merger", "lm_head") for spelling in spellings(name)]
    packed = [(replace(spec, name=spec.name.replace("model.", prefix, 1)), role) for spec, role in experts()]
    packed += [weight(f"{prefix}layers.{n}.mlp.shared_expert.gate_proj", 512, 2048) for n in (0, 1, 10)]
    tied = replace(QWEN, tied=True)
    listed, unlisted = (make_case(storage(kind), packed, tied, ignored=names) for names in (ignored, ()))
    assert judge_engines(listed) == judge_engines(unlisted)


def test_a_broken_expression_in_a_list_means_nothing() -> None:
    assert find_listed(["re:(", "re:["], ["a.b"], (Match.REGEX,)) is None


def test_no_list_means_that_it_is_not_known() -> None:
    assert judge(BLOCK, "vllm", facts=replace(QWEN, tied=True)).note == ""
    assert judge(DYNAMIC, "vllm", facts=replace(QWEN, tied=True)).tp


@pytest.mark.parametrize(
    ("ignored", "packed"),
    [
        (f"{LAYER}.self_attn.q_proj", [weight(f"{LAYER}.self_attn.k_proj", 256, 256)]),
        (f"{LAYER}.mlp.gate_proj", [weight(f"{LAYER}.mlp.up_proj", 256, 256)]),
        (f"{LAYER}.mlp.experts.0.up_proj", [weight(f"{LAYER}.mlp.experts.1.down_proj", 256, 256)]),
    ],
)
def test_fused_modules_are_fp8_in_all_of_their_parts_or_in_none(ignored: str, packed: Packed) -> None:
    for engine in ("vllm", "sglang", "tensorrt-llm", "tgi", "lmdeploy"):
        verdict = judge(BLOCK, engine, packed, ignored=[ignored])
        assert verdict.tp == ()
        assert f"{ignored} is not, but it fuses both into" in verdict.reason
        assert verdict.remedy == f"--ignore {packed[0][0].name.removesuffix('.weight')}"
    assert judge(BLOCK, "transformers", packed, ignored=[ignored]).tp


def test_vllm_wants_the_v_proj_in_the_list_that_a_shared_projection_does_not_have() -> None:
    attention, packed = f"{LAYER}.self_attn", [weight(UP, 256, 256)]
    ignored = [f"{attention}.q_proj", f"{attention}.k_proj"]
    verdict = judge(DYNAMIC, "vllm", packed, ignored=ignored)
    assert verdict.tp == ()
    assert f"but not {attention}.v_proj" in verdict.reason
    for added in (f"{attention}.v_proj", f"{attention}.qkv_proj", "re:.*self_attn.*"):
        assert judge(DYNAMIC, "vllm", packed, ignored=[*ignored, added]).tp
    assert judge(DYNAMIC, "sglang", packed, ignored=ignored).tp


@pytest.mark.parametrize(
    ("kind", "engine"),
    [(DYNAMIC, "vllm"), ("modelopt tensor static", "vllm"), (BLOCK, "transformers")],
)
def test_a_tied_head_must_be_listed(kind: str | Storage, engine: str) -> None:
    tied = replace(QWEN, tied=True)
    verdict = judge(kind, engine, facts=tied, ignored=[f"{LAYER}.linear_attn.b"])
    assert verdict.tp == ()
    assert verdict.reason.startswith("lm_head is tied")
    assert judge(kind, engine, facts=tied, ignored=["lm_head"]).tp
    assert judge(kind, engine, ignored=[f"{LAYER}.linear_attn.b"]).tp


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
    assert judge("modelopt tensor static", "vllm", packed, ignored=entries).tp


# Scales of K and V.


@pytest.mark.parametrize(
    ("kind", "engine", "architecture", "words"),
    [
        ("fp8 block:128x128 dynamic", "sglang", "Qwen2ForCausalLM", "drops the scales of K and V"),
        ("compressed-tensors channel dynamic", "sglang", "Qwen3MoeForCausalLM", "drops the scales of K and V"),
        ("compressed-tensors channel dynamic", "sglang", "MixtralForCausalLM", "drops the scales of K and V"),
        ("compressed-tensors channel dynamic", "vllm", "Qwen3MoeForCausalLM", ""),
        ("compressed-tensors channel dynamic", "vllm", "Qwen3_5ForConditionalGeneration", ""),
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
