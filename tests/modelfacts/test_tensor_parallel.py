"""What one of several GPUs holds of a tensor."""

from dataclasses import replace

import pytest

from fp8pack.errors import InputError
from fp8pack.modelfacts.model import ModelFacts
from fp8pack.modelfacts.spec import TensorSpec, nbytes_of
from fp8pack.modelfacts.tensor_parallel import Part, Rank, part_of
from fp8pack.numerics.granularity import BLOCK_128, CHANNEL, MX, TENSOR, Granularity

FACTS = ModelFacts("LlamaForCausalLM", "llama", num_layers=2, hidden_size=512, head_dim=64, num_heads=8, num_kv_heads=2)
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


def spec(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, "F8_E4M3", shape, "f", 0, nbytes_of("F8_E4M3", shape))


@pytest.mark.parametrize("granularity", [TENSOR, CHANNEL, BLOCK_128, MX])
def test_what_makes_heads_is_cut_along_n_and_what_takes_them_along_k(granularity: Granularity) -> None:
    rank = Rank(1, 2)
    assert part_of(spec(f"{ATTENTION}.q_proj.weight", 512, 512), granularity, FACTS, rank) == Part(
        ((256, 512),), (0, 512)
    )
    assert part_of(spec(f"{ATTENTION}.o_proj.weight", 512, 512), granularity, FACTS, rank) == Part(
        ((0, 512),), (256, 512)
    )
    assert part_of(spec(f"{MLP}.up_proj.weight", 1024, 512), granularity, FACTS, rank) == Part(((512, 1024),), (0, 512))
    assert part_of(spec(f"{MLP}.down_proj.weight", 512, 1024), granularity, FACTS, rank) == Part(
        ((0, 512),), (512, 1024)
    )


