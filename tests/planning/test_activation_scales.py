"""From a calibration to the scales that are stored, by sites small enough to count by hand."""

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf, nan, prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fp8pack.checkpoint.quant_methods import METHODS, find_method
from fp8pack.errors import Fp8PackError, InputError, RecipeError
from fp8pack.modelfacts.contents import Contents
from fp8pack.modelfacts.model import ModelFacts
from fp8pack.modelfacts.patterns import Pattern
from fp8pack.modelfacts.spec import Stored, TensorSpec
from fp8pack.numerics.formats import E4M3, E5M2, Float8Format
from fp8pack.numerics.granularity import parse_granularity
from fp8pack.planning.activation_scales import ActivationScale, ActivationScales
from fp8pack.planning.calibration import Calibration, Site
from fp8pack.planning.decide import decide
from fp8pack.planning.make_plan import choose_recipe, make_plan
from fp8pack.planning.plan import PackPlan
from fp8pack.planning.recipe import WRITABLE, ActivationOptions, Request, Rule, RuleAction
from fp8pack.planning.recipe_file import make_request

QWEN = ModelFacts("Qwen3ForCausalLM", "qwen3", num_layers=2, head_dim=64, num_heads=4, num_kv_heads=2)
LAYER = "model.layers.0"
EXPERTS = "model.layers.0.mlp.experts"
FILE = Path("calibration.safetensors")
Shapes = dict[str, tuple[int, ...]]


def bits(value: float) -> int:
    """The BF16 magnitude of a value that BF16 holds exactly."""
    rounded = np.array(value, ml_dtypes.bfloat16)
    assert float(rounded) == value
    return int(rounded.view(np.uint16)) & 0x7FFF


def site(*points: str, history: Sequence[float], tokens: int = 64, values: Mapping[float, int] | None = None) -> Site:
    """A site of one channel: the amax of each prompt, and the other values it saw."""
    counts = dict.fromkeys(filter(None, history), 1) | dict(values or {})
    counts[0.0] = counts.get(0.0, 0) + max(tokens - sum(counts.values()), 0)
    seen = {value: count for value, count in sorted(counts.items()) if count}
    return Site(
        points,
        sum(seen.values()) if tokens else 0,
        np.array([bits(value) for value in seen], np.uint16),
        np.array(list(seen.values()), np.int64),
        np.array([bits(max(seen, default=0.0))], np.uint16),
        np.ones(1),
        np.array([bits(value) for value in history], np.uint16),
    )


def calibration(*sites: Site, all_experts: Sequence[Site] = ()) -> Calibration:
    length = sites[0].prompt_amax.size if sites else 1
    return Calibration("f", tuple(f"p{i}" for i in range(length)), {}, sites, tuple(all_experts), "blake3:of-the-file")


def weight(module: str) -> tuple[str, Stored]:
    return f"{module}.weight", Stored(f"{module}.input_scale", "F32", ())


def inputs_of(
    found: Calibration, *modules: str, format: Float8Format = E4M3, **options: Any
) -> dict[str, ActivationScale]:
    """The scale of what enters each module."""
    scales = ActivationScales(found, ActivationOptions(**options), format)
    found_inputs = scales.of_inputs([weight(module) for module in modules])
    return {name.removesuffix(".weight"): scale for name, (scale, _) in found_inputs.items()}


def scale_by_hand(amax: float, largest: float = 448.0) -> float:
    """max(amax / largest, 2^-126) in float32; 1.0 for zero."""
    return float(max(np.float32(amax) / np.float32(largest), np.float32(2.0**-126))) if amax else 1.0


# From an amax to a scale.


@pytest.mark.parametrize(("format", "largest"), [(E4M3, 448.0), (E5M2, 57344.0)], ids=["e4m3", "e5m2"])
def test_the_scale_is_amax_over_the_largest_value_in_float32_exactly(format: Float8Format, largest: float) -> None:
    magnitudes = sorted({0, 1, 2, 0x7F, 0x80, 0x81, 0x3F80, 0x43E0, 0x7F7F, *range(0, 0x7F80, 61)})
    values = np.array(magnitudes, np.uint16).view(ml_dtypes.bfloat16).astype(np.float64).tolist()
    sites = [site(f"m.{i}.input", history=[value]) for i, value in enumerate(values)]
    scales = inputs_of(calibration(*sites), *(f"m.{i}" for i in range(len(values))), format=format)
    for i, value in enumerate(values):
        exact = max(value / largest, 2.0**-126) if value else 1.0
        assert scales[f"m.{i}"].scale == float(np.float32(exact)) == scale_by_hand(value, largest), value
        assert scales[f"m.{i}"].data == np.float32(exact).tobytes()
        assert scales[f"m.{i}"].amax == value


