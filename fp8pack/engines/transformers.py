"""Which FP8 checkpoints transformers loads, as read in its code."""

from fp8pack.engines.engine import (
    INFERRED,
    RUN,
    Edges,
    Engine,
    EngineRule,
    PartialBlocks,
)
from fp8pack.engines.gpus import BEFORE_ADA
from fp8pack.engines.ignore_list import ListSyntax, Match

TRANSFORMERS = Engine(
    "transformers",
    "transformers",
    "transformers 5.24.0",
    facts="transformers-5.24.0",
    modules="transformers-5.24.0-modules",
    readers=(
        EngineRule(
            "fp8 block:128x128 dynamic, fp8/transformers tensor dynamic, mxfp8 mx dynamic",
            True,
            "integrations/finegrained_fp8.py",
            "with accelerate",
            evidence=RUN,
        ),
        EngineRule("fp8/transformers tensor static", True, "integrations/finegrained_fp8.py", "with accelerate"),
        EngineRule("fp8 tensor *", False, "integrations/finegrained_fp8.py", "it looks for weight_scale_inv"),
        EngineRule(
            "compressed-tensors channel dynamic, compressed-tensors channel none, compressed-tensors mx dynamic, "
            "compressed-tensors block:128x128 dynamic, compressed-tensors tensor dynamic, "
            "compressed-tensors tensor static",
            True,
            "quantizers/quantizer_compressed_tensors.py",
            "with compressed-tensors",
            evidence=RUN,
        ),
        EngineRule(
            "compressed-tensors *", True, "quantizers/quantizer_compressed_tensors.py", "with compressed-tensors"
        ),
        EngineRule("torchao *", True, "quantizers/quantizer_torchao.py", "with torchao", evidence=RUN),
        EngineRule("quark *", True, "quantizers/quantizer_quark.py", "with amd-quark"),
        EngineRule("fbgemm_fp8 channel dynamic", True, "integrations/fbgemm_fp8.py", "with fbgemm-gpu"),
        EngineRule(
            "modelopt *",
            False,
            "quantizers/auto.py",
            "it has no reader for modelopt and takes the bytes for weights without scales",
            evidence=INFERRED,
        ),
    ),
    experts=(
        EngineRule(
            "fp8 *, fp8/transformers *, mxfp8 *, torchao *, quark *",
            False,
            "conversion_mapping.py",
            "has no conversion from experts one by one for Llama 4",
            only=("Llama4*",),
        ),
        EngineRule("compressed-tensors *", True, "conversion_mapping.py", only=("Llama4*",)),
        EngineRule(
            "compressed-tensors block:*, compressed-tensors group:*, compressed-tensors mx *",
            False,
            "quantizers/quantizer_compressed_tensors.py, where experts are put together",
            "puts experts together with tensor or channel scales only",
            evidence=RUN,
        ),
        EngineRule(
            "torchao *",
            False,
            "quantizers/quantizer_torchao.py, where experts are put together",
            "takes no experts from torchao files",
            evidence=RUN,
        ),
    ),
    wrappers=(
        EngineRule(
            "torchao *",
            False,
            "quantizers/quantizer_torchao.py, where names are mapped",
            "does not find the metadata of torchao files under a wrapper's names",
            evidence=RUN,
        ),
    ),
    on_gpu=(
        EngineRule(
            "fp8 *, fp8/transformers *, mxfp8 *",
            True,
            "quantizers/quantizer_finegrained_fp8.py",
            "dequantized to BF16 at load: FP8 products need SM89",
            only=("sm70", *BEFORE_ADA),
        ),
        EngineRule(
            "fbgemm_fp8 *",
            False,
            "integrations/fbgemm_fp8.py",
            "fbgemm_fp8 needs SM90",
            only=("sm70", *BEFORE_ADA, "sm89"),
        ),
    ),
    kv_cache=(EngineRule("*", True, "quantizers/", "KV scales unused", evidence=INFERRED),),
    lists=(
        ListSyntax("fp8 *, fp8/transformers *, mxfp8 *", (Match.ENDS,), "quantizers/quantizers_utils.py", True),
        ListSyntax("compressed-tensors *", (Match.WHOLE, Match.REGEX), "compressed-tensors utils/match.py"),
    ),
    partial_blocks=PartialBlocks(Edges.NONE, "integrations/finegrained_fp8.py, when it dequantizes"),
    loads_whole=True,
)
