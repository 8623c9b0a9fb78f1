"""Which FP8 checkpoints SGLang loads, as read in its code."""

from fp8pack.engines.engine import (
    FNUZ,
    INFERRED,
    KEEP_EXPERTS,
    ONE_BY_ONE,
    Edges,
    Engine,
    EngineRule,
    PartialBlocks,
    renaming_rules,
)
from fp8pack.engines.gpus import BEFORE_ADA, BEFORE_SM100
from fp8pack.engines.ignore_list import ListSyntax, Match

# Classes that rename `weight_scale_inv` to `weight_scale`: they read tensor scales under transformers' names, and lose
# block and MX scales, which the engine keeps under `weight_scale_inv`.
_RENAMING = {
    "LlamaForCausalLM": "Llama",
    "MistralForCausalLM": "Mistral",
    "Ministral3ForCausalLM": "Ministral",
    "Phi3ForCausalLM": "Phi3",
    "InternLM3ForCausalLM": "InternLM3",
    "TeleFLMForCausalLM": "TeleFLM",
    "IQuestCoderForCausalLM": "IQuestCoder",
}

SGLANG = Engine(
    "sglang",
    "SGLang",
    "SGLang 0.5.23",
    facts="sglang-0.5.23",
    readers=(
        *renaming_rules(_RENAMING, "models/llama.py, model_loader/auto_loader.py", loses_mx=True),
        EngineRule("fp8 block:128x128 dynamic, fp8 tensor dynamic, fp8 tensor static", True, "quantization/fp8.py"),
        EngineRule(
            "fp8/transformers *",
            False,
            "quantization/fp8.py, models/transformers.py",
            "it looks for weight_scale, and only its Llama classes rename weight_scale_inv",
        ),
        EngineRule(
            "compressed-tensors tensor *, compressed-tensors channel *, compressed-tensors block:128x128 dynamic, "
            "compressed-tensors block:128x128 none",
            True,
            "quantization/compressed_tensors/",
        ),
        EngineRule(
            "compressed-tensors mx *",
            False,
            "quantization/compressed_tensors/",
            "it has no MXFP8 in compressed-tensors",
        ),
        EngineRule("modelopt tensor static, modelopt mx dynamic", True, "configs/model_config.py"),
        EngineRule(
            "modelopt channel *, modelopt block:*",
            False,
            "quantization/modelopt_quant.py, sgl-project/sglang#15468",
            "its modelopt reader holds static tensor scales and MXFP8 only",
        ),
        EngineRule("mxfp8 mx dynamic", True, "quantization/fp8.py"),
        EngineRule("quark tensor *, quark channel *", True, "quantization/quark/quark.py"),
        EngineRule(
            "quark block:*",
            False,
            "quantization/quark/quark.py",
            "it looks for weight_scale_inv, and Quark's files say weight_scale",
        ),
        EngineRule("w8a8_fp8 channel dynamic", True, "quantization/w8a8_fp8.py"),
    ),
    experts=(EngineRule("*", False, "models/", ONE_BY_ONE, KEEP_EXPERTS, INFERRED, ("GptOss*",)),),
    on_gpu=(
        EngineRule(
            "*", False, "quantization/fp8.py", "FP8 weights need SM80 there", "", INFERRED, only=("sm70", "sm75")
        ),
        EngineRule(
            "modelopt tensor *",
            False,
            "quantization/modelopt_quant.py at 003ca3e5",
            "its modelopt reader needs SM89",
            only=BEFORE_ADA,
        ),
        EngineRule(
            "* tensor *, * channel *, * block:*",
            True,
            "quantization/fp8.py",
            "weight-only there (Marlin): below SM89 activations stay BF16",
            "",
            INFERRED,
            BEFORE_ADA,
        ),
        EngineRule("* mx *", True, "quantization/fp8.py", "MXFP8 is converted at load below SM100", only=BEFORE_SM100),
        EngineRule(
            "* mx *", True, "quantization/fp8.py", "MXFP8 becomes 128 x 128 block scales at load", only=("gfx942",)
        ),
        EngineRule("*", True, "quantization/fp8_utils.py", FNUZ, only=("gfx942",)),
    ),
    kv_cache=(
        EngineRule(
            "fp8 *, fp8/transformers *",
            True,
            "quantization/kv_cache.py",
            "KV cache in FP8 with --kv-cache-dtype fp8_e4m3",
            evidence=INFERRED,
        ),
    ),
    lists=(
        ListSyntax("fp8 *, fp8/transformers *, mxfp8 *, modelopt mx *", (Match.PARTS,), "quantization/utils.py"),
        ListSyntax("compressed-tensors *", (Match.WHOLE, Match.REGEX), "quantization/compressed_tensors/"),
        ListSyntax("modelopt *", (Match.GLOB_OF_PART,), "quantization/modelopt_quant.py"),
    ),
    renaming=_RENAMING,
    partial_blocks=PartialBlocks(Edges.SINGLE, "quantization/fp8.py, quantization/fp8_utils.py"),
    rounds_on_sm100="quantization/compressed_tensors/, sgl-project/sglang#28662",
    fuses=True,
)