@pytest.mark.parametrize("margin", [-8, -1, 0, 1, 3, 8])
def test_a_margin_multiplies_the_scale_by_a_power_of_two_and_leaves_amax_alone(margin: int) -> None:
    found = calibration(site("m.input", history=[3.0, 5.5]))
    scale = inputs_of(found, "m", margin=margin)["m"]
    assert (scale.scale, scale.amax, scale.history) == (scale_by_hand(5.5) * 2.0**margin, 5.5, (3.0, 5.5))


@pytest.mark.parametrize("margin", [-8, 8])
def test_zeros_have_scale_one_whatever_the_margin(margin: int) -> None:
    assert inputs_of(calibration(site("m.input", history=[0.0, 0.0])), "m", margin=margin)["m"].scale == 1.0


def test_no_margin_makes_a_scale_that_gpus_flush_to_zero() -> None:
    """A subnormal scale is none: the smallest is 2^-126."""
    tiny = calibration(site("m.input", history=[2.0**-130]))
    assert inputs_of(tiny, "m", margin=0)["m"].scale == 2.0**-126
    assert inputs_of(tiny, "m", margin=-8)["m"].scale >= 2.0**-126


def test_the_largest_amax_and_margin_give_a_finite_scale() -> None:
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    scale = inputs_of(calibration(site("m.input", history=[largest])), "m", margin=8)["m"]
    assert np.isfinite(struct.unpack("<f", scale.data)[0])


@pytest.mark.parametrize(
    ("percentile", "expected"), [(100, 8.0), (99.9, 8.0), (90, 4.0), (89.9, 4.0), (60, 2.0), (60.1, 4.0), (1e-9, 1.0)]
)
def test_a_percentile_is_that_of_all_magnitudes(percentile: float, expected: float) -> None:
    found = calibration(site("m.input", history=[8.0, 4.0], tokens=10, values={1.0: 3, 2.0: 3, 4.0: 3, 8.0: 1}))
    scale = inputs_of(found, "m", percentile=percentile)["m"]
    assert (scale.amax, scale.scale, scale.history) == (expected, scale_by_hand(expected), (8.0, 4.0))


def test_warmup_leaves_prompts_out_of_amax_and_history() -> None:
    found = calibration(site("m.input", history=[100.0, 50.0, 3.0, 4.0, 2.0]))
    expected = {0: (100.0, (100.0, 50.0, 3.0, 4.0, 2.0)), 1: (50.0, (50.0, 3.0, 4.0, 2.0)), 4: (2.0, (2.0,))}
    for warmup, (amax, history) in expected.items():
        scale = inputs_of(found, "m", warmup=warmup)["m"]
        assert (scale.amax, scale.history, scale.scale) == (amax, history, scale_by_hand(amax))


@pytest.mark.parametrize("warmup", [2, 3, 1000])
def test_a_warmup_of_all_prompts_is_refused(warmup: int) -> None:
    with pytest.raises(InputError, match=f"^warmup {warmup} skips all 2 prompts$"):
        inputs_of(calibration(site("m.input", history=[1.0, 2.0])), "m", warmup=warmup)


# Weights that engines fuse, and experts.


@pytest.mark.parametrize(
    "leaves",
    [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        ("attention.wq", "attention.wk", "attention.wv"),
        ("feed_forward.w1", "feed_forward.w3"),
        ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    ],
    ids=lambda leaves: leaves[0],
)
def test_fused_weights_share_the_largest_amax_and_its_history(leaves: tuple[str, ...]) -> None:
    """As when --ignore, or a model that feeds them differently, gives them sites of their own."""
    modules = [f"{LAYER}.{leaf}" for leaf in leaves]
    sites = [site(f"{module}.input", history=[1.0 + i, 6.0 - i]) for i, module in enumerate(modules)]
    other = site("model.layers.1.mlp.down_proj.input", history=[100.0, 200.0])
    scales = inputs_of(calibration(*sites, other), *modules, "model.layers.1.mlp.down_proj")
    for module in modules:
        found = scales[module]
        assert (found.amax, found.scale) == (6.0, scale_by_hand(6.0))
        assert found.history == (float(len(modules)), 6.0)
        assert (found.point, found.stored.name) == (f"{module}.input", f"{module}.input_scale")
    assert scales["model.layers.1.mlp.down_proj"].amax == 200.0


