"""Plans from headers alone: schemes, groups, rules, layout, engines."""

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from fp8pack.checkpoint.quant_methods import find_method
from fp8pack.errors import RecipeError
from fp8pack.modelfacts.contents import Contents
from fp8pack.modelfacts.model import ModelFacts
from fp8pack.modelfacts.patterns import Pattern
from fp8pack.modelfacts.spec import TensorSpec
from fp8pack.numerics.granularity import CHANNEL, TENSOR, parse_granularity
from fp8pack.planning.decide import decide
from fp8pack.planning.make_plan import choose_recipe, make_plan
from fp8pack.planning.plan import PackPlan
from fp8pack.planning.recipe import Request, Rule, RuleAction
from fp8pack.planning.recipe_file import make_request

QWEN = ModelFacts("Qwen3ForCausalLM", "qwen3", num_layers=2, head_dim=128, num_kv_heads=8)
Shapes = dict[str, tuple[int, ...]]


def model(layers: int = 2, hidden: int = 1024, kv: int = 1024, intermediate: int = 2048) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (512, hidden), "lm_head.weight": (512, hidden)}
    for i in range(layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        shapes |= {f"{attention}.q_proj.weight": (hidden, hidden), f"{attention}.o_proj.weight": (hidden, hidden)}
        shapes |= {f"{attention}.k_proj.weight": (kv, hidden), f"{attention}.v_proj.weight": (kv, hidden)}
        shapes |= {f"{mlp}.gate_proj.weight": (intermediate, hidden), f"{mlp}.up_proj.weight": (intermediate, hidden)}
        shapes |= {
            f"{mlp}.down_proj.weight": (hidden, intermediate),
            f"model.layers.{i}.input_layernorm.weight": (hidden,),
        }
    return shapes


def specs_of(shapes: Shapes, file: str = "model.safetensors") -> list[TensorSpec]:
    specs, begin = [], 4096
    for name, shape in shapes.items():
        end = begin + 2 * prod(shape)
        specs.append(TensorSpec(name, "BF16", shape, file, begin, end))
        begin = end
    return specs


def plan_of(shapes: Shapes, facts: ModelFacts = QWEN, request: Request | None = None, **changes: Any) -> PackPlan:
    asked = replace(request or Request(), **changes)
    contents = Contents("", tuple(specs_of(shapes)), facts)
    decisions = decide(contents, asked)
    recipe = choose_recipe(decisions, facts, asked)
    return make_plan(decisions, contents, asked, recipe=recipe, method=find_method(recipe, asked.rules))


def reasons(plan: PackPlan) -> dict[str, str]:
    return {tensor.spec.name: tensor.reason for tensor in plan.tensors if tensor.packing is None}


def test_auto_takes_block_scales_when_every_dimension_is_a_multiple_of_128() -> None:
    plan = plan_of(model())
    assert (plan.recipe.scheme, plan.recipe.quant_method) == ("FP8_BLOCK", "fp8")
    assert plan.recipe.reason == "auto: every packed dimension is a multiple of 128"


def test_auto_takes_channel_scales_for_ragged_dimensions() -> None:
    plan = plan_of(model(intermediate=2000))
    assert plan.recipe.scheme == "FP8_DYNAMIC"
    assert "gate_proj.weight is 2000 x 1024, not a multiple of 128" in plan.recipe.reason
    assert len(plan.packed) == 14


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM"])
def test_auto_avoids_loaders_that_lose_block_scales_unless_they_are_no_target(architecture: str) -> None:
    facts = replace(QWEN, architecture=architecture)
    assert plan_of(model(), facts).recipe.reason.startswith("auto: SGLang's")
    assert plan_of(model(), facts, targets=("vllm",)).recipe.scheme == "FP8_BLOCK"


@pytest.mark.parametrize(
    "architecture", ["Qwen2ForCausalLM", "Gemma2ForCausalLM", "PhiForCausalLM", "MixtralForCausalLM"]
)
def test_auto_keeps_block_scales_for_families_whose_loaders_read_them(architecture: str) -> None:
    assert plan_of(model(), replace(QWEN, architecture=architecture)).recipe.scheme == "FP8_BLOCK"


def test_auto_looks_at_the_tensor_parallel_size_that_is_asked_for() -> None:
    facts = replace(QWEN, num_kv_heads=0)
    assert plan_of(model(intermediate=1408), facts).recipe.scheme == "FP8_BLOCK"
    plan = plan_of(model(intermediate=1408), facts, tp=2)
    assert plan.recipe.scheme == "FP8_DYNAMIC"
    assert "1408 / 2 is not a multiple of 128" in plan.recipe.reason


def test_moe_sizes_that_do_not_split_are_named() -> None:
    shapes = {
        f"model.layers.0.mlp.experts.{i}.{leaf}.weight": (768, 2048)
        for i in range(4)
        for leaf in ("gate_proj", "up_proj")
    }
    plan = plan_of(shapes, replace(QWEN, architecture="Qwen3MoeForCausalLM"))
    vllm = next(verdict for verdict in plan.engines if verdict.engine == "vllm")
    assert vllm.tp == (1, 2)
    assert "N = 768, and 768 / 4 is not a multiple of 128" in vllm.reason


def test_replicated_key_heads_do_not_hinder_tensor_parallelism() -> None:
    plan = plan_of(model(kv=256), replace(QWEN, num_kv_heads=2))
    assert next(verdict for verdict in plan.engines if verdict.engine == "vllm").tp == (1, 2, 4, 8)


def test_heads_must_spread_over_the_gpus() -> None:
    facts = replace(QWEN, num_heads=12, num_kv_heads=4)
    assert next(v for v in plan_of(model(), facts).engines if v.engine == "vllm").tp == (1, 2, 4)
    with pytest.raises(RecipeError, match="12 attention heads with 4 key heads do not spread over 8 GPUs"):
        plan_of(model(), facts, scheme="FP8_DYNAMIC", targets=("vllm",), tp=8)


def test_no_engine_loads_a_checkpoint_whose_config_names_no_architecture() -> None:
    plan = plan_of(model(), ModelFacts())
    assert all(not verdict.tp for verdict in plan.engines if verdict.engine not in ("comfyui", "cublaslt"))
    with pytest.raises(RecipeError, match="names an architecture"):
        plan_of(model(), ModelFacts(), targets=("vllm",))


def test_a_pattern_of_pack_that_packs_nothing_is_an_error() -> None:
    with pytest.raises(RecipeError, match="matches no tensor that can be quantized") as caught:
        plan_of(model(), pack=(Pattern("*norm*"),))
    assert caught.value.command_hint == "name 2-D float weights; --pack '?*norm*' also accepts no match"
    plan_of(model(), pack=(Pattern("?*norm*"),))


def test_only_a_part_of_a_fused_group_says_why_nothing_is_packed() -> None:
    with pytest.raises(RecipeError, match="ignored with k_proj: engines fuse the two"):
        plan_of(model(), only=(Pattern("*.q_proj"),))


def test_a_ragged_member_keeps_its_whole_fused_group_under_fp8() -> None:
    plan = plan_of(model(kv=192), scheme="FP8_BLOCK")
    kept = reasons(plan)
    assert (
        "192 x 1024 is not a multiple of 128: --scheme FP8_DYNAMIC packs it"
        in kept["model.layers.0.self_attn.k_proj.weight"]
    )
    assert kept["model.layers.0.self_attn.q_proj.weight"].startswith("ignored with k_proj: engines fuse the two")
    assert "model.layers.0.self_attn.o_proj.weight" not in kept
    assert {f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv"} <= set(plan.ignored_modules)


def test_our_own_convention_packs_ragged_edges() -> None:
    plan = plan_of(model(kv=192), scheme="FP8_BLOCK", quant_method="fp8pack")
    assert len(plan.packed) == 14


def test_one_ignored_expert_keeps_the_experts_of_its_layer() -> None:
    shapes = {f"model.layers.{n}.mlp.experts.{i}.up_proj.weight": (256, 128) for n in range(2) for i in range(3)}
    plan = plan_of(shapes, ignore=(Pattern("model.layers.0.mlp.experts.1.up_proj"),))
    assert [tensor.spec.name.split(".")[2] for tensor in plan.packed] == ["1", "1", "1"]


def test_ignore_only_and_pack_do_what_they_say() -> None:
    plan = plan_of(
        model(), scheme="FP8_DYNAMIC", pack=(Pattern("lm_head"),), only=(Pattern("*mlp*"), Pattern("lm_head"))
    )
    assert {tensor.spec.name for tensor in plan.packed} == {
        "lm_head.weight",
        *(f"model.layers.{i}.mlp.{leaf}_proj.weight" for i in range(2) for leaf in ("gate", "up", "down")),
    }
    assert reasons(plan)["model.layers.0.self_attn.q_proj.weight"] == "not matched by --only"


def test_first_and_last_layers_stay_when_the_recipe_says_so() -> None:
    plan = plan_of(model(layers=4), replace(QWEN, num_layers=4), keep_first_layers=1, keep_last_layers=2)
    assert {tensor.spec.name.split(".")[2] for tensor in plan.packed} == {"1"}


def test_packing_what_is_no_matrix_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"input_layernorm.weight is BF16 \[1024\], and only 2-D float") as caught:
        plan_of(model(), pack=(Pattern("model.layers.0.input_layernorm"),))
    assert caught.value.command_hint == "leave out --pack model.layers.0.input_layernorm"


def test_a_glob_of_pack_passes_over_what_is_no_matrix() -> None:
    assert len(plan_of(model(), scheme="FP8_DYNAMIC", pack=(Pattern("*"),)).packed) == 16


def test_keeping_everything_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"^nothing to pack: no linear weight .*: ignore \*$"):
        plan_of(model(), ignore=(Pattern("*"),))


