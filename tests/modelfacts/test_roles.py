"""What stays and what is packed, by the names that real checkpoints of each family have."""

import pytest

from fp8pack.engines.module_names import spellings
from fp8pack.modelfacts.fused import fused_module, is_part_of, storage_key, together
from fp8pack.modelfacts.model import ModelFacts
from fp8pack.modelfacts.roles import is_wide, judge, layer_of
from fp8pack.modelfacts.spec import TensorSpec

PACKED = {
    "llama, mistral, qwen": [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.31.self_attn.o_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    ],
    "phi": [
        "model.layers.0.self_attn.dense.weight",
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.mlp.gate_up_proj.weight",
        "model.layers.0.mlp.fc1.weight",
        "model.layers.0.mlp.fc2.weight",
    ],
    "gpt-neox": [
        "gpt_neox.layers.0.attention.query_key_value.weight",
        "gpt_neox.layers.0.attention.dense.weight",
        "gpt_neox.layers.0.mlp.dense_h_to_4h.weight",
        "gpt_neox.layers.0.mlp.dense_4h_to_h.weight",
    ],
    "bert": [
        "bert.encoder.layer.0.attention.self.query.weight",
        "bert.encoder.layer.0.attention.output.dense.weight",
        "bert.encoder.layer.0.intermediate.dense.weight",
        "bert.encoder.layer.0.output.dense.weight",
    ],
    "experts": [
        "model.layers.0.block_sparse_moe.experts.7.w1.weight",
        "model.layers.3.mlp.experts.12.gate_proj.weight",
        "model.layers.3.mlp.shared_experts.up_proj.weight",
        "model.layers.3.mlp.shared_expert.down_proj.weight",
        "model.layers.3.self_attn.kv_b_proj.weight",
        "model.layers.3.self_attn.q_a_proj.weight",
    ],
    "eagle-3 draft": [
        "midlayer.self_attn.q_proj.weight",
        "midlayer.mlp.down_proj.weight",
    ],
    "multimodal language part": [
        "model.language_model.layers.0.self_attn.q_proj.weight",
        "language_model.model.layers.0.mlp.up_proj.weight",
    ],
    "diffusion": [
        "transformer_blocks.0.attn.to_q.weight",
        "transformer_blocks.0.attn.to_out.0.weight",
        "transformer_blocks.0.ff.net.0.proj.weight",
        "transformer_blocks.0.ff.net.2.weight",
        "single_transformer_blocks.0.proj_mlp.weight",
        "single_transformer_blocks.0.proj_out.weight",
        "double_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.img_attn.proj.weight",
        "double_blocks.0.img_mlp.0.weight",
        "double_blocks.0.txt_mlp.2.weight",
    ],
}
KEPT = {
    "embedding": [
        "model.embed_tokens.weight",
        "gpt_neox.embed_in.weight",
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.position_embeddings.weight",
        "transformer.wte.weight",
        "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ],
    "logits": ["lm_head.weight", "embed_out.weight", "output.weight", "score.weight", "classifier.weight"],
    "router": [
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.feed_forward.router.weight",
        "model.layers.0.mlp.shared_expert_gate.weight",
    ],
    "tower": [
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "model.visual.blocks.0.attn.qkv.weight",
        "audio_tower.layers.0.fc1.weight",
    ],
    "projector": ["multi_modal_projector.linear_1.weight", "model.multi_modal_projector.mm_input_projection.weight"],
    "mtp": ["mtp.layers.0.mlp.up_proj.weight", "mtp.fc.weight", "model.layers.61.self_attn.o_proj.weight"],
    "conditioning": [
        "x_embedder.weight",
        "img_in.weight",
        "txt_in.weight",
        "time_in.in_layer.weight",
        "guidance_in.out_layer.weight",
        "vector_in.in_layer.weight",
        "context_embedder.weight",
        "time_text_embed.timestep_embedder.linear_1.weight",
        "t_embedder.mlp.0.weight",
    ],
    "final": ["proj_out.weight", "final_layer.linear.weight", "norm_out.linear.weight"],
    "modulation": [
        "transformer_blocks.0.norm1.linear.weight",
        "transformer_blocks.0.norm1_context.linear.weight",
        "single_transformer_blocks.0.norm.linear.weight",
        "double_blocks.0.img_mod.lin.weight",
        "single_blocks.0.modulation.lin.weight",
        "blocks.0.adaLN_modulation.1.weight",
    ],
    "indexer": [
        "model.layers.0.self_attn.indexer.weights_proj.weight",
        "model.layers.0.self_attn.indexer.wk.weight",
    ],
    "other": ["bert.pooler.dense.weight", "fc.weight"],
}
DEEPSEEK = ModelFacts(architecture="DeepseekV3ForCausalLM", model_type="deepseek_v3", num_layers=61)


def spec(name: str, shape: tuple[int, ...] = (256, 512), dtype: str = "BF16") -> TensorSpec:
    return TensorSpec(name, dtype, shape, "model.safetensors", 0, 0)


@pytest.mark.parametrize("name", [name for names in PACKED.values() for name in names])
def test_linears_of_every_family_are_packed(name: str) -> None:
    verdict = judge(spec(name), ModelFacts())
    assert verdict.packed, verdict
    assert verdict.reason in ("policy: linear", "policy: unknown linear in a block")


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, names in KEPT.items() for name in names])
def test_what_must_stay_stays_with_its_role(role: str, name: str) -> None:
    verdict = judge(spec(name), DEEPSEEK)
    assert (verdict.packed, verdict.role) == (False, role)
    assert verdict.reason.startswith("policy: ")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.mlp.gate.e_score_correction_bias",
        "layers.3.ffn.gate.bias",
        "model.layers.3.feed_forward.expert_bias",
        "backbone.layers.0.mixer.A_log",
        "backbone.layers.0.mixer.D",
        "model.layers.0.linear_attn.dt_bias",
    ],
)
def test_what_engines_keep_in_float32_is_known_by_its_name(name: str) -> None:
    assert is_wide(name)
    assert not is_wide(name + "_proj.weight")


