"""What each inference engine reads and refuses, as tables; every row says where it was read.

`planning/engines.py` holds a checkpoint against them, and `docs/engines.md` is written from them. A change of an engine
is a change of a row here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from fp8pack.numerics.granularity import Granularity
from fp8pack.planning.layout import Stored
from fp8pack.planning.storage import Storage

VERSIONS = {
    "vllm": "vLLM 0.33.0",
    "sglang": "SGLang 0.5.23",
    "tensorrt-llm": "TensorRT-LLM 008e0af8",
    "transformers": "transformers 5.23.0",
    "tgi": "TGI 05d0aa67",
    "lmdeploy": "LMDeploy 02f556b3",
    "comfyui": "ComfyUI 0271a469",
    "cublaslt": "cuBLASLt 12.9, as nvmath-python 1.0.0 and torch 2.15 call it",
}


class Evidence(StrEnum):
    """How a row is known."""

    RUN = "library run in tests/interop"
    READ = "engine's code as read"
    INFERRED = "inferred from the engine's code"
    REPORTED = "reported in the issue"


@dataclass(frozen=True, slots=True)
class Rule:
    """What an engine does with some kinds of storage.

    kinds: globs over `method granularity activations`, separated by commas; a spelling follows the method, as in
    `fp8/transformers tensor dynamic`. loads: whether it goes on; then `text` is what must be known besides, else the
    reason. only: globs over what the table is about: architectures, roles of weights, or GPUs (`any` if none is named).
    """

    engine: str
    kinds: str
    loads: bool
    source: str
    text: str = ""
    remedy: str = ""
    evidence: Evidence = Evidence.READ
    only: tuple[str, ...] = ("*",)

    def covers(self, engine: str, kind: str, subject: str) -> bool:
        """Say whether the rule speaks of this engine, kind of storage and architecture, role or GPU."""
        return (
            self.engine == engine
            and any(fnmatchcase(kind, glob) for glob in self.kinds.split(", "))
            and any(fnmatchcase(subject, glob) for glob in self.only)
        )


def kind_of(storage: Storage) -> str:
    """Return how the rules call a storage: `compressed-tensors channel dynamic`."""
    method = f"{storage.quant_method}/{storage.spelling}" if storage.spelling else storage.quant_method
    return f"{method} {storage.granularity.name} {storage.activations}"


def rules_for(table: Sequence[Rule], engine: str, kind: str, subject: str = "") -> list[Rule]:
    """Return the rules of a table that speak of an engine, a kind of storage and an architecture, role or GPU."""
    return [rule for rule in table if rule.covers(engine, kind, subject)]


# Classes that rename `weight_scale_inv` to `weight_scale`: they read tensor scales in transformers' spelling, and lose
# block and MX scales, which the engine keeps under `weight_scale_inv`.
RENAMING = {
    "sglang": {
        "LlamaForCausalLM": "Llama",
        "MistralForCausalLM": "Mistral",
        "Ministral3ForCausalLM": "Ministral",
        "Phi3ForCausalLM": "Phi3",
        "InternLM3ForCausalLM": "InternLM3",
        "TeleFLMForCausalLM": "TeleFLM",
        "IQuestCoderForCausalLM": "IQuestCoder",
    },
    "vllm": {"Mistral3ForConditionalGeneration": "Mistral3"},
}
_RENAMED_IN = {"sglang": "models/llama.py, model_loader/auto_loader.py", "vllm": "models/mistral3.py"}
_LOST = (("block scales", "fp8 block:*, auto-round block:*"), ("MX scales", "mxfp8 mx *, modelopt mx *"))
_READ, _INFERRED, _RUN = Evidence.READ, Evidence.INFERRED, Evidence.RUN
_DYNAMIC, _BLOCK, _CT = "--scheme FP8_DYNAMIC", "--scheme FP8_BLOCK", "--quant-method compressed-tensors"
_WITH_CT = "with compressed-tensors"

_RENAMING_READERS = tuple(
    rule
    for engine, loaders in RENAMING.items()
    for architecture, loader in loaders.items()
    for rule in (
        *(
            Rule(
                engine,
                kinds,
                False,
                _RENAMED_IN[engine],
                f"its {loader} loader loses {what}",
                _DYNAMIC,
                _INFERRED,
                (architecture,),
            )
            for what, kinds in _LOST
            if what == "block scales" or engine == "sglang"
        ),
        Rule(engine, "fp8/transformers tensor *", True, _RENAMED_IN[engine], only=(architecture,)),
    )
)

# Who reads what. The first rule that speaks of an engine, a kind of storage and the model's architecture decides.
READERS = (
    *_RENAMING_READERS,
    # vLLM
    Rule("vllm", "fp8 block:128x128 dynamic, fp8 tensor dynamic, fp8 tensor static", True, "fp8.py"),
    Rule("vllm", "fp8 block:* static", False, "fp8.py", "block scales go with dynamic activations only", _BLOCK),
    Rule(
        "vllm",
        "fp8/transformers *",
        False,
        "fp8.py",
        "it looks for weight_scale, and only its Mistral3 class renames weight_scale_inv",
        _DYNAMIC,
    ),
    Rule(
        "vllm",
        "compressed-tensors tensor *, compressed-tensors channel *, compressed-tensors block:128x128 dynamic, "
        "compressed-tensors block:128x128 none",
        True,
        "compressed_tensors/compressed_tensors.py, schemes/",
    ),
    Rule(
        "vllm",
        "compressed-tensors block:* static",
        False,
        "compressed_tensors/schemes/",
        "block scales go with dynamic activations only",
        _BLOCK,
    ),
    Rule(
        "vllm",
        "compressed-tensors group:*",
        False,
        "compressed_tensors/compressed_tensors.py",
        "it has kernels for tensor, channel and block scales only",
        _DYNAMIC,
    ),
    Rule(
        "vllm",
        "compressed-tensors mx dynamic, compressed-tensors mx none",
        True,
        "compressed_tensors/compressed_tensors.py",
    ),
    Rule(
        "vllm",
        "modelopt tensor static, modelopt channel dynamic, modelopt block:128x128 dynamic, modelopt mx dynamic",
        True,
        "modelopt.py, modelopt_block_quant.py",
    ),
    Rule("vllm", "mxfp8 mx dynamic", True, "models/minimax_m3/nvidia/model.py", only=("MiniMaxM3*",)),
    Rule(
        "vllm",
        "mxfp8 *",
        False,
        "models/minimax_m3/nvidia/model.py",
        "only its MiniMax-M3 class reads quant_method mxfp8",
        "--quant-method modelopt",
    ),
    Rule(
        "vllm",
        "torchao tensor dynamic, torchao tensor none, torchao channel dynamic, torchao channel none",
        True,
        "torchao.py",
        "with safetensors_load_strategy=torchao",
    ),
    Rule(
        "vllm",
        "quark tensor *, quark channel dynamic, quark channel static, quark block:128x128 dynamic, quark mx dynamic",
        True,
        "quark/quark.py, quark/schemes/",
    ),
    Rule("vllm", "fbgemm_fp8 channel dynamic", True, "fbgemm_fp8.py", "with its flag for deprecated methods"),
    Rule("vllm", "auto-round block:128x128 dynamic, auto-round mx dynamic", True, "inc/inc.py"),
    # SGLang
    Rule("sglang", "fp8 block:128x128 dynamic, fp8 tensor dynamic, fp8 tensor static", True, "quantization/fp8.py"),
    Rule(
        "sglang",
        "fp8/transformers *",
        False,
        "quantization/fp8.py, models/transformers.py",
        "it looks for weight_scale, and only its Llama classes rename weight_scale_inv",
        _DYNAMIC,
    ),
    Rule(
        "sglang",
        "compressed-tensors tensor *, compressed-tensors channel *, compressed-tensors block:128x128 dynamic, "
        "compressed-tensors block:128x128 none",
        True,
        "quantization/compressed_tensors/",
    ),
    Rule(
        "sglang",
        "compressed-tensors mx *",
        False,
        "quantization/compressed_tensors/",
        "it has no MXFP8 in compressed-tensors",
        "--quant-method modelopt",
    ),
    Rule("sglang", "modelopt tensor static, modelopt mx dynamic", True, "configs/model_config.py"),
    Rule(
        "sglang",
        "modelopt channel *, modelopt block:*",
        False,
        "quantization/modelopt_quant.py, sgl-project/sglang#15468",
        "its modelopt reader holds static tensor scales and MXFP8 only",
        _DYNAMIC,
    ),
    Rule("sglang", "mxfp8 mx dynamic", True, "quantization/fp8.py"),
    Rule("sglang", "quark tensor *, quark channel *", True, "quantization/quark/quark.py"),
    Rule(
        "sglang",
        "quark block:*",
        False,
        "quantization/quark/quark.py",
        "it looks for weight_scale_inv, and Quark's files say weight_scale",
        "--quant-method fp8",
    ),
    Rule("sglang", "w8a8_fp8 channel dynamic", True, "quantization/w8a8_fp8.py"),
    # TensorRT-LLM
    Rule("tensorrt-llm", "fp8 block:128x128 dynamic", True, "_torch/model_config.py"),
    Rule(
        "tensorrt-llm",
        "fp8 tensor *, fp8/transformers *",
        False,
        "_torch/model_config.py",
        "quant_method fp8 means block scales there",
        _BLOCK,
    ),
    Rule(
        "tensorrt-llm",
        "compressed-tensors channel dynamic, compressed-tensors block:128x128 dynamic",
        True,
        "models/quant_config_utils.py",
    ),
    Rule(
        "tensorrt-llm",
        "compressed-tensors tensor *",
        False,
        "models/quant_config_utils.py",
        "it refuses tensor scales there",
        "--quant-method modelopt",
    ),
    Rule(
        "tensorrt-llm",
        "compressed-tensors * none",
        False,
        "models/quant_config_utils.py",
        "it asks for input_activations there",
        _DYNAMIC,
        _INFERRED,
    ),
    Rule(
        "tensorrt-llm",
        "modelopt tensor static, modelopt channel dynamic, modelopt block:128x128 dynamic, modelopt mx dynamic",
        True,
        "_torch/modules/linear.py, quantization/modelopt_config.py",
    ),
    Rule("tensorrt-llm", "mxfp8 mx dynamic", True, "_torch/model_config.py"),
    # transformers
    Rule(
        "transformers",
        "fp8 block:128x128 dynamic, fp8/transformers tensor dynamic, mxfp8 mx dynamic",
        True,
        "integrations/finegrained_fp8.py",
        "with accelerate",
        evidence=_RUN,
    ),
    Rule(
        "transformers",
        "fp8/transformers tensor static",
        True,
        "integrations/finegrained_fp8.py",
        "with accelerate",
    ),
    Rule(
        "transformers",
        "fp8 tensor *",
        False,
        "integrations/finegrained_fp8.py",
        "it looks for weight_scale_inv",
        _DYNAMIC,
    ),
    Rule(
        "transformers",
        "compressed-tensors channel dynamic, compressed-tensors channel none, compressed-tensors mx dynamic, "
        "compressed-tensors block:128x128 dynamic, compressed-tensors tensor dynamic, compressed-tensors tensor static",
        True,
        "quantizers/quantizer_compressed_tensors.py",
        _WITH_CT,
        evidence=_RUN,
    ),
    Rule("transformers", "compressed-tensors *", True, "quantizers/quantizer_compressed_tensors.py", _WITH_CT),
    Rule("transformers", "torchao *", True, "quantizers/quantizer_torchao.py", "with torchao", evidence=_RUN),
    Rule("transformers", "quark *", True, "quantizers/quantizer_quark.py", "with amd-quark"),
    Rule("transformers", "fbgemm_fp8 channel dynamic", True, "integrations/fbgemm_fp8.py", "with fbgemm-gpu"),
    Rule(
        "transformers",
        "modelopt *",
        False,
        "quantizers/auto.py",
        "it has no reader for modelopt and takes the bytes for weights without scales",
        _CT,
        _INFERRED,
    ),
    # TGI
    Rule("tgi", "fp8 block:128x128 dynamic, fp8 tensor dynamic, fp8 tensor static", True, "layers/fp8.py"),
    Rule("tgi", "fp8/transformers *", False, "layers/fp8.py", "it looks for weight_scale", _DYNAMIC, _INFERRED),
    Rule(
        "tgi",
        "compressed-tensors channel dynamic, compressed-tensors tensor dynamic, compressed-tensors tensor static",
        True,
        "layers/compressed_tensors",
    ),
    Rule(
        "tgi",
        "compressed-tensors block:*",
        False,
        "layers/compressed_tensors",
        "its compressed-tensors reader holds tensor and channel scales only",
        "--quant-method fp8",
        _INFERRED,
    ),
    Rule("tgi", "modelopt *", False, "utils/quantization.py", "it has no reader for modelopt", _CT),
    Rule("tgi", "fbgemm_fp8 channel dynamic", True, "layers/fp8.py"),
    # LMDeploy
    Rule("lmdeploy", "fp8 block:128x128 dynamic", True, "turbomind/weight_format.py, pytorch/nn/linear/blocked_fp8.py"),
    Rule(
        "lmdeploy",
        "fp8 tensor *, fp8/transformers tensor *",
        False,
        "turbomind/weight_format.py",
        "it would use the weight without its scale",
        _BLOCK,
        _INFERRED,
    ),
    Rule("lmdeploy", "* block:*", False, "turbomind/converter.py", "quant_method fp8 only", "--quant-method fp8"),
    Rule("lmdeploy", "*", False, "turbomind/converter.py", "block scales only", _BLOCK),
    # ComfyUI
    Rule("comfyui", "comfyui tensor *, comfyui-scaled tensor *", True, "ops.py, quant_ops.py"),
    Rule("comfyui", "comfyui mx *", True, "ops.py, quant_ops.py", "with scales in cuBLASLt's tiled order"),
    Rule(
        "comfyui",
        "*",
        False,
        "ops.py",
        "it reads single files with its own markers",
        "--quant-method comfyui --granularity tensor",
    ),
    # load_packed() and cuBLASLt
    Rule(
        "cublaslt",
        "* none",
        False,
        "nvmath linalg/advanced",
        "it multiplies FP8 by FP8, and these activations stay as they are",
        "--activations dynamic",
    ),
    Rule("cublaslt", "* tensor *", True, "MATMUL_MATRIX_SCALE_SCALAR_32F"),
    Rule("cublaslt", "* channel *", True, "MATMUL_MATRIX_SCALE_OUTER_VEC_32F, NVIDIA/CUDALibrarySamples#270"),
    Rule("cublaslt", "* block:128x128 *", True, "MATMUL_MATRIX_SCALE_BLK128x128_32F, NVIDIA/CUDALibrarySamples#270"),
    Rule("cublaslt", "* mx *", True, "MATMUL_MATRIX_SCALE_VEC32_UE8M0"),
    Rule(
        "cublaslt",
        "*",
        False,
        "nvmath bindings/cycublasLt.pxd",
        "it has no such mode of scaling",
        "--granularity tensor",
    ),
)

# Packed weights of a role that an engine keeps otherwise.
WEIGHTS = (
    Rule(
        "vllm",
        "fp8 *, fp8/transformers *, fbgemm_fp8 *",
        False,
        "fp8.py, vllm-project/vllm#31757",
        "never takes the logits for FP8 under this quant method",
        "--quant-method compressed-tensors",
        only=("logits",),
    ),
    Rule(
        "vllm",
        "*",
        False,
        "compressed_tensors/compressed_tensors_embedding.py",
        "has no FP8 embedding",
        "--ignore '*embed*'",
        only=("embedding",),
    ),
    Rule(
        "vllm",
        "compressed-tensors channel static",
        False,
        "compressed_tensors/compressed_tensors_moe/",
        "takes channel scales of experts with dynamic activations only",
        _DYNAMIC,
        only=("expert*",),
    ),
    Rule(
        "vllm",
        "compressed-tensors tensor none, compressed-tensors channel none, compressed-tensors block:* none",
        False,
        "compressed_tensors/compressed_tensors_moe/",
        "has no weight-only FP8 experts",
        _DYNAMIC,
        _INFERRED,
        ("expert*",),
    ),
)

_ONE_BY_ONE = "was not read to take experts of this class one by one"
_KEEP_EXPERTS = "--ignore '*experts*'"

# Classes that hold the experts of a layer in one tensor, by architecture: who reads those of our files, one by one. The
# first row that speaks of a class and a storage counts.
EXPERTS = (
    Rule(
        "transformers",
        "fp8 *, fp8/transformers *, mxfp8 *, torchao *, quark *",
        False,
        "conversion_mapping.py",
        "has no conversion from experts one by one for Llama 4",
        "--quant-method compressed-tensors",
        only=("Llama4*",),
    ),
    Rule(
        "transformers",
        "*",
        False,
        "conversion_mapping.py",
        "has no conversion from experts one by one for this class",
        _KEEP_EXPERTS,
        only=("GptOss*", "Qwen3VLMoe*"),
    ),
    Rule("transformers", "compressed-tensors *", True, "conversion_mapping.py", only=("Llama4*",)),
    Rule(
        "transformers",
        "compressed-tensors block:*, compressed-tensors group:*, compressed-tensors mx *",
        False,
        "quantizers/quantizer_compressed_tensors.py, where experts are put together",
        "puts experts together with tensor or channel scales only",
        _DYNAMIC,
        _RUN,
    ),
    Rule(
        "transformers",
        "torchao *",
        False,
        "quantizers/quantizer_torchao.py, where experts are put together",
        "takes no experts from torchao files",
        _CT,
        _RUN,
    ),
    Rule(
        "vllm",
        "fp8 *, fp8/transformers *, compressed-tensors *, modelopt *, mxfp8 *, torchao *",
        False,
        "models/gpt_oss.py",
        "reads experts of gpt-oss one by one in quark files only",
        "--quant-method quark",
        _INFERRED,
        ("GptOss*",),
    ),
    *(
        Rule(engine, "*", False, "models/", _ONE_BY_ONE, _KEEP_EXPERTS, _INFERRED, ("GptOss*",))
        for engine in ("sglang", "tensorrt-llm", "tgi", "lmdeploy")
    ),
)

# Models with a text_config around the language model's.
WRAPPERS = (
    Rule(
        "transformers",
        "torchao *",
        False,
        "quantizers/quantizer_torchao.py, where names are mapped",
        "does not find the metadata of torchao files under a wrapper's names",
        _CT,
        _RUN,
    ),
)

_BEFORE_ADA = ("sm75", "sm80", "sm86")
_BEFORE_SM100 = ("sm75", "sm80", "sm86", "sm89", "sm90")
_FNUZ = "turned into e4m3fnuz at load"

# What a GPU changes. A refusal counts first; of the rest, all are worth a note.
ON_GPU = (
    Rule("vllm", "*", False, "fp8.py", "FP8 weights need SM75 there", only=("sm70",)),
    Rule(
        "vllm",
        "modelopt tensor *, modelopt channel *, modelopt block:*",
        False,
        "modelopt.py at 00155cde",
        "its modelopt reader needs SM89",
        _DYNAMIC,
        only=_BEFORE_ADA,
    ),
    Rule(
        "vllm",
        "* tensor *, * channel *, * block:*",
        True,
        "compressed_tensors_w8a16_fp8.py, fp8.py",
        "weight-only there (Marlin): below SM89 activations stay BF16",
        only=_BEFORE_ADA,
    ),
    Rule(
        "vllm",
        "* block:*",
        True,
        "vllm-project/vllm#58241",
        "block scales run weight-only there (Marlin)",
        evidence=Evidence.REPORTED,
        only=("sm89",),
    ),
    Rule("vllm", "* mx *", True, "quark_ocp_mx.py", "MXFP8 is emulated or weight-only below SM100", only=_BEFORE_SM100),
    Rule("vllm", "*", True, "utils/w8a8_utils.py", _FNUZ, only=("gfx942",)),
    Rule(
        "sglang", "*", False, "quantization/fp8.py", "FP8 weights need SM80 there", "", _INFERRED, only=("sm70", "sm75")
    ),
    Rule(
        "sglang",
        "modelopt tensor *",
        False,
        "quantization/modelopt_quant.py at 003ca3e5",
        "its modelopt reader needs SM89",
        _DYNAMIC,
        only=_BEFORE_ADA,
    ),
    Rule(
        "sglang",
        "* tensor *, * channel *, * block:*",
        True,
        "quantization/fp8.py",
        "weight-only there (Marlin): below SM89 activations stay BF16",
        "",
        _INFERRED,
        _BEFORE_ADA,
    ),
    Rule("sglang", "* mx *", True, "quantization/fp8.py", "MXFP8 is converted at load below SM100", only=_BEFORE_SM100),
    Rule(
        "sglang",
        "* mx *",
        True,
        "quantization/fp8.py",
        "MXFP8 becomes 128 x 128 block scales at load",
        only=("gfx942",),
    ),
    Rule("sglang", "*", True, "quantization/fp8_utils.py", _FNUZ, only=("gfx942",)),
    Rule("tensorrt-llm", "*", False, "the project", "it runs on NVIDIA GPUs only", "", _INFERRED, ("gfx*",)),
    Rule(
        "tensorrt-llm",
        "*",
        False,
        "_torch/modules/linear.py",
        "FP8 needs SM89 there",
        "",
        _INFERRED,
        ("sm70", *_BEFORE_ADA),
    ),
    Rule(
        "tensorrt-llm",
        "* mx *",
        False,
        "_torch/modules/linear.py",
        "MXFP8 needs SM100 there",
        _DYNAMIC,
        _INFERRED,
        _BEFORE_SM100,
    ),
    Rule(
        "transformers",
        "fp8 *, fp8/transformers *, mxfp8 *",
        True,
        "quantizers/quantizer_finegrained_fp8.py",
        "dequantized to BF16 at load: FP8 products need SM89",
        only=("sm70", *_BEFORE_ADA),
    ),
    Rule(
        "transformers",
        "fbgemm_fp8 *",
        False,
        "integrations/fbgemm_fp8.py",
        "fbgemm_fp8 needs SM90",
        _DYNAMIC,
        only=("sm70", *_BEFORE_ADA, "sm89"),
    ),
    Rule(
        "tgi",
        "fp8 block:*",
        False,
        "layers/fp8.py, layers/marlin/fp8.py at 14e8ca52",
        "its kernel for SM8x (Marlin) takes no block scales",
        _DYNAMIC,
        only=("sm80", "sm86", "sm89"),
    ),
    Rule(
        "tgi",
        "*",
        True,
        "layers/fp8.py",
        "weight-only there (Marlin): activations stay BF16",
        only=("sm80", "sm86", "sm89"),
    ),
    Rule("tgi", "*", True, "layers/fp8.py", _FNUZ, only=("gfx942",)),
    Rule(
        "tgi",
        "*",
        False,
        "layers/fp8.py",
        "it turns every file into e4m3fnuz on AMD, which gfx950 does not multiply",
        "",
        _INFERRED,
        ("gfx950",),
    ),
    Rule(
        "lmdeploy", "*", True, "turbomind/weight_format.py", "scales become F16 below SM89", only=("sm70", *_BEFORE_ADA)
    ),
    Rule("lmdeploy", "*", False, "turbomind/", "TurboMind runs on NVIDIA GPUs only", "", _INFERRED, ("gfx*",)),
    Rule("cublaslt", "*", False, "the library", "it runs on NVIDIA GPUs only", "", _INFERRED, ("gfx*",)),
    Rule("cublaslt", "* tensor *", True, "nvmath linalg/advanced", "on SM89 and later", only=("any",)),
    Rule(
        "cublaslt", "*", False, "nvmath linalg/advanced", "it multiplies FP8 from SM89 on", only=("sm70", *_BEFORE_ADA)
    ),
    Rule(
        "cublaslt",
        "* channel *, * block:*",
        True,
        "NVIDIA/CUDALibrarySamples#270",
        "on SM90",
        evidence=Evidence.REPORTED,
        only=("any",),
    ),
    Rule(
        "cublaslt",
        "* channel *, * block:*",
        False,
        "NVIDIA/CUDALibrarySamples#270",
        "it has these scales on SM90 only",
        "--granularity tensor",
        Evidence.REPORTED,
        ("sm89", "sm1*"),
    ),
    Rule("cublaslt", "* mx *", True, "nvmath linalg/advanced", "on SM100 and later", only=("any",)),
    Rule(
        "cublaslt",
        "* mx *",
        False,
        "nvmath linalg/advanced",
        "it has MX scales from SM100 on",
        _BLOCK,
        only=("sm89", "sm90"),
    ),
)

# What becomes of scales of K and V.
KV_CACHE = (
    Rule(
        "vllm",
        "*",
        True,
        "vllm-project/vllm#54623, #25047",
        "its class drops the scales of K and V, which become 1.0",
        evidence=Evidence.REPORTED,
        only=("Qwen3MoeForCausalLM", "Qwen3_5*"),
    ),
    Rule("vllm", "fp8 *, fp8/transformers *", True, "fp8.py", "KV cache in FP8 with --kv-cache-dtype fp8"),
    Rule(
        "sglang",
        "fp8 *, fp8/transformers *",
        True,
        "quantization/kv_cache.py",
        "KV cache in FP8 with --kv-cache-dtype fp8_e4m3",
        evidence=_INFERRED,
    ),
    Rule(
        "tensorrt-llm",
        "modelopt *, compressed-tensors *",
        True,
        "_torch/modules/linear.py",
        "KV scales with TRTLLM_LOAD_KV_SCALES=1",
    ),
    Rule("tensorrt-llm", "fp8 *", True, "_torch/model_config.py", "KV scales unused", evidence=_INFERRED),
    Rule("transformers", "*", True, "quantizers/", "KV scales unused", evidence=_INFERRED),
    Rule("lmdeploy", "*", True, "turbomind/weight_format.py", "KV scales unused", evidence=_INFERRED),
)

# Engines that turn block scales into powers of two on SM100, where DeepGEMM takes no others.
ROUNDS_ON_SM100 = {
    "vllm": "utils/fp8_utils.py, vllm-project/vllm#58157",
    "sglang": "quantization/compressed_tensors/, sgl-project/sglang#28662",
    "tensorrt-llm": "ai-dynamo/aiconfigurator#414",
}


class Edges(StrEnum):
    """Which partial blocks an engine takes, at the edge of a weight whose N or K is no multiple of 128."""

    LAST = "of a single weight, and of the last part of a fused one"
    SINGLE = "of a single weight"
    NONE = "none"


PARTIAL_BLOCKS = {
    "vllm": (Edges.LAST, "utils/fp8_utils.py validate_fp8_block_shape", _READ),
    "sglang": (Edges.SINGLE, "quantization/fp8.py, quantization/fp8_utils.py", _READ),
    "tensorrt-llm": (Edges.SINGLE, "_torch/modules/linear.py", _INFERRED),
    "transformers": (Edges.NONE, "integrations/finegrained_fp8.py, when it dequantizes", _READ),
    "tgi": (Edges.SINGLE, "layers/fp8.py", _INFERRED),
    "lmdeploy": (Edges.SINGLE, "pytorch/nn/linear/blocked_fp8.py", _INFERRED),
}
# Whole on every GPU, and in SGLang one weight: vLLM models/deepseek_v2.py, SGLang models/deepseek_v2.py.
REPLICATED = ("q_a_proj", "kv_a_proj_with_mqa")
LAST_PARTS = ("v_proj", "value", "wv", "up_proj", "w3", "kv_a_proj_with_mqa")


class Match(StrEnum):
    """How an entry of the list of modules that stay is compared with a module's name."""

    WHOLE = "the whole name"
    PARTS = "a run of its dotted parts"
    ENDS = "its first or last dotted parts"
    ANYWHERE = "any piece of it"
    GLOB = "a glob over it"
    GLOB_OF_PART = "a glob over it, or over one dotted part"
    REGEX = "`re:` and an expression, from its start"