def test_weights_that_are_not_fused_keep_their_own() -> None:
    modules = [f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    modules.append("model.layers.0.self_attn.k_proj")
    found = calibration(*(site(f"{module}.input", history=[i + 1.0]) for i, module in enumerate(modules)))
    assert [scale.amax for scale in inputs_of(found, *modules).values()] == [1.0, 2.0, 3.0, 4.0]


def test_an_expert_with_32_tokens_keeps_its_own_and_one_with_31_borrows_the_largest_of_its_peers() -> None:
    amax = {0: (2.0, 32), 1: (1.0, 31), 2: (9.0, 5), 3: (4.0, 1000)}
    sites = [site(f"{EXPERTS}.{i}.down_proj.input", history=[a, a / 2], tokens=n) for i, (a, n) in amax.items()]
    strangers = [
        site(f"{EXPERTS}.3.up_proj.input", history=[50.0, 50.0]),
        site("model.layers.1.mlp.experts.3.down_proj.input", history=[60.0, 60.0]),
        site(f"{LAYER}.mlp.shared_experts.down_proj.input", history=[70.0, 70.0]),
    ]
    scales = inputs_of(calibration(*sites, *strangers), *(f"{EXPERTS}.{i}.down_proj" for i in range(4)))
    assert [scale.amax for scale in scales.values()] == [2.0, 9.0, 9.0, 4.0]
    assert scales[f"{EXPERTS}.1.down_proj"].history == (9.0, 4.5)


def test_an_expert_that_no_token_was_ever_routed_to_borrows_as_well() -> None:
    sites = [site(f"{EXPERTS}.{i}.down_proj.input", history=[2.0 + i]) for i in range(3)]
    scales = inputs_of(calibration(*sites), *(f"{EXPERTS}.{i}.down_proj" for i in range(8)))
    assert [scale.amax for scale in scales.values()] == [2.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]


def test_what_every_expert_would_have_seen_comes_before_what_its_peers_saw() -> None:
    def point(i: int) -> str:
        return f"{EXPERTS}.{i}.down_proj.input"

    routed = [site(point(0), history=[2.0], tokens=500), site(point(1), history=[3.0], tokens=1)]
    every = [site(point(i), history=[10.0 + i], tokens=500) for i in range(3)]
    scales = inputs_of(calibration(*routed, all_experts=every), *(f"{EXPERTS}.{i}.down_proj" for i in range(4)))
    assert [scale.amax for scale in scales.values()] == [2.0, 11.0, 12.0, 3.0]


def test_gate_and_up_of_an_expert_share_one_scale_also_when_one_of_them_borrowed() -> None:
    sites = [
        site(f"{EXPERTS}.0.gate_proj.input", f"{EXPERTS}.0.up_proj.input", history=[2.0], tokens=3),
        site(f"{EXPERTS}.1.gate_proj.input", history=[5.0]),
        site(f"{EXPERTS}.1.up_proj.input", history=[7.0], tokens=2),
    ]
    modules = [f"{EXPERTS}.{i}.{leaf}" for i in range(3) for leaf in ("gate_proj", "up_proj")]
    scales = inputs_of(calibration(*sites), *modules)
    assert {scale.amax for scale in scales.values()} == {7.0}


def test_borrowing_keeps_to_percentile_and_warmup() -> None:
    values = {1.0: 900, 2.0: 95, 8.0: 5}
    sites = [site(f"{EXPERTS}.0.w2.input", history=[8.0, 1.0, 2.0], tokens=1000, values=values)]
    sites.append(site(f"{EXPERTS}.1.w2.input", history=[0.0, 4.0, 0.0], tokens=1))
    modules = [f"{EXPERTS}.{i}.w2" for i in range(3)]
    assert [s.amax for s in inputs_of(calibration(*sites), *modules, warmup=1).values()] == [2.0, 4.0, 4.0]
    assert [s.amax for s in inputs_of(calibration(*sites), *modules, percentile=95).values()] == [2.0, 4.0, 4.0]
    histories = [scale.history for scale in inputs_of(calibration(*sites), *modules, warmup=1).values()]
    assert histories == [(1.0, 2.0), (4.0, 2.0), (4.0, 2.0)]


@pytest.mark.parametrize("module", [f"{LAYER}.self_attn.o_proj", f"{EXPERTS}.3.down_proj"])
def test_a_weight_that_nothing_entered_is_named(module: str) -> None:
    found = calibration(site(f"{LAYER}.mlp.down_proj.input", history=[1.0]))
    with pytest.raises(InputError, match=f"{module}.weight") as caught:
        inputs_of(found, module)
    assert "\n" not in str(caught.value)


# Plans.


def llama(layers: int = 2) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (512, 256), "lm_head.weight": (512, 256)}
    for i in range(layers):
        for leaf in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
            shapes[f"model.layers.{i}.{leaf}.weight"] = (256, 256)
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            shapes[f"model.layers.{i}.mlp.{leaf}.weight"] = (256, 256)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (256,)
    return shapes


