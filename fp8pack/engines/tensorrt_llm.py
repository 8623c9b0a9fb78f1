"""Which FP8 checkpoints TensorRT-LLM loads, as read in its code."""

from fp8pack.engines.engine import (
    INFERRED,
    KEEP_EXPERTS,
    ONE_BY_ONE,
    Edges,
    Engine,
    EngineRule,
    PartialBlocks,
)
from fp8pack.engines.gpus import BEFORE_ADA, BEFORE_SM100
from fp8pack.engines.ignore_list import ListSyntax, Match

TENSORRT_LLM = Engine(
    "tensorrt-llm",
    "TensorRT-LLM",
    "TensorRT-LLM 008e0af8",
    facts="tensorrt-llm-065ff9e9",
    readers=(
        EngineRule("fp8 block:128x128 dynamic", True, "_torch/model_config.py"),
        EngineRule(
            "fp8 tensor *, fp8/transformers *",
            False,
            "_torch/model_config.py",
            "quant_method fp8 means block scales there",
        ),
        EngineRule(
            "compressed-tensors channel dynamic, compressed-tensors block:128x128 dynamic",
            True,
            "models/quant_config_utils.py",
        ),
        EngineRule(
            "compressed-tensors tensor *", False, "models/quant_config_utils.py", "it refuses tensor scales there"
        ),
        EngineRule(
            "compressed-tensors * none",
            False,
            "models/quant_config_utils.py",
            "it asks for input_activations there",
            evidence=INFERRED,
        ),
        EngineRule(
            "modelopt tensor static, modelopt channel dynamic, modelopt block:128x128 dynamic, modelopt mx dynamic",
            True,
            "_torch/modules/linear.py, quantization/modelopt_config.py",
        ),
        EngineRule("mxfp8 mx dynamic", True, "_torch/model_config.py"),
    ),
    experts=(EngineRule("*", False, "models/", ONE_BY_ONE, KEEP_EXPERTS, INFERRED, ("GptOss*",)),),
    on_gpu=(
        EngineRule("*", False, "the project", "it runs on NVIDIA GPUs only", "", INFERRED, ("gfx*",)),
        EngineRule("*", False, "_torch/modules/linear.py", "FP8 needs SM89 there", "", INFERRED, ("sm70", *BEFORE_ADA)),
        EngineRule(
            "* mx *", False, "_torch/modules/linear.py", "MXFP8 needs SM100 there", evidence=INFERRED, only=BEFORE_SM100
        ),
    ),
    kv_cache=(
        EngineRule(
            "modelopt *, compressed-tensors *",
            True,
            "_torch/modules/linear.py",
            "KV scales with TRTLLM_LOAD_KV_SCALES=1",
        ),
        EngineRule("fp8 *", True, "_torch/model_config.py", "KV scales unused", evidence=INFERRED),
    ),
    lists=(ListSyntax("*", (Match.WHOLE, Match.GLOB), "models/quant_config_utils.py"),),
    partial_blocks=PartialBlocks(Edges.SINGLE, "_torch/modules/linear.py", INFERRED),
    rounds_on_sm100="ai-dynamo/aiconfigurator#414",
    fuses=True,
)
