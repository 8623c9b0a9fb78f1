"""Which FP8 checkpoints TGI loads, as read in its code."""

from fp8pack.engines.engine import (
    FNUZ,
    INFERRED,
    KEEP_EXPERTS,
    ONE_BY_ONE,
    Edges,
    Engine,
    EngineRule,
    PartialBlocks,
)

TGI = Engine(
    "tgi",
    "TGI",
    "TGI 05d0aa67",
    facts="tgi-db931fcf",
    readers=(
        EngineRule("fp8 block:128x128 dynamic, fp8 tensor dynamic, fp8 tensor static", True, "layers/fp8.py"),
        EngineRule("fp8/transformers *", False, "layers/fp8.py", "it looks for weight_scale", evidence=INFERRED),
        EngineRule(
            "compressed-tensors channel dynamic, compressed-tensors tensor dynamic, compressed-tensors tensor static",
            True,
            "layers/compressed_tensors",
        ),
        EngineRule(
            "compressed-tensors block:*",
            False,
            "layers/compressed_tensors",
            "its compressed-tensors reader holds tensor and channel scales only",
            evidence=INFERRED,
        ),
        EngineRule("modelopt *", False, "utils/quantization.py", "it has no reader for modelopt"),
        EngineRule("fbgemm_fp8 channel dynamic", True, "layers/fp8.py"),
    ),
    experts=(EngineRule("*", False, "models/", ONE_BY_ONE, KEEP_EXPERTS, INFERRED, ("GptOss*",)),),
    on_gpu=(
        EngineRule(
            "fp8 block:*",
            False,
            "layers/fp8.py, layers/marlin/fp8.py at 14e8ca52",
            "its kernel for SM8x (Marlin) takes no block scales",
            only=("sm80", "sm86", "sm89"),
        ),
        EngineRule(
            "*",
            True,
            "layers/fp8.py",
            "weight-only there (Marlin): activations stay BF16",
            only=("sm80", "sm86", "sm89"),
        ),
        EngineRule("*", True, "layers/fp8.py", FNUZ, only=("gfx942",)),
        EngineRule(
            "*",
            False,
            "layers/fp8.py",
            "it turns every file into e4m3fnuz on AMD, which gfx950 does not multiply",
            "",
            INFERRED,
            ("gfx950",),
        ),
    ),
    partial_blocks=PartialBlocks(Edges.SINGLE, "layers/fp8.py", INFERRED),
    fuses=True,
)