def test_shapes_that_leave_nothing_to_pack_have_the_scheme_that_packs_them_as_a_hint() -> None:
    shapes = {f"model.layers.0.mlp.{leaf}_proj.weight": (192, 192) for leaf in ("gate", "up", "down")}
    with pytest.raises(RecipeError, match="192 x 192 is not a multiple of 128") as caught:
        plan_of(shapes, scheme="FP8_BLOCK")
    assert caught.value.command_hint == "--scheme FP8_DYNAMIC packs it"
    assert "--" not in str(caught.value)
    plan_of(shapes, scheme="FP8_DYNAMIC")


def test_rules_may_mix_granularities_under_our_own_convention_only() -> None:
    rules = (Rule(Pattern("*down_proj"), RuleAction.PACK, granularity=CHANNEL),)
    plan = plan_of(model(), quant_method="fp8pack", granularity=TENSOR, rules=rules)
    found = {t.packing.granularity.name for t in plan.packed if t.packing and t.spec.name.endswith("down_proj.weight")}
    assert found == {"channel"}
    with pytest.raises(RecipeError, match="one format and granularity for all") as caught:
        plan_of(model(), rules=rules)
    assert caught.value.hint == "use quant_method='fp8pack'"


def test_a_recipe_file_is_a_request(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "scheme: FP8_DYNAMIC\nignore: ['*o_proj']\nkeep_first_layers: 1\nrules:\n- {match: '*up_proj', action: keep}\n"
    )
    request = make_request(recipe)
    plan = plan_of(model(), request=request)
    assert {tensor.spec.name.rsplit(".", 2)[1] for tensor in plan.packed} == {"q_proj", "k_proj", "v_proj", "down_proj"}