@pytest.mark.parametrize("rank", range(4))
def test_fewer_key_heads_than_gpus_are_held_by_neighbours(rank: int) -> None:
    part = part_of(spec(f"{ATTENTION}.k_proj.weight", 128, 512), CHANNEL, FACTS, Rank(rank, 4))
    assert part == Part(((64 * (rank // 2), 64 * (rank // 2 + 1)),), (0, 512))


def test_fused_weights_are_cut_part_by_part() -> None:
    qkv = part_of(spec(f"{ATTENTION}.qkv_proj.weight", 768, 512), CHANNEL, FACTS, Rank(1, 2))
    assert qkv == Part(((256, 512), (576, 640), (704, 768)), (0, 512))
    gate_up = part_of(spec(f"{MLP}.gate_up_proj.weight", 2048, 512), BLOCK_128, FACTS, Rank(0, 2))
    assert gate_up == Part(((0, 512), (1024, 1536)), (0, 512))


def test_a_bias_is_cut_with_the_rows_of_its_weight() -> None:
    rank = Rank(1, 2)
    assert part_of(replace(spec(f"{ATTENTION}.q_proj.bias", 512), dtype="BF16"), None, FACTS, rank) == Part(
        ((256, 512),), (0, 1)
    )
    assert part_of(replace(spec(f"{ATTENTION}.o_proj.bias", 512), dtype="BF16"), None, FACTS, rank) is None


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head", f"{MLP}.gate", f"{ATTENTION}.kv_a_proj_with_mqa"])
def test_everything_else_is_whole(module: str) -> None:
    assert part_of(spec(f"{module}.weight", 512, 512), None, FACTS, Rank(0, 2)) is None


@pytest.mark.parametrize(
    ("name", "shape", "granularity", "world", "said"),
    [
        (f"{MLP}.up_proj.weight", (192, 512), BLOCK_128, 2, "within a scale block of 128"),
        (f"{MLP}.down_proj.weight", (512, 192), BLOCK_128, 2, "within a scale block of 128"),
        (f"{MLP}.down_proj.weight", (512, 96), MX, 2, "within a scale block of 32"),
        (f"{MLP}.up_proj.weight", (511, 512), CHANNEL, 2, "N = 511, not divisible by 2 GPUs"),
        (f"{ATTENTION}.k_proj.weight", (128, 512), CHANNEL, 3, "2 key heads cannot be sharded over 3 GPUs"),
        (f"{ATTENTION}.qkv_proj.weight", (700, 512), CHANNEL, 2, "not the 768 of q, k and v"),
    ],
)
def test_what_does_not_spread_is_refused(
    name: str, shape: tuple[int, ...], granularity: Granularity, world: int, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        part_of(spec(name, *shape), granularity, FACTS, Rank(0, world))


def test_one_gpu_holds_all() -> None:
    assert part_of(spec(f"{MLP}.up_proj.weight", 511, 512), BLOCK_128, FACTS, Rank(0, 1)) is None
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Rank(2, 2)


@pytest.mark.parametrize(("heads", "keys", "world"), [(14, 2, 4), (6, 3, 2), (9, 3, 2), (8, 8, 3), (6, 6, 4)])
@pytest.mark.parametrize("leaf", ["q_proj", "k_proj", "o_proj", "q_b_proj", "kv_b_proj"])
def test_no_cut_goes_through_a_head(heads: int, keys: int, world: int, leaf: str) -> None:
    facts = replace(FACTS, num_heads=heads, num_kv_heads=keys)
    with pytest.raises(InputError, match="cannot be sharded over"):
        part_of(spec(f"{ATTENTION}.{leaf}.weight", heads * 64, heads * 64), CHANNEL, facts, Rank(0, world))


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("model.layers.0.attention.wqkv", "internlm2"),  # grouped by key heads
        ("transformer.encoder.layers.0.self_attention.query_key_value", "chatglm"),  # q, then k, then v
        ("transformer.encoder.layers.0.mlp.dense_h_to_4h", "chatglm"),  # gate, then up
        ("transformer.h.0.self_attention.query_key_value", "falcon"),  # one key head
        ("model.layers.0.linear_attn.in_proj_qkv", "qwen3_5"),
        ("model.layers.0.linear_attn.out_proj", "qwen3_next"),
        ("backbone.layers.0.mixer.in_proj", "mamba2"),
        ("single_blocks.0.linear1", "flux"),
        ("albert.encoder.layers.0.ffn", "albert"),
    ],
)
def test_layouts_that_are_not_known_are_refused(name: str, model_type: str) -> None:
    with pytest.raises(InputError, match="unknown head or channel layout") as caught:
        part_of(spec(f"{name}.weight", 512, 512), CHANNEL, replace(FACTS, model_type=model_type), Rank(0, 2))
    assert caught.value.hint == "load without tp"


@pytest.mark.parametrize(
    ("name", "width"), [("sinks", 8), ("q_norm.weight", 512), ("k_norm.weight", 128), ("q_norm.weight", 64)]
)
def test_what_has_an_element_for_each_head_is_refused(name: str, width: int) -> None:
    small = replace(spec(f"{ATTENTION}.{name}", width), dtype="BF16")
    if width == FACTS.head_dim:
        assert part_of(small, None, FACTS, Rank(0, 2)) is None
        return
    with pytest.raises(InputError, match="unknown head or channel layout"):
        part_of(small, None, FACTS, Rank(0, 2))


@pytest.mark.parametrize(
    ("name", "model_type", "cols"),
    [
        ("gpt_neox.layers.0.attention.query_key_value", "gpt_neox", (0, 512)),
        ("gpt_neox.layers.0.attention.dense", "gpt_neox", (0, 256)),
        ("gpt_neox.layers.0.mlp.dense_4h_to_h", "gpt_neox", (0, 256)),
        ("bert.encoder.layer.0.attention.self.query", "bert", (0, 512)),
        ("bert.encoder.layer.0.attention.output.dense", "bert", (0, 256)),
        ("bert.encoder.layer.0.intermediate.dense", "bert", (0, 512)),
        ("model.layers.0.mlp.experts.3.down_proj", "qwen3_moe", (0, 256)),
        ("model.layers.0.block_sparse_moe.experts.3.w1", "mixtral", (0, 512)),
    ],
)
def test_other_families_are_cut_alike(name: str, model_type: str, cols: tuple[int, int]) -> None:
    part = part_of(spec(f"{name}.weight", 512, 512), CHANNEL, replace(FACTS, model_type=model_type), Rank(0, 2))
    assert part is not None
    assert part.cols == cols
