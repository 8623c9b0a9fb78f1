"""Which FP8 checkpoints LMDeploy loads, as read in its code."""

from fp8pack.engines.engine import INFERRED, KEEP_EXPERTS, ONE_BY_ONE, Edges, Engine, EngineRule, PartialBlocks
from fp8pack.engines.gpus import BEFORE_ADA

LMDEPLOY = Engine(
    "lmdeploy",
    "LMDeploy",
    "LMDeploy 02f556b3",
    facts="lmdeploy-0.18.0",
    readers=(
        EngineRule("fp8 block:128x128 dynamic", True, "turbomind/weight_format.py, pytorch/nn/linear/blocked_fp8.py"),
        EngineRule(
            "fp8 tensor *, fp8/transformers tensor *",
            False,
            "turbomind/weight_format.py",
            "it would use the weight without its scale",
            evidence=INFERRED,
        ),
        EngineRule("* block:*", False, "turbomind/converter.py", "quant_method fp8 only"),
        EngineRule("*", False, "turbomind/converter.py", "block scales only"),
    ),
    experts=(EngineRule("*", False, "models/", ONE_BY_ONE, KEEP_EXPERTS, INFERRED, ("GptOss*",)),),
    on_gpu=(
        EngineRule("*", True, "turbomind/weight_format.py", "scales become F16 below SM89", only=("sm70", *BEFORE_ADA)),
        EngineRule("*", False, "turbomind/", "TurboMind runs on NVIDIA GPUs only", "", INFERRED, ("gfx*",)),
    ),
    kv_cache=(EngineRule("*", True, "turbomind/weight_format.py", "KV scales unused", evidence=INFERRED),),
    partial_blocks=PartialBlocks(Edges.SINGLE, "pytorch/nn/linear/blocked_fp8.py", INFERRED),
    fuses=True,
)