def sites_of(shapes: Shapes, *attentions: str) -> Calibration:
    """What enters every matrix, and K and V of these attentions; every amax another one."""
    modules = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    points = [f"{module}.input" for module in modules] + [
        f"{attention}.{kind}" for attention in attentions for kind in "kv"
    ]
    return calibration(*(site(point, history=[1.0 + i, 2.0 + i]) for i, point in enumerate(points)))


def llama_calibration() -> Calibration:
    return sites_of(llama(), *(f"model.layers.{i}.self_attn" for i in range(2)))


def specs_of(shapes: Shapes) -> list[TensorSpec]:
    specs, begin = [], 4096
    for name, shape in shapes.items():
        end = begin + 2 * prod(shape)
        specs.append(TensorSpec(name, "BF16", shape, "model.safetensors", begin, end))
        begin = end
    return specs


def plan_of(
    found: Calibration | None, shapes: Shapes | None = None, facts: ModelFacts = QWEN, **asked: Any
) -> PackPlan:
    request = Request(**{"calibration": FILE if found else None, **asked})
    contents = Contents("", tuple(specs_of(llama() if shapes is None else shapes)), facts)
    decisions = decide(contents, request)
    recipe = choose_recipe(decisions, facts, request, found)
    return make_plan(decisions, contents, request, recipe=recipe, method=find_method(recipe, request.rules))


def stored_scales(plan: PackPlan) -> dict[str, tuple[str, float]]:
    """Name of each stored scale of activations -> the tensor beside which it lies, and its amax."""
    return {a.stored.name: (tensor.spec.name, a.amax) for tensor in plan.tensors for a in tensor.activations}


def test_every_packed_weight_has_an_input_scale_and_nothing_else_has() -> None:
    plan = plan_of(llama_calibration(), scheme="FP8", ignore=(Pattern("*.1.mlp.down_proj"),))
    packed = {tensor.spec.name.removesuffix("weight") + "input_scale" for tensor in plan.packed}
    assert len(packed) == 13
    assert stored_scales(plan).keys() == packed
    assert [tensor.spec.name for tensor in plan.tensors if tensor.activations and not tensor.packing] == []


def test_a_part_that_is_not_packed_has_no_say_in_the_scale_of_the_others() -> None:
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    sites = [site(f"{LAYER}.{name}.input", history=[4.0 - i]) for i, name in enumerate(names)]
    shapes = {f"{LAYER}.{name}.weight": (256, 256) for name in names}
    asked = {"scheme": "FP8", "quant_method": "fp8pack", "ignore": (Pattern("*.q_proj"),)}
    found = stored_scales(plan_of(calibration(*sites), shapes, **asked))
    assert {amax for _, amax in found.values()} == {3.0}
    assert len(found) == 2


def test_a_plan_refuses_a_weight_that_nothing_entered_and_the_flag_it_names_mends_it() -> None:
    sites = [found for found in llama_calibration().sites if "1.self_attn.q_proj" not in found.points[0]]
    name = "model.layers.1.self_attn.q_proj.weight"
    with pytest.raises(InputError, match="^the calibration has no input activations of " + re.escape(name)) as caught:
        plan_of(calibration(*sites), scheme="FP8")
    assert caught.value.command_hint == f"--ignore {name}"
    plan = plan_of(calibration(*sites), scheme="FP8", ignore=(Pattern(name),))
    assert len(plan.packed) == 11


