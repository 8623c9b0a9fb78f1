"""Which FP8 checkpoints vLLM loads, as read in its code."""

from fp8pack.engines.engine import (
    FNUZ,
    INFERRED,
    REPORTED,
    RUN,
    Edges,
    Engine,
    EngineRule,
    PartialBlocks,
    renaming_rules,
)
from fp8pack.engines.gpus import BEFORE_ADA, BEFORE_SM100
from fp8pack.engines.ignore_list import ListSyntax, Match

# Classes that rename `weight_scale_inv` to `weight_scale`: they read tensor scales under transformers' names, and lose
# block scales, which the engine keeps under `weight_scale_inv`.
_RENAMING = {"Mistral3ForConditionalGeneration": "Mistral3"}

VLLM = Engine(
    "vllm",
    "vLLM",
    "vLLM 0.33.0",
    facts="vllm-0.33.0",
    earlier={
        "0.32.0": (
            EngineRule(
                "quark mx *",
                False,
                "quark/quark_moe.py",
                "reads no MXFP8 experts under this quant method",
                evidence=RUN,
                only=("expert*",),
            ),
        )
    },
    dequantizes={"wk": ("fp8 block:128x128 dynamic",)},  # models/deepseek_v2.py, of the indexer: weight_scale_inv only
    readers=(
        *renaming_rules(_RENAMING, "models/mistral3.py"),
        EngineRule("fp8 block:128x128 dynamic, fp8 tensor dynamic, fp8 tensor static", True, "fp8.py"),
        EngineRule("fp8 block:* static", False, "fp8.py", "block scales go with dynamic activations only"),
        EngineRule(
            "fp8/transformers *",
            False,
            "fp8.py",
            "it looks for weight_scale, and only its Mistral3 class renames weight_scale_inv",
        ),
        EngineRule(
            "compressed-tensors tensor *, compressed-tensors channel *, compressed-tensors block:128x128 dynamic, "
            "compressed-tensors block:128x128 none",
            True,
            "compressed_tensors/compressed_tensors.py, schemes/",
        ),
        EngineRule(
            "compressed-tensors block:* static",
            False,
            "compressed_tensors/schemes/",
            "block scales go with dynamic activations only",
        ),
        EngineRule(
            "compressed-tensors group:*",
            False,
            "compressed_tensors/compressed_tensors.py",
            "it has kernels for tensor, channel and block scales only",
        ),
        EngineRule(
            "compressed-tensors mx dynamic, compressed-tensors mx none",
            True,
            "compressed_tensors/compressed_tensors.py",
        ),
        EngineRule(
            "modelopt tensor static, modelopt channel dynamic, modelopt block:128x128 dynamic, modelopt mx dynamic",
            True,
            "modelopt.py, modelopt_block_quant.py",
        ),
        EngineRule("mxfp8 mx dynamic", True, "models/minimax_m3/nvidia/model.py", only=("MiniMaxM3*",)),
        EngineRule(
            "mxfp8 *", False, "models/minimax_m3/nvidia/model.py", "only its MiniMax-M3 class reads quant_method mxfp8"
        ),
        EngineRule(
            "torchao tensor dynamic, torchao tensor none, torchao channel dynamic, torchao channel none",
            True,
            "torchao.py",
            "with torchao",
        ),
        EngineRule(
            "quark tensor dynamic, quark tensor static, quark channel dynamic, quark channel static, "
            "quark block:128x128 dynamic, quark mx dynamic",
            True,
            "quark/quark.py, quark/schemes/",
        ),
        EngineRule("fbgemm_fp8 channel dynamic", True, "fbgemm_fp8.py", "with its flag for deprecated methods"),
        EngineRule("auto-round block:128x128 dynamic, auto-round mx dynamic", True, "inc/inc.py"),
    ),
    weights=(
        EngineRule(
            "fp8 *, fp8/transformers *, fbgemm_fp8 *",
            False,
            "fp8.py, vllm-project/vllm#31757",
            "never takes the logits for FP8 under this quant method",
            only=("logits",),
        ),
        EngineRule(
            "*",
            False,
            "compressed_tensors/compressed_tensors_embedding.py",
            "has no FP8 embedding",
            "--ignore '*embed*'",
            only=("embedding",),
        ),
        EngineRule(
            "compressed-tensors channel static",
            False,
            "compressed_tensors/compressed_tensors_moe/",
            "takes channel scales of experts with dynamic activations only",
            only=("expert*",),
        ),
        EngineRule(
            "compressed-tensors tensor none, compressed-tensors channel none, compressed-tensors block:* none",
            False,
            "compressed_tensors/compressed_tensors_moe/",
            "has no weight-only FP8 experts",
            evidence=INFERRED,
            only=("expert*",),
        ),
        EngineRule(
            "modelopt channel *, modelopt block:*",
            False,
            "modelopt.py ModelOptFp8MoEMethod",
            "takes experts with tensor and MX scales only under this quant method",
            only=("expert*",),
        ),
        EngineRule("torchao *", False, "torchao.py", "reads no experts under this quant method", only=("expert*",)),
    ),
    experts=(
        EngineRule(
            "fp8 *, fp8/transformers *, compressed-tensors *, modelopt *, mxfp8 *, torchao *",
            False,
            "models/gpt_oss.py",
            "reads experts of gpt-oss one by one in quark files only",
            evidence=INFERRED,
            only=("GptOss*",),
        ),
    ),
    on_gpu=(
        EngineRule("*", False, "fp8.py", "FP8 weights need SM75 there", only=("sm70",)),
        EngineRule(
            "modelopt tensor *, modelopt channel *, modelopt block:*",
            False,
            "modelopt.py at 00155cde",
            "its modelopt reader needs SM89",
            only=BEFORE_ADA,
        ),
        EngineRule(
            "* tensor *, * channel *, * block:*",
            True,
            "compressed_tensors_w8a16_fp8.py, fp8.py",
            "weight-only there (Marlin): below SM89 activations stay BF16",
            only=BEFORE_ADA,
        ),
        EngineRule(
            "* block:*",
            True,
            "vllm-project/vllm#58241",
            "block scales run weight-only there (Marlin)",
            evidence=REPORTED,
            only=("sm89",),
        ),
        EngineRule(
            "* mx *", True, "quark_ocp_mx.py", "MXFP8 is emulated or weight-only below SM100", only=BEFORE_SM100
        ),
        EngineRule("*", True, "utils/w8a8_utils.py", FNUZ, only=("gfx942",)),
    ),
    kv_cache=(EngineRule("fp8 *, fp8/transformers *", True, "fp8.py", "KV cache in FP8 with --kv-cache-dtype fp8"),),
    lists=(
        ListSyntax("fp8 *, fp8/transformers *, fbgemm_fp8 *", (Match.WHOLE,), "utils/quant_utils.py"),
        ListSyntax("compressed-tensors *", (Match.WHOLE, Match.REGEX), "compressed_tensors/utils.py", True),
        ListSyntax("modelopt *", (Match.WHOLE, Match.ANYWHERE, Match.GLOB), "modelopt.py", True),
        ListSyntax("quark *", (Match.WHOLE, Match.REGEX), "quark/utils.py"),
        ListSyntax("torchao *", (Match.PARTS,), "torchao.py", knows_parts=False),
    ),
    renaming=_RENAMING,
    partial_blocks=PartialBlocks(Edges.LAST, "utils/fp8_utils.py validate_fp8_block_shape"),
    rounds_on_sm100="utils/fp8_utils.py, vllm-project/vllm#58157",
    fuses=True,
)
