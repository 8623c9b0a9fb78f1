"""The built-in policy: the role of each tensor, and whether it is quantized.

Names decide, because a checkpoint has nothing else. The rules cover Llama, Mistral, Qwen, Gemma, Phi, GPT-NeoX, BERT,
mixtures of experts, multimodal wrappers and diffusion transformers. The first rule that matches wins.
tests/modelfacts/test_roles.py has the names of each family.
"""

import re
from dataclasses import dataclass
from functools import cache

from fp8pack.modelfacts.fused import EXPERT
from fp8pack.modelfacts.model import ModelFacts
from fp8pack.modelfacts.spec import FLOAT_DTYPES, TensorSpec

UNKNOWN_LINEAR = "unknown linear"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the policy decides for a tensor."""

    role: str
    packed: bool
    reason: str


# Never quantized, whatever the shape: (pattern over the module name, role, reason).
_IGNORED = tuple(
    (re.compile(pattern), role, f"policy: {reason}")
    for pattern, role, reason in (
        (
            r"(^|\.)(vision\w*|visual\w*|image_\w+|vit|audio\w*|speech\w*|sam_model|siglip\w*|vqmodel|vae|first_stage_model|"
            r"cond_stage_model|text_encoders?|conditioner)\.",
            "tower",
            "of another modality, a small share of the compute",
        ),
        (
            r"(^|\.)(multi_modal_projector|mm_projector|projector|aligner|connector|merger|embed_vision)(\.|$)",
            "projector",
            "small, and its error reaches every token",
        ),
        (r"(^|\.)(mtp|mtp_\w+|nextn\w*)(\.|$)", "mtp", "multi-token prediction, which only drafts"),
        (
            r"(^|\.)(lm_head|embed_out|logits|shared_head|score|classifier|cls|qa_outputs)(\.|$)|^output$",
            "logits",
            "a small error changes which token is chosen",
        ),
        (
            r"(^|\.)(embed_tokens\w*|tok_embeddings|embed_in|wte|wpe|word_embeddings|\w*position_embeddings?|token_type_embeddings|"
            r"embeddings?|embed_positions|relative_attention_bias|pos_embed|shared)(\.\w*embeddings?)?$",
            "embedding",
            "a lookup, no GEMM",
        ),
        (
            r"(^|\.)(gate|router|wg|\w*router_proj|router\.\w+|gate\.wg|shared_expert_gate|altup\.\w+)$",
            "router",
            "a small error changes which experts run",
        ),
        (
            r"(^|\.)indexer\.(weights_proj|wk)$",
            "indexer",
            "it selects tokens of sparse attention; engines fuse both in BF16",
        ),
        (r"(^|\.)(rotary\w*|rope\w*|inv_freq|freqs\w*)(\.|$)", "rotary", "a table, no GEMM"),
        (
            r"(^|\.)(x_embedder|img_in|txt_in|time_in|vector_in|guidance_in|context_embedder|caption_projection|time_text_embed|"
            r"time_embed\w*|timestep_embed\w*|t_embedder|y_embedder|cap_embedder|condition_embedder|patch_embed\w*|time_proj\w*|"
            r"text_embedding|label_emb|input_blocks\.0)(\.|$)",
            "conditioning",
            "small, and its error reaches every block",
        ),
        (
            r"(^|\.)(final_layer|proj_out|norm_out|head\.head)(\.linear|\.\w+)*$(?<!blocks)",
            "final",
            "its error is in the output itself",
        ),
        (
            r"(^|\.)(\w*modulation\w*|img_mod|txt_mod|adaln\w*|adaLN\w*)(\.|$)|(^|\.)norm\w*\.linear$",
            "modulation",
            "it scales every channel of a block",
        ),
        (r"(^|\.)\w*(norm|_ln|ln_\w+|layernorm|LayerNorm|ln\d*|norm\d*)$", "norm", "1-D, no GEMM"),
        (
            r"(^|\.)(conv1d|dt_proj|x_proj|in_proj_(a|b|ba)|A_log|b_proj|a_proj)$",
            "state",
            "its error accumulates over the sequence",
        ),
        (r"(^|\.)lora_\w+(\.\w+)?$", "lora", "a factor of an adapter, which is small"),
        (r"(^|\.)_extra_state\w*$", "extra_state", "Transformer Engine's pickled state, not read"),
    )
)

_LINEARS = {
    "attn.q": "q_proj q_a_proj q_b_proj query to_q wq q wq_a wq_b add_q_proj",
    "attn.k": "k_proj key to_k wk k add_k_proj",
    "attn.v": "v_proj value to_v wv v add_v_proj",
    "attn.kv": "kv_a_proj_with_mqa kv_b_proj kv_proj wkv wkv_a wkv_b",
    "attn.qkv": "qkv_proj query_key_value qkv Wqkv wqkv W_pack in_proj_qkv in_proj_qkvz",
    "attn.o": "o_proj out_proj wo o to_add_out proj",
    "mlp.gate": "gate_proj w1 wi_0 linear_fc1_gate",
    "mlp.up": "up_proj w3 fc1 dense_h_to_4h c_fc wi_1 wi fc_in lin1 linear1",
    "mlp.down": "down_proj w2 fc2 dense_4h_to_h wo_0 fc_out lin2 linear2",
    "mlp.gate_up": "gate_up_proj w13",
    "ssm": "in_proj in_proj_z",
}
LINEAR_ROLES = (*_LINEARS, "expert.gate", "expert.up", "expert.down", "expert.gate_up")
_ROLE_OF_LEAF = {leaf: role for role, leaves in _LINEARS.items() for leaf in leaves.split()}
_CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_LEAVES = ("c_attn", "c_proj", "c_fc", "q_attn")
_WIDE = re.compile(r"(^|\.)(\w*score_correction_bias|expert_bias|(gate|router)\.bias|A_log|D|dt_bias)$")
_NARROW = 32  # a kernel of a convolution is narrower
_OF_TEXT = re.compile(r"((model|language_model|transformer|text_model|thinker)\.)*layers\.\d+\.")
_NUMBER = re.compile(r"(^|(?<=\.))\d+(?=\.)")
_MIDLAYER = re.compile(r"(model\.)?midlayer\.")  # the first layer of an EAGLE-3 draft: layers.0 in vLLM and SGLang
_IN_BLOCK = re.compile(r"(^|\.)(\d+)\.[A-Za-z_]\w*\.")  # a number, a name, and a leaf


def judge(spec: TensorSpec, facts: ModelFacts, *, keeps_towers: bool = True) -> Verdict:
    """Return the role of a tensor, whether the policy quantizes it, and the reason as text.

    keeps_towers: false for a model of images or sound alone, whose tower is all of it.
    """
    module = spec.name.removesuffix(".weight")
    outside = _NUMBER.split(module, maxsplit=1)[0]  # a block of text may have a part for sound or images
    ignored = next(
        (
            (role, reason)
            for pattern, role, reason in _IGNORED
            if (role != "tower" or keeps_towers) and pattern.search(outside if role == "tower" else module)
        ),
        None,
    )
    if ignored is not None and not (ignored[0] == "final" and layer_of(spec.name) is not None):
        return Verdict(ignored[0], False, ignored[1])
    if spec.dtype not in FLOAT_DTYPES:
        return Verdict("other", False, f"dtype {spec.dtype} is not a float of 16 or 32 bits")
    if len(spec.shape) == 3 and re.search(r"(^|\.)experts\.\w+(\.weight)?$", spec.name):
        return Verdict("experts", False, "policy: fused 3-D experts of unknown layout")
    if not spec.name.endswith(".weight") or len(spec.shape) != 2:
        return _judge_other(spec)
    if _is_conv1d(module, spec, facts):
        return Verdict("conv1d", False, "policy: Conv1D stores [in, out], which no FP8 kernel reads")
    return _judge_linear(module, facts)


def is_wide(name: str) -> bool:
    """Say whether engines keep a tensor in float32 whatever the model's dtype: biases of routers, states of SSMs."""
    return _WIDE.search(name) is not None