@dataclass(frozen=True, slots=True)
class ListSyntax:
    """How an engine compares the entries of the list of modules that stay.

    lists_tied_head: a tied `lm_head` is taken for FP8 unless it is listed, though the file holds no scale of it.
    """

    engine: str
    kinds: str
    matches: tuple[Match, ...]
    source: str
    lists_tied_head: bool = False


LISTS = (
    ListSyntax("vllm", "fp8 *, fp8/transformers *, fbgemm_fp8 *", (Match.WHOLE,), "utils/quant_utils.py"),
    ListSyntax("vllm", "compressed-tensors *", (Match.WHOLE, Match.REGEX), "compressed_tensors/utils.py", True),
    ListSyntax("vllm", "modelopt *", (Match.WHOLE, Match.ANYWHERE, Match.GLOB), "modelopt.py", True),
    ListSyntax("vllm", "quark *", (Match.WHOLE, Match.REGEX), "quark/utils.py"),
    ListSyntax("vllm", "torchao *", (Match.PARTS,), "torchao.py"),
    ListSyntax("sglang", "fp8 *, fp8/transformers *, mxfp8 *, modelopt mx *", (Match.PARTS,), "quantization/utils.py"),
    ListSyntax("sglang", "compressed-tensors *", (Match.WHOLE, Match.REGEX), "quantization/compressed_tensors/"),
    ListSyntax("sglang", "modelopt *", (Match.GLOB_OF_PART,), "quantization/modelopt_quant.py"),
    ListSyntax("tensorrt-llm", "*", (Match.WHOLE, Match.GLOB), "models/quant_config_utils.py"),
    ListSyntax(
        "transformers", "fp8 *, fp8/transformers *, mxfp8 *", (Match.ENDS,), "quantizers/quantizers_utils.py", True
    ),
    ListSyntax("transformers", "compressed-tensors *", (Match.WHOLE, Match.REGEX), "compressed-tensors utils/match.py"),
)
_GLOB_CHARACTERS = re.compile(r"[*?\[]")