MODELOPT_KV = {
    "llama": ("model.layers.0.self_attn", ("q_proj", "k_proj", "v_proj", "o_proj"), ("k_proj", "v_proj")),
    "gpt-neox": ("gpt_neox.layers.0.attention", ("query_key_value", "dense"), ("", "")),
    "bert": (
        "bert.encoder.layer.0.attention.self",
        ("query", "key", "value"),
        ("key", "value"),
    ),
    "phi3": ("model.layers.0.self_attn", ("qkv_proj", "o_proj"), ("", "")),
    "falcon": ("transformer.h.0.self_attention", ("query_key_value", "dense"), ("", "")),
    "gpt-j": ("transformer.h.0.attn", ("k_proj", "out_proj", "q_proj", "v_proj"), ("k_proj", "v_proj")),
}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("family", MODELOPT_KV)
def test_k_and_v_of_every_family_lie_beside_the_weight_that_makes_them(family: str, method: Any) -> None:
    attention, leaves, modelopt = MODELOPT_KV[family]
    shapes: Shapes = {f"{attention}.{leaf}.weight": (256, 256) for leaf in leaves}
    shapes["model.layers.0.mlp.up_proj.weight"] = (256, 256)
    plain = {"fp8": {"scheme": "FP8_BLOCK"}, "compressed-tensors": {"scheme": "FP8_DYNAMIC"}}
    plain |= {"mxfp8": {"scheme": "MXFP8", "quant_method": "mxfp8"}}
    plain |= {"torchao": {"scheme": "FP8_DYNAMIC", "quant_method": "torchao"}}
    asked = plain.get(method.name, {"scheme": "FP8", "quant_method": method.name})
    plan = plan_of(sites_of(shapes, attention), shapes, replace(QWEN, num_layers=0), kv_cache=True, **asked)
    kinds = [(a.kind, a.stored, tensor.spec.name) for tensor in plan.tensors for a in tensor.activations]
    stored = {kind: (scale, owner) for kind, scale, owner in kinds if kind != "input"}
    assert stored.keys() == {"k", "v"}
    for i, kind in enumerate("kv"):
        scale, owner = stored[kind]
        own = f".{modelopt[i]}" if modelopt[i].endswith("_proj") and method.name == "modelopt" else ""
        quark = f"{attention}.{kind}_proj.output_scale"
        assert scale.name == (quark if method.name == "quark" else f"{attention}{own}.{kind}_scale")
        assert (scale.dtype, scale.shape) == ("F32", (1,) if method.name == "compressed-tensors" else ())
        assert owner.removesuffix(".weight") in {f"{attention}.{modelopt[i] or leaves[0]}"}


@pytest.mark.parametrize("method", ["modelopt", "compressed-tensors", "fp8pack"])
def test_latent_attention_is_refused(method: str) -> None:
    """Its cache holds a latent and the rotary part of K, of which no scale was taken."""
    attention = "model.layers.0.self_attn"
    shapes: Shapes = {f"{attention}.q_a_proj.weight": (256, 256), f"{attention}.kv_a_proj_with_mqa.weight": (256, 256)}
    shapes |= {f"{attention}.q_b_proj.weight": (256, 256), f"{attention}.kv_b_proj.weight": (256, 256)}
    shapes |= {f"{attention}.o_proj.weight": (256, 256)}
    asked = {"scheme": "FP8", "quant_method": method, "kv_cache": True}
    with pytest.raises(InputError, match="caches a latent"):
        plan_of(sites_of(shapes, attention), shapes, **asked)


def test_scales_of_k_and_v_also_lie_beside_projections_that_are_not_packed() -> None:
    plan = plan_of(llama_calibration(), scheme="FP8_DYNAMIC", kv_cache=True, ignore=(Pattern("*self_attn*"),))
    owners = {owner for owner, _ in stored_scales(plan).values()}
    assert owners == {f"model.layers.{i}.self_attn.{leaf}_proj.weight" for i in range(2) for leaf in "kv"}
    stored = [stored.name for shard in plan.shards for stored in shard.tensors]
    assert stored.count("model.layers.1.self_attn.k_scale") == 1


def test_a_point_of_k_or_v_counts_wherever_it_stands_among_the_points_of_its_site() -> None:
    """Where one tensor is K and V, or what a norm gives is V, one site bears both names."""
    attention = f"{LAYER}.self_attn"
    shapes = llama(1)
    for points in (
        (f"{attention}.k", f"{attention}.v"),
        (f"{LAYER}.v_norm.output", f"{attention}.v", f"{attention}.k"),
    ):
        found = calibration(site(*points, history=[3.5]))
        plan = plan_of(found, shapes, scheme="FP8_DYNAMIC", kv_cache=True)
        assert {name: amax for name, (_, amax) in stored_scales(plan).items()} == {
            f"{attention}.k_scale": 3.5,
            f"{attention}.v_scale": 3.5,
        }