def layer_of(name: str) -> int | None:
    """Return the number of the block of a tensor, None outside the blocks."""
    if _MIDLAYER.match(name):
        return 0
    match = _IN_BLOCK.search(name)
    return int(match[2]) if match and len(match[2]) < 7 else None


def _judge_other(spec: TensorSpec) -> Verdict:
    leaf = spec.name.rsplit(".", 1)[-1]
    if leaf == "bias" or leaf.endswith("_bias"):
        return Verdict("bias", False, "policy: 1-D, no GEMM")
    if len(spec.shape) == 3 and layer_of(spec.name) is not None and min(spec.shape[1:]) >= _NARROW:
        return Verdict("experts", False, "policy: a stack of matrices of unknown layout")
    if len(spec.shape) >= 3:
        return Verdict("conv", False, "policy: convolution kernel, no GEMM of [N, K]")
    if spec.name.endswith(".weight") and len(spec.shape) == 1:
        return Verdict("norm", False, "policy: 1-D, no GEMM")
    return Verdict("other", False, "policy: not a linear weight")


def _judge_linear(module: str, facts: ModelFacts) -> Verdict:
    layer = layer_of(module + ".weight")
    if layer is None:
        return Verdict("other", False, "policy: linear outside the numbered blocks")
    if facts.num_layers and layer >= facts.num_layers and _OF_TEXT.match(module):
        return Verdict(
            "mtp", False, f"policy: layer {layer} is beyond the {facts.num_layers} layers (multi-token prediction)"
        )
    leaf = module.removesuffix(".base_layer").rsplit(".", 1)[-1]
    role = _ROLE_OF_LEAF.get(leaf)
    if leaf in ("dense", "c_proj"):
        role = "mlp.down" if re.search(r"(mlp\.|(?<!attention\.)output\.)\w+$", module) else "attn.o"
        role = "mlp.up" if module.endswith("intermediate.dense") else role
    if re.search(r"\.to_out\.0$", module):
        role = "attn.o"
    if re.search(r"\.(ff|ff_context|ffn|mlp|img_mlp|txt_mlp)\.(net\.)?\d(\.proj)?$", module):
        role = "mlp.up" if re.search(r"\.0(\.proj)?$", module) else "mlp.down"
    if role is None:
        return Verdict(UNKNOWN_LINEAR, True, f"policy: {UNKNOWN_LINEAR} in a block")
    return _linear(role, of_expert=EXPERT.match(module) is not None)


@cache
def _linear(role: str, *, of_expert: bool) -> Verdict:
    return Verdict(role.replace("mlp", "expert") if of_expert else role, True, "policy: linear")


def _is_conv1d(module: str, spec: TensorSpec, facts: ModelFacts) -> bool:
    leaf = module.rsplit(".", 1)[-1]
    if leaf not in _CONV1D_LEAVES:
        return False
    return facts.model_type in _CONV1D_TYPES or (leaf == "c_attn" and 3 * spec.shape[0] == spec.shape[1])