def list_syntax(engine: str, kind: str) -> ListSyntax | None:
    """Return how an engine compares the list of modules that stay, None where that was not read."""
    rows = (row for row in LISTS if row.engine == engine)
    return next((row for row in rows if any(fnmatchcase(kind, glob) for glob in row.kinds.split(", "))), None)


def is_understood(entry: str, matches: Sequence[Match]) -> bool:
    """Say whether an engine takes an entry as it is meant: an expression, a glob or a name."""
    if entry.startswith("re:"):
        return Match.REGEX in matches
    return not _GLOB_CHARACTERS.search(entry) or not {Match.GLOB, Match.GLOB_OF_PART}.isdisjoint(matches)


def find_listed(entries: Sequence[str], modules: Sequence[str], matches: Sequence[Match]) -> tuple[str, str] | None:
    """Return the first entry that means one of the modules, with that module."""
    plain = [entry for entry in entries if is_understood(entry, ())]
    patterns = [entry for entry in entries if not is_understood(entry, ()) and is_understood(entry, matches)]
    names, pieces = set(plain), [match for match in matches if match in (Match.PARTS, Match.ENDS, Match.ANYWHERE)]
    for module in modules:
        parts = [module, *(module.split(".") if Match.GLOB_OF_PART in matches else ())]
        found = [part for part in parts if part in names]
        found += [entry for entry in patterns if any(_fits(entry, part) for part in parts)]
        found += [entry for match in pieces for entry in plain if _is_piece(entry, module, match)]
        if found:
            return found[0], module
    return None