@pytest.mark.parametrize(
    "text", ["schema: FP8", "keep_first_layers: -1", "- a list", "format: e3m4", "a: [", "rules: [{}]"]
)
def test_a_wrong_recipe_file_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        make_request(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said", "hint"),
    [
        ({"format": "e5m2", "quant_method": "fp8"}, "fp8 does not support e5m2 with block", "fp8pack"),
        ({"granularity": "group:64", "quant_method": "modelopt"}, "modelopt does not", "compressed-tensors or fp8pack"),
        ({"scheme": "FP8_BLOCK", "quant_method": "mxfp8"}, "mxfp8 does not", "fp8 or compressed-tensors"),
    ],
)
def test_what_a_convention_cannot_express_is_refused(changes: dict[str, str], said: str, hint: str) -> None:
    from fp8pack.numerics.formats import parse_format

    typed: dict[str, Any] = dict(changes)
    if "format" in typed:
        typed["format"] = parse_format(typed["format"])
    if "granularity" in typed:
        typed["granularity"] = parse_granularity(typed["granularity"])
    with pytest.raises(RecipeError, match=said) as caught:
        plan_of(model(), **typed)
    assert caught.value.command_hint.startswith(f"use --quant-method {hint}")


def test_a_target_that_cannot_load_the_output_is_named_with_the_remedy() -> None:
    with pytest.raises(
        RecipeError, match=r"LMDeploy 02f556b3 cannot load channel scales in compressed-tensors: block scales only$"
    ) as caught:
        plan_of(model(), scheme="FP8_DYNAMIC", targets=("lmdeploy",))
    assert caught.value.command_hint == "--scheme FP8_BLOCK"


def test_payloads_are_aligned_and_fused_members_lie_side_by_side() -> None:
    plan = plan_of(model(kv=128))
    shard = plan.shards[0]
    begins = dict(zip((stored.name for stored in shard.tensors), shard.begins, strict=True))
    ends = {stored.name: begins[stored.name] + stored.nbytes for stored in shard.tensors}
    assert all(begin % 16 == 0 for name, begin in begins.items() if name.endswith("proj.weight"))
    attention = "model.layers.0.self_attn"
    for suffix in ("weight", "weight_scale_inv"):
        assert ends[f"{attention}.q_proj.{suffix}"] == begins[f"{attention}.k_proj.{suffix}"]
        assert ends[f"{attention}.k_proj.{suffix}"] == begins[f"{attention}.v_proj.{suffix}"]
    assert max(ends.values()) == shard.nbytes


def test_a_size_limit_makes_shards_that_keep_scales_beside_their_weight() -> None:
    contents = Contents("", tuple(specs_of(model())), QWEN)
    decisions = decide(contents, Request())
    recipe = choose_recipe(decisions, QWEN, Request())
    method = find_method(recipe)
    plan = make_plan(decisions, contents, Request(), recipe=recipe, method=method, max_shard_nbytes=6 << 20)
    assert len(plan.shards) > 2
    assert plan.shards[0].file == f"model-00001-of-{len(plan.shards):05}.safetensors"
    for shard in plan.shards:
        assert shard.nbytes <= 6 << 20
        names = {stored.name for stored in shard.tensors}
        assert {f"{tensor.spec.name}_scale_inv" for tensor in plan.packed if tensor.spec.name in names} <= names


def test_many_unknown_linears_are_one_warning() -> None:
    plan = plan_of({f"model.layers.0.mixer.strange{i}.weight": (256, 256) for i in range(9)})
    assert len(plan.warnings) == 1
    assert plan.warnings[0].startswith("9 quantized weights have an unknown role, such as")
