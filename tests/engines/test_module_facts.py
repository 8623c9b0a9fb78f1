"""What transformers makes of the modules of a class: names, conversions, and what verdicts say of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import Tensors, llama_tensors, random_weight
from conftest import MakeCheckpoint
from engines.engine_cases import BLOCK, DYNAMIC, QWEN, experts, judge, weight

import fp8pack
from fp8pack.engines.known import BY_ID
from fp8pack.engines.module_facts import ModuleFacts, experts_of, find_modules, is_kept, one_number, read_module_facts
from fp8pack.modelfacts.experts import FusedLayout
from fp8pack.modelfacts.storage import Storage

NAME = BY_ID["transformers"].modules
FILE = Path(fp8pack.__file__).parent / "engines" / "data" / f"{NAME}.json"


def facts_of(cls: str) -> ModuleFacts:
    return read_module_facts(NAME, cls) or ModuleFacts()


@pytest.mark.parametrize(
    ("cls", "name", "modules"),
    [
        ("FuyuForCausalLM", "vision_embed_tokens", ("model.vision_embed_tokens",)),
        (
            "BailingHybridForCausalLM",
            "model.layers.31.attention.dense",
            ("model.layers.31.self_attn.o_proj",),
        ),
        (
            "GteForMaskedLM",
            "gte.encoder.layer.7.attention.qkv_proj",
            tuple(f"gte.layers.7.self_attn.{part}_proj" for part in "qkv"),
        ),
        (
            "GraniteMoeForCausalLM",
            "model.layers.2.block_sparse_moe.input_linear",
            ("model.layers.2.block_sparse_moe.experts",),
        ),
        ("DeepseekV3ForCausalLM", "model.layers.5.mlp.experts.17.up_proj", ("model.layers.5.mlp.experts",)),
        (
            "DeepseekV3ForCausalLM",
            "model.layers.5.mlp.shared_experts.up_proj",
            ("model.layers.5.mlp.shared_experts.up_proj",),
        ),
        ("Kimi_K25ForConditionalGeneration", "mm_projector.proj.0", ("model.mm_projector.in_proj",)),
        ("Kimi_K25ForConditionalGeneration", "mm_projector.proj.2", ("model.mm_projector.out_proj",)),
    ],
)
def test_a_module_is_found_by_its_name_in_a_file(cls: str, name: str, modules: tuple[str, ...]) -> None:
    assert facts_of(cls).modules(name) == modules


def test_the_longest_prefix_that_is_known_tells_the_module() -> None:
    names = {"a": ("x",), "a.b": ("y", "z"), "c.*.d": ("e.*.f",)}
    assert find_modules("a.q", names) == ["x.q"]
    assert find_modules("a.b.q", names) == ["y.q", "z.q"]
    assert find_modules("c.*.d.w", names) == ["e.*.f.w"]
    assert find_modules("b.a", names) == ["b.a"]
    assert ModuleFacts(names=names).modules("c.12.d") == ("e.12.f",)


def test_experts_are_known_by_their_names() -> None:
    assert experts_of("model.layers.*.mlp.experts.*.up_proj") == "model.layers.*.mlp.experts"
    assert experts_of("layers.*.mlp.experts.gate_up_proj") == "layers.*.mlp.experts"
    assert experts_of("layers.*.mlp.shared_experts.up_proj") == ""
    assert experts_of("layers.*.ffn.experts.expert_3.fc1") == ""
    assert one_number("model.layers.3.mlp.2") == "model.layers.*.mlp.2"


def test_a_class_may_be_built_otherwise_for_another_model_type() -> None:
    name = "model.layers.*.attention.query_key_value"
    assert name not in facts_of("Glm4MoeForCausalLM").converted
    found = read_module_facts(NAME, "Glm4MoeForCausalLM", "sarvam_moe")
    assert found
    assert name in found.converted
    assert read_module_facts(NAME, "Glm4MoeForCausalLM", "glm4_moe") == facts_of("Glm4MoeForCausalLM")


def test_a_linear_that_transformers_does_not_find_in_the_list_is_a_no() -> None:
    kept = "model.llm.layers.1.attn.k_sconv.weight_proj"
    facts = replace(QWEN, architecture="Inkling2ForCausalLM", model_type="inkling2_text")
    packed = [weight("model.llm.layers.1.attn.o_proj", 256, 256, "attn.o")]
    assert judge(BLOCK, "transformers", packed, facts).loads
    verdict = judge(BLOCK, "transformers", packed, facts, ignored=[kept])
    assert f"does not find {kept}" in verdict.reason
    assert judge(DYNAMIC, "transformers", packed, facts, ignored=[kept]).loads


def test_what_is_kept_in_float32_is_matched_as_transformers_does() -> None:
    assert is_kept("encoder.block.0.layer.1.DenseReluDense.wo", ["wo"])
    assert is_kept("qformer.encoder.layer.0.query", ["qformer"])
    assert not is_kept("layers.0.mlp.gate_proj", ["mlp.gate"])


SAYS = [
    (DYNAMIC, "DeepseekV3ForCausalLM", "experts", None),
    (DYNAMIC, "HYV4ForCausalLM", "experts", "experts one by one"),
    (BLOCK, "FalconForCausalLM", "transformer.h.0.self_attention.dense", "a linear of its own"),
    (DYNAMIC, "FalconForCausalLM", "transformer.h.0.self_attention.dense", None),
    (BLOCK, "T5ForConditionalGeneration", "encoder.block.0.layer.1.DenseReluDense.wo", "keeps it in float32"),
    (DYNAMIC, "T5ForConditionalGeneration", "encoder.block.0.layer.1.DenseReluDense.wo", None),
    (DYNAMIC, "IBertForMaskedLM", "ibert.encoder.layer.0.attention.self.query", "has no linear there"),
    (DYNAMIC, "GteForMaskedLM", "gte.encoder.layer.0.attention.qkv_proj", "but not the scales"),
    (BLOCK, "NemotronHForCausalLM", "backbone.layers.0.mixer.experts.0.up_proj", "does not fit"),
    (BLOCK, "SwitchTransformersModel", "encoder.block.1.layer.1.mlp.experts.expert_0.wi", "does not fit"),
    (BLOCK, "MimiModel", "encoder_transformer.layers.0.self_attn.o_proj", "called scale"),
    (DYNAMIC, "Dinov2Model", "encoder.layer.0.mlp.fc1", "does not build this class"),
    (BLOCK, "MimiEncoderModel", "encoder_transformer.layers.0.self_attn.o_proj", None),
    (DYNAMIC, "FalconMambaModel", "layers.0.mixer.out_proj", None),
    (DYNAMIC, "RTDetrModel", "decoder.layers.0.self_attn.o_proj", "does not build this class"),
    (BLOCK, "LlamaForCausalLM", "model.layers.0.self_attn.o_proj", None),
]


@pytest.mark.parametrize(("stored", "cls", "name", "reason"), SAYS)
def test_a_verdict_knows_what_becomes_of_the_modules(stored: Storage, cls: str, name: str, reason: str | None) -> None:
    facts = replace(QWEN, architecture=cls, model_type="x")
    packed = experts() if name == "experts" else [weight(name, 256, 256, "attn.o")]
    verdict = judge(stored, "transformers", packed, facts)
    assert verdict.loads is (reason is None)
    assert (reason or "") in verdict.reason


def test_a_remedy_names_all_that_is_split_at_load() -> None:
    layer = "gte.encoder.layer.0"
    packed = [weight(f"{layer}.{leaf}", 256, 256, "attn.o") for leaf in ("attention.qkv_proj", "mlp.up_gate_proj")]
    verdict = judge(DYNAMIC, "transformers", packed, replace(QWEN, architecture="GteForMaskedLM"))
    assert verdict.remedy == "--ignore '*.qkv_proj' --ignore '*.up_gate_proj'"


def test_fused_tensors_of_a_class_and_how_they_lie() -> None:
    experts = "model.layers.*.mlp.experts"
    found = facts_of("GptOssForCausalLM").fused_layouts
    assert found.keys() == {f"{experts}.{leaf}{end}" for leaf in ("gate_up_proj", "down_proj") for end in ("", "_bias")}
    assert set(found.values()) == {FusedLayout(transposed=True)}
    assert set(facts_of("HYV4ForCausalLM").fused_layouts.values()) == {FusedLayout()}
    assert facts_of("DeepseekV3ForCausalLM").fused_layouts == {}


def test_the_list_has_modules_under_the_names_that_transformers_gives_them(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    tensors: Tensors = {
        name.replace("self_attn.o_proj", "attention.dense").replace("self_attn", "attention"): tensor
        for name, tensor in llama_tensors().items()
    }
    tensors |= {f"model.layers.{i}.attention.b_proj.weight": random_weight((4, 256)) for i in range(2)}
    source = make_checkpoint(tensors, config={"architectures": ["BailingHybridForCausalLM"], "hidden_size": 256})
    fp8pack.pack(source, tmp_path / "out", scheme="FP8_DYNAMIC")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {f"model.layers.{i}.{attention}.b_proj" for i in range(2) for attention in ("attention", "self_attn")} <= {
        *ignored
    }


def test_every_entry_of_the_data_file_is_a_name() -> None:
    for cls in json.loads(FILE.read_text())["classes"]:
        facts = facts_of(cls)
        assert cls.replace(" ", "_").replace("-", "_").isidentifier()
        stems = facts.converted | facts.merged | facts.fused | facts.subclasses | facts.others | facts.unfit
        assert all(".." not in stem and not stem.endswith(".weight") for stem in stems), cls