def test_only_the_experts_gate_projection_is_no_router() -> None:
    assert judge(spec("model.layers.0.mlp.gate_proj.weight"), ModelFacts()).role == "mlp.gate"
    assert judge(spec("model.layers.0.mlp.experts.0.gate_proj.weight"), ModelFacts()).role == "expert.gate"


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("model.layers.0.input_layernorm.weight", (256,), "norm"),
        ("model.layers.0.self_attn.q_proj.bias", (256,), "bias"),
        ("model.layers.0.mlp.gate.e_score_correction_bias", (64,), "bias"),
        ("conv1.weight", (64, 3, 7, 7), "conv"),
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 512, 256), "experts"),
        ("model.layers.0.mixer.A_log", (64, 16), "state"),
    ],
)
def test_what_is_no_matrix_stays(name: str, shape: tuple[int, ...], role: str) -> None:
    verdict = judge(spec(name, shape), ModelFacts())
    assert (verdict.packed, verdict.role) == (False, role)


def test_gpt2_stores_its_linears_transposed_and_they_stay() -> None:
    gpt2 = ModelFacts(model_type="gpt2")
    for name in ("h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_fc.weight"):
        assert judge(spec(name), gpt2).role == "conv1d"
    assert judge(spec("h.0.attn.c_attn.weight", (768, 2304)), ModelFacts()).role == "conv1d"
    assert judge(spec("transformer.h.0.attn.c_attn.weight", (2304, 2048)), ModelFacts()).packed


def test_integers_and_fp8_stay() -> None:
    assert not judge(spec("model.layers.0.mlp.up_proj.weight", dtype="I32"), ModelFacts()).packed


def test_an_unknown_linear_is_packed_inside_a_block_only() -> None:
    assert judge(spec("model.layers.0.mixer.strange.weight"), ModelFacts()).role == "unknown linear"
    assert not judge(spec("model.strange.weight"), ModelFacts()).packed


def test_layers_are_numbered_by_their_block() -> None:
    assert layer_of("midlayer.mlp.up_proj.weight") == 0
    assert layer_of("model.layers.17.mlp.experts.3.up_proj.weight") == 17
    assert layer_of("t_embedder.mlp.0.weight") is None


def test_engines_fuse_q_k_v_and_gate_up() -> None:
    assert fused_module("model.layers.0.self_attn.k_proj.weight") == "model.layers.0.self_attn.qkv_proj"
    assert fused_module("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.gate_up_proj"
    assert fused_module("model.layers.0.block_sparse_moe.experts.1.w3.weight") == (
        "model.layers.0.block_sparse_moe.experts.1.w13"
    )
    assert fused_module("model.layers.0.mlp.down_proj.weight") is None
    assert fused_module("model.layers.0.self_attn.q_proj.bias") is None


def test_all_experts_of_a_layer_belong_together() -> None:
    assert together("model.layers.0.mlp.experts.5.down_proj.weight") == "model.layers.0.mlp.experts"
    assert is_part_of("model.layers.0.mlp.experts.5.up_proj.weight", "model.layers.0.mlp.experts.gate_up_proj")
    assert not is_part_of("model.layers.0.mlp.experts.5.up_proj.weight", "model.layers.0.mlp.experts.down_proj")


def test_storage_order_is_that_of_the_engines() -> None:
    experts = "model.layers.0.mlp.experts"
    expected = [
        *(f"{experts}.{i}.{leaf}.weight" for i in (0, 2, 10) for leaf in ("gate_proj", "up_proj")),
        *(f"{experts}.{i}.down_proj.weight" for i in (0, 2, 10)),
        *(f"model.layers.0.self_attn.{leaf}_proj.weight" for leaf in "qkv"),
        *(f"model.layers.10.self_attn.{leaf}_proj.weight" for leaf in "qkv"),
    ]
    assert sorted(sorted(expected), key=storage_key) == expected


@pytest.mark.parametrize(
    ("module", "others"),
    [
        ("fc", {"fc", "model.fc"}),
        ("model.layers.0.mlp.gate", {"model.layers.0.mlp.gate"}),
        ("language_model.lm_head", {"language_model.lm_head", "lm_head"}),
        ("embed_out", {"embed_out", "lm_head"}),
        (
            "vision_tower.encoder.layers.0.fc1",
            {"vision_tower.encoder.layers.0.fc1", "model.vision_tower.encoder.layers.0.fc1"},
        ),
        ("model.visual.blocks.0.attn.qkv", {"model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"}),
        (
            "model.language_model.layers.0.mlp.gate",
            {"model.language_model.layers.0.mlp.gate", "language_model.model.layers.0.mlp.gate"},
        ),
    ],
)
def test_modules_that_stay_are_listed_by_every_name_that_engines_know(module: str, others: set[str]) -> None:
    assert set(spellings(module)) == others