def test_towers_of_other_modalities_get_no_scales() -> None:
    tower = "vision_tower.vision_model.encoder.layers.0.self_attn"
    shapes = llama() | {f"{tower}.{leaf}_proj.weight": (256, 256) for leaf in "qkv"}
    attentions = [*(f"model.layers.{i}.self_attn" for i in range(2)), tower, "audio_tower.layers.0.self_attn"]
    plan = plan_of(sites_of(shapes, *attentions), shapes, scheme="FP8", kv_cache=True)
    found = stored_scales(plan)
    assert len(found) == 14 + 4
    assert all(name.startswith("model.layers.") for name in found)


def test_a_calibration_of_towers_alone_gives_no_kv_cache_scales() -> None:
    tower = "vision_tower.encoder.layers.0.self_attn"
    shapes = llama() | {f"{tower}.{leaf}_proj.weight": (256, 256) for leaf in "qkv"}
    with pytest.raises(InputError, match=r"no K of model\.layers\.0"):
        plan_of(sites_of(shapes, tower), shapes, scheme="FP8_DYNAMIC", kv_cache=True)


@pytest.mark.parametrize("missing", ["model.layers.1.self_attn.v", "model.layers.1.self_attn.k", "model.layers.1."])
def test_a_layer_without_its_k_or_v_is_refused(missing: str) -> None:
    """An engine takes 1.0 for a scale that is missing, or that of K for V: scales without partner are refused."""
    sites = [
        found
        for found in llama_calibration().sites
        if found.points[0].endswith(".input") or not found.points[0].startswith(missing)
    ]
    with pytest.raises(InputError, match=r"model\.layers\.1\.self_attn"):
        plan_of(calibration(*sites), scheme="FP8_DYNAMIC", kv_cache=True)


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"scheme": "FP8"}, f"{LAYER}.mlp.up_proj.input_scale"),
        ({"scheme": "FP8", "kv_cache": True}, f"{LAYER}.self_attn.k_proj.k_scale"),
        ({"scheme": "FP8_DYNAMIC", "kv_cache": True}, f"{LAYER}.self_attn.v_scale"),
    ],
)
def test_a_source_that_holds_a_tensor_of_that_name_is_refused(asked: dict[str, Any], name: str) -> None:
    shapes = llama() | {name: ()}
    with pytest.raises(InputError, match=name.replace(".", r"\.")) as caught:
        plan_of(llama_calibration(), shapes, **asked)
    if asked.get("kv_cache"):
        assert caught.value.command_hint == "leave out --kv-cache; unless activations are static, also --calibration"
        left = {key: value for key, value in asked.items() if key != "kv_cache"}
        plan_of(llama_calibration() if asked["scheme"] == "FP8" else None, shapes, **left)
    else:
        named = caught.value.command_hint.removeprefix("--ignore ")
        plan_of(llama_calibration(), shapes, ignore=(Pattern(named),), **asked)


# What is asked of a calibration.