def _fits(pattern: str, name: str) -> bool:
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    try:
        return re.match(pattern[3:], name) is not None
    except re.error:
        return False


def _is_piece(entry: str, module: str, match: Match) -> bool:
    match match:
        case Match.PARTS:
            return f".{entry}." in f".{module}."
        case Match.ENDS:
            return module.startswith(f"{entry}.") or module.endswith(f".{entry}")
        case _:
            return entry in module


@dataclass(frozen=True, slots=True)
class ScaleLayout:
    """How readers want the scale of a weight [N, K]: the end of its name, its dtypes, its shapes."""

    kinds: str
    suffix: str
    dtypes: tuple[str, ...]
    shapes: tuple[str, ...]
    source: str


_FLOATS = ("F32", "BF16", "F16")
SCALES = (
    ScaleLayout("fp8 block:*, auto-round block:*", "_scale_inv", _FLOATS, ("grid",), "vLLM fp8.py, DeepSeek-V3 README"),
    ScaleLayout("fp8 tensor *", "_scale", ("F32",), ("[]", "[1]"), "vLLM fp8.py, AutoFP8 quantize.py"),
    ScaleLayout("fp8/transformers *", "_scale_inv", ("F32",), ("[]",), "transformers finegrained_fp8.py"),
    ScaleLayout("compressed-tensors tensor *", "_scale", _FLOATS, ("[1]", "[]"), "compressed-tensors initialize.py"),
    ScaleLayout("compressed-tensors mx *", "_scale", ("U8",), ("grid",), "compressed-tensors compressors/mxfp8"),
    ScaleLayout("compressed-tensors *", "_scale", _FLOATS, ("grid",), "compressed-tensors initialize.py"),
    ScaleLayout("modelopt tensor *", "_scale", ("F32",), ("[]", "[1]"), "vLLM modelopt.py"),
    ScaleLayout("modelopt channel *", "_scale", ("F32",), ("[N]",), "vLLM modelopt.py"),
    ScaleLayout("modelopt block:*", "_scale", ("F32",), ("[rows, 1, cols, 1]",), "vLLM modelopt_block_quant.py"),
    ScaleLayout("modelopt mx *", "_scale", ("U8",), ("grid",), "vLLM modelopt.py"),
    ScaleLayout("mxfp8 mx *", "_scale_inv", ("U8",), ("grid",), "SGLang quantization/fp8.py"),
    ScaleLayout("quark tensor *", "_scale", ("F32",), ("[]", "[1]"), "vLLM quark/schemes/"),
    ScaleLayout("quark channel *", "_scale", ("F32",), ("[N]",), "vLLM quark/schemes/"),
    ScaleLayout("quark block:*", "_scale", ("F32", "F8_E8M0"), ("grid",), "vLLM quark/schemes/"),
    ScaleLayout("quark mx *", "_scale", ("U8",), ("grid",), "vLLM quark/schemes/"),
    ScaleLayout("fbgemm_fp8 *, w8a8_fp8 *", "_scale", ("F32",), ("grid",), "vLLM fbgemm_fp8.py, SGLang w8a8_fp8.py"),
    ScaleLayout("comfyui tensor *", "_scale", ("F32",), ("[]",), "ComfyUI QUANTIZATION.md"),
)


def scale_problem(storage: Storage, weight: str, shape: tuple[int, ...], scale: Stored) -> str | None:
    """Return why readers do not find or take the scale of a weight [N, K], in words; None if they do."""
    kind = kind_of(storage)
    layout = next((row for row in SCALES if any(fnmatchcase(kind, glob) for glob in row.kinds.split(", "))), None)
    if layout is None:
        return None
    if scale.name != weight + layout.suffix:
        return f"{scale.name} is not called {weight + layout.suffix}"
    if scale.dtype not in layout.dtypes:
        return f"{scale.name} is {scale.dtype}, not {' or '.join(layout.dtypes)}"
    wanted = [_shape(form, shape, storage.granularity) for form in layout.shapes]
    if scale.shape not in wanted:
        return f"{scale.name} is {list(scale.shape)}, not {' or '.join(str(list(one)) for one in wanted)}"
    return None


def _shape(form: str, shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    rows, cols = granularity.scale_shape(shape)
    shapes: dict[str, tuple[int, ...]] = {
        "[]": (),
        "[1]": (1,),
        "[N]": (rows,),
        "[rows, 1, cols, 1]": (rows, 1, cols, 1),
        "grid": (rows, cols),
    }
    return shapes[form]