@pytest.mark.parametrize(
    ("has_calibration", "asked", "said", "hint"),
    [
        (False, {"scheme": "FP8"}, "need a calibration", "--calibration FILE"),
        (False, {"activations": "static"}, "need a calibration", "--calibration FILE"),
        (False, {"kv_cache": True}, "need a calibration", "--calibration FILE"),
        (False, {"scheme": "FP8_DYNAMIC", "kv_cache": True}, "need a calibration", "--calibration FILE"),
        (False, {"percentile": 99.9}, "change calibrated scales", "--calibration FILE"),
        (False, {"margin": 1}, "change calibrated scales", "--calibration FILE"),
        (False, {"warmup": 1}, "change calibrated scales", "--calibration FILE"),
        (True, {"scheme": "FP8_DYNAMIC"}, "none is asked for", "leave out --calibration"),
        (True, {"scheme": "FP8_BLOCK"}, "none is asked for", "leave out --calibration"),
        (True, {"scheme": "W8A16"}, "none is asked for", "leave out --calibration"),
        (True, {"scheme": "FP8", "activations": "dynamic"}, "none is asked for", "leave out --calibration"),
        (True, {"activations": "none"}, "none is asked for", "leave out --calibration"),
        (True, {"scheme": "FP8_DYNAMIC", "percentile": 99.9}, "none is asked for", "leave out --calibration"),
        (True, {"scheme": "FP8", "percentile": 99.9, "warmup": 1}, "exclude", "--warmup"),
        (True, {"kv_cache": True, "percentile": 99.9, "warmup": 1}, "exclude", "--warmup"),
        (True, {"scheme": "FP8", "quant_method": "mxfp8"}, "mxfp8 does not", "fp8 or compressed-tensors"),
        (True, {"scheme": "FP8_DYNAMIC", "activations": "static", "quant_method": "quark"}, "channel", "--quant-"),
        (True, {"scheme": "FP8_BLOCK", "activations": "static", "quant_method": "modelopt"}, "modelopt", "--quant-"),
        (True, {"scheme": "FP8_DYNAMIC", "kv_cache": True, "quant_method": "fp8"}, "fp8", "compressed"),
        (True, {"scheme": "FP8", "format": E5M2, "quant_method": "modelopt"}, "modelopt", "--quant-"),
        (True, {"scheme": "FP8", "targets": ("transformers",)}, "cannot load", "--quant-method compressed-tensors"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(
    has_calibration: bool, asked: dict[str, Any], said: str, hint: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_of(llama_calibration() if has_calibration else None, **asked)
    assert said in str(caught.value)
    assert hint in caught.value.command_hint
    assert "--" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.5, 1e9, nan, inf])
def test_a_percentile_that_is_none_is_refused(percentile: float) -> None:
    with pytest.raises(RecipeError, match="percentile"):
        plan_of(llama_calibration(), scheme="FP8", percentile=percentile)


@pytest.mark.parametrize("asked", [{"warmup": -1}, {"margin": 9}, {"margin": -9}, {"margin": 1000}])
def test_a_warmup_or_margin_out_of_range_is_refused(asked: dict[str, int]) -> None:
    with pytest.raises(Fp8PackError, match=next(iter(asked))):
        plan_of(llama_calibration(), scheme="FP8", **asked)


def test_a_rule_cannot_mix_granularities_into_modelopt() -> None:
    rule = Rule(Pattern("*.down_proj"), RuleAction.PACK, granularity=parse_granularity("channel"))
    with pytest.raises(RecipeError, match="one format and granularity"):
        plan_of(llama_calibration(), scheme="FP8", rules=(rule,))


def test_the_remedy_for_transformers_is_one() -> None:
    asked = {"scheme": "FP8", "quant_method": "compressed-tensors", "targets": ("transformers", "vllm")}
    verdicts = {verdict.engine: verdict for verdict in plan_of(llama_calibration(), **asked).engines}
    assert verdicts["transformers"].tp == (1,)
    assert verdicts["vllm"].tp
    assert not verdicts["tensorrt-llm"].tp
    assert "--quant-method modelopt" in verdicts["tensorrt-llm"].remedy


AUTO = [
    ({}, "FP8", "modelopt", "FP8"),
    ({"activations": "static"}, "FP8", "modelopt", "FP8"),
    ({"kv_cache": True, "activations": "static"}, "FP8", "modelopt", "FP8-KV"),
    ({"kv_cache": True}, "FP8_BLOCK", "fp8", "FP8-block-KV"),
    ({"scheme": "FP8"}, "FP8", "modelopt", "FP8"),
    ({"scheme": "fp8", "kv_cache": True}, "FP8", "modelopt", "FP8-KV"),
    ({"scheme": "fp8-dynamic", "kv_cache": True}, "FP8_DYNAMIC", "compressed-tensors", "FP8-dynamic-KV"),
    ({"scheme": "MXFP8", "kv_cache": True}, "MXFP8", "compressed-tensors", "MXFP8-KV"),
    ({"scheme": "W8A16", "kv_cache": True}, "W8A16", "compressed-tensors", "FP8-W8A16-KV"),
]


@pytest.mark.parametrize(("asked", "scheme", "method", "suffix"), AUTO)
def test_schemes_methods_and_names_of_outputs(asked: dict[str, Any], scheme: str, method: str, suffix: str) -> None:
    recipe = plan_of(llama_calibration(), **asked).recipe
    assert (recipe.scheme, recipe.quant_method, recipe.suffix) == (scheme, method, suffix)


def test_auto_says_that_the_calibration_decided() -> None:
    assert plan_of(llama_calibration()).recipe.reason == "auto: the calibration gives static activation scales"


def test_auto_keeps_its_choice_with_kv_cache_scales_whatever_that_is() -> None:
    llama_facts = replace(QWEN, architecture="LlamaForCausalLM")
    for facts in (QWEN, llama_facts):
        alone, with_kv = (
            plan_of(None, facts=facts).recipe,
            plan_of(llama_calibration(), facts=facts, kv_cache=True).recipe,
        )
        assert (with_kv.scheme, with_kv.reason) == (alone.scheme, alone.reason)
        assert with_kv.suffix == f"{alone.suffix}-KV"


def test_static_scales_in_parts_that_are_no_scheme_are_custom_and_have_names_of_their_own() -> None:
    asked = [
        {"scheme": "FP8", "quant_method": "compressed-tensors"},
        {"granularity": parse_granularity("channel"), "activations": "static"},
        {"granularity": parse_granularity("block:128x128"), "activations": "static", "kv_cache": True},
        {"format": E5M2, "activations": "static"},
    ]
    recipes = [plan_of(llama_calibration(), **each).recipe for each in asked]
    assert [recipe.scheme for recipe in recipes] == ["custom"] * 4
    assert [recipe.quant_method for recipe in recipes] == ["compressed-tensors", *["fp8pack"] * 3]
    suffixes = [recipe.suffix for recipe in recipes]
    assert len(set(suffixes)) == 4
    assert all("static" in suffix for suffix in suffixes)
    assert suffixes[2].endswith("-KV")


def test_the_recipe_says_what_decided_the_scales_and_nothing_without_a_calibration() -> None:
    recipe = plan_of(llama_calibration(), scheme="FP8", margin=1, warmup=1).recipe
    data = recipe.as_data()
    keys = ("calibration", "kv_cache", "percentile", "margin", "warmup", "activations")
    assert [data[key] for key in keys] == ["blake3:of-the-file", False, None, 1, 1, "static"]
    assert str(FILE) not in str(data)
    assert not {"calibration", "kv_cache", "margin"} & plan_of(None).recipe.as_data().keys()


def test_a_recipe_file_asks_for_the_same_as_the_flags(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    text = "scheme: FP8\nkv_cache: true\npercentile: 99.5\nmargin: -2\n"
    recipe.write_text(text)
    asked = make_request(recipe)
    assert asked == Request(scheme="FP8", kv_cache=True, percentile=99.5, margin=-2)
    for wrong in ("percentile: 0", "percentile: .nan", "percentile: 101", "margin: 9", "warmup: -1", "kv_cache: 3"):
        recipe.write_text(wrong)
        with pytest.raises(RecipeError, match=wrong.split(":")[0].replace("_", " ")):
            make_request(recipe)


def test_what_is_worth_knowing_of_the_scales_is_a_warning() -> None:
    calm = plan_of(llama_calibration(), scheme="FP8")
    assert calm.warnings == ()
    clipped = plan_of(llama_calibration(), scheme="FP8", percentile=99)
    assert any("above the percentile are clipped" in text for text in clipped.warnings)
    sites = [found for found in llama_calibration().sites if "0.mlp.down_proj" not in found.points[0]]
    spike = site(f"{LAYER}.mlp.down_proj.input", history=[64.0, 64.0], tokens=10_000, values={1.0: 9_999, 64.0: 1})
    assert any(f"{LAYER}.mlp.down_proj" in text for text in plan_of(calibration(*sites, spike), scheme="FP8").warnings)
    shapes: Shapes = {f"{EXPERTS}.{i}.down_proj.weight": (256, 256) for i in range(2)}
    found = calibration(site(f"{EXPERTS}.0.down_proj.input", history=[1.0]))
    assert any(f"{EXPERTS}.1.down_proj" in text for text in plan_of(found, shapes, scheme="FP8").warnings)


def test_an_expert_that_only_the_warm_up_reached_takes_what_its_peers_saw() -> None:
    expert, peer = "l.0.mlp.experts.0.up_proj", "l.0.mlp.experts.1.up_proj"
    sites = [site(f"{expert}.input", history=[9.0, 0.0, 0.0]), site(f"{peer}.input", history=[1.0, 2.0, 4.0])]
    sites = [replace(found, tokens=100) for found in sites]
    scales = ActivationScales(calibration(*sites), ActivationOptions(warmup=1), E4M3)
    found = scales.observed(f"{expert}.input", f"{expert}.weight")
    assert (found.amax, found.source) == (4.0, "peers")
    alone = ActivationScales(calibration(replace(sites[0], points=("a.input",))), ActivationOptions(warmup=1), E4M3)
    with pytest.raises(InputError, match="which warmup skips") as caught:
        alone.observed("a.input", "a.weight")
    assert caught.value.command_hint == "choose a smaller --warmup"


def test_the_names_that_a_recipe_may_keep_are_those_of_the_conventions_that_are_written() -> None:
    assert tuple(method.name for method in METHODS) == WRITABLE
